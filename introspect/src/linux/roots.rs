//! Where references to heap objects can hide in the kernel image itself.

use super::Linux;
use crate::memory::{MemoryError, PhysicalMemory, Va};
use crate::symbols::SymbolRef;
use std::ops::Range;

/// A part of the kernel's static data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticRoot {
    /// `data`, `bss`, `ro_after_init`, or `percpuN`.
    pub name: String,
    /// Run-time addresses.
    pub range: Range<Va>,
    /// What in it is not to be read, ascending: a detector's own records, which hold the address of every object, and
    /// [`NOTES`].
    pub unread: Vec<Range<Va>>,
}

impl StaticRoot {
    /// The parts that are read, ascending.
    pub fn parts(&self) -> Vec<Range<Va>> {
        let mut parts = Vec::new();
        let mut at = self.range.start;
        for gap in &self.unread {
            parts.push(at..gap.start.max(at));
            at = at.max(gap.end);
        }
        parts.push(at..self.range.end.max(at));
        parts.retain(|part| part.start < part.end);
        parts
    }
}

/// Names and the symbols around them (include/asm-generic/sections.h).
const SECTIONS: [(&str, &str, &str); 3] = [
    ("data", "_sdata", "_edata"),
    ("bss", "__bss_start", "__bss_stop"),
    ("ro_after_init", "__start_ro_after_init", "__end_ro_after_init"),
];

/// Per-CPU variables that tell other CPUs something for a moment and keep what they said. `flush_tlb_info`
/// (arch/x86/mm/tlb.c) has the bounds of the address range flushed last, which may be in use again by now; its `mm` is
/// held by whoever flushes.
const NOTES: [&str; 1] = ["flush_tlb_info"];

impl Linux {
    /// Static data that kmemleak scans: writable sections of the image, data that became read-only after
    /// initialisation, and every possible CPU's copy of the static per-CPU variables. A part whose symbols the image
    /// lacks is left out.
    ///
    /// # Errors
    /// The table of per-CPU areas is not in RAM.
    pub fn static_roots(&self, memory: &impl PhysicalMemory) -> Result<Vec<StaticRoot>, MemoryError> {
        let mut roots: Vec<StaticRoot> = Vec::new();
        let pools = self.kmemleak_pools();
        for (name, start, end) in SECTIONS {
            let (Some(start), Some(end)) = (self.symbol(start), self.symbol(end)) else { continue };
            // On some kernels the last lies inside .data.
            let nested = roots.iter().any(|r| r.range.start <= start && end <= r.range.end);
            if start < end && !nested {
                let inside = |pool: &&Range<Va>| start <= pool.start && pool.end <= end;
                let unread = pools.iter().filter(inside).cloned().collect();
                roots.push(StaticRoot { name: name.to_owned(), range: start..end, unread });
            }
        }
        let symbols = &self.kernel.symbols;
        let (Some(start), Some(end)) = (symbols.lookup("__per_cpu_start"), symbols.lookup("__per_cpu_end"))
        else {
            return Ok(roots);
        };
        let notes = NOTES.iter().flat_map(|name| symbols.lookup_all(name));
        let mut notes: Vec<Range<Va>> = notes
            .map(|symbol| symbol.va..symbol.va + symbols.size_of(symbol))
            .filter(|note| start <= note.start && note.end <= end)
            .collect();
        notes.sort_unstable_by_key(|note| note.start);
        for cpu in 0..self.cpu_count(memory)? {
            let base = self.percpu_base(memory, cpu)? + self.percpu_slide();
            let range = base + start.0..base + end.0;
            let unread = notes.iter().map(|note| base + note.start.0..base + note.end.0).collect();
            // Before the areas are set up all CPUs share the one in the image.
            if start < end && !roots.iter().any(|r| r.range == range) {
                roots.push(StaticRoot { name: format!("percpu{cpu}"), range, unread });
            }
        }
        Ok(roots)
    }

    /// The records that a kernel with an in-kernel kmemleak has before its slab caches (mm/kmemleak.c `mem_pool`,
    /// 5.5 and newer). kmemleak reads them with the rest of .bss, and so takes what is recorded there for referenced.
    fn kmemleak_pools(&self) -> Vec<Range<Va>> {
        let symbols = &self.kernel.symbols;
        // The pool's name says little; that of the number of its free records is kmemleak's alone.
        if symbols.lookup("mem_pool_free_count").is_none() {
            return Vec::new();
        }
        let pool = |symbol: SymbolRef<'_>| {
            let start = symbol.va + self.placement.slide;
            start..start + symbols.size_of(symbol)
        };
        symbols.lookup_all("mem_pool").map(pool).collect()
    }
}
