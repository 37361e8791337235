//! What a part of the roots is.

use super::guest::Extent;
use crate::memory::Pa;
use std::ops::Range;

/// A part of the roots, named for statistics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// What it is.
    pub name: String,
    /// Where it is; every extent starts at a multiple of 8.
    pub extents: Vec<Extent>,
}

impl Region {
    /// Why it is a root.
    pub fn reason(&self) -> &'static str {
        match self.name.as_str() {
            "page structs" => "pages in use refer to what owns them, and link to each other",
            "task stacks" => "from each stack pointer up: local variables and saved registers",
            "interrupt stacks" => "a CPU is in an interrupt",
            "exception stacks" => "a CPU is in an exception with a stack of its own",
            "registers of sleeping tasks" => "what tasks go on with that were switched out",
            "percpu chunks" => "per-CPU allocations that are not tracked",
            "reserved pages" => "memory from before the page allocator",
            "kernel pages" => "pages in use that belong to no tracked object",
            "slab pages" => "slab objects are not tracked",
            name if name.starts_with("percpu") => "a CPU's copies of per-CPU variables",
            name if name.starts_with("module ") => "a module's writable data",
            _ => "the kernel's variables",
        }
    }

    /// Guest physical addresses from its first byte to its last; empty when it is nowhere.
    pub fn span(&self) -> Range<Pa> {
        let start = self.extents.iter().map(|extent| extent.start).min();
        let end = self.extents.iter().map(|extent| extent.start + extent.len).max();
        start.unwrap_or(Pa(0))..end.unwrap_or(Pa(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_has_a_reason_and_a_place() {
        let region = |name: &str, places: &[u64]| Region {
            name: name.into(),
            extents: places.iter().map(|&at| Extent { start: Pa(at), len: 8 }).collect(),
        };
        assert_eq!(region("data", &[0x30, 0x10]).span(), Pa(0x10)..Pa(0x38));
        assert!(region("data", &[]).span().is_empty());
        let reasons = ["data", "percpu0", "percpu chunks", "module x"].map(|name| region(name, &[]).reason());
        assert!((1..4).all(|n| !reasons[..n].contains(&reasons[n])), "{reasons:?}");
    }
}
