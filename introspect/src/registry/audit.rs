//! The registry against the guest's own metadata of slabs and of per-CPU memory: the proof that tracking is exact.

use super::{Kind, Registry};
use crate::linux::percpu::PercpuChunk;
use crate::linux::slab::SlabMap;
use crate::memory::Va;
use rustc_hash::FxHashSet;
use serde::Serialize;

/// Examples kept of each kind of mismatch.
const EXAMPLES: usize = 16;

/// One object on which registry and guest disagree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Start of the object.
    pub address: Va,
    /// Its cache's name; empty when the registry's cache is not in the guest's list, "(percpu)" for per-CPU memory.
    pub cache: String,
    /// True: allocated in the guest, not in the registry. False: in the registry, free in the guest.
    pub missing: bool,
}

/// Result of [`Registry::audit`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Audit {
    /// Slab objects and per-CPU allocations on which both agree.
    pub tracked: u64,
    /// Allocated in the guest, but not in the registry.
    pub missing: u64,
    /// In the registry, but free in the guest, or on no slab page and in no chunk.
    pub stale: u64,
    /// The first few mismatches of either kind, by address.
    #[serde(skip)]
    pub examples: Vec<Mismatch>,
}

/// What mismatches call per-CPU memory, as `top caches` does.
const PERCPU: &str = "(percpu)";

impl Registry {
    /// Compares the registry's slab objects and per-CPU objects with the guest's slab pages and per-CPU chunks at the
    /// same pause. `boot_objects` were taken from their slabs without an allocator call and are not missing
    /// ([`crate::linux::Linux::boot_objects`]).
    pub fn audit(&self, slabs: &SlabMap, percpu: &[PercpuChunk], boot_objects: &[Va]) -> Audit {
        let untraced: FxHashSet<Va> = boot_objects.iter().copied().collect();
        let mut audit = Audit::default();
        let mut agreed = FxHashSet::default();
        let mut missing = Vec::new();
        let slab = allocated(slabs).map(|(address, cache)| (address, cache, Kind::Slab));
        let percpu = percpu.iter().flat_map(PercpuChunk::objects);
        for (address, cache, kind) in slab.chain(percpu.map(|(cookie, _)| (cookie, PERCPU, Kind::Percpu))) {
            if self.get(address).is_some_and(|o| o.kind == kind) {
                agreed.insert(address);
            } else if !untraced.contains(&address) {
                audit.missing += 1;
                missing.push(Mismatch { address, cache: cache.to_owned(), missing: true });
                missing.truncate(EXAMPLES);
            }
        }
        audit.tracked = agreed.len() as u64;
        let audited = |kind| matches!(kind, Kind::Slab | Kind::Percpu);
        let mut stale: Vec<_> =
            self.objects().filter(|o| audited(o.kind) && !agreed.contains(&o.address)).collect();
        audit.stale = stale.len() as u64;
        stale.sort_unstable_by_key(|o| o.address);
        audit.examples = missing;
        audit.examples.extend(stale.iter().take(EXAMPLES).map(|o| {
            let named = slabs.caches.iter().find(|c| o.kind == Kind::Slab && c.va == o.cache);
            let other = if o.kind == Kind::Percpu { PERCPU } else { "" };
            let cache = named.map_or_else(|| other.to_owned(), |c| c.name.clone());
            Mismatch { address: o.address, cache, missing: false }
        }));
        audit
    }
}

/// Every allocated slot with its cache's name.
fn allocated(slabs: &SlabMap) -> impl Iterator<Item = (Va, &str)> {
    slabs.pages.iter().filter_map(|page| Some((page, slabs.caches.get(page.cache as usize)?))).flat_map(
        |(page, cache)| {
            page.allocated().map(move |i| (page.start + u64::from(i) * cache.size, cache.name.as_str()))
        },
    )
}
