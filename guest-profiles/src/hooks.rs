//! Allocator hooks: which functions see every allocation and every free exactly once.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// What a hook means to the tracer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Returns one slab object, or NULL.
    SlabAlloc,
    /// As [`Role::SlabAlloc`], but also hands through large allocations that [`Role::LargeAlloc`] has seen.
    Kmalloc,
    /// Fills `p[]` (argument 3) and returns how many.
    BulkAlloc,
    /// Returns whole pages; size in argument 0.
    LargeAlloc,
    /// Frees the object in `argument`.
    Free,
    /// Frees `p[]` (argument 2), count in argument 1.
    BulkFree,
    /// The object waits for an RCU grace period.
    RcuFree,
    /// Returns a vmalloc block; size in argument 0.
    Vmalloc,
    /// Gives back the vmalloc-space area at `argument`.
    Vfree,
    /// Returns the vmalloc-space address of pages that exist already; how many in argument 1, flags in `argument` where that is
    /// not 0.
    Vmap,
    /// Returns the cookie of a per-CPU allocation; size of one copy in argument 0.
    PercpuAlloc,
    /// Returns an address of mapped device memory; size in argument 1.
    Ioremap,
    /// Returns the `struct page` of a block of pages; order in argument 1.
    PageAlloc,
    /// Fills a list (argument 4) or an array (argument 5) with single pages and returns how many are there.
    PageBulkAlloc,
    /// Gives back the block whose `struct page` is `argument`; order in the next argument.
    PageFree,
    /// Gives back the single pages on the list at `argument`.
    PageListFree,
    /// Gives back the blocks in the `struct folio_batch` at `argument`.
    PageBatchFree,
    /// The object that starts at `argument` is no leak and is read (`kmemleak_not_leak`).
    NotLeak,
    /// The object that starts at `argument` is neither reported nor read (`kmemleak_ignore`).
    Ignore,
    /// The object that starts at `argument` is not read (`kmemleak_no_scan`).
    NoScan,
    /// Of the object that `argument` points into only the bytes from there on are read, and those of other such calls; how
    /// many in the next argument, all when that is -1 (`kmemleak_scan_area`).
    ScanArea,
    /// The kernel is about to change its own text, returns among it, for the processor it runs on.
    Patching,
    /// The kernel has changed its text.
    Patched,
    /// A module is about to start; `struct module` in `argument`.
    ModuleLoad,
    /// A module's memory goes away.
    ModuleUnload,
}

/// What can be tracked; `run --track` takes these words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tracked {
    /// Slab objects, and kmalloc beyond the largest cache.
    Slab,
    /// vmalloc blocks, and pages that vmap and vm_map_ram map.
    Vmalloc,
    /// Per-CPU allocations.
    Percpu,
    /// Blocks of the page allocator.
    Pages,
    /// Mapped device memory.
    Ioremap,
}

impl Tracked {
    /// Everything, in the order of reports.
    pub const ALL: [Self; 5] = [Self::Slab, Self::Vmalloc, Self::Percpu, Self::Pages, Self::Ioremap];

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Slab => "slab",
            Self::Vmalloc => "vmalloc",
            Self::Percpu => "percpu",
            Self::Pages => "pages",
            Self::Ioremap => "ioremap",
        }
    }
}

/// Where in the function to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Point {
    /// Before its body runs.
    Entry,
    /// When its result is known.
    Return,
    /// Both, paired by stack pointer.
    Both,
}

/// One row of `data/hooks.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// Meaning.
    pub role: Role,
    /// Place.
    pub point: Point,
    /// What it is needed for; empty: always.
    #[serde(default)]
    pub track: Vec<Tracked>,
    /// Alternative symbols, best first.
    pub functions: Vec<String>,
    /// Symbols whose presence makes this hook unnecessary.
    #[serde(default)]
    pub unless: Vec<String>,
    /// Position of the argument that matters, for one-argument roles.
    #[serde(default)]
    pub argument: u8,
    /// What is lost without it; shown by `inspect`.
    pub cover: String,
    /// Kernels without it lose nothing: it is no gap.
    #[serde(default)]
    pub optional: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    hook: Vec<Hook>,
}

impl Hook {
    /// True when it is needed to track these.
    pub fn is_for(&self, tracked: &[Tracked]) -> bool {
        self.track.is_empty() || self.track.iter().any(|what| tracked.contains(what))
    }
}

/// The built-in hooks.
///
/// # Panics
/// Never: the data is part of the crate and a unit test loads it.
pub fn builtin() -> Vec<Hook> {
    parse(include_str!("../data/hooks.toml")).expect("built-in hooks are valid")
}

/// Reads a hook file.
///
/// # Errors
/// Not TOML, an unknown key, or a hook without functions.
pub fn parse(text: &str) -> Result<Vec<Hook>> {
    let file: File = toml::from_str(text).context("Cannot read the hook profile")?;
    if let Some(empty) = file.hook.iter().find(|h| h.functions.is_empty()) {
        bail!("Hook for {:?} names no function", empty.cover);
    }
    Ok(file.hook)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builtin_hooks_load_and_pair_every_allocation_with_a_free() {
        let hooks = builtin();
        let roles =
            [Role::SlabAlloc, Role::Free, Role::BulkAlloc, Role::BulkFree, Role::Vmalloc, Role::Vfree];
        for role in roles.into_iter().chain([Role::PercpuAlloc]) {
            assert!(hooks.iter().any(|h| h.role == role), "{role:?} is missing");
        }
        let percpu = |h: &Hook| h.role == Role::Free && h.functions == ["free_percpu"];
        assert!(hooks.iter().any(percpu), "free_percpu is missing");
    }

    #[test]
    fn everything_that_can_be_tracked_has_hooks_that_see_it_come_and_go() {
        let hooks = builtin();
        for (what, comes, goes) in [
            (Tracked::Slab, Role::SlabAlloc, Role::Free),
            (Tracked::Vmalloc, Role::Vmalloc, Role::Vfree),
            (Tracked::Vmalloc, Role::Vmap, Role::Vfree),
            (Tracked::Percpu, Role::PercpuAlloc, Role::Free),
            (Tracked::Pages, Role::PageAlloc, Role::PageFree),
            (Tracked::Ioremap, Role::Ioremap, Role::Vfree),
        ] {
            for role in [comes, goes] {
                assert!(hooks.iter().any(|h| h.role == role && h.is_for(&[what])), "{what:?}: {role:?}");
            }
        }
        let always = hooks.iter().filter(|h| h.is_for(&[]));
        let mut always: Vec<Role> = always.map(|h| h.role).collect();
        always.dedup();
        let annotations = [Role::NotLeak, Role::Ignore, Role::NoScan, Role::ScanArea];
        let others = [Role::Patching, Role::Patched, Role::ModuleLoad, Role::ModuleUnload];
        assert_eq!(
            always,
            [&annotations[..], &others].concat(),
            "annotations, patches and modules are followed whatever is tracked"
        );
    }

    #[test]
    fn unknown_keys_are_refused() {
        let bad = "[[hook]]\nrole='free'\npoint='entry'\nfunctions=['kfree']\ncover='x'\nversion='6.1'\n";
        assert!(parse(bad).is_err());
    }
}
