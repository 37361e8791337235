//! The kallsyms tables, found in the image's bytes by their own structure (scripts/kallsyms.c `write_src`).
//!
//! Each table starts 8-aligned. What differs is told apart by validation, never by the kernel's version:
//! distributions backport it (Debian's 6.1.192 has the layout of 6.2).
//!
//! | layout | order | since |
//! | --- | --- | --- |
//! | A | offsets, relative_base, num_syms, names, markers, token_table, token_index | 4.6 |
//! | A2 | as A, with seqs_of_names between markers and token_table | 6.2, late 6.1.y |
//! | B | num_syms, names, markers, token_table, token_index, offsets, relative_base, seqs_of_names | 6.4 |
//!
//! - `num_syms` u32; `offsets` a u32 or s32 per symbol, ascending addresses; `relative_base` u64
//! - `names`: per symbol a length (one byte, or two of ULEB128 since 6.1) and that many token numbers; the first
//!   character is nm's type letter
//! - `markers`: u32 per 256 symbols, offset in `names`
//! - `token_table`: 256 NUL-terminated strings; `token_index`: u16 each, their offsets
//! - `seqs_of_names`: 3 big-endian bytes per symbol, symbol numbers sorted by name
//!
//! The search starts at the token table, which has the most to check, finds the markers before it by their
//! shape, and `num_syms` before those; every step is linear in the bytes it looks at.

use super::{Names, SymbolTable};
use crate::image::find_all;
use std::ops::Range;

/// A character that occurs in symbols is its own token, and ten digits in a row are a rare thing to see.
const DIGITS: &[u8; 20] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
const TOKENS: usize = 256;
const TOKEN_INDEX_BYTES: usize = 2 * TOKENS;
/// Places that look like a token table before the search gives up.
const MAX_CANDIDATES: usize = 64;
/// Longest token, bytes; more than KSYM_NAME_LEN (512 since 6.1).
const MAX_TOKEN: usize = 1024;
/// Symbols per marker.
const MARKER_SYMBOLS: usize = 256;
/// Most bytes of names between two markers.
const MAX_MARKER_STEP: usize = MARKER_SYMBOLS * (MAX_NAME + 2);
/// Least bytes of names between two markers: a length and one token each.
const MIN_MARKER_STEP: usize = MARKER_SYMBOLS * 2;
/// Most symbols a table may have; three times an allyesconfig kernel's.
const MAX_SYMBOLS: usize = 2 << 20;
/// Longest name, type letter included: bytes when expanded, token numbers when not (each is a byte or more).
/// More than KSYM_NAME_LEN.
const MAX_NAME: usize = 1024;
/// Markers whose names are searched before the search gives up. A real table is the first or second.
const MAX_SEARCHES: usize = 64;
const SEQ_BYTES: usize = 3;

/// Which order the tables come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    A,
    A2,
    B,
}

impl Layout {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::A => "A",
            Self::A2 => "A2",
            Self::B => "B",
        }
    }
}

/// Finds and decodes the tables in the bytes of one segment, whose first byte is 8-aligned. `is_kernel`
/// tells whether an address can be the lowest symbol's.
pub(super) fn recover(bytes: &[u8], is_kernel: &dyn Fn(u64) -> bool) -> Option<(Layout, SymbolTable)> {
    find_all(bytes, DIGITS).take(MAX_CANDIDATES).find_map(|digits| {
        let tokens = Tokens::at_digits(bytes, digits)?;
        let names = NameTable::before(bytes, &tokens)?;
        names.layouts(bytes, &tokens).into_iter().find_map(|(layout, offsets_at)| {
            let addresses = addresses(bytes, offsets_at, names.count, is_kernel)?;
            let names = names.expand(bytes, &tokens)?;
            Some((layout, SymbolTable::new(addresses, names)))
        })
    })
}

/// token_table and token_index.
struct Tokens<'a> {
    texts: Vec<&'a [u8]>,
    /// Where token_table starts.
    start: usize,
    /// Where token_index ends.
    end: usize,
}

impl<'a> Tokens<'a> {
    /// The tables around the token `0` at `digits`.
    fn at_digits(bytes: &'a [u8], digits: usize) -> Option<Self> {
        let mut end = digits;
        for _ in usize::from(b'0')..TOKENS {
            let token = &bytes[end..bytes.len().min(end + MAX_TOKEN)];
            end += memchr::memchr(0, token)? + 1;
        }
        let index_at = align8(end);
        let index_bytes = bytes.get(index_at..index_at + TOKEN_INDEX_BYTES)?;
        let index: Vec<usize> =
            index_bytes.chunks_exact(2).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]]))).collect();
        let start = digits.checked_sub(index[usize::from(b'0')])?;
        if start % 8 != 0 || index[0] != 0 || end - start > usize::from(u16::MAX) + MAX_TOKEN {
            return None;
        }
        let texts: Vec<&[u8]> =
            bytes[start..end].split_inclusive(|&b| b == 0).map(|token| &token[..token.len() - 1]).collect();
        let mut at = 0;
        let consistent = texts.len() == TOKENS
            && texts.iter().zip(&index).all(|(text, &indexed)| {
                let matches = at == indexed && text.iter().all(u8::is_ascii_graphic);
                at += text.len() + 1;
                matches
            });
        consistent.then_some(Self { texts, start, end: index_at + TOKEN_INDEX_BYTES })
    }
}

/// num_syms, names and markers, whose shapes agree with each other.
struct NameTable {
    count: usize,
    /// Where num_syms is.
    num_syms_at: usize,
    names: Range<usize>,
    has_seqs: bool,
}

impl NameTable {
    /// The tables before the token table, directly or with seqs_of_names between.
    fn before(bytes: &[u8], tokens: &Tokens<'_>) -> Option<Self> {
        let most = align8(4 * MAX_SYMBOLS.div_ceil(MARKER_SYMBOLS)) + align8(SEQ_BYTES * MAX_SYMBOLS);
        let lowest = tokens.start.saturating_sub(most);
        let mut at = tokens.start;
        let mut searches = 0;
        while at >= lowest + 8 && searches < MAX_SEARCHES {
            at -= 8;
            // The first marker is 0; num_syms, its padding and a name lie before it.
            if at < 16 || u32_at(bytes, at)? != 0 {
                continue;
            }
            if let Some(found) = Self::with_markers(bytes, at, tokens.start, &mut searches) {
                return Some(found);
            }
        }
        None
    }

    /// The tables whose markers start at `markers`, if there are such. Counts the `searches` that took.
    fn with_markers(bytes: &[u8], markers: usize, token_table: usize, searches: &mut usize) -> Option<Self> {
        let gap = token_table - markers;
        let steps = marker_run(&bytes[markers..token_table]);
        // Without seqs_of_names the markers fill the gap, but for padding.
        for entries in [gap / 4, gap / 4 - 1] {
            if entries <= steps && align8(4 * entries) == gap {
                *searches += 1;
                let counts = (entries - 1) * MARKER_SYMBOLS + 1..entries * MARKER_SYMBOLS + 1;
                if let Some(found) = Self::with_counts(bytes, markers, entries, counts, false) {
                    return Some(found);
                }
            }
        }
        // With them a symbol takes 3 bytes, and 4 more per 256: at most 15 bytes of padding are undecided.
        let estimate = gap * MARKER_SYMBOLS / (SEQ_BYTES * MARKER_SYMBOLS + 4);
        let fits = |&n: &usize| {
            let entries = n.div_ceil(MARKER_SYMBOLS);
            entries <= steps && align8(4 * entries) + align8(SEQ_BYTES * n) == gap
        };
        (estimate.saturating_sub(8).max(1)..=estimate + 1).filter(fits).find_map(|n| {
            *searches += 1;
            Self::with_counts(bytes, markers, n.div_ceil(MARKER_SYMBOLS), n..n + 1, true)
        })
    }

    /// Looks for num_syms, whose value is one of `counts`, where the markers say that names start.
    fn with_counts(
        bytes: &[u8],
        markers: usize,
        entries: usize,
        counts: Range<usize>,
        has_seqs: bool,
    ) -> Option<Self> {
        let last = u32_at(bytes, markers + 4 * (entries - 1))? as usize;
        // The names behind the last marker take 2 bytes at least, and a whole step at most.
        let highest = (markers - 2).checked_sub(last)? & !7;
        let lowest = highest.saturating_sub(align8(MAX_MARKER_STEP));
        (lowest..=highest).rev().step_by(8).filter(|&names| names >= 8).find_map(|names| {
            let num_syms_at = names - 8;
            let count = u32_at(bytes, num_syms_at)? as usize;
            if !counts.contains(&count) || u32_at(bytes, num_syms_at + 4)? != 0 {
                return None;
            }
            let end = walk_names(bytes, names..markers, count, markers)?;
            (align8(end) == markers).then_some(Self { count, num_syms_at, names: names..end, has_seqs })
        })
    }

    /// Where the offsets may be, by layout.
    fn layouts(&self, bytes: &[u8], tokens: &Tokens<'_>) -> Vec<(Layout, usize)> {
        let mut layouts = Vec::new();
        // offsets, relative_base, num_syms.
        let before = self.num_syms_at.checked_sub(8 + align8(4 * self.count));
        if self.has_seqs {
            return before.map(|at| (Layout::A2, at)).into_iter().collect();
        }
        let seqs = tokens.end + align8(4 * self.count) + 8;
        if valid_seqs(bytes, seqs, self.count) {
            layouts.push((Layout::B, tokens.end));
        }
        layouts.extend(before.map(|at| (Layout::A, at)));
        layouts
    }

    /// Decodes every name.
    fn expand(&self, bytes: &[u8], tokens: &Tokens<'_>) -> Option<Names> {
        let mut names = Names::with_capacity(self.count);
        let mut rest = &bytes[self.names.clone()];
        for _ in 0..self.count {
            let (length, tail) = name_length(rest)?;
            let (numbers, tail) = tail.split_at_checked(length)?;
            rest = tail;
            // Numbers that no symbol needs have no text.
            if numbers.iter().any(|&number| tokens.texts[usize::from(number)].is_empty()) {
                return None;
            }
            names.push(numbers.iter().map(|&number| tokens.texts[usize::from(number)]), MAX_NAME)?;
        }
        Some(names)
    }
}

/// How many words from the start of `bytes` look like markers.
fn marker_run(bytes: &[u8]) -> usize {
    let words = bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes")) as usize);
    let mut previous = None;
    words
        .take_while(|&word| {
            let fits = match previous {
                None => word == 0,
                Some(p) => word >= p + MIN_MARKER_STEP && word <= p + MAX_MARKER_STEP,
            };
            previous = Some(word);
            fits
        })
        .count()
}

/// Steps over `count` names and checks each marker on the way; where they end.
fn walk_names(bytes: &[u8], names: Range<usize>, count: usize, markers: usize) -> Option<usize> {
    let start = names.start;
    let mut rest = &bytes[names.clone()];
    for n in 0..count {
        let at = names.end - rest.len();
        if n % MARKER_SYMBOLS == 0 && u32_at(bytes, markers + n / MARKER_SYMBOLS * 4)? as usize != at - start
        {
            return None;
        }
        let (length, tail) = name_length(rest)?;
        rest = tail.get(length..)?;
    }
    Some(names.end - rest.len())
}

/// A name's number of tokens, never 0, and what follows.
fn name_length(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (&low, rest) = bytes.split_first()?;
    let (length, rest) = if low & 0x80 == 0 {
        (usize::from(low), rest)
    } else {
        let (&high, rest) = rest.split_first()?;
        (usize::from(low & 0x7f) | usize::from(high) << 7, rest)
    };
    (length != 0 && length <= MAX_NAME).then_some((length, rest))
}

/// True when every number in seqs_of_names is a symbol's.
fn valid_seqs(bytes: &[u8], at: usize, count: usize) -> bool {
    bytes.get(at..at + SEQ_BYTES * count).is_some_and(|seqs| {
        seqs.chunks_exact(SEQ_BYTES).all(|b| (u32::from_be_bytes([0, b[0], b[1], b[2]]) as usize) < count)
    })
}

/// Decodes offsets and relative_base; None unless the addresses ascend and the base is a kernel address.
fn addresses(bytes: &[u8], at: usize, count: usize, is_kernel: &dyn Fn(u64) -> bool) -> Option<Vec<u64>> {
    let offsets = bytes.get(at..at + 4 * count)?;
    let base_at = at + align8(4 * count);
    let base = u64::from_le_bytes(bytes.get(base_at..base_at + 8)?.try_into().ok()?);
    if !is_kernel(base) {
        return None;
    }
    let decode = |address: &dyn Fn(u32) -> u64| -> Option<Vec<u64>> {
        let addresses: Vec<u64> = offsets
            .chunks_exact(4)
            .map(|b| address(u32::from_le_bytes(b.try_into().expect("4 bytes"))))
            .collect();
        addresses.is_sorted().then_some(addresses)
    };
    // Plain offsets of ascending addresses ascend. With CONFIG_KALLSYMS_ABSOLUTE_PERCPU (x86 before 6.15)
    // those of kernel addresses are negative and descend, and per-CPU ones stand for themselves.
    decode(&|word| base.wrapping_add(u64::from(word))).or_else(|| {
        decode(&|word| {
            let offset = i64::from(word as i32);
            if offset >= 0 { offset as u64 } else { base.wrapping_sub(1).wrapping_sub(offset as u64) }
        })
    })
}

fn align8(n: usize) -> usize {
    n.next_multiple_of(8)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}
