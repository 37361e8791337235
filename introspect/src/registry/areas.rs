//! Parts of objects that are read instead of the whole: what `kmemleak_scan_area` says (mm/kmemleak.c).

use crate::memory::Va;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;

/// Most areas of one object, and most objects that have any.
const MAX_AREAS: usize = 64;
const MAX_OBJECTS: usize = 1 << 16;

/// Offsets in objects, by the objects' addresses. Empty on kernels without CONFIG_DEBUG_KMEMLEAK.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanAreas(BTreeMap<Va, Vec<Range<u64>>>);

impl ScanAreas {
    /// The areas of the object at `address`; None when all of it is read.
    pub fn of(&self, address: Va) -> Option<&[Range<u64>]> {
        self.0.get(&address).map(Vec::as_slice)
    }

    /// Adds one; false when there are too many.
    pub(super) fn add(&mut self, address: Va, area: Range<u64>) -> bool {
        if !self.0.contains_key(&address) && self.0.len() >= MAX_OBJECTS {
            return false;
        }
        let areas = self.0.entry(address).or_default();
        areas.len() < MAX_AREAS && {
            areas.push(area);
            true
        }
    }

    /// Forgets those of an object.
    #[inline]
    pub(super) fn remove(&mut self, address: Va) {
        if !self.0.is_empty() {
            self.0.remove(&address);
        }
    }

    /// What of it fits objects, whose sizes `size` knows.
    pub(super) fn checked(&self, size: impl Fn(Va) -> Option<u64>) -> Self {
        let mut this = Self::default();
        for (&address, areas) in &self.0 {
            let fits = |area: &&Range<u64>| {
                area.start <= area.end && size(address).is_some_and(|size| area.end <= size)
            };
            for area in areas.iter().filter(fits) {
                this.add(address, area.clone());
            }
        }
        this
    }
}
