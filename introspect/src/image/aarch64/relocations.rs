//! The relocations with which an Image relocates itself: `Elf64_Rela` entries (arch/arm64/kernel/pi/relocate.c, before 6.2
//! arch/arm64/kernel/head.S), nothing else of which the file names. Each says the link address of a field and what the field
//! holds when the image is where it is linked.

use crate::memory::Va;
use anyhow::{Context, ensure};

/// `R_AARCH64_RELATIVE` as `r_info` (ELF for the Arm 64-bit Architecture, 5.7.16).
const RELATIVE: [u8; 8] = 0x403_u64.to_le_bytes();
const ENTRY_BYTES: usize = 24;
/// Fewer in a row are an accident; a kernel has more than a hundred thousand.
const MIN_ENTRIES: usize = 64;
/// The image is linked at a multiple of this, plus `text_offset` (`MIN_KIMG_ALIGN`).
const ALIGN: u64 = 2 << 20;

/// The image's own relocations, which it applies itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Relocations {
    /// Number of fields, all of 64 bits.
    pub(super) count: usize,
    /// Where their table ends in the image.
    pub(super) end: usize,
}

impl Found {
    /// What the kernel image keeps of it.
    pub fn relocations(&self) -> Relocations {
        Relocations { count: self.count, end: self.at + self.count * ENTRY_BYTES }
    }
}

impl Relocations {
    /// Numbers of 64-bit fields, of 32-bit ones, and of 32-bit ones to subtract from.
    pub fn counts(&self) -> [usize; 3] {
        [self.count, 0, 0]
    }

    /// Where their table ends in the image.
    pub(crate) fn end(&self) -> usize {
        self.end
    }

    /// Number of fields.
    pub fn len(&self) -> usize {
        self.count
    }

    /// True when there is no field.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// A table of relocations.
pub(super) struct Found {
    /// Where it is in the image.
    at: usize,
    count: usize,
    /// Link address of the image.
    pub base: Va,
}

/// Finds the table of an image that takes `size` bytes.
pub(super) fn find(image: &[u8], size: u64, text_offset: u64) -> anyhow::Result<Found> {
    let (at, count) = longest_run(image).context("It has no table of relocations (CONFIG_RELOCATABLE)")?;
    let table = &image[at..at + count * ENTRY_BYTES];
    let entries = || table.chunks_exact(ENTRY_BYTES).map(|entry| (word(entry, 0), word(entry, 16)));
    // Most addends are addresses in the image, and some of them that of its first code: a hardware number among them is
    // far away.
    let (field, _) = entries().next().unwrap_or_default();
    let near = |address: &u64| address.abs_diff(field) < size;
    let lowest = entries().flat_map(|(field, addend)| [field, addend]).filter(near).min().unwrap_or(field);
    let base = lowest.wrapping_sub(text_offset) / ALIGN * ALIGN + text_offset;
    let outside = entries().filter(|(field, _)| field.wrapping_sub(base) > size - 8).count();
    ensure!(
        base >> 63 == 1 && outside == 0,
        "{outside} of its {count} relocations lie outside of {size:#x} bytes at {base:#x}"
    );
    Ok(Found { at, count, base: Va(base) })
}

/// Gives every field of the file the value it has at the link address.
pub(super) fn apply(image: &mut [u8], found: &Found) -> anyhow::Result<()> {
    let table = image[found.at..found.at + found.count * ENTRY_BYTES].to_vec();
    for entry in table.chunks_exact(ENTRY_BYTES) {
        let at = usize::try_from(word(entry, 0) - found.base.0)?;
        // Fields of what is zero in the file have no relocations.
        let field =
            image.get_mut(at..at + 8).context("A relocation is for a field behind the end of the Image")?;
        field.copy_from_slice(&entry[16..24]);
    }
    Ok(())
}

/// The longest run of entries, which start at multiples of 8.
fn longest_run(image: &[u8]) -> Option<(usize, usize)> {
    let mut best = None;
    let mut at = 8;
    while at + 16 <= image.len() {
        let mut end = at;
        while image.get(end..end + 8) == Some(&RELATIVE) {
            end += ENTRY_BYTES;
        }
        let count = (end - at) / ENTRY_BYTES;
        if count >= MIN_ENTRIES && best.is_none_or(|(_, most)| count > most) && end - 8 <= image.len() {
            best = Some((at - 8, count));
        }
        at = end.max(at + 8);
    }
    best
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
