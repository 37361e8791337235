//! Reading words out of memory and keeping those that may be references: the hot loop of a scan.

use crate::arch::{Lanes, widest};
use std::ops::Range;

/// Words looked at together; the test of a whole group compiles to vector instructions.
pub(super) const GROUP: usize = 8;

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
    ranges: [(u64, u64); ADDRESSES + COOKIES],
    /// Start and length of all addresses together, and of the ranges of cookies. Text, counters and zeros are nowhere near:
    /// these few comparisons rule most words out.
    near: [(u64, u64); 1 + COOKIES],
}

impl Windows {
    /// Words in one of the ranges are candidates; empty ranges hold none.
    pub fn new(addresses: [Range<u64>; ADDRESSES], cookies: [Range<u64>; COOKIES]) -> Self {
        let used = || addresses.iter().filter(|r| r.start < r.end);
        let start = used().map(|r| r.start).min().unwrap_or(0);
        let end = used().map(|r| r.end).max().unwrap_or(0);
        let hull = window(start..end);
        let mut ranges = addresses.into_iter().chain(cookies).map(window);
        let ranges: [(u64, u64); ADDRESSES + COOKIES] =
            std::array::from_fn(|_| ranges.next().unwrap_or_default());
        let near =
            std::array::from_fn(|number| if number == 0 { hull } else { ranges[ADDRESSES + number - 1] });
        Self { ranges, near }
    }

    /// Ranges that leave room around these.
    pub(super) fn wider(&self) -> Self {
        let round = |&(start, len): &(u64, u64), down: u64, up: u64| match len {
            0 => 0..0,
            _ => start / down * down..(start + len).checked_next_multiple_of(up).unwrap_or(u64::MAX),
        };
        let (addresses, cookies) = self.ranges.split_at(ADDRESSES);
        let address = |number: usize| round(&addresses[number], ROOM, ROOM);
        // Numbers just below the first cookie are frequent.
        let cookie = |number: usize| round(&cookies[number], COOKIE_ROOM.0, COOKIE_ROOM.1);
        Self::new(std::array::from_fn(address), std::array::from_fn(cookie))
    }

    /// True when all candidates of the `others` are candidates of these.
    pub(super) fn cover(&self, others: &Self) -> bool {
        let inside = |&(start, len): &(u64, u64)| {
            self.ranges.iter().any(|&(from, all)| {
                start.checked_sub(from).and_then(|at| at.checked_add(len)).is_some_and(|end| end <= all)
            })
        };
        others.ranges.iter().filter(|(_, len)| *len != 0).all(inside)
    }

    /// True for a candidate.
    #[inline(always)]
    pub fn contain(&self, word: u64) -> bool {
        within(&self.ranges, word)
    }

    /// False for most words that are no candidates. `USED` ranges of cookies are not empty.
    #[inline(always)]
    fn near<const USED: usize>(&self, word: u64) -> bool {
        within(&self.near[..1 + USED], word)
    }
}

/// The bit by which unsigned and signed numbers differ.
const SIGN: u64 = 1 << 63;

fn window(range: Range<u64>) -> (u64, u64) {
    (range.start, range.end.saturating_sub(range.start))
}

#[inline(always)]
fn within(windows: &[(u64, u64)], word: u64) -> bool {
    // Compared as signed numbers, which is all that many a processor's vectors do.
    windows.iter().fold(false, |any, (start, len)| {
        any | ((word.wrapping_sub(*start ^ SIGN) as i64) < (*len ^ SIGN) as i64)
    })
}

/// Calls `found` with the offset and value of every aligned little-endian word of `bytes` that lies in one of the
/// `windows`. `bytes` starts at an aligned guest address; a partial word at the end is no word.
#[inline]
pub fn candidates(bytes: &[u8], windows: &Windows, found: impl FnMut(usize, u64)) {
    widest(
        #[inline(always)]
        |lanes| candidates_by(lanes, bytes, windows, found),
    );
}

/// [`candidates`] for the processor that the caller is compiled for.
#[inline(always)]
pub(super) fn candidates_by(
    lanes: Lanes,
    bytes: &[u8],
    windows: &Windows,
    mut found: impl FnMut(usize, u64),
) {
    groups(
        lanes,
        bytes,
        windows,
        (0, 0),
        #[inline(always)]
        |number, words, bits| {
            for (i, word) in words.iter().enumerate().filter(|&(i, _)| bits >> i & 1 != 0) {
                found((number * GROUP + i) * 8, *word);
            }
        },
    );
}

/// Calls `found` with each group of words that has candidates, its number, and a bit for each word that is one. What lies
/// in `own`, which is a start and a length, is none.
#[inline(always)]
pub(super) fn groups(
    lanes: Lanes,
    bytes: &[u8],
    windows: &Windows,
    own: (u64, u64),
    mut found: impl FnMut(usize, &[u64; GROUP], u8),
) {
    // A comparison more for each word, where one chunk of per-CPU memory is enough, makes the loop a sixth slower.
    let one_chunk = windows.ranges[ADDRESSES + COOKIES - 1].1 == 0;
    let (whole, rest) = bytes.as_chunks::<{ 8 * GROUP }>();
    let rest = rest.as_chunks::<8>().0;
    for number in 0..whole.len() + usize::from(!rest.is_empty()) {
        let (words, there) = match whole.get(number) {
            Some(group) => (load(group.as_chunks::<8>().0), u8::MAX),
            None => (load(rest), (1 << rest.len()) - 1),
        };
        let bits = match lanes.inside(&words, &windows.near) {
            Some(0) => 0,
            Some(_) => {
                let inside = |ranges: &[(u64, u64)]| lanes.inside(&words, ranges).unwrap_or(0);
                inside(&windows.ranges) & !inside(&[own])
            }
            None if one_chunk => one_by_one::<1>(&words, windows, own),
            None => one_by_one::<COOKIES>(&words, windows, own),
        };
        if bits & there != 0 {
            found(number, &words, bits & there);
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

/// A bit for each candidate.
#[inline(always)]
fn one_by_one<const USED: usize>(words: &[u64; GROUP], windows: &Windows, own: (u64, u64)) -> u8 {
    let near = |word: u64| windows.near::<USED>(word) & !within(&[own], word);
    // As numbers of 64 bits each they stay vectors.
    if words.iter().fold(0, |any, &word| any | u64::from(near(word))) == 0 {
        return 0;
    }
    let candidate = |word: u64| windows.contain(word) & !within(&[own], word);
    words.iter().rev().fold(0, |bits, &word| bits << 1 | u8::from(candidate(word)))
}

/// The words of a group, or fewer.
#[inline(always)]
fn load(bytes: &[[u8; 8]]) -> [u64; GROUP] {
    let mut words = [0; GROUP];
    words.iter_mut().zip(bytes).for_each(|(word, bytes)| *word = u64::from_le_bytes(*bytes));
    words
}
