//! Where references to heap objects can hide in the kernel image itself.

use super::Linux;
use crate::memory::{MemoryError, PhysicalMemory, Va};
use std::ops::Range;

/// A part of the kernel's static data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticRoot {
    /// `data`, `bss`, `ro_after_init`, or `percpuN`.
    pub name: String,
    /// Run-time addresses.
    pub range: Range<Va>,
}

/// Names and the symbols around them (include/asm-generic/sections.h).
const SECTIONS: [(&str, &str, &str); 3] = [
    ("data", "_sdata", "_edata"),
    ("bss", "__bss_start", "__bss_stop"),
    ("ro_after_init", "__start_ro_after_init", "__end_ro_after_init"),
];

impl Linux {
    /// Static data that kmemleak scans: writable sections of the image, data that became read-only after
    /// initialisation, and every possible CPU's copy of the static per-CPU variables. A part whose symbols the image
    /// lacks is left out.
    ///
    /// # Errors
    /// The table of per-CPU areas is not in RAM.
    pub fn static_roots(&self, memory: &impl PhysicalMemory) -> Result<Vec<StaticRoot>, MemoryError> {
        let mut roots: Vec<StaticRoot> = Vec::new();
        for (name, start, end) in SECTIONS {
            let (Some(start), Some(end)) = (self.symbol(start), self.symbol(end)) else { continue };
            // On some kernels the last lies inside .data.
            let nested = roots.iter().any(|r| r.range.start <= start && end <= r.range.end);
            if start < end && !nested {
                roots.push(StaticRoot { name: name.to_owned(), range: start..end });
            }
        }
        let symbols = &self.kernel.symbols;
        let (Some(start), Some(end)) = (symbols.lookup("__per_cpu_start"), symbols.lookup("__per_cpu_end"))
        else {
            return Ok(roots);
        };
        for cpu in 0..self.cpu_count(memory)? {
            let base = self.percpu_base(memory, cpu)?;
            let range = base + start.0..base + end.0;
            // Before the areas are set up all CPUs share the one in the image.
            if start < end && !roots.iter().any(|r| r.range == range) {
                roots.push(StaticRoot { name: format!("percpu{cpu}"), range });
            }
        }
        Ok(roots)
    }
}
