//! The registry against the guest's own slab metadata: the proof that tracking is exact.

use super::{Kind, Registry};
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
    /// Its cache's name; empty when the registry's cache is not in the guest's list.
    pub cache: String,
    /// True: allocated in the guest, not in the registry. False: in the registry, free in the guest.
    pub missing: bool,
}

/// Result of [`Registry::audit`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Audit {
    /// Slab objects on which both agree.
    pub tracked: u64,
    /// Allocated in the guest, but not in the registry.
    pub missing: u64,
    /// In the registry as slab objects, but free in the guest, or on no slab page.
    pub stale: u64,
    /// The first few mismatches of either kind, by address.
    #[serde(skip)]
    pub examples: Vec<Mismatch>,
}

impl Registry {
    /// Compares the registry's slab objects with the guest's slab pages at the same pause. `boot_objects` were
    /// taken from their slabs without an allocator call and are not missing
    /// ([`crate::linux::Linux::boot_objects`]).
    pub fn audit(&self, slabs: &SlabMap, boot_objects: &[Va]) -> Audit {
        let untraced: FxHashSet<Va> = boot_objects.iter().copied().collect();
        let mut audit = Audit::default();
        let mut agreed = FxHashSet::default();
        let mut missing = Vec::new();
        for (address, cache) in allocated(slabs) {
            if self.get(address).is_some_and(|o| o.kind == Kind::Slab) {
                agreed.insert(address);
            } else if !untraced.contains(&address) {
                audit.missing += 1;
                missing.push(Mismatch { address, cache: cache.to_owned(), missing: true });
                missing.truncate(EXAMPLES);
            }
        }
        audit.tracked = agreed.len() as u64;
        let mut stale: Vec<_> =
            self.objects().filter(|o| o.kind == Kind::Slab && !agreed.contains(&o.address)).collect();
        audit.stale = stale.len() as u64;
        stale.sort_unstable_by_key(|o| o.address);
        audit.examples = missing;
        audit.examples.extend(stale.iter().take(EXAMPLES).map(|o| {
            let cache = slabs.caches.iter().find(|c| c.va == o.cache).map(|c| c.name.clone());
            Mismatch { address: o.address, cache: cache.unwrap_or_default(), missing: false }
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
