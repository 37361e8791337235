//! The rooms of this folder on a synthetic guest, in both generations of layouts.

use super::StaticRoot;
use super::pages::Use;
use super::synthetic::*;
use super::tasks::Context;
use crate::memory::{MemoryError, PAGE_SIZE, Va};
use crate::scan::guest::GuestMemory;
use crate::scan::mark::Contents;
use proptest::prelude::*;

const ERAS: [Era; 2] = [Era::Flags, Era::Types];
const CACHE: u64 = HEAP;
const CPU_SLAB: u64 = 0x100;
/// The slab's first frame; it has two.
const SLAB: u64 = 0x300;
const OBJECT: u64 = 96;
const OBJECTS: u64 = 2 * PAGE_SIZE / OBJECT;
const KEY: u64 = 0x1234_5678_9abc_def0;
const FREE_POINTER: u64 = 48;
/// A chunk of per-CPU memory, and where each CPU's copy is from its base address.
const CHUNK: u64 = HEAP + 0x4000;
const UNITS: [u64; 2] = [0x1000, 0x3000];

impl Guest {
    fn mark_slab(&mut self, era: Era, frame: u64) {
        match era {
            Era::Flags => self.put(Guest::page(frame), 1 << 9 | 1 << 16),
            Era::Types => {
                self.put(Guest::page(frame), 1 << 16);
                self.put32(Guest::page(frame) + 48, 0xf5 << 24);
            }
        }
    }

    fn mark_buddy(&mut self, era: Era, frame: u64, order: u64) {
        self.put32(Guest::page(frame) + 48, if era == Era::Flags { 0xffff_ff7f } else { 0xf0 << 24 });
        self.put(Guest::page(frame) + 40, order);
    }

    /// One cache with one slab of two pages, nothing allocated.
    fn add_cache(&mut self, era: Era) {
        self.list_at("slab_caches", &[CACHE + 40]);
        self.put(CACHE, CPU_SLAB);
        self.put32(CACHE + 16, OBJECT as u32);
        self.put32(CACHE + 20, 90);
        self.put32(CACHE + 24, FREE_POINTER as u32);
        self.put(CACHE + 32, direct(CACHE + 0x80));
        self.ram[CACHE as usize + 0x80..][..7].copy_from_slice(b"objects");
        self.put(CACHE + 56, KEY);
        self.mark_slab(era, SLAB);
        let page = Guest::page(SLAB);
        self.put(page + 24, direct(CACHE));
        self.put(page + 40, (OBJECTS << 16) | OBJECTS);
        self.put(page + PAGE_STRUCT + 8, (PAGE_STRUCTS + SLAB * PAGE_STRUCT).0 | 1);
    }

    /// Two CPUs and one chunk of a page, whose first two words and last are its neighbours': an allocation of two words
    /// of the map, and one of a single word.
    fn add_percpu_chunk(&mut self, base: Va) {
        let (lists, offsets, map, bounds) = (CHUNK + 0x100, CHUNK + 0x200, CHUNK + 0x1000, CHUNK + 0x2000);
        self.set("nr_cpu_ids", 2);
        self.set("pcpu_chunk_lists", direct(lists));
        // The list of free chunks is the last but one; where the number of lists has no symbol, that is known.
        let slots = if self.linux.symbol("pcpu_nr_slots").is_some() {
            ("pcpu_nr_slots", 2)
        } else {
            ("pcpu_free_slot", 0)
        };
        self.set(slots.0, slots.1);
        self.put(lists + 32, 0x4e20_9840_3500_0063);
        self.set("pcpu_unit_offsets", direct(offsets));
        self.list(lists, &[]);
        self.list(lists + 16, &[CHUNK]);
        for (at, unit) in [offsets, offsets + 8].into_iter().zip(UNITS) {
            self.put(at, unit);
        }
        for (member, value) in [(16, base.0), (24, direct(map)), (48, direct(bounds))] {
            self.put(CHUNK + member, value);
        }
        for (member, value) in [(32, 8), (36, 4), (40, 1)] {
            self.put32(CHUNK + member, value);
        }
        self.put(map, 0b1_1111);
        self.put(bounds, 0b11_0101);
        self.put(map + 120, 1 << 63);
    }

    /// Writes a freelist through `objects` and returns its head.
    fn freelist(&mut self, objects: &[u64]) -> u64 {
        let va = |n: &u64| direct(SLAB * PAGE_SIZE + n * OBJECT);
        for (i, n) in objects.iter().enumerate() {
            let next = objects.get(i + 1).map_or(0, va);
            let at = SLAB * PAGE_SIZE + n * OBJECT + FREE_POINTER;
            self.put(at, next ^ KEY ^ direct(at).swap_bytes());
        }
        objects.first().map_or(0, va)
    }

    fn allocated(&self) -> Vec<u64> {
        let map = self.linux.slab_map(&self.memory()).expect("a slab map");
        assert_eq!(map.damaged, []);
        map.pages[0].allocated().map(u64::from).collect()
    }
}

#[test]
fn a_missing_symbol_is_named() {
    for name in ["jiffies_64", "slab_caches", "init_top_pgt", "modules"] {
        let error = Guest::without(Era::Flags, name).err().map(|e| format!("{e:#}")).unwrap_or_default();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn variables_and_bases_are_read_where_the_image_was_put() {
    for era in ERAS {
        let guest = Guest::new(era);
        let memory = guest.memory();
        assert_eq!(guest.linux.hz(), u64::from(HZ));
        assert_eq!(guest.linux.cpu_count(&memory), Ok(1));
        assert_eq!(guest.linux.direct_map_base(&memory), Ok(DIRECT_MAP));
        assert_eq!(guest.linux.percpu_base(&memory, 0), Ok(DIRECT_MAP + PERCPU));
        let beyond = DIRECT_MAP + RAM;
        assert_eq!(guest.linux.read_u64(&memory, beyond), Err(MemoryError::NotMapped { va: beyond }));
    }
}

#[test]
fn the_context_is_kmemleaks() {
    for era in ERAS {
        let mut guest = Guest::new(era);
        guest.put(PERCPU, direct(Guest::init_task()));
        let cases = [
            (0, Context::Task),
            (0x200, Context::Task),
            (0x100, Context::Softirq),
            (0x1_0100, Context::Hardirq),
        ];
        for (count, context) in cases {
            guest.put32(PERCPU + 8, count | 0x8000_0000);
            assert_eq!(guest.linux.context(&guest.memory(), 0), Ok(context));
        }
        let (comm, pid) = guest.linux.allocating_comm_and_pid(&guest.memory(), 0).expect("a context");
        assert_eq!((&comm[..8], pid), (&b"hardirq\0"[..], 0));
        guest.put32(PERCPU + 8, 0);
        let (comm, _) = guest.linux.allocating_comm_and_pid(&guest.memory(), 0).expect("a context");
        assert_eq!(&comm[..10], b"swapper/0\0");
    }
}

#[test]
fn tasks_and_threads_are_found_once() {
    let mut guest = Guest::new(Era::Flags);
    let init = Guest::init_task();
    let (leader, thread, signal) = (HEAP, HEAP + 0x1000, HEAP + 0x2000);
    guest.task(leader, b"leader", 1, signal);
    guest.task(thread, b"thread", 2, signal);
    guest.list(init + 48, &[leader + 48]);
    guest.list(signal, &[leader + 72, thread + 72]);
    let tasks = guest.linux.tasks(&guest.memory()).expect("tasks");
    let found: Vec<_> = tasks.iter().map(|t| (t.pid, t.comm[0], t.stack_size)).collect();
    assert_eq!(found, [(0, b's', 0x4000), (1, b'l', 0x4000), (2, b't', 0x4000)]);

    guest.put(thread + 72, direct(thread + 72));
    let damaged = guest.linux.tasks(&guest.memory());
    assert!(matches!(damaged, Err(MemoryError::Corrupt { .. })), "{damaged:?}");
}

#[test]
fn the_cache_of_an_object_is_found_from_any_page_of_its_slab() {
    for era in ERAS {
        let mut guest = Guest::new(era);
        guest.add_cache(era);
        let memory = guest.memory();
        let cache_of = |frame: u64| guest.linux.cache_of(&memory, DIRECT_MAP + frame * PAGE_SIZE + 8);
        assert_eq!(cache_of(SLAB), Ok(Some(Va(direct(CACHE)))));
        assert_eq!(cache_of(SLAB + 1), Ok(Some(Va(direct(CACHE)))));
        assert_eq!(cache_of(SLAB + 2), Ok(None));
        assert_eq!(guest.linux.cache_of(&memory, VMALLOC), Ok(None));
        let cache = guest.linux.cache(&memory, Va(direct(CACHE))).expect("a cache");
        assert_eq!((cache.name.as_str(), cache.object_size, cache.size), ("objects", 90, OBJECT));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn freelists_are_decoded(
        order in Just((0..OBJECTS).collect::<Vec<_>>()).prop_shuffle(),
        parts in (0..=OBJECTS as usize, 0..=OBJECTS as usize),
        new in any::<bool>(),
    ) {
        let era = ERAS[usize::from(new)];
        let mut guest = Guest::new(era);
        guest.add_cache(era);
        let (one, two) = (parts.0.min(parts.1), parts.0.max(parts.1));
        let own = guest.freelist(&order[..one]);
        guest.put(Guest::page(SLAB) + 32, own);
        guest.put(Guest::page(SLAB) + 40, (OBJECTS << 16) | (OBJECTS - one as u64));
        let active = guest.freelist(&order[one..two]);
        guest.put(PERCPU + CPU_SLAB, active);
        guest.put(PERCPU + CPU_SLAB + 16, (PAGE_STRUCTS + SLAB * PAGE_STRUCT).0);
        let mut expected = order[two..].to_vec();
        expected.sort_unstable();
        prop_assert_eq!(guest.allocated(), expected);
    }

    #[test]
    fn no_damage_hangs_or_panics(words in proptest::collection::vec((0..RAM / 8, any::<u64>()), 1..200), seed in 0..4_u64) {
        let era = ERAS[(seed % 2) as usize];
        let mut guest = Guest::new(era);
        guest.add_cache(era);
        let head = guest.freelist(&(0..OBJECTS).collect::<Vec<_>>());
        guest.put(Guest::page(SLAB) + 32, head);
        for (n, (word, value)) in words.into_iter().enumerate() {
            // Half of the damage goes where it hurts.
            let word = if n % 2 == 0 { word % 0x8000 + 0x2000 } else { word };
            let value = if value % 3 == 0 { direct((value % RAM) & !7) } else { value };
            guest.put(word * 8, value);
        }
        let memory = guest.memory();
        let linux = &guest.linux;
        let _ = (linux.tasks(&memory), linux.slab_map(&memory), linux.page_map(&memory));
        let _ = (linux.vmalloc_areas(&memory), linux.vmalloc_size(&memory, VMALLOC), linux.boot_objects(&memory));
        let _ = (linux.static_roots(&memory), linux.cache_of(&memory, DIRECT_MAP + SLAB * PAGE_SIZE));
        let _ = linux.percpu_chunks(&memory);
        for va in linux.modules(&memory).unwrap_or_default() {
            let _ = linux.module(&memory, va);
        }
    }
}

#[test]
fn a_freelist_that_leaves_its_slab_or_returns_is_listed_as_damage() {
    let mut guest = Guest::new(Era::Types);
    guest.add_cache(Era::Types);
    let page = Guest::page(SLAB);
    guest.freelist(&[3, 4]);
    for bad in [direct(SLAB * PAGE_SIZE + 3 * OBJECT), direct(SLAB * PAGE_SIZE + 8), direct(0)] {
        let at = SLAB * PAGE_SIZE + 4 * OBJECT + FREE_POINTER;
        guest.put(at, bad ^ KEY ^ direct(at).swap_bytes());
        guest.put(page + 32, direct(SLAB * PAGE_SIZE + 3 * OBJECT));
        let map = guest.linux.slab_map(&guest.memory()).expect("a slab map");
        assert_eq!(map.damaged.len(), 1);
        let start = Va(direct(SLAB * PAGE_SIZE));
        assert_eq!((map.damaged[0].cache, map.damaged[0].slab), (Some(0), start));
        assert!(matches!(map.damaged[0].error, MemoryError::Corrupt { va, .. } if va == start));
        assert_eq!(map.pages[0].allocated().count() as u64, OBJECTS - 2);
    }
}

#[test]
fn frames_are_classified() {
    for era in ERAS {
        let mut guest = Guest::new(era);
        guest.add_cache(era);
        guest.mark_buddy(era, 0x310, 2);
        for used in [SLAB + 2, 0x314, 0x342] {
            guest.put32(Guest::page(used) + 48, u32::MAX);
        }
        // An entry inside the free block, left over from its last user.
        guest.put(Guest::page(0x312), 1 << 12);
        guest.put(Guest::page(0x320), 1 << 12);
        guest.put(Guest::page(0x321), 1 << 4);
        guest.put(Guest::page(0x322) + 24, 0x1001);
        guest.put(Guest::page(0x330), 1 << 16 | 1 << 19);
        guest.put(Guest::page(0x331) + 8, (PAGE_STRUCTS + 0x330 * PAGE_STRUCT).0 | 1);
        guest.put32(Guest::page(0x332) + 48, if era == Era::Flags { 0xffff_fdff } else { 0xf2 << 24 });
        // A page on the CPU's list of order 1.
        let (node, pageset) = (HEAP + 0x4000, 0x200);
        guest.set("node_data", direct(node));
        guest.put(node, pageset);
        for list in 0..14 {
            let head = PERCPU + pageset + 16 + 16 * list;
            guest.list(head, &[]);
            if list == 3 {
                guest.put(head, (PAGE_STRUCTS + 0x340 * PAGE_STRUCT + 8).0);
                guest.put(Guest::page(0x340) + 8, direct(head));
            }
        }
        let map = guest.linux.page_map(&guest.memory()).expect("a page map");
        let uses = |first: u64, n: u64| (first..first + n).map(|f| map.get(f)).collect::<Vec<_>>();
        assert_eq!(uses(SLAB, 3), [Use::Slab, Use::Slab, Use::Kernel]);
        assert_eq!(uses(0x310, 5), [Use::Free, Use::Free, Use::Free, Use::Free, Use::Kernel]);
        assert_eq!(uses(0x320, 3), [Use::Reserved, Use::User, Use::User]);
        assert_eq!(uses(0x330, 3), [Use::User, Use::User, Use::PageTable]);
        assert_eq!(uses(0x340, 3), [Use::Free, Use::Free, Use::Kernel]);
        // An entry that was never initialised, and a frame that has none.
        assert_eq!((map.get(0x350), map.get(RAM / PAGE_SIZE)), (Use::None, Use::None));
    }
}

#[test]
fn percpu_chunks_list_allocations_by_cookie() {
    for era in ERAS {
        let mut guest = Guest::new(era);
        assert_eq!(guest.linux.percpu_chunks(&guest.memory()), Ok(Vec::new()));
        guest.add_percpu_chunk(VMALLOC);
        let chunks = guest.linux.percpu_chunks(&guest.memory()).expect("per-CPU chunks");
        assert_eq!(chunks.len(), 1);
        assert_eq!(chunks[0].copies, [VMALLOC + UNITS[0], VMALLOC + UNITS[1]]);
        assert_eq!(chunks[0].cookie, Va(VMALLOC + UNITS[0] - (DIRECT_MAP + PERCPU)));
        let objects: Vec<_> = chunks[0].objects().map(|(va, size)| (va - chunks[0].cookie, size)).collect();
        assert_eq!(objects, [(8, 8), (16, 4)]);
        guest.put32(CHUNK + 40, 1 << 20);
        let damaged = guest.linux.percpu_chunks(&guest.memory());
        assert!(matches!(damaged, Err(MemoryError::Corrupt { va, .. }) if va == Va(direct(CHUNK))));
    }
}

#[test]
fn chunks_are_found_without_the_number_of_their_lists() {
    let mut guest = Guest::without(Era::Flags, "pcpu_nr_slots").expect("what is needed");
    guest.add_percpu_chunk(DIRECT_MAP + HEAP + 0x10000);
    assert_eq!(guest.linux.percpu_chunks(&guest.memory()).map(|chunks| chunks.len()), Ok(1));
}

#[test]
fn a_cookie_stands_for_the_copies_of_all_cpus() {
    let mut guest = Guest::new(Era::Types);
    let base = DIRECT_MAP + HEAP + 0x10000;
    guest.add_percpu_chunk(base);
    for (n, unit) in UNITS.into_iter().enumerate() {
        guest.put(HEAP + 0x10000 + unit + 8, 0x1111 * (n as u64 + 1));
    }
    let memory = guest.memory();
    let lent = GuestMemory::new(&guest.linux, &memory).expect("the guest's memory");
    let cookie = Va(base + UNITS[0] - (DIRECT_MAP + PERCPU)) + 8;
    assert_eq!(lent.copies(cookie), [base + UNITS[0] + 8, base + UNITS[1] + 8]);
    let mut words = Vec::new();
    lent.pieces(cookie.0, 8, &mut |_, bytes| words.push(u64::from_le_bytes(bytes.try_into().unwrap())));
    assert_eq!(words, [0x1111, 0x2222]);
    for address in [base, cookie + PAGE_SIZE, Va(8)] {
        assert_eq!(lent.copies(address), [address]);
    }
}

#[test]
fn vmalloc_areas_are_listed_and_found() {
    for era in ERAS {
        let mut guest = Guest::new(era);
        let area = |n: u64| HEAP + n * 0x100;
        for n in 0..3 {
            guest.vmap_area(n, area(n));
            guest.put(area(n) + 56, direct(area(n) + 0x80));
            guest.put(area(n) + 0x80 + 16, 3 * PAGE_SIZE);
            guest.put(area(n) + 0x80 + 24, 2);
            guest.map_vmalloc(4 * n, HEAP + n * PAGE_SIZE);
            guest.map_vmalloc(4 * n + 1, HEAP + 0x1_0000);
        }
        // The middle one is the root; right is at 8, left at 16.
        guest.put(area(1) + 16 + 8, direct(area(2) + 16));
        guest.put(area(1) + 16 + 16, direct(area(0) + 16));
        let nodes = [area(2) + 40, area(0) + 40, area(1) + 40];
        match era {
            Era::Flags => {
                guest.list_at("vmap_area_list", &nodes);
                guest.set("vmap_area_root", direct(area(1) + 16));
            }
            Era::Types => {
                let set = HEAP + 0x1000;
                guest.set("vmap_nodes", direct(set));
                guest.set("nr_vmap_nodes", 2);
                guest.put(set + 32, direct(area(1) + 16));
                guest.list(set + 32 + 8, &nodes);
            }
        }
        assert_eq!(guest.linux.idle_vmap_areas(&guest.memory()), Ok(vec![]));
        guest.put(PERCPU + u64::from(SPARE), direct(area(3)));
        let memory = guest.memory();
        assert_eq!(guest.linux.idle_vmap_areas(&memory), Ok(vec![Va(direct(area(3)))]));
        let areas = guest.linux.vmalloc_areas(&memory).expect("areas");
        let found: Vec<_> = areas.iter().map(|a| (a.start - VMALLOC, a.size, a.frames.clone())).collect();
        let frame = HEAP / PAGE_SIZE;
        let expected = |n: u64| (4 * n * PAGE_SIZE, 2 * PAGE_SIZE, vec![frame + n, frame + 16]);
        assert_eq!(found, [expected(0), expected(1), expected(2)]);
        for (n, size) in [(0, Some(0x2000)), (4, Some(0x2000)), (8, Some(0x2000)), (1, None), (12, None)] {
            assert_eq!(guest.linux.vmalloc_size(&memory, VMALLOC + n * PAGE_SIZE), Ok(size));
        }
        guest.put(area(1) + 16 + 8, direct(area(1) + 16));
        let damaged = guest.linux.vmalloc_size(&guest.memory(), VMALLOC + 9 * PAGE_SIZE);
        assert!(matches!(damaged, Err(MemoryError::Corrupt { .. })));
    }
}

#[test]
fn modules_have_regions_and_symbols() {
    for era in ERAS {
        let mut guest = Guest::new(era);
        let (module, tables, base) = (HEAP, HEAP + 0x1000, VMALLOC.0);
        guest.list_at("modules", &[module]);
        guest.ram[module as usize + 16..][..4].copy_from_slice(b"test");
        guest.put(module + 72, direct(tables));
        match era {
            Era::Flags => {
                guest.put(module + 80, base);
                guest.put32(module + 88, 0x4000);
                guest.put32(module + 92, 0x1000);
                guest.put32(module + 96, 0x3000);
            }
            Era::Types => {
                for (block, at, size) in [(0, 0, 0x1000), (1, 0x3000, 0x1000), (2, 0x1000, 0x2000_u32)] {
                    guest.put(module + 80 + 16 * block, base + at);
                    guest.put32(module + 88 + 16 * block, size);
                }
            }
        }
        let (symtab, strtab, typetab) = (tables + 0x100, tables + 0x400, tables + 0x500);
        guest.put(tables, direct(symtab));
        guest.put32(tables + 8, 5);
        guest.put(tables + 16, direct(strtab));
        guest.put(tables + 24, direct(typetab));
        guest.ram[strtab as usize..][..23].copy_from_slice(b"\0late\0early\0.L1\0extern\0");
        guest.ram[typetab as usize..][..5].copy_from_slice(b"?tdtU");
        for (n, (name, section, at)) in
            [(1, 2, 0x80), (6, 3, 0x40), (12, 2, 0x10), (16, 0, 0x20)].iter().enumerate()
        {
            let entry = symtab + 24 * (n as u64 + 1);
            guest.put(entry, name | section << 48);
            guest.put(entry + 8, base + at);
        }
        let memory = guest.memory();
        assert_eq!(guest.linux.modules(&memory), Ok(vec![Va(direct(module))]));
        let found = guest.linux.module(&memory, Va(direct(module))).expect("a module");
        assert_eq!(found.name, "test");
        let symbols: Vec<_> =
            found.symbols.iter().map(|s| (s.va.0 - base, s.kind, s.name.as_str())).collect();
        assert_eq!(symbols, [(0x40, 'd', "early"), (0x80, 't', "late")]);
        let mut regions: Vec<_> =
            found.regions.iter().map(|r| (r.range.start - base, r.text, r.data)).collect();
        regions.sort_unstable();
        assert_eq!(regions, [(0, true, false), (0x1000, false, false), (0x3000, false, true)]);

        guest.put32(tables + 8, u32::MAX);
        assert!(guest.linux.module(&guest.memory(), Va(direct(module))).is_err());
    }
}

#[test]
fn static_roots_are_the_guests() {
    let guest = Guest::new(Era::Flags);
    let memory = guest.memory();
    let roots = guest.linux.static_roots(&memory).expect("roots");
    let found: Vec<_> = roots.iter().map(|r| (r.name.as_str(), r.range.start)).collect();
    assert_eq!(found, [("data", guest.symbol("_sdata")), ("bss", guest.symbol("__bss_start"))]);
}

#[test]
fn records_of_an_in_kernel_kmemleak_are_no_roots() {
    let bss = |guest: &Guest| {
        let roots = guest.linux.static_roots(&guest.memory()).expect("roots");
        roots.into_iter().find(|root| root.name == "bss").expect("a .bss").parts()
    };
    let guest = Guest::new(Era::Flags);
    let (start, end) = (guest.symbol("__bss_start"), guest.symbol("__bss_stop"));
    let (pool, behind) = (guest.symbol("mem_pool"), guest.symbol("mem_pool_free_count"));
    assert_eq!(bss(&guest), [start..pool, behind..end]);
    // Another's pool of that name.
    let guest = Guest::without(Era::Flags, "mem_pool_free_count").expect("a guest");
    assert_eq!(bss(&guest), [start..end]);
}

/// Ranges of addresses.
type Spans = &'static [(u64, u64)];

#[test]
fn parts_leave_out_what_is_not_read() {
    let root = |unread: Spans| StaticRoot {
        name: "bss".into(),
        range: Va(0x100)..Va(0x200),
        unread: unread.iter().map(|&(start, end)| Va(start)..Va(end)).collect(),
    };
    let cases: [(Spans, Spans); 4] = [
        (&[], &[(0x100, 0x200)]),
        (&[(0x100, 0x140)], &[(0x140, 0x200)]),
        (&[(0x180, 0x200)], &[(0x100, 0x180)]),
        (
            &[(0x110, 0x140), (0x130, 0x150), (0x160, 0x170)],
            &[(0x100, 0x110), (0x150, 0x160), (0x170, 0x200)],
        ),
    ];
    for (unread, expected) in cases {
        let found: Vec<_> = root(unread).parts().iter().map(|p| (p.start.0, p.end.0)).collect();
        assert_eq!(found, expected, "{unread:x?}");
    }
}
