//! `slabinfo`: the slab heap by cache.

use super::{Cell, Column, Role, Table};
use crate::linux::slab::{Damage, SlabMap};
use crate::memory::{MemoryError, PAGE_SIZE, Va};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// What one cache has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Objects that are really allocated.
    pub active: u64,
    /// Room for objects.
    pub total: u64,
    /// Slabs.
    pub slabs: u64,
    /// Bytes of all slabs.
    pub bytes: u64,
    /// Bytes of the largest: smaller ones are made when memory is short.
    pub largest: u64,
}

/// By index of the cache. Objects of the sampling allocator KFENCE are in no slab of their cache and not counted.
pub fn usage(map: &SlabMap) -> Vec<Usage> {
    let mut sums = vec![Usage::default(); map.caches.len()];
    for page in map.pages.iter().filter(|p| !p.sampled) {
        let (Some(sum), Some(cache)) =
            (sums.get_mut(page.cache as usize), map.caches.get(page.cache as usize))
        else {
            continue;
        };
        let active = page.allocated.iter().map(|word| u64::from(word.count_ones())).sum();
        let bytes = slab_bytes(page.objects, cache.size);
        sum.active = sum.active.saturating_add(active);
        sum.total = sum.total.saturating_add(page.objects.into());
        sum.slabs += 1;
        sum.bytes = sum.bytes.saturating_add(bytes);
        sum.largest = sum.largest.max(bytes);
    }
    sums
}

/// One row per cache that has slabs, largest first: size of its objects as asked for and as laid out, objects in use,
/// room for objects, slabs, and bytes of the slabs.
///
/// `active` counts objects that are really allocated. The guest's own /proc/slabinfo counts as active what lies free in
/// a CPU's own slabs, too: it never says less. For KFENCE's objects see [`usage`]: they are in neither.
pub fn table(map: &SlabMap) -> Table {
    let columns = vec![
        Column::new("name", Role::Key),
        Column::new("object_size", Role::Fact),
        Column::new("size", Role::Fact),
        Column::new("active", Role::Amount),
        Column::new("total", Role::Amount),
        Column::new("slabs", Role::Amount),
        Column::new("bytes", Role::Amount),
    ];
    let mut table = Table::new(columns, 6);
    for (cache, usage) in map.caches.iter().zip(usage(map)).filter(|(_, usage)| usage.slabs > 0) {
        let facts: [Cell; 3] = [cache.name.as_str().into(), cache.object_size.into(), cache.size.into()];
        let amounts = [usage.active, usage.total, usage.slabs, usage.bytes];
        table.rows.push(facts.into_iter().chain(amounts.map(Cell::from)).collect());
    }
    table.sort();
    table
}

/// The damaged slabs of one cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DamagedCache {
    /// The cache; None for slabs whose cache cannot be read.
    pub cache: Option<String>,
    /// How many slabs.
    pub slabs: usize,
    /// First object of the first.
    pub first: String,
    /// What is wrong with it.
    pub what: String,
}

/// The damage to the slab heap by cache, in the caches' order: how far the numbers of these caches can be trusted.
pub fn damage(map: &SlabMap) -> Vec<DamagedCache> {
    let mut by_cache: BTreeMap<Option<u32>, BTreeMap<Va, &Damage>> = BTreeMap::new();
    for damage in &map.damaged {
        by_cache.entry(damage.cache).or_default().entry(damage.slab).or_insert(damage);
    }
    let name = |cache: u32| map.caches.get(cache as usize).map(|cache| cache.name.clone());
    let described = by_cache.into_iter().filter_map(|(cache, slabs)| {
        let (first, damage) = slabs.first_key_value()?;
        Some(DamagedCache {
            cache: cache.and_then(name),
            slabs: slabs.len(),
            first: first.to_string(),
            what: match damage.error {
                MemoryError::Corrupt { va, what } if va == *first => what.to_owned(),
                error => error.to_string(),
            },
        })
    });
    described.collect()
}

impl fmt::Display for DamagedCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cache, slabs, first, what } = self;
        // Escaped: a module chooses it.
        let (of, part) = match cache {
            Some(cache) => (format!("cache {}: ", cache.escape_debug()), "freelist"),
            None => (String::new(), "cache"),
        };
        match slabs {
            1 => write!(f, "{of}the {part} of the slab at {first} is damaged: {what}"),
            _ => write!(f, "{of}the {part}s of {slabs} slabs are damaged, the first at {first}: {what}"),
        }
    }
}

/// Bytes of a slab: the smallest block of pages that holds its objects. A block of half the size would hold fewer than
/// half of them, so this is the block it was made of, also where SLUB fell back to a smaller one.
fn slab_bytes(objects: u32, size: u64) -> u64 {
    u64::from(objects).saturating_mul(size).max(PAGE_SIZE).checked_next_power_of_two().unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::linux::slab::{Cache, SlabPage};
    use proptest::prelude::*;

    pub(in crate::accounting) fn cache(name: &str, size: u64) -> Cache {
        Cache {
            va: Va(0),
            name: name.to_owned(),
            object_size: size - 6,
            size,
            flags: 0,
            typesafe_by_rcu: false,
            no_leak_trace: false,
        }
    }

    pub(in crate::accounting) fn page(cache: u32, objects: u32, allocated: u64, sampled: bool) -> SlabPage {
        SlabPage { cache, start: Va(0), objects, allocated: vec![allocated], sampled }
    }

    #[test]
    fn caches_are_added_up_and_sampled_objects_left_out() {
        let map = SlabMap {
            caches: vec![cache("empty", 64), cache("small", 96), cache("large", 4096)],
            pages: vec![
                page(1, 42, 0b111, false),
                page(2, 8, 0xff, false),
                page(1, 42, 0b1, false),
                page(1, 1, 1, true),
                // Of a cache that is in no list.
                page(9, 1, 1, false),
            ],
            damaged: vec![],
        };
        let text = "\
name   object_size  size  active  total  slabs  bytes
large         4090  4096       8      8      1  32768
small           90    96       4     84      2   8192
";
        assert_eq!(table(&map).text(), text);
    }

    #[test]
    fn damage_is_told_by_cache_with_its_first_slab() {
        let damaged = |cache, slab| {
            let error = MemoryError::Corrupt { va: Va(slab), what: "a freelist leaves its slab" };
            Damage { cache, slab: Va(slab), error }
        };
        let map = SlabMap {
            caches: vec![cache("a\n", 64)],
            pages: vec![],
            // One slab twice: its own freelist and a CPU's.
            damaged: [0x3000, 0x2000, 0x2000].map(|slab| damaged(Some(0), slab)).to_vec(),
        };
        let told = damage(&map);
        assert_eq!((told.len(), told[0].slabs, told[0].first.as_str()), (1, 2, "0x2000"));
        let line = "cache a\\n: the freelists of 2 slabs are damaged, the first at 0x2000: a freelist leaves its slab";
        assert_eq!(told[0].to_string(), line);
        let map = SlabMap { damaged: vec![damaged(None, 0x4000)], ..map };
        assert!(damage(&map)[0].to_string().starts_with("the cache of the slab at 0x4000 is damaged: "));
        assert_eq!(damage(&SlabMap::default()), []);
    }

    proptest! {
        #[test]
        fn the_block_of_a_slab_is_found_from_its_objects(order in 0..6_u32, size in 8..32768_u64) {
            let bytes = PAGE_SIZE << order;
            prop_assume!(size <= bytes);
            prop_assert_eq!(slab_bytes((bytes / size) as u32, size), bytes);
        }
    }
}
