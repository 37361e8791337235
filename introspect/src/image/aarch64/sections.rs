//! Sections of an Image that are found by their contents: the two tables of exported symbols, and BTF.
//!
//! An entry of `__ksymtab` is three s32, each relative to its own address: value, name, namespace
//! (include/linux/export-internal.h); the linker sorts each table by name.

use crate::image::{Section, find_all};
use crate::memory::Va;
use std::ops::Range;

const EXPORT_BYTES: usize = 12;
/// Fewer in a row are an accident; a kernel has thousands.
const MIN_EXPORTS: usize = 16;
/// Longest name, bytes; more than KSYM_NAME_LEN.
const MAX_NAME: usize = 512;
/// Magic, version and flags of a little-endian BTF (Documentation/bpf/btf.rst), and the size of its header.
const BTF_START: [u8; 8] = [0x9f, 0xeb, 1, 0, 24, 0, 0, 0];

/// What is found, ascending.
pub(super) fn find(image: &[u8], base: Va) -> Vec<Section> {
    let tables = export_tables(image);
    let names = ["__ksymtab", "__ksymtab_gpl"].into_iter().zip(tables);
    let mut found: Vec<(&str, Range<usize>)> = names.collect();
    found.extend(btf(image).map(|range| (".BTF", range)));
    found.sort_by_key(|(_, range)| range.start);
    found
        .into_iter()
        .map(|(name, file)| Section {
            name: name.to_owned(),
            va: base + file.start as u64,
            size: file.len() as u64,
            file,
        })
        .collect()
}

/// The two longest runs of entries with ascending names; the table of symbols for everybody is the first in the image.
fn export_tables(image: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    while at + EXPORT_BYTES <= image.len() {
        let mut end = at;
        let mut before: &[u8] = &[];
        while let Some(name) = export_name(image, end).filter(|name| *name > before) {
            before = name;
            end += EXPORT_BYTES;
        }
        if (end - at) / EXPORT_BYTES >= MIN_EXPORTS {
            runs.push(at..end);
        }
        at = end.max(at + 4);
    }
    runs.sort_by_key(|run| std::cmp::Reverse(run.len()));
    runs.truncate(2);
    runs.sort_by_key(|run| run.start);
    runs
}

/// The name in an entry; None where there is none.
fn export_name(image: &[u8], at: usize) -> Option<&[u8]> {
    let target = |field: usize| {
        let distance = i32::from_le_bytes(image.get(field..field + 4)?.try_into().ok()?);
        field.checked_add_signed(distance as isize)
    };
    let start = target(at + 4)?;
    if !is_name_byte(*image.get(start)?) {
        return None;
    }
    let name = text(image, start)?;
    let namespace = text(image, target(at + 8)?)?;
    (name.iter().chain(namespace).all(|&b| is_name_byte(b))).then_some(name)
}

fn text(image: &[u8], start: usize) -> Option<&[u8]> {
    let rest = image.get(start..image.len().min(start.checked_add(MAX_NAME)?))?;
    Some(&rest[..memchr::memchr(0, rest)?])
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_.".contains(&byte)
}

/// The largest BTF.
fn btf(image: &[u8]) -> Option<Range<usize>> {
    let found = find_all(image, &BTF_START).filter_map(|at| {
        let word =
            |n: usize| Some(u32::from_le_bytes(image.get(at + 4 * n..at + 4 * n + 4)?.try_into().ok()?));
        // Header; offset and size of the types, offset and size of the strings.
        let end = at + 24 + (word(4)? as usize).checked_add(word(5)? as usize)?;
        (end <= image.len()).then_some(at..end)
    });
    found.max_by_key(Range::len)
}
