//! The kernel's tables of what its code is changed into and where faults lead. An Image has no sections and often no symbols
//! of these, so a table is found by what its entries are: distances, each from its own field, to code. It is where the most
//! entries follow each other.

use crate::arch::instruction::{BYTES, Instruction};
use crate::image::KernelImage;
use crate::memory::Va;

/// Fewer in a row are an accident; a kernel has many hundreds of each.
const MIN_ENTRIES: usize = 64;
/// Longest code that an alternative replaces, bytes, and the largest number of what decides it.
const MAX_REPLACED: u64 = 255;
const MAX_CAPABILITY: u16 = 1024;
/// Set in that number where a function makes the replacement.
const BY_FUNCTION: u16 = 1 << 15;
/// Largest type of a fault's entry (arch/arm64/include/asm/asm-extable.h).
const MAX_FAULT_TYPE: u16 = 15;

/// The image's bytes, and where they are linked.
pub(super) struct Bytes<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) start: Va,
    /// Bytes in memory, those behind the file's included.
    pub(super) size: u64,
}

/// A piece of code that is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Alternative {
    pub original: Va,
    /// None where a function makes it.
    pub replacement: Option<Va>,
    /// Bytes of each.
    pub len: u64,
}

impl<'a> Bytes<'a> {
    pub(super) fn of(image: &'a KernelImage) -> Option<Self> {
        let segment = image.segments.first()?;
        Some(Self { bytes: image.elf.get(segment.file.clone())?, start: segment.va, size: segment.mem_size })
    }

    /// Jump labels, from and to: `struct jump_entry` (include/linux/jump_label.h), 16 bytes.
    pub(super) fn jump_labels(&self) -> Option<Vec<(Va, Va)>> {
        self.longest(16, |at, _| {
            let (from, to) = (self.near(at)?, self.near(at + 4)?);
            let is_label = matches!(
                Instruction::decode(self.word(from)?),
                Instruction::Nop | Instruction::Branch { call: false, .. }
            );
            let key = at.checked_add(8)?.wrapping_add(self.u64(at + 8)?);
            (is_label && self.code(to)? && key < self.size).then(|| (self.va(from), self.va(to)))
        })
    }

    /// Faults that are expected, from and to: `struct exception_table_entry` (arch/arm64/include/asm/extable.h), 12 bytes,
    /// ascending.
    pub(super) fn faults(&self) -> Option<Vec<(Va, Va)>> {
        self.longest(12, |at, before: Option<&(Va, Va)>| {
            let (from, to) = (self.near(at)?, self.near(at + 4)?);
            let ascends = before.is_none_or(|before| before.0 < self.va(from));
            let known = self.u16(at + 8)? <= MAX_FAULT_TYPE;
            // Loads and stores, and what else takes an address: bits 28:25 of the encoding, and `sys`.
            let word = self.word(from)?;
            let accesses = word >> 25 & 0b0101 == 0b0100 || word >> 24 == 0xd5;
            (ascends && known && accesses && self.code(to)?).then(|| (self.va(from), self.va(to)))
        })
    }

    /// Alternatives: `struct alt_instr` (arch/arm64/include/asm/alternative.h), 12 bytes.
    pub(super) fn alternatives(&self) -> Option<Vec<Alternative>> {
        self.longest(12, |at, _| {
            let (original, other) = (self.near(at)?, self.near(at + 4)?);
            let capability = self.u16(at + 8)?;
            let [len, other_len] = [10, 11].map(|byte| self.bytes.get((at + byte) as usize).copied());
            let (len, other_len) = (u64::from(len?), u64::from(other_len?));
            let by_function = other_len == 0;
            let is_one = (len == other_len || by_function)
                && (BYTES..=MAX_REPLACED).contains(&len)
                && len.is_multiple_of(BYTES)
                && capability & !BY_FUNCTION < MAX_CAPABILITY
                && self.code(original)?
                && self.code(other)?;
            let replacement = (!by_function).then(|| self.va(other));
            is_one.then(|| Alternative { original: self.va(original), replacement, len })
        })
    }

    /// The most entries of `size` bytes in a row; `read` makes one of the bytes at an offset, and is told the one before.
    fn longest<T>(&self, size: u64, read: impl Fn(u64, Option<&T>) -> Option<T>) -> Option<Vec<T>> {
        let mut best = Vec::new();
        let mut at = 0;
        while at + size <= self.bytes.len() as u64 {
            let mut run = Vec::new();
            while let Some(entry) = read(at + size * run.len() as u64, run.last()) {
                run.push(entry);
            }
            at += if run.is_empty() { 4 } else { size * run.len() as u64 };
            if run.len() > best.len() {
                best = run;
            }
        }
        (best.len() >= MIN_ENTRIES).then_some(best)
    }

    fn va(&self, offset: u64) -> Va {
        self.start + offset
    }

    /// Where the distance at an offset leads, when that is an instruction's place.
    fn near(&self, at: u64) -> Option<u64> {
        let to = at.checked_add_signed(i64::from(self.word(at)?.cast_signed()))?;
        to.is_multiple_of(BYTES).then_some(to)
    }

    /// Whether there is anything at an offset: zeros are no instruction.
    fn code(&self, at: u64) -> Option<bool> {
        Some(self.word(at)? != 0)
    }

    fn word(&self, at: u64) -> Option<u32> {
        let bytes = self.bytes.get(usize::try_from(at).ok()?..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    }

    fn u16(&self, at: u64) -> Option<u16> {
        Some(self.word(at)? as u16)
    }

    fn u64(&self, at: u64) -> Option<u64> {
        Some(u64::from(self.word(at)?) | u64::from(self.word(at + 4)?) << 32)
    }
}
