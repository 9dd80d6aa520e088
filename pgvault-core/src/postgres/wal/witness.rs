//! Reading along while WAL is checked: what needs the records themselves need not walk the pages a second time.

use super::super::Lsn;

/// Reads along with a checker: every record in pieces, without the page headers between them, then whether it was whole and right.
///
/// Nobody is told of a record that turns out not to be one: the next one simply begins.
pub trait Witness {
    /// A record begins at `lsn`.
    fn begin(&mut self, lsn: Lsn);
    /// Bytes of the record, header included, that continue those before.
    fn bytes(&mut self, bytes: &[u8]);
    /// All bytes of the record were given, its CRC is right, and it follows the one before it.
    fn whole(&mut self);
}

/// Nobody reads along.
impl Witness for () {
    fn begin(&mut self, _: Lsn) {}
    fn bytes(&mut self, _: &[u8]) {}
    fn whole(&mut self) {}
}
