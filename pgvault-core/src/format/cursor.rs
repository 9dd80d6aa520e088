//! A bounds-checked reader over stored bytes, and the few writers that mirror it.

use super::FormatError;

/// Reads integers, strings and slices off the front of a byte slice.
#[derive(Debug, Clone)]
pub struct Cursor<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// A reader of the structure `what`, named so in errors.
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    /// Bytes not read yet.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// An error of the structure being read.
    pub fn error(&self, why: impl Into<String>) -> FormatError {
        FormatError::new(self.what, why)
    }

    /// The next `n` bytes.
    ///
    /// # Errors
    /// When the bytes end too early or do not fit.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], FormatError> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or_else(|| self.error("ends too early"))?;
        self.rest = rest;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    ///
    /// # Errors
    /// When the bytes end too early or do not fit.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or_else(|| self.error("ends too early"))?;
        self.rest = rest;
        Ok(*head)
    }

    /// One byte.
    ///
    /// # Errors
    /// When the bytes end too early or do not fit.
    pub fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    /// A little-endian `u16`.
    ///
    /// # Errors
    /// When the bytes end too early or do not fit.
    pub fn u16(&mut self) -> Result<u16, FormatError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// A little-endian `u32`.
    ///
    /// # Errors
    /// When the bytes end too early or do not fit.
    pub fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// A little-endian `u64`.
    ///
    /// # Errors
    /// When the bytes end too early or do not fit.
    pub fn u64(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A LEB128 integer; at most 10 bytes, no overlong forms.
    ///
    /// # Errors
    /// When the bytes end too early or do not fit.
    pub fn varint(&mut self) -> Result<u64, FormatError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7F);
            if shift == 63 && bits > 1 || byte == 0 && shift > 0 {
                return Err(self.error("has a number out of range"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.error("has a number out of range"))
    }

    /// A LEB128 integer that must fit `T`.
    ///
    /// # Errors
    /// When the bytes end too early or do not fit.
    pub fn number<T: TryFrom<u64>>(&mut self) -> Result<T, FormatError> {
        T::try_from(self.varint()?).map_err(|_| self.error("has a number out of range"))
    }

    /// A count of items that take at least `item_bytes` each, so that a forged count cannot reserve memory.
    ///
    /// # Errors
    /// When the bytes end too early or do not fit.
    pub fn count(&mut self, item_bytes: usize) -> Result<usize, FormatError> {
        let count: usize = self.number()?;
        if count.checked_mul(item_bytes.max(1)).is_none_or(|needed| needed > self.rest.len()) {
            return Err(self.error(format!("announces {count} items, more than its bytes can hold")));
        }
        Ok(count)
    }

    /// A byte string with its length before it.
    ///
    /// # Errors
    /// When the bytes end too early or do not fit.
    pub fn bytes(&mut self) -> Result<&'a [u8], FormatError> {
        let len = self.count(1)?;
        self.take(len)
    }

    /// A UTF-8 string with its length before it.
    ///
    /// # Errors
    /// When the bytes end too early or do not fit.
    pub fn string(&mut self) -> Result<&'a str, FormatError> {
        let bytes = self.bytes()?;
        std::str::from_utf8(bytes).map_err(|_| self.error("has a name that is not UTF-8"))
    }

    /// Ends the reading; leftover bytes are an error.
    ///
    /// # Errors
    /// When the bytes end too early or do not fit.
    pub fn finish(self) -> Result<(), FormatError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.error(format!("has {} bytes too many", self.rest.len()))) }
    }
}

/// Appends a LEB128 integer.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(u8::try_from(value & 0x7F).unwrap_or(0x7F) | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).unwrap_or(0x7F));
}

/// Appends a byte string with its length before it.
pub fn put_string(out: &mut Vec<u8>, value: &[u8]) {
    put_varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn varints_round_trip(value: u64) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            let mut cursor = Cursor::new("test", &out);
            prop_assert_eq!(cursor.varint().unwrap(), value);
            prop_assert!(cursor.finish().is_ok());
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let mut cursor = Cursor::new("test", &bytes);
            let _ = cursor.varint();
            let _ = cursor.count(3);
            let _ = cursor.string();
            let _ = cursor.u64();
        }
    }

    #[test]
    fn overlong_and_overflowing_varints_are_refused() {
        for bytes in [&[0x80, 0x00][..], &[0xFF; 10], &[0x80]] {
            assert!(Cursor::new("test", bytes).varint().is_err(), "{bytes:?}");
        }
    }
}
