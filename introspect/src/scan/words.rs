//! Reading words out of memory and keeping those that may be references: the hot loop of a scan.

use crate::arch::widest;
use std::ops::Range;

/// Words looked at together; the test of a whole group compiles to vector instructions.
const GROUP: usize = 8;

/// Where references can point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// Start and length of each range of addresses.
    addresses: [(u64, u64); 3],
    /// Start and length of each range of per-CPU cookies; the second is empty where one chunk is enough.
    cookies: [(u64, u64); 2],
    /// Start and length of all addresses together. Text, counters and zeros are nowhere near: one comparison, and one for
    /// each range of cookies, rule most words out.
    hull: (u64, u64),
}

impl Windows {
    /// Words in one of the ranges are candidates; empty ranges hold none.
    pub fn new(addresses: [Range<u64>; 3], cookies: [Range<u64>; 2]) -> Self {
        let used = || addresses.iter().filter(|r| r.start < r.end);
        let start = used().map(|r| r.start).min().unwrap_or(0);
        let end = used().map(|r| r.end).max().unwrap_or(0);
        let hull = window(start..end);
        Self { hull, addresses: addresses.map(window), cookies: cookies.map(window) }
    }

    /// True for a candidate.
    #[inline(always)]
    pub fn contain(&self, word: u64) -> bool {
        within(&self.addresses, word) | within(&self.cookies, word)
    }

    /// False for most words that are no candidates. `COOKIES` ranges of cookies are not empty.
    #[inline(always)]
    fn near<const COOKIES: usize>(&self, word: u64) -> bool {
        within(&[self.hull], word) | within(&self.cookies[..COOKIES], word)
    }
}

fn window(range: Range<u64>) -> (u64, u64) {
    (range.start, range.end.saturating_sub(range.start))
}

#[inline(always)]
fn within(windows: &[(u64, u64)], word: u64) -> bool {
    windows.iter().fold(false, |any, (start, len)| any | (word.wrapping_sub(*start) < *len))
}

/// Calls `found` with the offset and value of every aligned little-endian word of `bytes` that lies in one of the
/// `windows`. `bytes` starts at an aligned guest address; a partial word at the end is no word.
#[inline]
pub fn candidates(bytes: &[u8], windows: &Windows, found: impl FnMut(usize, u64)) {
    widest(
        #[inline(always)]
        || any_candidates(bytes, windows, found),
    );
}

/// [`candidates`] for the processor that the caller is compiled for.
#[inline(always)]
pub(super) fn any_candidates(bytes: &[u8], windows: &Windows, found: impl FnMut(usize, u64)) {
    // A comparison more for each word, where one chunk of per-CPU memory is enough, makes the loop a sixth slower.
    if windows.cookies[1].1 == 0 {
        near_candidates::<1>(bytes, windows, found);
    } else {
        near_candidates::<2>(bytes, windows, found);
    }
}

#[inline(always)]
fn near_candidates<const COOKIES: usize>(bytes: &[u8], windows: &Windows, mut found: impl FnMut(usize, u64)) {
    let (groups, rest) = bytes.as_chunks::<{ 8 * GROUP }>();
    for (number, group) in groups.iter().enumerate() {
        let mut words = [0; GROUP];
        for (word, bytes) in words.iter_mut().zip(group.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        let near = words.map(|word| u8::from(windows.near::<COOKIES>(word)));
        let mut hits = u64::from_le_bytes(near);
        while hits != 0 {
            let i = hits.trailing_zeros() as usize / 8;
            hits &= hits - 1;
            if windows.contain(words[i]) {
                found((number * GROUP + i) * 8, words[i]);
            }
        }
    }
    let done = groups.len() * GROUP * 8;
    for (i, bytes) in rest.as_chunks::<8>().0.iter().enumerate() {
        let word = u64::from_le_bytes(*bytes);
        if windows.contain(word) {
            found(done + i * 8, word);
        }
    }
}
