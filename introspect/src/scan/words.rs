//! Reading words out of memory and keeping those that may be references: the hot loop of a scan.

use crate::arch::{Lanes, Vectors, Wide, prefetch};
use std::ops::Range;

/// Words looked at together; the test of a whole group compiles to vector instructions.
pub(super) const GROUP: usize = 8;
/// Their bytes.
pub(super) const LINE: usize = 8 * GROUP;

/// See [`Windows`].
const ADDRESSES: usize = 4;
const COOKIES: usize = 2;
/// [`Windows::wider`] goes on to multiples of this.
const ROOM: u64 = 1 << 30;
/// The same of cookies, below them and above.
const COOKIE_ROOM: (u64, u64) = (1 << 12, 1 << 16);

/// Where references can point.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Windows {
    /// Start and length of each range: four of addresses, and [`COOKIES`] of per-CPU cookies, of which the last is empty
    /// where one chunk is enough.
    ranges: [Wide; ADDRESSES + COOKIES],
    /// The same, those that are empty behind the others.
    sorted: [Wide; ADDRESSES + COOKIES],
    /// [`COOKIES`] at least of these are empty.
    few: bool,
    /// Start and length of all addresses together, and of the ranges of cookies. Text, counters and zeros are nowhere near:
    /// these few comparisons rule most words out.
    near: [Wide; 1 + COOKIES],
}

impl Windows {
    /// Words in one of the ranges are candidates; empty ranges hold none.
    pub fn new(addresses: [Range<u64>; ADDRESSES], cookies: [Range<u64>; COOKIES]) -> Self {
        let used = || addresses.iter().filter(|r| r.start < r.end);
        let start = used().map(|r| r.start).min().unwrap_or(0);
        let end = used().map(|r| r.end).max().unwrap_or(0);
        let hull = window(start..end);
        let mut ranges = addresses.into_iter().chain(cookies).map(window);
        let ranges: [Wide; ADDRESSES + COOKIES] = std::array::from_fn(|_| ranges.next().unwrap_or_default());
        let near =
            std::array::from_fn(|number| if number == 0 { hull } else { ranges[ADDRESSES + number - 1] });
        let mut sorted = ranges;
        sorted.sort_by_key(|range| range.both().1 == 0);
        Self { ranges, sorted, few: sorted[ADDRESSES].both().1 == 0, near }
    }

    /// Ranges that leave room around these.
    pub(super) fn wider(&self) -> Self {
        let round = |range: &Wide, down: u64, up: u64| match range.both() {
            (_, 0) => 0..0,
            (start, len) => {
                start / down * down..(start + len).checked_next_multiple_of(up).unwrap_or(u64::MAX)
            }
        };
        let (addresses, cookies) = self.ranges.split_at(ADDRESSES);
        let address = |number: usize| round(&addresses[number], ROOM, ROOM);
        // Numbers just below the first cookie are frequent.
        let cookie = |number: usize| round(&cookies[number], COOKIE_ROOM.0, COOKIE_ROOM.1);
        Self::new(std::array::from_fn(address), std::array::from_fn(cookie))
    }

    /// True when all candidates of the `others` are candidates of these.
    pub(super) fn cover(&self, others: &Self) -> bool {
        let inside = |(start, len): (u64, u64)| {
            self.ranges.iter().map(Wide::both).any(|(from, all)| {
                start.checked_sub(from).and_then(|at| at.checked_add(len)).is_some_and(|end| end <= all)
            })
        };
        others.ranges.iter().map(Wide::both).filter(|(_, len)| *len != 0).all(inside)
    }

    /// True for a candidate.
    #[inline(always)]
    pub fn contain(&self, word: u64) -> bool {
        within(&self.ranges, word)
    }

    /// A bit for each candidate of a group.
    #[inline(always)]
    pub fn bits(&self, lanes: Lanes, words: &[u64; GROUP]) -> u8 {
        // Each that is left out makes the loop faster by a twentieth.
        let used = if self.few { &self.sorted[..ADDRESSES] } else { &self.sorted };
        lanes.inside(words, used).unwrap_or_else(
            #[inline(always)]
            || if self.any_near(lanes, words) { bits(|word| self.contain(words[word])) } else { 0 },
        )
    }

    /// False when no word of a group is a candidate, and for most groups of which that is so.
    #[inline(always)]
    fn any_near(&self, lanes: Lanes, words: &[u64; GROUP]) -> bool {
        // A comparison more for each word, where one chunk of per-CPU memory is enough, makes the loop a sixth slower.
        let one_chunk = self.near[COOKIES].both().1 == 0;
        match lanes.inside(words, &self.near) {
            Some(bits) => bits != 0,
            // As numbers of 64 bits each they stay vectors.
            None if one_chunk => {
                words.iter().fold(0, |any, &word| any | u64::from(self.near::<1>(word))) != 0
            }
            None => words.iter().fold(0, |any, &word| any | u64::from(self.near::<COOKIES>(word))) != 0,
        }
    }

    /// False for most words that are no candidates. `USED` ranges of cookies are not empty.
    #[inline(always)]
    fn near<const USED: usize>(&self, word: u64) -> bool {
        within(&self.near[..1 + USED], word)
    }
}

/// The bit by which unsigned and signed numbers differ.
const SIGN: u64 = 1 << 63;

fn window(range: Range<u64>) -> Wide {
    Wide::new(range.start, range.end.saturating_sub(range.start))
}

#[inline(always)]
fn within(windows: &[Wide], word: u64) -> bool {
    // Compared as signed numbers, which is all that many a processor's vectors do.
    windows.iter().map(Wide::both).fold(false, |any, (start, len)| {
        any | ((word.wrapping_sub(start ^ SIGN) as i64) < (len ^ SIGN) as i64)
    })
}

/// Calls `found` with the offset and value of every aligned little-endian word of `bytes` that lies in one of the
/// `windows`. `bytes` starts at an aligned guest address; a partial word at the end is no word.
#[inline]
pub fn candidates(vectors: Vectors, bytes: &[u8], windows: &Windows, mut found: impl FnMut(usize, u64)) {
    vectors.run(
        #[inline(always)]
        |lanes| {
            groups(
                lanes,
                (bytes, &[]),
                windows,
                #[inline(always)]
                |number, words, bits| {
                    for (i, word) in words.iter().enumerate().filter(|&(i, _)| bits >> i & 1 != 0) {
                        found((number * GROUP + i) * 8, *word);
                    }
                },
            );
        },
    );
}

/// Calls `found` with each group of words that has candidates, its number, and a bit for each word that is one. `ahead` is
/// read next.
#[inline(always)]
pub(super) fn groups(
    lanes: Lanes,
    (bytes, ahead): (&[u8], &[u8]),
    windows: &Windows,
    mut found: impl FnMut(usize, &[u64; GROUP], u8),
) {
    let (lines, rest) = bytes.as_chunks::<LINE>();
    let (ahead, whole) = (ahead.as_chunks::<LINE>().0, lines.len());
    let mut last = [0; LINE];
    last[..rest.len()].copy_from_slice(rest);
    let lines = lines.iter().chain((rest.len() >= 8).then_some(&last));
    for (number, line) in lines.enumerate() {
        // The processor reads ahead by itself, but not over the end of a page.
        ahead.get(number).into_iter().for_each(prefetch);
        let words = load(line);
        if windows.any_near(lanes, &words) {
            let there = if number < whole { u8::MAX } else { (1 << (rest.len() / 8)) - 1 };
            let bits = windows.bits(lanes, &words) & there;
            if bits != 0 {
                found(number, &words, bits);
            }
        }
    }
}

/// Writes the words that have a bit to `place`, which has room for [`GROUP`] of them. All are written and those that count stay,
/// because a processor guesses badly which these are.
#[inline(always)]
pub(super) fn keep(lanes: Lanes, words: &[u64; GROUP], bits: u8, place: &mut [u64]) {
    if let Some(place) = place.first_chunk_mut::<GROUP>()
        && lanes.compress(words, bits, place).is_none()
    {
        let mut count = 0;
        for (i, word) in words.iter().enumerate() {
            place[count % GROUP] = *word;
            count += usize::from(bits >> i & 1);
        }
    }
}

/// A bit for each word of a group that lies in one of the ranges.
#[inline(always)]
pub(super) fn inside(lanes: Lanes, words: &[u64; GROUP], ranges: &[Wide]) -> u8 {
    lanes.inside(words, ranges).unwrap_or_else(
        #[inline(always)]
        || bits(|word| within(ranges, words[word])),
    )
}

/// A bit for each word of a group.
#[inline(always)]
fn bits(is: impl Fn(usize) -> bool) -> u8 {
    (0..GROUP).rev().fold(0, |bits, word| bits << 1 | u8::from(is(word)))
}

/// The words of a group.
#[inline(always)]
pub(super) fn load(bytes: &[u8; LINE]) -> [u64; GROUP] {
    let bytes = bytes.as_chunks::<8>().0;
    std::array::from_fn(
        #[inline(always)]
        |word| u64::from_le_bytes(bytes[word]),
    )
}
