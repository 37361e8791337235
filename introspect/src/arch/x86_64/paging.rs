//! x86-64 page tables, 4 and 5 levels (Intel SDM volume 3, 4.5).

use crate::memory::{MemoryError, PAGE_SHIFT, PAGE_SIZE, Pa, PhysicalMemory, Va};
use std::ops::ControlFlow;

/// Entry bit 0: present.
const PRESENT: u64 = 1;
/// Entry bit 7 in the two levels above the last: maps a large page instead of a table.
const LARGE: u64 = 1 << 7;
/// Entry bit 9, which processors leave to software: Linux has not to count the page (`_PAGE_SPECIAL`,
/// arch/x86/include/asm/pgtable_types.h).
const SPECIAL: u64 = 1 << 9;
/// Entry bits 51:12: physical address of the next table or of the page.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Index bits per level.
const LEVEL_BITS: u32 = 9;
/// log2 of the largest page (1 GiB).
const LARGEST_SHIFT: u32 = 30;
/// Entries that [`AddressSpace::leaves`] looks at: every page of 32 GiB, mapped one by one. Damaged tables that lead back
/// to themselves have 2^36.
pub const MAX_ENTRIES: u64 = 8 << 20;

/// A page-table root and its number of levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressSpace {
    /// Physical address of the top-level table.
    pub root: Pa,
    /// 4 or 5.
    pub levels: u8,
}

/// One mapping of the page tables: 4 KiB, 2 MiB or 1 GiB.
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

/// An entry that maps the GiB at `pa` for the kernel alone: to read and run, or to read and write. Accessed and dirty bits
/// are set, so that the processor has nothing to write.
pub fn gigabyte_leaf(pa: Pa, writable: bool) -> u64 {
    const WRITABLE: u64 = 1 << 1;
    const ACCESSED_DIRTY: u64 = 3 << 5;
    const NO_EXECUTE: u64 = 1 << 63;
    let rights = if writable { WRITABLE | NO_EXECUTE } else { 0 };
    pa.0 | PRESENT | LARGE | ACCESSED_DIRTY | rights
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
    /// True when bits 63 down to the top of the address space are all equal.
    pub fn is_canonical(&self, va: Va) -> bool {
        let unused = 64 - self.va_bits();
        ((va.0 << unused).cast_signed() >> unused).cast_unsigned() == va.0
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

    /// Where the entry is that maps the GiB at `va`, and what it holds.
    ///
    /// # Errors
    /// There is no table for it.
    pub fn gigabyte_entry(&self, memory: &impl PhysicalMemory, va: Va) -> Result<(Pa, u64), MemoryError> {
        let (mut table, mut shift) = (self.root, self.va_bits());
        loop {
            shift -= LEVEL_BITS;
            let at = table + ((va.0 >> shift) & ((1 << LEVEL_BITS) - 1)) * 8;
            let entry = memory.read_u64(at)?;
            if shift == LARGEST_SHIFT {
                return Ok((at, entry));
            }
            if entry & PRESENT == 0 {
                return Err(MemoryError::NotMapped { va });
            }
            table = Pa(entry & ADDRESS);
        }
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
    /// does not go.
    pub fn tables(&self, memory: &impl PhysicalMemory, mut visit: impl FnMut(Pa) -> bool) {
        let mut work = vec![(self.root, self.va_bits() - LEVEL_BITS)];
        while let Some((table, shift)) = work.pop() {
            if !visit(table) || shift == PAGE_SHIFT {
                continue;
            }
            let mut entries = [0; PAGE_SIZE as usize];
            if memory.read(table, &mut entries).is_err() {
                continue;
            }
            for entry in entries.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)) {
                let large = entry & LARGE != 0 && shift <= LARGEST_SHIFT;
                if entry & PRESENT != 0 && !large {
                    work.push((Pa(entry & ADDRESS), shift - LEVEL_BITS));
                }
            }
        }
    }

    /// Size of the lower half of the addresses, which is user code's.
    pub fn user_bytes(&self) -> u64 {
        1 << (self.va_bits() - 1)
    }

    fn va_bits(&self) -> u32 {
        PAGE_SHIFT + LEVEL_BITS * u32::from(self.levels)
    }

    /// `recent` is the last table that was found: the next address is nearly always one of its.
    fn entry(
        &self,
        memory: &impl PhysicalMemory,
        va: Va,
        recent: &mut Option<LastTable>,
    ) -> Result<Entry, MemoryError> {
        const LAST_SHIFT: u32 = PAGE_SHIFT + LEVEL_BITS;
        if !self.is_canonical(va) {
            return Err(MemoryError::NotMapped { va });
        }
        let (mut table, mut shift) = match *recent {
            Some((first, table)) if va - first < 1 << LAST_SHIFT => (table, LAST_SHIFT),
            _ => (self.root, self.va_bits()),
        };
        loop {
            if shift == LAST_SHIFT {
                *recent = Some((Va(va.0 & !((1 << LAST_SHIFT) - 1)), table));
            }
            shift -= LEVEL_BITS;
            let index = (va.0 >> shift) & ((1 << LEVEL_BITS) - 1);
            let entry = memory.read_u64(table + index * 8)?;
            let size = 1 << shift;
            if entry & PRESENT == 0 {
                return Ok(Entry::Hole(size));
            }
            let large = entry & LARGE != 0 && shift <= LARGEST_SHIFT;
            if large || size == PAGE_SIZE {
                // A large page's entry keeps PAT in bit 12 (SDM volume 3, table 4-18): masked with the size.
                let pa = Pa(entry & ADDRESS & !(size - 1));
                return Ok(Entry::Leaf(Leaf {
                    va: Va(va.0 & !(size - 1)),
                    pa,
                    size,
                    special: entry & SPECIAL != 0,
                }));
            }
            table = Pa(entry & ADDRESS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::FlatMemory;
    use std::time::{Duration, Instant};

    /// A command on a damaged guest answers in a second; what is hardly optimised gets more.
    const PATIENCE: Duration = Duration::from_secs(if cfg!(debug_assertions) { 5 } else { 1 });

    /// Tables from 0x1000 on: maps 4 KiB at 0xffff888000000000, 2 MiB behind it, 1 GiB at the next GiB.
    fn tables(levels: u8) -> (FlatMemory, AddressSpace) {
        let mut ram = vec![0; 0x8000];
        let mut put = |pa: usize, value: u64| ram[pa..pa + 8].copy_from_slice(&value.to_le_bytes());
        put(0x1000 + 8 * 511, 0x2000 | 3);
        put(0x2000 + 8 * 273, 0x3000 | 3);
        put(0x3000, 0x4000 | 3);
        put(0x3000 + 8, (0x4000_0000 | 1) | LARGE | 1 << 12);
        put(0x4000, 0x5000 | 3);
        put(0x4000 + 8, 0x20_0000 | 3 | LARGE);
        put(0x5000, 0x8000_0000_0000_7000_u64 | 3 | LARGE);
        let root = if levels == 5 { Pa(0x1000) } else { Pa(0x2000) };
        (FlatMemory::new(ram), AddressSpace { root, levels })
    }

    #[test]
    fn pages_of_all_sizes_are_found() {
        for levels in [4, 5] {
            let (memory, space) = tables(levels);
            let base = Va(0xffff_8880_0000_0000);
            assert_eq!(space.translate(&memory, base + 0x123), Ok(Pa(0x7123)));
            assert_eq!(space.translate(&memory, base + 0x20_1234), Ok(Pa(0x20_1234)));
            assert_eq!(space.translate(&memory, base + 0x4000_0000 + 0x1234_5678), Ok(Pa(0x5234_5678)));
            let hole = base + 0x1000;
            assert_eq!(space.translate(&memory, hole), Err(MemoryError::NotMapped { va: hole }));
        }
    }

    #[test]
    fn addresses_that_are_not_canonical_are_not_mapped() {
        let (memory, space) = tables(4);
        for va in [0x8880_0000_0000, 0x7fff_8880_0000_0000, 0xdead_0000_0000_0100] {
            assert_eq!(space.translate(&memory, Va(va)), Err(MemoryError::NotMapped { va: Va(va) }));
        }
    }

    #[test]
    fn leaves_skips_holes_and_stops() {
        let (memory, space) = tables(4);
        let mut seen = Vec::new();
        let start = Va(0xffff_8000_0000_0000);
        let all = space.leaves(&memory, start, !0 - start.0, |leaf| {
            seen.push((leaf.va.0 & 0xff_ffff_ffff, leaf.size));
            ControlFlow::Continue(())
        });
        assert_eq!(all, Ok(()));
        let base = 0x80_0000_0000;
        assert_eq!(seen, [(base, 0x1000), (base + 0x20_0000, 0x20_0000), (base + 0x4000_0000, 0x4000_0000)]);
        let mut count = 0;
        let first = space.leaves(&memory, start, !0 - start.0, |_| {
            count += 1;
            ControlFlow::Break(())
        });
        assert_eq!((first, count), (Ok(()), 1));
    }

    /// A table whose entries all lead to the next page, and so on to the last level's, which has `last` in all of its.
    fn uniform(last: u64) -> (FlatMemory, AddressSpace) {
        let tables = [0x1003, 0x2003, 0x3003, last];
        let bytes = tables.iter().flat_map(|entry: &u64| entry.to_le_bytes().repeat(512)).collect();
        (FlatMemory::new(bytes), AddressSpace { root: Pa(0), levels: 4 })
    }

    #[test]
    fn tables_without_an_end_are_damage_soon() {
        // Every page mapped, or as a device's, or none: what a table that leads back to itself looks like, and worse.
        for last in [0x3003, 0x3203, 0] {
            let (memory, space) = uniform(last);
            let begin = Instant::now();
            let walked = space.leaves(&memory, Va(0), space.user_bytes(), |_| ControlFlow::Continue(()));
            assert!(matches!(walked, Err(MemoryError::Corrupt { .. })), "{walked:?}");
            assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
        }
        let (memory, space) = uniform(0x3003);
        let (mut left, mut seen) = (600, 0);
        let visit = |_| {
            seen += 1;
            ControlFlow::Continue(())
        };
        let walked = space.leaves_within(&memory, Va(0), 512 * PAGE_SIZE, &mut left, visit);
        assert_eq!((walked, left, seen), (Ok(()), 88, 512));
    }

    #[test]
    fn tables_are_visited_once_where_the_visitor_remembers() {
        for (levels, expected) in
            [(5, vec![0x1000, 0x2000, 0x3000, 0x4000, 0x5000]), (4, vec![0x2000, 0x3000, 0x4000, 0x5000])]
        {
            let (memory, space) = tables(levels);
            let mut seen = Vec::new();
            let visit = |table: Pa| {
                let new = !seen.contains(&table.0);
                seen.extend(new.then_some(table.0));
                new
            };
            space.tables(&memory, visit);
            assert_eq!(seen, expected);
        }
    }

    #[test]
    fn a_table_outside_ram_is_an_error() {
        let memory = FlatMemory::new(vec![0xff; 0x1000]);
        let space = AddressSpace { root: Pa(0), levels: 4 };
        assert!(matches!(space.translate(&memory, Va(0x1000)), Err(MemoryError::Unbacked { .. })));
        let mut seen = Vec::new();
        space.tables(&memory, |table| {
            seen.push(table.0);
            seen.len() < 4
        });
        assert_eq!(seen[0], 0, "{seen:x?}");
        assert!(seen.len() > 4, "what is not there ends a branch, not the walk: {seen:x?}");
    }
}
