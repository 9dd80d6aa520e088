//! Data for the benchmarks: heap pages that look like those of an application, made from a fixed seed.
//!
//! A page has PostgreSQL's header, line pointers from the front and tuples from the back. Each tuple has a tuple header
//! with rising transaction ids, a rising key, a timestamp, text of words from a vocabulary of 2,000 where few words are
//! common and most are rare, and 8 random bytes such as a token or a hash. zstd level 1 compresses a region of them about
//! 4:1, between pgbench's tables (9:1) and tables of tokens (2:1).

#![expect(clippy::cast_possible_truncation, reason = "all numbers here are small")]

/// Bytes of a page.
pub const PAGE: usize = 8192;

/// Pages of a region, the unit of compression.
pub const REGION_PAGES: usize = 32;

/// Pseudo-random numbers from a fixed seed (`SplitMix64`).
#[derive(Debug, Clone)]
pub struct Generator(u64);

impl Generator {
    /// The same numbers for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }
}

/// One region of heap pages without checksums; `first` is its first block.
pub fn region(seed: u64, first: u32) -> Vec<u8> {
    let mut generator = Generator::new(seed);
    let vocabulary = vocabulary(&mut Generator::new(1));
    let mut bytes = Vec::with_capacity(REGION_PAGES * PAGE);
    for block in 0..REGION_PAGES as u32 {
        bytes.extend_from_slice(&page(&mut generator, &vocabulary, first + block));
    }
    bytes
}

fn vocabulary(generator: &mut Generator) -> Vec<String> {
    let mut words = Vec::new();
    for _ in 0..2000 {
        let length = 3 + generator.below(8);
        words.push((0..length).map(|_| char::from(b"etaoinshrdlucmfwypvbgk"[generator.below(22) as usize])).collect());
    }
    words
}

fn page(generator: &mut Generator, vocabulary: &[String], block: u32) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    let (mut lower, mut upper) = (24, PAGE);
    let mut number = 0u16;
    loop {
        let tuple = tuple(generator, vocabulary, block, number);
        let start = upper.saturating_sub(tuple.len()) & !7;
        if start < lower + 4 {
            break;
        }
        page[start..start + tuple.len()].copy_from_slice(&tuple);
        // Line pointer: offset, "normal", length.
        let pointer = start as u32 | (1 << 15) | ((tuple.len() as u32) << 17);
        page[lower..lower + 4].copy_from_slice(&pointer.to_le_bytes());
        (lower, upper, number) = (lower + 4, start, number + 1);
    }
    let lsn = 0x1_0000_0000 + u64::from(block) * 8200;
    page[..4].copy_from_slice(&((lsn >> 32) as u32).to_le_bytes());
    page[4..8].copy_from_slice(&(lsn as u32).to_le_bytes());
    page[12..14].copy_from_slice(&(lower as u16).to_le_bytes());
    page[14..16].copy_from_slice(&(upper as u16).to_le_bytes());
    page[16..18].copy_from_slice(&(PAGE as u16).to_le_bytes());
    page[18..20].copy_from_slice(&(PAGE as u16 | 4).to_le_bytes());
    page
}

fn tuple(generator: &mut Generator, vocabulary: &[String], block: u32, number: u16) -> Vec<u8> {
    let mut tuple = Vec::with_capacity(256);
    tuple.extend_from_slice(&(700 + block / 2).to_le_bytes());
    tuple.extend_from_slice(&[0; 8]);
    tuple.extend_from_slice(&block.to_be_bytes());
    tuple.extend_from_slice(&(number + 1).to_le_bytes());
    tuple.extend_from_slice(&[4, 0, 2, 9, 24, 0]);
    tuple.extend_from_slice(&(u64::from(block) * 60 + u64::from(number)).to_le_bytes());
    tuple.extend_from_slice(&(800_000_000_000_000 + u64::from(block) * 7_000_000 + generator.below(1_000_000)).to_le_bytes());
    for _ in 0..5 + generator.below(15) {
        let rank = generator.below(2000) * generator.below(2000) / 2000;
        tuple.extend_from_slice(vocabulary[rank as usize].as_bytes());
        tuple.push(b' ');
    }
    tuple.extend_from_slice(&generator.number().to_le_bytes());
    tuple
}
