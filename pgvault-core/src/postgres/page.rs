//! Data pages: their header, their checksum, and whether PostgreSQL would accept them.
//!
//! The checksum is that of `src/include/storage/checksum_impl.h`: 32 parallel FNV-1a lanes, made so that a compiler turns each step
//! into vector instructions. Here the loop is compiled once per instruction set by `pulp` and chosen at run time, because a
//! distributed binary targets the oldest x86-64, which has no 32-bit vector multiplication. With AVX2: 20 GB/s on pages in cache.
//!
//! What counts as a good page follows `PageIsVerified` in `src/backend/storage/page/bufpage.c`, the check that the server makes on
//! every read: a page that passes here can be read by the server, one that fails cannot.

use std::sync::LazyLock;

use super::Lsn;
use super::bytes::{u16_at, u32_at};

/// Bytes of `PageHeaderData` before the line pointers.
pub const PAGE_HEADER_SIZE: usize = 24;

/// Where `pd_checksum` stands.
const CHECKSUM_OFFSET: usize = 8;

/// `PD_VALID_FLAG_BITS`.
const VALID_FLAGS: u16 = 0x0007;

/// The header of a data page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// The end of the WAL record of the page's last change.
    ///
    /// A page whose LSN is at or past the start of a backup may have been copied while it was written, and is restored from WAL
    /// in any case; `pg_basebackup` does not judge such pages.
    pub lsn: Lsn,
    /// The stored checksum.
    pub checksum: u16,
    /// `pd_flags`.
    pub flags: u16,
    /// Offset of the start of free space.
    pub lower: u16,
    /// Offset of the end of free space; 0 on a page that was allocated and never initialised.
    pub upper: u16,
    /// Offset of the space of the access method.
    pub special: u16,
    /// The page's size and layout version as stored, see [`PageHeader::page_size`].
    pub size_and_version: u16,
}

impl PageHeader {
    /// Reads the header; `None` when there are fewer than [`PAGE_HEADER_SIZE`] bytes.
    pub fn parse(page: &[u8]) -> Option<Self> {
        // PageXLogRecPtr is two 32-bit halves, the high one first.
        let lsn = Lsn(u64::from(u32_at(page, 0)?) << 32 | u64::from(u32_at(page, 4)?));
        page.get(..PAGE_HEADER_SIZE)?;
        Some(Self {
            lsn,
            checksum: u16_at(page, CHECKSUM_OFFSET)?,
            flags: u16_at(page, 10)?,
            lower: u16_at(page, 12)?,
            upper: u16_at(page, 14)?,
            special: u16_at(page, 16)?,
            size_and_version: u16_at(page, 18)?,
        })
    }

    /// The page size in the header.
    pub fn page_size(self) -> u32 {
        u32::from(self.size_and_version & 0xFF00)
    }

    /// The layout version in the header: 4 since PostgreSQL 8.3.
    pub fn layout_version(self) -> u8 {
        self.size_and_version.to_le_bytes()[0]
    }

    /// `PageIsNew`: space that was added to the file and not used yet.
    pub fn is_new(self) -> bool {
        self.upper == 0
    }

    /// What `PageIsVerified` asks of a header.
    fn is_sane(self, block_size: usize) -> bool {
        self.flags & !VALID_FLAGS == 0
            && self.lower <= self.upper
            && self.upper <= self.special
            && usize::from(self.special) <= block_size
            && self.special.is_multiple_of(8)
    }
}

/// What a page is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    /// All zero: allocated, not used yet. Has no checksum.
    New,
    /// Checksum and header are right.
    Good,
    /// The contents do not give the stored checksum: damaged, torn, or checked under the wrong block number (T14).
    BadChecksum {
        /// What the page says.
        stored: u16,
        /// What its contents give.
        computed: u16,
    },
    /// The checksum is right or absent, but the server would refuse the header. A page that claims to be new and is not empty is
    /// one of these.
    BadHeader,
    /// Not a whole page: a file that was being extended or truncated while it was read.
    Incomplete,
}

impl PageState {
    /// True when the server would read this page without complaint.
    pub fn is_acceptable(self) -> bool {
        matches!(self, Self::New | Self::Good)
    }
}

/// Judges a page of a cluster with data checksums.
///
/// `block_number` counts from the start of the *relation*, not of the file, see
/// [`RelationFile::block_number`](super::RelationFile::block_number).
pub fn verify(page: &[u8], block_number: u32, block_size: u32) -> PageState {
    judge(page, Some(block_number), block_size)
}

/// Judges a page of a cluster without data checksums: by its header alone.
pub fn verify_header(page: &[u8], block_size: u32) -> PageState {
    judge(page, None, block_size)
}

fn judge(page: &[u8], block_number: Option<u32>, block_size: u32) -> PageState {
    let header = match PageHeader::parse(page) {
        Some(header) if u32::try_from(page.len()) == Ok(block_size) => header,
        _ => return PageState::Incomplete,
    };
    if header.is_new() {
        return if is_all_zero(page) { PageState::New } else { PageState::BadHeader };
    }
    if let Some(block_number) = block_number {
        let computed = checksum(page, block_number);
        if computed != header.checksum {
            return PageState::BadChecksum { stored: header.checksum, computed };
        }
    }
    if header.is_sane(page.len()) { PageState::Good } else { PageState::BadHeader }
}

/// True when there is nothing but zero bytes.
fn is_all_zero(page: &[u8]) -> bool {
    let mut blocks = page.chunks_exact(64);
    blocks.by_ref().all(|block| block.iter().fold(0, |all, byte| all | byte) == 0) && blocks.remainder().iter().all(|b| *b == 0)
}

/// Lanes that run side by side, and the words of a row.
const LANES: usize = 32;

/// Bytes of a row: one word for each lane.
const ROW: usize = LANES * 4;

const FNV_PRIME: u32 = 16_777_619;

/// Where the lanes start, so that they differ.
const BASE_OFFSETS: [u32; LANES] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// The instruction set to use, found out once.
static ARCH: LazyLock<pulp::Arch> = LazyLock::new(pulp::Arch::new);

/// The checksum that `page` should carry as block `block_number` of its relation.
///
/// The stored checksum counts as zero. `page` is a whole page: block sizes are multiples of 1 KiB, so of the 128 bytes that the
/// algorithm takes at a time; bytes past the last such multiple do not count.
pub fn checksum(page: &[u8], block_number: u32) -> u16 {
    let mixed = ARCH.dispatch(Hash(page)) ^ block_number;
    // Never zero, which a page without a checksum has. The remainder plus one fits 16 bits.
    u16::try_from(mixed % 65_535 + 1).unwrap_or(u16::MAX)
}

/// The hash of a page, in code that is compiled once for each instruction set.
struct Hash<'a>(&'a [u8]);

impl pulp::WithSimd for Hash<'_> {
    type Output = u32;

    #[expect(clippy::inline_always, reason = "what is not inlined here is compiled for the oldest x86-64")]
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> u32 {
        let mut sums = BASE_OFFSETS;
        let mut rows = self.0.chunks_exact(ROW);
        if let Some(first) = rows.next() {
            let mut words = words(first);
            // pd_checksum is the low half of the third word.
            words[CHECKSUM_OFFSET / 4] &= 0xFFFF_0000;
            step(&mut sums, &words);
        }
        for row in rows {
            step(&mut sums, &words(row));
        }
        // Two rows of zeroes mix the last words in.
        step(&mut sums, &[0; LANES]);
        step(&mut sums, &[0; LANES]);
        sums.iter().fold(0, |all, sum| all ^ sum)
    }
}

#[expect(clippy::inline_always, reason = "see Hash")]
#[inline(always)]
fn words(row: &[u8]) -> [u32; LANES] {
    let mut words = [0; LANES];
    for (word, bytes) in words.iter_mut().zip(row.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

#[expect(clippy::inline_always, reason = "see Hash")]
#[inline(always)]
fn step(sums: &mut [u32; LANES], words: &[u32; LANES]) {
    for (sum, word) in sums.iter_mut().zip(words) {
        let mixed = *sum ^ word;
        *sum = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A heap of two pages, frozen, written by a real server with `initdb --data-checksums`.
    const REAL: &[u8] = include_bytes!("../../../testdata/postgres/heap_5_16384");
    const BLOCK: usize = 8192;
    const SIZE: u32 = 8192;

    /// `pg_checksum_block` word by word, as it is written in C.
    fn plain(page: &[u8], block_number: u32) -> u16 {
        let mut copy = page.to_vec();
        copy[8] = 0;
        copy[9] = 0;
        let mut sums = BASE_OFFSETS;
        let rows = copy.len() / 128;
        for row in 0..rows + 2 {
            for (lane, sum) in sums.iter_mut().enumerate() {
                let at = row * 128 + lane * 4;
                let word = if row < rows { u32::from_le_bytes(copy[at..at + 4].try_into().unwrap()) } else { 0 };
                let tmp = *sum ^ word;
                *sum = tmp.wrapping_mul(16_777_619) ^ (tmp >> 17);
            }
        }
        u16::try_from((sums.iter().fold(0, |a, b| a ^ b) ^ block_number) % 65_535 + 1).unwrap()
    }

    #[test]
    fn real_pages_are_good_under_their_block_number_only() {
        assert_eq!(REAL.len(), 2 * BLOCK);
        for (number, page) in (0u32..).zip(REAL.chunks(BLOCK)) {
            assert_eq!(verify(page, number, SIZE), PageState::Good);
            assert!(matches!(verify(page, number + 1, SIZE), PageState::BadChecksum { .. }));
            let header = PageHeader::parse(page).unwrap();
            assert_eq!((header.page_size(), header.layout_version(), header.is_new()), (SIZE, 4, false));
            assert!(header.lsn > Lsn(0x80_0000) && header.lsn < Lsn(0x120_0000), "{}", header.lsn);
        }
    }

    /// T14: the first page of the second gigabyte is block 131072, not block 0.
    #[test]
    fn t14_pages_past_the_first_gigabyte_hash_with_their_relation_block() {
        let mut page = REAL[..BLOCK].to_vec();
        let value = checksum(&page, 131_072);
        page[8..10].copy_from_slice(&value.to_le_bytes());
        assert_eq!(verify(&page, 131_072, SIZE), PageState::Good);
        assert_eq!(verify(&page, 0, SIZE), PageState::BadChecksum { stored: value, computed: plain(&page, 0) });
    }

    /// T14: zeroes are a page that was added and not used; zeroes with a speck are not.
    #[test]
    fn t14_all_zero_pages_are_new_and_nothing_else_is() {
        let mut page = vec![0; BLOCK];
        assert_eq!(verify(&page, 7, SIZE), PageState::New);
        page[BLOCK - 1] = 1;
        assert_eq!(verify(&page, 7, SIZE), PageState::BadHeader);
        assert!(!verify(&page, 7, SIZE).is_acceptable());
    }

    /// T14: any flipped bit is noticed, and the answer says what was found.
    #[test]
    fn t14_a_forged_page_is_reported() {
        for at in [0, 9, 11, 100, BLOCK - 1] {
            let mut page = REAL[..BLOCK].to_vec();
            page[at] ^= 0x10;
            assert!(matches!(verify(&page, 0, SIZE), PageState::BadChecksum { .. }), "byte {at}");
        }
        // A right checksum over a senseless header is no good page either.
        let mut page = REAL[..BLOCK].to_vec();
        page[12..14].copy_from_slice(&9000u16.to_le_bytes());
        let value = checksum(&page, 0);
        page[8..10].copy_from_slice(&value.to_le_bytes());
        assert_eq!(verify(&page, 0, SIZE), PageState::BadHeader);
        assert_eq!(verify_header(&page, SIZE), PageState::BadHeader);
    }

    #[test]
    fn a_page_without_checksum_is_judged_by_its_header() {
        let mut page = REAL[..BLOCK].to_vec();
        page[8] = 0;
        page[9] = 0;
        assert_eq!(verify_header(&page, SIZE), PageState::Good);
        assert!(matches!(verify(&page, 0, SIZE), PageState::BadChecksum { stored: 0, .. }));
    }

    #[test]
    fn a_part_of_a_page_is_incomplete() {
        for length in [0, 1, 23, 24, BLOCK - 1] {
            assert_eq!(verify(&REAL[..length], 0, SIZE), PageState::Incomplete);
        }
        assert_eq!(verify(REAL, 0, SIZE), PageState::Incomplete);
    }

    proptest! {
        #[test]
        fn the_vector_code_agrees_with_the_plain_one(
            seed in proptest::collection::vec(any::<u8>(), 1..300),
            size in proptest::sample::select(vec![1024usize, 2048, 4096, 8192, 16_384, 32_768]),
            block in any::<u32>(),
        ) {
            let page: Vec<u8> = seed.iter().copied().cycle().zip(0u32..).take(size).map(|(s, i)| s ^ i.to_le_bytes()[1]).collect();
            prop_assert_eq!(checksum(&page, block), plain(&page, block));
        }

        #[test]
        fn any_bytes_never_panic(page in proptest::collection::vec(any::<u8>(), 0..2100), block in any::<u32>(), size in any::<u32>()) {
            let _ = verify(&page, block, size);
            let length = u32::try_from(page.len()).unwrap();
            let _ = verify(&page, block, length);
            let _ = verify_header(&page, length);
            let _ = checksum(&page, block);
        }
    }

    /// `cargo test --release -p pgvault-core --lib page::tests::speed -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn speed() {
        let start = std::time::Instant::now();
        let rounds = 200_000;
        let mut all = 0u64;
        for number in 0..rounds {
            all += u64::from(checksum(std::hint::black_box(&REAL[..BLOCK]), number));
        }
        let bytes = f64::from(rounds) * 8192.0;
        println!("{:.1} GB/s ({all})", bytes / start.elapsed().as_secs_f64() / 1e9);
    }
}
