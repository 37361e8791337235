//! Reading words out of memory and keeping those that may be references: the hot loop of a scan.

use std::ops::Range;

/// Words looked at together; the test of a whole group compiles to vector instructions.
const GROUP: usize = 8;

/// Where references can point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// Start and length of each range of addresses.
    addresses: [(u64, u64); 3],
    /// Start and length of each range of per-CPU cookies.
    cookies: [(u64, u64); 2],
    /// Start and length of all addresses together, and of all cookies. Text, counters and zeros are near neither: two
    /// comparisons rule most words out.
    hulls: [(u64, u64); 2],
}

impl Windows {
    /// Words in one of the ranges are candidates; empty ranges hold none.
    pub fn new(addresses: [Range<u64>; 3], cookies: [Range<u64>; 2]) -> Self {
        let hulls = [hull(&addresses), hull(&cookies)];
        Self { hulls, addresses: addresses.map(window), cookies: cookies.map(window) }
    }

    /// True for a candidate.
    #[inline]
    pub fn contain(&self, word: u64) -> bool {
        within(&self.addresses, word) | within(&self.cookies, word)
    }

    /// False for most words that are no candidates.
    #[inline]
    fn near(&self, word: u64) -> bool {
        within(&self.hulls, word)
    }
}

fn window(range: Range<u64>) -> (u64, u64) {
    (range.start, range.end.saturating_sub(range.start))
}

fn hull(ranges: &[Range<u64>]) -> (u64, u64) {
    let used = || ranges.iter().filter(|r| r.start < r.end);
    let start = used().map(|r| r.start).min().unwrap_or(0);
    let end = used().map(|r| r.end).max().unwrap_or(0);
    window(start..end)
}

#[inline]
fn within(windows: &[(u64, u64)], word: u64) -> bool {
    windows.iter().fold(false, |any, (start, len)| any | (word.wrapping_sub(*start) < *len))
}

/// Calls `found` with the offset and value of every aligned little-endian word of `bytes` that lies in one of the
/// `windows`. `bytes` starts at an aligned guest address; a partial word at the end is no word.
#[inline]
pub fn candidates(bytes: &[u8], windows: &Windows, mut found: impl FnMut(usize, u64)) {
    let (groups, rest) = bytes.as_chunks::<{ 8 * GROUP }>();
    for (number, group) in groups.iter().enumerate() {
        let mut words = [0; GROUP];
        for (word, bytes) in words.iter_mut().zip(group.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        if !words.iter().fold(false, |any, &w| any | windows.near(w)) {
            continue;
        }
        let mut hits = words.iter().rev().fold(0u32, |bits, &w| bits << 1 | u32::from(windows.contain(w)));
        while hits != 0 {
            let i = hits.trailing_zeros() as usize;
            hits &= hits - 1;
            found((number * GROUP + i) * 8, words[i]);
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
