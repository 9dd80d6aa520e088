//! What a backup refers to: how much of each pack is still used, and what a restore has to read for it.
//!
//! Packs are never rewritten. As pages change, fewer and fewer blocks of an old pack belong to the newest backup, and a restore
//! reads, and the vault keeps, what nobody wants. So a backup stores anew what lies in packs that have become mostly
//! dead, or in many small ones (docs/decisions/0009).

use std::collections::{HashMap, HashSet};

use crate::format::REGION_BLOCKS;
use crate::format::map::PackId;
use crate::format::pack_table::{PackKind, PackRef};

/// A pack of which less than this part is used is left behind.
const LIVE_FROM: (u64, u64) = (1, 4);

/// Of all that is used, the part that one backup stores anew at most for that reason.
const REFRESH_MOST: u64 = 8;

/// Packs smaller than this are small.
const SMALL: u64 = 4 << 20;

/// Blocks of a frame.
const FRAME_BLOCKS: u8 = 32;
const _: () = assert!(FRAME_BLOCKS as usize == REGION_BLOCKS);

/// So many small packs of a kind are put together.
const SMALL_MANY: usize = 32;

/// How many blocks, or sections of maps, are used of each frame.
#[derive(Debug, Default)]
pub(super) struct Usage {
    frames: HashMap<PackId, Vec<u8>>,
}

impl Usage {
    /// Notes that `count` blocks of a data pack's frame, or one section of a meta pack, are used.
    pub(super) fn add(&mut self, pack: PackId, frame: u32, count: u32) {
        let frames = self.frames.entry(pack).or_default();
        let at = frame as usize;
        if frames.len() <= at {
            frames.resize(at + 1, 0);
        }
        if let Some(used) = frames.get_mut(at) {
            // Several regions with one content may share a frame.
            *used = used.saturating_add(u8::try_from(count).unwrap_or(u8::MAX)).min(FRAME_BLOCKS);
        }
    }

    /// The packs that are used at all.
    pub(super) fn packs(&self) -> impl Iterator<Item = &PackId> {
        self.frames.keys()
    }

    /// How much of a pack is used, as [`PackRef::live`] has it.
    pub(super) fn live(&self, pack: &PackRef) -> u32 {
        let each = if pack.kind == PackKind::Data { u8::MAX } else { 1 };
        self.frames.get(&pack.id).map_or(0, |frames| frames.iter().map(|used| u32::from((*used).min(each))).sum())
    }

    /// Blocks that a restore decodes for each that it writes, over these packs.
    pub(super) fn amplification<'a>(&self, packs: impl Iterator<Item = &'a PackRef>) -> f64 {
        let (mut read, mut wanted) = (0u64, 0u64);
        for frames in packs.filter(|pack| pack.kind == PackKind::Data).filter_map(|pack| self.frames.get(&pack.id)) {
            for used in frames.iter().filter(|used| **used > 0) {
                read += REGION_BLOCKS as u64;
                wanted += u64::from(*used);
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "a ratio that is printed with two digits")]
        if wanted == 0 { 1.0 } else { read as f64 / wanted as f64 }
    }
}

/// The packs of a parent that are not worth referring to any more.
pub(super) fn left_behind(packs: &[PackRef]) -> HashSet<PackId> {
    let mut behind = HashSet::new();
    for kind in [PackKind::Data, PackKind::Meta] {
        let own = || packs.iter().filter(move |pack| pack.kind == kind && pack.live > 0);
        let used: u64 = own().map(|pack| u64::from(pack.live)).sum();
        let mut dying: Vec<&PackRef> =
            own().filter(|pack| u64::from(pack.live) * LIVE_FROM.1 < pack.capacity() * LIVE_FROM.0).collect();
        dying.sort_by_key(|pack| (u64::from(pack.live) * 1000 / pack.capacity().max(1), pack.id));
        let mut left = used / REFRESH_MOST;
        for pack in dying {
            let Some(rest) = left.checked_sub(pack.live.into()) else { break };
            left = rest;
            let _ = behind.insert(pack.id);
        }
        let small: Vec<PackId> = own().filter(|pack| pack.size < SMALL).map(|pack| pack.id).collect();
        if small.len() > SMALL_MANY {
            behind.extend(small);
        }
    }
    behind
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(id: u8, kind: PackKind, size: u64, frames: u32, live: u32) -> PackRef {
        PackRef { id: [id; 16], kind, size, footer_len: 0, frames, live, sha256: [0; 32] }
    }

    #[test]
    fn what_is_used_is_counted_by_frame() {
        let mut usage = Usage::default();
        for (frame, count) in [(0, 32), (0, 32), (3, 1), (3, 2), (9, 31)] {
            usage.add([1; 16], frame, count);
        }
        let data = pack(1, PackKind::Data, 1, 10, 0);
        assert_eq!(usage.live(&data), 32 + 3 + 31);
        assert!((usage.amplification([&data].into_iter()) - 96.0 / 66.0).abs() < 1e-9);
        assert!((Usage::default().amplification([&data].into_iter()) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn dying_packs_are_left_behind_a_few_at_a_time_and_small_ones_all_at_once() {
        let data = |id: u8, live: u32| pack(id, PackKind::Data, 31 << 20, 1000, live);
        // The deadest first, up to an eighth of what is used: 6000 of 51,100.
        let packs = [data(1, 32_000), data(2, 100), data(3, 7_000), data(4, 4_000), data(5, 8_000), data(6, 0)];
        assert_eq!(left_behind(&packs), HashSet::from([[2; 16], [4; 16]]));
        let small = |id: u8| pack(id, PackKind::Meta, 1 << 20, 10, 10);
        let packs: Vec<_> = (0..32).map(small).chain([data(99, 32_000)]).collect();
        assert_eq!(left_behind(&packs), HashSet::new());
        let packs: Vec<_> = (0..33).map(small).chain([data(99, 32_000)]).collect();
        assert_eq!(left_behind(&packs).len(), 33);
    }
}
