//! The beginning of what is read in pieces, without an allocation.

/// The first bytes of something.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kept<const N: usize> {
    bytes: [u8; N],
    pub(super) len: usize,
}

impl<const N: usize> Kept<N> {
    pub(super) const EMPTY: Self = Self { bytes: [0; N], len: 0 };

    pub(super) fn add(&mut self, bytes: &[u8]) {
        let n = bytes.len().min(N - self.len);
        if let (Some(place), Some(bytes)) = (self.bytes.get_mut(self.len..self.len + n), bytes.get(..n)) {
            place.copy_from_slice(bytes);
            self.len += n;
        }
    }

    pub(super) fn get(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    pub(super) fn is_zero(&self) -> bool {
        self.get().iter().all(|byte| *byte == 0)
    }
}
