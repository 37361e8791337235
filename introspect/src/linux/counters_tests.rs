//! Zones, counters, amounts of memory and vmalloc areas of a synthetic guest.

use super::counters::Counter;
use super::synthetic::*;
use super::totals::Totals;
use super::vmalloc_info::AreaInfo;
use super::zones::Zone;
use crate::accounting;
use crate::memory::{MemoryError, PAGE_SIZE, Va};
use proptest::prelude::*;

const ERAS: [Era; 2] = [Era::Flags, Era::Types];
/// Where the test puts things, physical addresses: the node with its zone, strings, free blocks, structures.
const NODE: u64 = HEAP + 0x4000;
const STRINGS: u64 = HEAP + 0x5000;
const BLOCKS: u64 = HEAP + 0x6000;
const REST: u64 = HEAP + 0x7000;
/// Offsets in the CPU's area of its parts of the zone's and the node's counters, and of `vm_committed_as`.
const OF_ZONE: u64 = 0x100;
const OF_NODE: u64 = 0x120;
const OF_COMMITTED: u64 = 0x140;
/// `free_area` of order n in the zone, `free_list` of a type in it, and `nr_free`.
const AREAS: u64 = NODE + 96;
const AREA: u64 = 40;
const NR_FREE: u64 = 32;

/// Physical address of a variable.
fn variable(guest: &Guest, name: &str) -> u64 {
    let memory = guest.memory();
    guest.linux.translate(&memory, guest.symbol(name)).expect("a variable of the image").0
}

fn string(guest: &mut Guest, n: u64, text: &str) -> u64 {
    let at = STRINGS + 64 * n;
    guest.ram[at as usize..][..text.len()].copy_from_slice(text.as_bytes());
    direct(at)
}

/// A guest with one zone and names for all counters.
fn counting(era: Era) -> Guest {
    let mut guest = Guest::new(era);
    guest.set("node_data", direct(NODE));
    let name = string(&mut guest, 0, "DMA");
    guest.put(NODE + 8, name);
    guest.put(NODE + 16, 100);
    guest.put(NODE + 40, OF_ZONE);
    guest.put(NODE + 280, OF_NODE);
    let names = [
        "nr_free_pages",
        "numa_hit",
        "nr_inactive_anon",
        "nr_file_pages",
        "nr_dirty_threshold",
        "nr_memmap_pages",
        "pgpgin",
        "pgfault",
    ];
    let array = variable(&guest, "vmstat_text");
    for (n, name) in names.into_iter().enumerate() {
        let text = string(&mut guest, 1 + n as u64, name);
        guest.put(array + 8 * n as u64, text);
    }
    for order in 0..3 {
        for ty in 0..2 {
            guest.list(AREAS + AREA * order + 16 * ty, &[]);
        }
    }
    guest
}

#[test]
fn counters_are_the_sums_and_every_cpus_part() {
    for era in ERAS {
        let mut guest = counting(era);
        guest.set("vm_zone_stat", 1000);
        guest.set("vm_numa_event", 5);
        let nodes = variable(&guest, "vm_node_stat");
        guest.put(nodes, 3);
        guest.put(nodes + 8, 200);
        guest.set("nr_memmap_pages", 77);
        guest.ram[(PERCPU + OF_ZONE) as usize] = -7_i8 as u8;
        guest.put(PERCPU + OF_ZONE + 8, 6);
        guest.ram[(PERCPU + OF_NODE) as usize + 1] = -4_i8 as u8;
        guest.ram[(PERCPU + OF_NODE) as usize + 2] = 9;
        guest.put(PERCPU + u64::from(EVENTS), 40);
        guest.put(PERCPU + u64::from(EVENTS) + 8, 41);
        let counters = guest.linux.counters(&guest.memory()).expect("counters");
        let found: Vec<(&str, i64)> =
            counters.iter().map(|Counter { name, value }| (name.as_str(), *value)).collect();
        let expected = [
            ("nr_free_pages", 993),
            ("numa_hit", 11),
            // Below zero until another CPU adds its part.
            ("nr_inactive_anon", 0),
            ("nr_file_pages", 209),
            ("nr_memmap_pages", 77),
            ("pgpgin", 40),
            ("pgfault", 41),
        ];
        assert_eq!(found, expected);
    }
}

#[test]
fn names_that_do_not_fit_are_refused() {
    let mut guest = counting(Era::Types);
    let array = variable(&guest, "vmstat_text");
    let refused = |guest: &Guest| guest.linux.counters(&guest.memory()).expect_err("no counters").to_string();
    // Nothing where the events' names begin: an endless search without its bound.
    let other = string(&mut guest, 20, "other");
    for n in 6..60 {
        guest.put(array + 8 * n, other);
    }
    assert!(refused(&guest).contains("no name of a counter is the first event's"));
    let mut guest = counting(Era::Types);
    let other = string(&mut guest, 20, "other");
    guest.put(array + 16, other);
    assert!(refused(&guest).contains("do not fit"));
    guest.put(array + 16, VMALLOC.0);
    assert_eq!(refused(&guest), MemoryError::NotMapped { va: VMALLOC }.to_string());
    let lacking = Guest::without(Era::Types, "vmstat_text").expect("a guest");
    assert_eq!(refused(&lacking), "The kernel image has no symbol vmstat_text");
}

#[test]
fn free_blocks_are_counted_by_order_and_type() {
    let mut guest = counting(Era::Flags);
    guest.put(AREAS + NR_FREE, 3);
    guest.put(AREAS + 2 * AREA + NR_FREE, 1);
    guest.list(AREAS + 16, &[BLOCKS, BLOCKS + 64, BLOCKS + 128]);
    guest.list(AREAS + 2 * AREA, &[BLOCKS + 192]);
    let names = variable(&guest, "migratetype_names");
    for (n, name) in ["Unmovable", "Movable"].into_iter().enumerate() {
        let text = string(&mut guest, 20 + n as u64, name);
        guest.put(names + 8 * n as u64, text);
    }
    let zones = guest.linux.memory_zones(&guest.memory()).expect("zones");
    let expected = Zone {
        node: 0,
        name: "DMA".to_owned(),
        free: vec![3, 0, 1],
        free_by_type: vec![("Unmovable".to_owned(), vec![0, 0, 1]), ("Movable".to_owned(), vec![3, 0, 0])],
    };
    assert_eq!(zones, [expected]);
    // A list that does not come back to its head.
    guest.put(BLOCKS + 128, direct(BLOCKS + 64));
    let error = guest.linux.memory_zones(&guest.memory()).expect_err("a damaged list");
    assert!(error.downcast_ref::<MemoryError>().is_some(), "{error}");
    // A zone without memory is none.
    guest.put(NODE + 16, 0);
    assert_eq!(guest.linux.memory_zones(&guest.memory()).expect("no zones"), []);
}

#[test]
fn amounts_come_from_their_own_variables() {
    let mut guest = counting(Era::Types);
    guest.set("_totalram_pages", 900);
    guest.set("totalreserve_pages", 30);
    guest.set("nr_vmalloc_pages", 12);
    guest.set("pcpu_nr_populated", 20);
    guest.set("pcpu_nr_units", 2);
    guest.set("hugetlb_max_hstate", 1);
    let huge = variable(&guest, "hstates");
    guest.put32(huge, 2);
    guest.put(huge + 8, 5);
    guest.put(huge + 16, 1);
    guest.set("sysctl_overcommit_ratio", 50);
    // Watermark "low" is the second of four; a boost comes on top.
    guest.put(NODE + 56, 8);
    guest.put(NODE + 80, 2);
    let committed = variable(&guest, "vm_committed_as");
    guest.put(committed + 8, 50);
    guest.put(committed + 16, OF_COMMITTED);
    guest.put32(PERCPU + OF_COMMITTED, -8_i32 as u32);
    let (superblock, inodes) = (REST, [REST + 0x100, REST + 0x200]);
    guest.set("blockdev_superblock", direct(superblock));
    guest.list(superblock, &inodes);
    for (n, inode) in (1..).zip(inodes) {
        guest.put(inode + 16, direct(inode + 0x40));
        guest.put(inode + 0x40, 10 * n);
    }
    let totals = guest.linux.totals(&guest.memory()).expect("amounts");
    let expected = Totals {
        ram: Some(900),
        buffers: Some(30),
        committed: Some(42),
        vmalloc: Some(12),
        percpu: Some(40),
        reserve: Some(30),
        low_watermarks: Some(10),
        huge: Some(20),
        huge_free: Some(4),
        commit_limit: Some(440),
        // This guest has no such variables.
        swap: None,
        swap_free: None,
        poisoned: None,
    };
    assert_eq!(totals, expected);
    guest.set("sysctl_overcommit_kbytes", 400);
    assert_eq!(guest.linux.totals(&guest.memory()).expect("amounts").commit_limit, Some(100));
    guest.put(inodes[1] + 16, VMALLOC.0);
    let error = guest.linux.totals(&guest.memory()).expect_err("a mapping nobody can read");
    assert_eq!(error.downcast_ref(), Some(&MemoryError::NotMapped { va: VMALLOC }));
}

#[test]
fn shared_pages_are_those_in_use_with_several_users() {
    let mut guest = counting(Era::Types);
    for frame in 0..16 {
        guest.put32(Guest::page(frame) + 48, u32::MAX);
        guest.put32(Guest::page(frame) + 52, u32::from(frame < 5) * 2);
    }
    // One user, reserved, the tail of a block, free.
    guest.put32(Guest::page(0) + 52, 1);
    guest.put(Guest::page(1), 1 << 12);
    guest.put(Guest::page(2) + 8, PAGE_STRUCTS.0 | 1);
    guest.put32(Guest::page(3) + 48, 0xf0 << 24);
    assert_eq!(guest.linux.shared_pages(&guest.memory()).expect("pages"), 1);
}

#[test]
fn vmalloc_areas_have_callers_and_kinds() {
    for era in ERAS {
        let mut guest = Guest::new(era);
        let area = |n: u64| HEAP + n * 0x100;
        for n in 0..3 {
            guest.vmap_area(n, area(n));
        }
        // The first is vmalloc's with its table of pages in the third, the second device memory; the third has no structure.
        for (n, flags) in [(0, 0x22), (1, 0x1)] {
            let vm = area(n) + 0x80;
            guest.put(area(n) + 56, direct(vm));
            guest.put(vm + 16, 3 * PAGE_SIZE);
            guest.put(vm + 24, flags);
        }
        guest.put(area(0) + 0x80 + 32, VMALLOC.0 + 8 * PAGE_SIZE);
        guest.put32(area(0) + 0x80 + 40, 2);
        guest.put(area(0) + 0x80 + 56, 0x1234);
        guest.put(area(1) + 0x80 + 48, 0xfed0_0000);
        let nodes = [area(2) + 40, area(0) + 40, area(1) + 40];
        match era {
            Era::Flags => guest.list_at("vmap_area_list", &nodes),
            Era::Types => {
                let set = HEAP + 0x1000;
                guest.set("vmap_nodes", direct(set));
                guest.set("nr_vmap_nodes", 1);
                guest.list(set + 8, &nodes);
            }
        }
        let info = |n: u64, caller, pages, physical, flags: &[&'static str]| AreaInfo {
            start: VMALLOC + n * 4 * PAGE_SIZE,
            size: 3 * PAGE_SIZE,
            caller,
            pages,
            physical,
            flags: flags.to_vec(),
        };
        let expected = [
            info(0, Some(Va(0x1234)), 2, None, &["vmalloc", "vpages"]),
            info(1, None, 0, Some(0xfed0_0000), &["ioremap"]),
            info(2, None, 0, None, &["vm_map_ram"]),
        ];
        assert_eq!(guest.linux.vmalloc_info(&guest.memory()).expect("areas"), expected);
        guest.put(area(1) + 8, VMALLOC.0);
        let error =
            guest.linux.vmalloc_info(&guest.memory()).expect_err("an area that ends before it starts");
        assert!(matches!(error.downcast_ref(), Some(MemoryError::Corrupt { va: Va(_), .. })), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn no_damage_hangs_or_panics(words in proptest::collection::vec((0..RAM / 8, any::<u64>()), 1..200), new in any::<bool>()) {
        let mut guest = counting(ERAS[usize::from(new)]);
        for (n, (word, value)) in words.into_iter().enumerate() {
            // Half of the damage goes where it hurts.
            let word = if n % 2 == 0 { NODE / 8 + word % 0x800 } else { word };
            let value = if value % 3 == 0 { direct((value % RAM) & !7) } else { value };
            guest.put(word * 8, value);
        }
        let (memory, linux) = (guest.memory(), &guest.linux);
        let _ = (linux.memory_zones(&memory), linux.vmalloc_info(&memory));
        if let (Ok(counters), Ok(totals)) = (linux.counters(&memory), linux.totals(&memory)) {
            let _ = accounting::counters::meminfo(&counters, &totals).text();
        }
    }
}
