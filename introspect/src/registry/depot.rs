//! Backtraces, each stored once.

use crate::memory::Va;
use hashbrown::HashTable;
use serde::{Deserialize, Serialize};

/// A stored backtrace; 0 is the empty one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StackId(pub u32);

/// Deduplicating store of backtraces. Nothing is ever removed: a kernel allocates from some ten thousand
/// different places, and old reports keep pointing here.
#[derive(Default)]
pub struct StackDepot {
    /// All frames of all backtraces, one after the other.
    frames: Vec<Va>,
    /// End of backtrace `id` (numbered from 1) in `frames`; it starts where the one before ends.
    ends: Vec<u32>,
    table: HashTable<u32>,
}

impl StackDepot {
    /// Stores a backtrace or finds it. Once 2^32 frames are stored, new backtraces become the empty one.
    pub fn intern(&mut self, stack: &[Va]) -> StackId {
        if stack.is_empty() {
            return StackId::default();
        }
        let Self { frames, ends, table } = self;
        let hash = hash_frames(stack);
        if let Some(&id) = table.find(hash, |&id| is_same(span(frames, ends, id), stack)) {
            return StackId(id);
        }
        let Ok(end) = u32::try_from(frames.len() + stack.len()) else {
            return StackId::default();
        };
        frames.extend_from_slice(stack);
        ends.push(end);
        // Cannot truncate: every backtrace has at least one of the 2^32 frames.
        let id = ends.len() as u32;
        table.insert_unique(hash, id, |&other| hash_frames(span(frames, ends, other)));
        StackId(id)
    }

    /// Its frames, innermost first; empty for an id that was never given out.
    pub fn get(&self, id: StackId) -> &[Va] {
        span(&self.frames, &self.ends, id.0)
    }

    /// Number of ids given out, the empty backtrace included: ids are below this.
    pub fn len(&self) -> usize {
        self.ends.len() + 1
    }

    /// True when nothing but the empty backtrace is stored.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Bytes of host memory held.
    pub fn memory(&self) -> usize {
        self.frames.capacity() * size_of::<Va>() + self.ends.capacity() * 4 + self.table.allocation_size()
    }
}

fn span<'a>(frames: &'a [Va], ends: &[u32], id: u32) -> &'a [Va] {
    let Some(index) = (id as usize).checked_sub(1).filter(|&i| i < ends.len()) else {
        return &[];
    };
    let start = if index == 0 { 0 } else { ends[index - 1] };
    &frames[start as usize..ends[index] as usize]
}

/// Without a branch for each frame.
fn is_same(one: &[Va], other: &[Va]) -> bool {
    one.len() == other.len() && one.iter().zip(other).fold(0, |bits, (a, b)| bits | (a.0 ^ b.0)) == 0
}

/// Two frames per step of a folded multiply (the construction of wyhash, Wang Yi 2019), in two lanes that do not wait for
/// each other.
fn hash_frames(stack: &[Va]) -> u64 {
    const SECRET: [u64; 2] = [0xa076_1d64_78bd_642f, 0xe703_7ed1_a0b4_28db];
    let fold = |a: u64, b: u64| {
        let product = u128::from(a) * u128::from(b);
        (product >> 64) as u64 ^ product as u64
    };
    let step = |state: u64, a: Va, b: Va| fold(a.0 ^ SECRET[0] ^ state, b.0 ^ SECRET[1]);
    let (fours, rest) = stack.as_chunks::<4>();
    let start = (stack.len() as u64, SECRET[1]);
    let lanes = fours.iter().fold(start, |(x, y), [a, b, c, d]| (step(x, *a, *b), step(y, *c, *d)));
    let last =
        rest.chunks(2).fold(lanes.0, |x, pair| step(x, pair[0], pair.get(1).copied().unwrap_or_default()));
    fold(last ^ SECRET[0], lanes.1 ^ SECRET[1])
}
