//! `slabinfo`: the slab heap by cache.

use super::{Cell, Column, Role, Table};
use crate::linux::slab::SlabMap;
use crate::memory::PAGE_SIZE;

/// One row per cache that has slabs, largest first: size of its objects as asked for and as laid out, objects in use,
/// room for objects, slabs, and bytes of the slabs.
///
/// `active` counts objects that are really allocated. The guest's own /proc/slabinfo counts as active what lies free in
/// a CPU's own slabs, too: it never says less. Objects of the sampling allocator KFENCE are in no slab of their cache and
/// in neither.
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
    let mut sums = vec![[0_u64; 4]; map.caches.len()];
    for page in map.pages.iter().filter(|p| !p.sampled) {
        let (Some(sum), Some(cache)) =
            (sums.get_mut(page.cache as usize), map.caches.get(page.cache as usize))
        else {
            continue;
        };
        let active = page.allocated.iter().map(|word| u64::from(word.count_ones())).sum();
        let bytes = slab_bytes(page.objects, cache.size);
        for (sum, more) in sum.iter_mut().zip([active, page.objects.into(), 1, bytes]) {
            *sum = sum.saturating_add(more);
        }
    }
    let mut table = Table::new(columns, 6);
    for (cache, sum) in map.caches.iter().zip(sums).filter(|(_, [_, _, slabs, _])| *slabs > 0) {
        let facts: [Cell; 3] = [cache.name.as_str().into(), cache.object_size.into(), cache.size.into()];
        table.rows.push(facts.into_iter().chain(sum.map(Cell::from)).collect());
    }
    table.sort();
    table
}

/// Bytes of a slab: the smallest block of pages that holds its objects. A block of half the size would hold fewer than
/// half of them, so this is the block it was made of, also where SLUB fell back to a smaller one.
fn slab_bytes(objects: u32, size: u64) -> u64 {
    u64::from(objects).saturating_mul(size).max(PAGE_SIZE).checked_next_power_of_two().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::slab::{Cache, SlabPage};
    use crate::memory::Va;
    use proptest::prelude::*;

    fn cache(name: &str, size: u64) -> Cache {
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

    fn page(cache: u32, objects: u32, allocated: u64, sampled: bool) -> SlabPage {
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

    proptest! {
        #[test]
        fn the_block_of_a_slab_is_found_from_its_objects(order in 0..6_u32, size in 8..32768_u64) {
            let bytes = PAGE_SIZE << order;
            prop_assume!(size <= bytes);
            prop_assert_eq!(slab_bytes((bytes / size) as u32, size), bytes);
        }
    }
}
