//! arm64 page tables: granules of 4, 16 and 64 KiB, 36 to 52 bits of address (Arm ARM, D8.2 and D8.3).

use crate::memory::{MemoryError, PAGE_SIZE, Pa, PhysicalMemory, Va};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;

/// Descriptor bit 0: valid.
const VALID: u64 = 1;
/// Descriptor bit 1: a table, or in the last level a page; else a block, or in the last level nothing valid.
const TABLE: u64 = 1 << 1;
/// Descriptor bit 56, which processors leave to software: Linux has not to count the page (`PTE_SPECIAL`,
/// arch/arm64/include/asm/pgtable-prot.h).
const SPECIAL: u64 = 1 << 56;
/// log2 of a descriptor's size.
const DESCRIPTOR_SHIFT: u32 = 3;
/// Largest size of addresses with which bits 47:12 of a descriptor say all (D8.3.1).
const PLAIN_VA_BITS: u32 = 48;
/// TCR_EL1 (D24.2.207): T1SZ, TG1 and DS.
const T1SZ: (u32, u64) = (16, 0x3f);
const TG1: (u32, u64) = (30, 3);
const DS: u32 = 59;
/// Entries that [`AddressSpace::leaves`] looks at: every page of 32 GiB, mapped one by one. Damaged tables that lead back
/// to themselves have 2^36.
pub const MAX_ENTRIES: u64 = 8 << 20;

/// How a kernel's addresses are translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Translation {
    /// Bits of an address below those that are all equal.
    pub va_bits: u8,
    /// log2 of the page size: 12, 14 or 16.
    pub page_shift: u8,
    /// Descriptors have the upper bits of 52-bit physical addresses where 4 and 16 KiB granules have them (FEAT_LPA2).
    pub lpa2: bool,
}

impl Default for Translation {
    /// What most kernels have: 48 bits and pages of 4 KiB.
    fn default() -> Self {
        Self { va_bits: PLAIN_VA_BITS as u8, page_shift: 12, lpa2: false }
    }
}

impl Translation {
    /// What TCR_EL1 says of the upper half of addresses; None when it has no valid value yet.
    pub fn from_tcr(tcr: u64) -> Option<Self> {
        let field = |(shift, mask): (u32, u64)| tcr >> shift & mask;
        let va_bits = 64 - field(T1SZ) as u8;
        let page_shift = match field(TG1) {
            1 => 14,
            2 => 12,
            3 => 16,
            _ => return None,
        };
        let translation = Self { va_bits, page_shift, lpa2: tcr >> DS & 1 != 0 && page_shift != 16 };
        translation.is_valid().then_some(translation)
    }

    /// False for what no processor does, such as in a damaged file.
    pub fn is_valid(&self) -> bool {
        matches!(self.page_shift, 12 | 14 | 16) && (25..=52).contains(&self.va_bits)
    }

    /// Address bits that one level of tables resolves.
    fn level_bits(self) -> u32 {
        u32::from(self.page_shift) - DESCRIPTOR_SHIFT
    }

    /// Address bits below those that the first level resolves.
    fn top_shift(self) -> u32 {
        let (page, bits) = (u32::from(self.page_shift), self.level_bits());
        let resolved = u32::from(self.va_bits) - page;
        page + (resolved.div_ceil(bits) - 1) * bits
    }

    /// The address of the table or page that a descriptor names, for one that covers 2^`shift` bytes.
    fn output(self, descriptor: u64, shift: u32) -> Pa {
        let page = u32::from(self.page_shift);
        let field = |from: u32, to: u32| descriptor & ((1 << to) - (1 << from));
        let low = if self.lpa2 {
            // D8.3.1: bits 49:shift, and 51:50 in bits 9:8.
            field(page, 50) | (descriptor >> 8 & 3) << 50
        } else if page == 16 {
            // FEAT_LPA: bits 51:48 in bits 15:12.
            field(16, 48) | (descriptor >> 12 & 0xf) << 48
        } else {
            field(page, 48)
        };
        Pa(low & !((1 << shift) - 1))
    }
}

/// A page-table root and how addresses are translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressSpace {
    /// Physical address of the top-level table.
    pub root: Pa,
    /// Sizes.
    pub translation: Translation,
}

/// One mapping of the page tables: a page or a block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Leaf {
    /// First virtual address.
    pub va: Va,
    /// First physical address.
    pub pa: Pa,
    /// Size in bytes; 0 in the default value, which maps nothing.
    pub size: u64,
    /// In user space: no page of a process, but a device's or the kernel's own.
    pub special: bool,
}

impl Leaf {
    /// Where `va` is; None outside the leaf.
    pub fn translate(&self, va: Va) -> Option<Pa> {
        let offset = va - self.va;
        (offset < self.size).then(|| self.pa + offset)
    }
}

/// A table of the last level, and the first of the addresses it is for.
type LastTable = (Va, Pa);

/// What the tables say of an address.
enum Entry {
    Leaf(Leaf),
    /// Nothing mapped from here to the end of an aligned block of that many bytes.
    Hole(u64),
}

impl AddressSpace {
    /// True when the bits above those that are translated are all equal: user addresses have zeros, the kernel's ones.
    /// (Which of the two root registers applies is the caller's to know.)
    pub fn is_canonical(&self, va: Va) -> bool {
        let upper = va.0.cast_signed() >> self.translation.va_bits;
        upper == 0 || upper == -1
    }

    /// The mapping that holds `va`.
    ///
    /// # Errors
    /// Not canonical, not mapped, or a table outside RAM.
    pub fn leaf(&self, memory: &impl PhysicalMemory, va: Va) -> Result<Leaf, MemoryError> {
        match self.entry(memory, va, &mut None)? {
            Entry::Leaf(leaf) => Ok(leaf),
            Entry::Hole(_) => Err(MemoryError::NotMapped { va }),
        }
    }

    /// Walks the tables for `va`.
    ///
    /// # Errors
    /// As [`Self::leaf`].
    pub fn translate(&self, memory: &impl PhysicalMemory, va: Va) -> Result<Pa, MemoryError> {
        let leaf = self.leaf(memory, va)?;
        Ok(leaf.pa + (va - leaf.va))
    }

    /// Copies `buf.len()` bytes from `va`, one mapping at a time.
    ///
    /// # Errors
    /// As [`Self::leaf`]; the first part of `buf` may have been written.
    pub fn read(&self, memory: &impl PhysicalMemory, va: Va, buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < buf.len() {
            let at = va + done as u64;
            let leaf = self.leaf(memory, at)?;
            let offset = at - leaf.va;
            let len = usize::try_from(leaf.size - offset).unwrap_or(usize::MAX).min(buf.len() - done);
            memory.read(leaf.pa + offset, &mut buf[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    /// Reads a word at `va`.
    ///
    /// # Errors
    /// As [`Self::leaf`].
    pub fn read_u64(&self, memory: &impl PhysicalMemory, va: Va) -> Result<u64, MemoryError> {
        let mut b = [0; 8];
        self.read(memory, va, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// Visits every mapping that meets `[start, start + len)`, ascending, until `visit` breaks. Holes are skipped at
    /// the level they are found, so the cost follows what is mapped, not the length.
    ///
    /// # Errors
    /// A table outside RAM, a range that leaves the canonical addresses, or more entries than [`MAX_ENTRIES`].
    pub fn leaves(
        &self,
        memory: &impl PhysicalMemory,
        start: Va,
        len: u64,
        visit: impl FnMut(Leaf) -> ControlFlow<()>,
    ) -> Result<(), MemoryError> {
        self.leaves_within(memory, start, len, &mut { MAX_ENTRIES }, visit)
    }

    /// [`Self::leaves`] that looks at no more than `left` entries, mappings and holes, and takes off what it used: for
    /// walks that share a limit.
    ///
    /// # Errors
    /// As [`Self::leaves`].
    pub fn leaves_within(
        &self,
        memory: &impl PhysicalMemory,
        start: Va,
        len: u64,
        left: &mut u64,
        mut visit: impl FnMut(Leaf) -> ControlFlow<()>,
    ) -> Result<(), MemoryError> {
        let mut offset = 0;
        let mut recent = None;
        while offset < len {
            let at = start + offset;
            let what = "page tables have more entries than any real ones";
            *left = left.checked_sub(1).ok_or(MemoryError::Corrupt { va: at, what })?;
            let end = match self.entry(memory, at, &mut recent)? {
                Entry::Leaf(leaf) => {
                    if visit(leaf).is_break() {
                        break;
                    }
                    leaf.va + leaf.size
                }
                Entry::Hole(size) => Va(at.0 & !(size - 1)) + size,
            };
            offset += end - at;
        }
        Ok(())
    }

    /// Visits the tables themselves, the root first; below a table for which `visit` says false, or that is not in RAM, it
    /// does not go. A table of 16 or 64 KiB is visited by each of its 4 KiB.
    pub fn tables(&self, memory: &impl PhysicalMemory, mut visit: impl FnMut(Pa) -> bool) {
        let (page_shift, level_bits) =
            (u32::from(self.translation.page_shift), self.translation.level_bits());
        let mut work = vec![(self.root, self.translation.top_shift())];
        while let Some((table, shift)) = work.pop() {
            for part in 0..(1 << page_shift) / PAGE_SIZE {
                let part = table + part * PAGE_SIZE;
                let mut entries = [0; PAGE_SIZE as usize];
                if !visit(part) || shift == page_shift || memory.read(part, &mut entries).is_err() {
                    continue;
                }
                for entry in entries.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)) {
                    if entry & VALID != 0 && entry & TABLE != 0 {
                        work.push((self.translation.output(entry, page_shift), shift - level_bits));
                    }
                }
            }
        }
    }

    /// Size of the lower half of the addresses, which is user code's.
    pub fn user_bytes(&self) -> u64 {
        1 << self.translation.va_bits
    }

    /// `recent` is the last table that was found: the next address is nearly always one of its.
    fn entry(
        &self,
        memory: &impl PhysicalMemory,
        va: Va,
        recent: &mut Option<LastTable>,
    ) -> Result<Entry, MemoryError> {
        let translation = self.translation;
        let (page_shift, level_bits) = (u32::from(translation.page_shift), translation.level_bits());
        let last_span = 1_u64 << (page_shift + level_bits);
        if !self.is_canonical(va) {
            return Err(MemoryError::NotMapped { va });
        }
        let (mut table, mut shift) = match *recent {
            Some((first, table)) if va - first < last_span => (table, page_shift),
            _ => (self.root, translation.top_shift()),
        };
        // The first level may resolve fewer bits than the others.
        let used = va.0 & ((1 << translation.va_bits) - 1);
        loop {
            if shift == page_shift {
                *recent = Some((Va(va.0 & !(last_span - 1)), table));
            }
            let index = (used >> shift) & ((1 << level_bits) - 1);
            let descriptor = memory.read_u64(table + index * 8)?;
            let size = 1 << shift;
            let (valid, is_table) = (descriptor & VALID != 0, descriptor & TABLE != 0);
            let last = shift == page_shift;
            if !valid || last && !is_table {
                return Ok(Entry::Hole(size));
            }
            if last || !is_table {
                return Ok(Entry::Leaf(Leaf {
                    va: Va(va.0 & !(size - 1)),
                    pa: translation.output(descriptor, shift),
                    size,
                    special: descriptor & SPECIAL != 0,
                }));
            }
            table = translation.output(descriptor, page_shift);
            shift -= level_bits;
        }
    }
}

#[cfg(test)]
#[path = "paging_tests.rs"]
mod tests;
