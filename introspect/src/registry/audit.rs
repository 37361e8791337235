//! The registry against the guest's own metadata of slabs, per-CPU memory and pages: the proof that tracking is exact.

use super::{Kind, Object, Registry};
use crate::linux::pages::{PageMap, Use};
use crate::linux::percpu::PercpuChunk;
use crate::linux::slab::SlabMap;
use crate::linux::vmalloc::Area;
use crate::memory::{PAGE_SHIFT, PAGE_SIZE, Va};
use rustc_hash::FxHashSet;
use serde::Serialize;

/// Examples kept of each kind of mismatch.
const EXAMPLES: usize = 16;

/// One object on which registry and guest disagree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Start of the object.
    pub address: Va,
    /// Its cache's name; empty when the registry's cache is not in the guest's list, "(percpu)" for per-CPU memory, "(vmap)"
    /// for mapped pages, "(page)" for pages.
    pub cache: String,
    /// True: allocated in the guest, not in the registry. False: in the registry, free in the guest.
    pub missing: bool,
}

/// Result of [`Registry::audit`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Audit {
    /// Slab objects, per-CPU allocations, vmap areas and blocks of pages on which both agree.
    pub tracked: u64,
    /// Allocated in the guest, but not in the registry.
    pub missing: u64,
    /// In the registry, but free in the guest (of pages: in part), or on no slab page and in no chunk.
    pub stale: u64,
    /// The first few mismatches of either kind, by address.
    #[serde(skip)]
    pub examples: Vec<Mismatch>,
}

/// What the guest's own metadata list as allocated, at one pause; None and empty: not tracked, not compared.
#[derive(Clone, Copy, Default)]
pub struct Truth<'a> {
    /// Slab pages.
    pub slabs: Option<&'a SlabMap>,
    /// Objects taken from their slabs without an allocator call ([`crate::linux::Linux::boot_objects`]): they are not
    /// missing.
    pub boot_objects: &'a [Va],
    /// Per-CPU chunks.
    pub percpu: &'a [PercpuChunk],
    /// Areas of the vmalloc space, ascending.
    pub areas: Option<&'a [Area]>,
    /// Page frames, and the direct-map address of frame 0.
    pub pages: Option<(&'a PageMap, Va)>,
}

impl Registry {
    /// Compares the registry with the guest.
    pub fn audit(&self, truth: &Truth<'_>) -> Audit {
        let mut audit = Audit::default();
        let mut stale = self.audit_objects(truth, &mut audit);
        if let Some((pages, direct)) = truth.pages {
            stale.extend(self.audit_pages(pages, direct, &mut audit));
        }
        audit.stale = stale.len() as u64;
        stale.sort_unstable_by_key(|o| o.address);
        audit.examples.extend(stale.iter().take(EXAMPLES).map(|o| {
            let caches = truth.slabs.map_or(&[][..], |slabs| &slabs.caches);
            let cache = match o.kind {
                Kind::Slab => caches.iter().find(|c| c.va == o.cache).map(|c| c.name.clone()),
                kind => Some(kind.instead_of_cache()),
            };
            Mismatch { address: o.address, cache: cache.unwrap_or_default(), missing: false }
        }));
        audit
    }

    /// Slab objects, per-CPU objects and what `vmap` mapped; returns the stale ones.
    fn audit_objects(&self, truth: &Truth<'_>, audit: &mut Audit) -> Vec<Object> {
        let untraced: FxHashSet<Va> = truth.boot_objects.iter().copied().collect();
        let mut agreed = FxHashSet::default();
        let slab = truth.slabs.into_iter().flat_map(allocated);
        let slab = slab.map(|(address, cache)| (address, cache, Kind::Slab));
        let percpu_name = Kind::Percpu.instead_of_cache();
        let percpu = truth.percpu.iter().flat_map(PercpuChunk::objects);
        let percpu = percpu.map(|(cookie, _)| (cookie, percpu_name.as_str(), Kind::Percpu));
        let vmap_name = Kind::Vmap.instead_of_cache();
        let areas = truth.areas.unwrap_or_default();
        let vmap = areas.iter().filter(|area| area.made.is_vmap());
        let vmap = vmap.map(|area| (area.start, vmap_name.as_str(), Kind::Vmap));
        // Of what lies in a CPU's block the guest does not say where it starts.
        let inside = |o: &&Object| o.kind == Kind::Vmap && is_vmap(areas, o);
        agreed.extend(self.objects().filter(|o| inside(&o)).map(|o| o.address));
        for (address, cache, kind) in slab.chain(percpu).chain(vmap) {
            if self.get(address).is_some_and(|o| o.kind == kind) {
                agreed.insert(address);
            } else if !untraced.contains(&address) {
                audit.miss(address, cache);
            }
        }
        audit.tracked += agreed.len() as u64;
        let audited = |kind| match kind {
            Kind::Slab => truth.slabs.is_some(),
            Kind::Percpu => !truth.percpu.is_empty(),
            Kind::Vmap => truth.areas.is_some(),
            _ => false,
        };
        self.objects().filter(|o| audited(o.kind) && !agreed.contains(&o.address)).collect()
    }

    /// Blocks of pages; returns the stale ones, which have a free page. Of pages that are in use by no block, those of
    /// users are not missing: compaction gives them pages that it took off the free lists itself.
    fn audit_pages(&self, pages: &PageMap, direct: Va, audit: &mut Audit) -> Vec<Object> {
        let frame = |va: Va| (va - direct) >> PAGE_SHIFT;
        let mut stale = Vec::new();
        let mut blocks = self.blocks().peekable();
        let mut until = 0;
        for (number, usage) in (0..).zip(&pages.uses) {
            while let Some(block) = blocks.next_if(|block| frame(block.address) <= number) {
                until = frame(block.address + block.size);
                if (number..until).any(|frame| pages.get(frame) == Use::Free) {
                    stale.push(block);
                } else {
                    audit.tracked += 1;
                }
            }
            if number >= until && matches!(usage, Use::Slab | Use::PageTable | Use::Kernel) {
                audit.miss(direct + number * PAGE_SIZE, &Kind::Page.instead_of_cache());
            }
        }
        stale
    }
}

/// True when the object is what `vmap` or `vm_map_ram` made, as far as the guest's `areas`, ascending, tell.
pub fn is_vmap(areas: &[Area], object: &Object) -> bool {
    let after = areas.partition_point(|area| area.start <= object.address);
    after.checked_sub(1).is_some_and(|last| {
        let area = &areas[last];
        let offset = object.address - area.start;
        let fits = offset < area.size && object.size <= area.size - offset;
        fits && area.made.may_be_vmap() && (offset == 0 || !area.made.is_vmap())
    })
}

impl Audit {
    fn miss(&mut self, address: Va, cache: &str) {
        self.missing += 1;
        if self.missing <= EXAMPLES as u64 {
            self.examples.push(Mismatch { address, cache: cache.to_owned(), missing: true });
        }
    }
}

/// Every allocated slot with its cache's name.
fn allocated(slabs: &SlabMap) -> impl Iterator<Item = (Va, &str)> {
    slabs.pages_with_caches().flat_map(|(page, cache)| {
        page.allocated().map(move |i| (page.start + u64::from(i) * cache.size, cache.name.as_str()))
    })
}
