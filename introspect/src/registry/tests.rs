//! The registry against a naive twin.

use super::*;
use crate::instructions;
use crate::linux::percpu::PercpuChunk;
use crate::linux::slab::{Cache, SlabMap, SlabPage};
use proptest::prelude::*;
use std::collections::BTreeMap;

const BASE: u64 = 0xffff_8880_0000_0000;

fn event(address: u64, size: u64, stack: &[Va]) -> AllocEvent<'_> {
    AllocEvent {
        address: Va(address),
        size,
        kind: Kind::Slab,
        cache: Va(BASE + 0x100),
        comm: *b"insmod\0\0\0\0\0\0\0\0\0\0",
        pid: 77,
        jiffies: 4_294_892_296,
        stack: Backtrace::Frames(stack),
    }
}

#[derive(Debug, Clone)]
enum Step {
    Alloc { slot: u64, size: u64, kind: Kind, pid: i32, jiffies: u64, stack: Vec<u64>, comm: u8 },
    Free { slot: u64 },
    Paint { slot: u64, paint: Paint },
    NoScan { slot: u64 },
    Reported { slot: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let slot = 0..64u64;
    let size =
        prop_oneof![8 => Just(16u64), 1 => 0..9000u64, 1 => Just(u64::from(u32::MAX)), 1 => Just(5 << 32)];
    let kind = prop_oneof![
        8 => Just(Kind::Slab),
        1 => Just(Kind::Large),
        1 => Just(Kind::Vmalloc),
        1 => Just(Kind::Percpu),
        1 => Just(Kind::Ioremap),
        1 => Just(Kind::Vmap)
    ];
    let paint = prop_oneof![Just(Paint::Normal), Just(Paint::Gray), Just(Paint::Black)];
    let stack = proptest::collection::vec(0..20u64, 0..20);
    prop_oneof![
        4 => (slot.clone(), size, kind, 0..1 << 22i32, 0..1u64 << 36, stack, 0..9u8).prop_map(
            |(slot, size, kind, pid, jiffies, stack, comm)| Step::Alloc {
                slot, size, kind, pid, jiffies, stack, comm
            }
        ),
        3 => slot.clone().prop_map(|slot| Step::Free { slot }),
        1 => (slot.clone(), paint).prop_map(|(slot, paint)| Step::Paint { slot, paint }),
        1 => slot.clone().prop_map(|slot| Step::NoScan { slot }),
        1 => slot.prop_map(|slot| Step::Reported { slot }),
    ]
}

/// Some pages, in which slots are 16 bytes apart: most objects have that size, and others overlap them, which a confused
/// tracer may report. A quarter are per-CPU offsets, whose top byte is zero, and a quarter lie askew.
fn address(slot: u64) -> Va {
    let place = slot / 16 * 4096 + slot % 16 * 8;
    match slot % 4 {
        0 | 2 => Va(BASE + place),
        1 => Va(0x3b000 + place),
        _ => Va(BASE + place - 4),
    }
}

/// What the twin keeps: everything, uncompressed.
#[derive(Debug, Clone, PartialEq)]
struct Naive {
    object: Object,
    comm: [u8; 16],
    stack: Vec<Va>,
}

fn view(registry: &Registry, object: Object) -> Naive {
    let comm = registry.comm(object.comm);
    let stack = registry.stacks.get(object.stack).to_vec();
    Naive { object: Object { comm: 0, stack: StackId(0), ..object }, comm, stack }
}

fn apply(registry: &mut Registry, twin: &mut BTreeMap<Va, Naive>, counters: &mut Counters, step: &Step) {
    match step {
        Step::Alloc { slot, size, kind, pid, jiffies, stack, comm } => {
            let stack: Vec<Va> = stack.iter().map(|f| Va(0xffff_ffff_8100_0000 + f)).collect();
            let object = Object {
                address: address(*slot),
                size: *size,
                kind: *kind,
                cache: Va(BASE + u64::from(*comm) * 256),
                comm: 0,
                pid: *pid,
                jiffies: *jiffies,
                stack: StackId(0),
                paint: Paint::Normal,
                no_scan: false,
                reported: false,
                sequence: registry.sequence() + 1,
            };
            registry.alloc(&AllocEvent {
                address: object.address,
                size: *size,
                kind: *kind,
                cache: object.cache,
                comm: [*comm; 16],
                pid: *pid,
                jiffies: *jiffies,
                stack: Backtrace::Frames(&stack),
            });
            counters.allocs += 1;
            let stack = stack[..stack.len().min(MAX_FRAMES)].to_vec();
            let old = twin.insert(object.address, Naive { object, comm: [*comm; 16], stack });
            counters.overwrites += u64::from(old.is_some());
        }
        Step::Free { slot } => {
            let freed = registry.free(address(*slot));
            let expected = twin.remove(&address(*slot));
            assert_eq!(freed.map(|o| view(registry, o)), expected);
            counters.frees += u64::from(expected.is_some());
            counters.unknown_frees += u64::from(expected.is_none());
        }
        Step::Paint { slot, paint } => {
            let known = twin.get_mut(&address(*slot)).map(|n| n.object.paint = *paint).is_some();
            assert_eq!(registry.paint(address(*slot), *paint), known);
        }
        Step::NoScan { slot } => {
            let known = twin.get_mut(&address(*slot)).map(|n| n.object.no_scan = true).is_some();
            assert_eq!(registry.set_no_scan(address(*slot)), known);
        }
        Step::Reported { slot } => {
            registry.set_reported(address(*slot));
            if let Some(n) = twin.get_mut(&address(*slot)) {
                n.object.reported = true;
            }
        }
    }
}

proptest! {
    #[test]
    fn registry_is_a_map_from_address_to_object(steps in proptest::collection::vec(step(), 0..300)) {
        let mut registry = Registry::default();
        let (mut twin, mut counters) = (BTreeMap::new(), Counters::default());
        for step in &steps {
            apply(&mut registry, &mut twin, &mut counters, step);
        }
        prop_assert_eq!(registry.counters, counters);
        prop_assert_eq!(registry.len(), twin.len());
        let all: BTreeMap<Va, Naive> =
            registry.objects().map(|o| (o.address, view(&registry, o))).collect();
        prop_assert_eq!(&all, &twin);
        let order: Vec<Va> = registry.objects().map(|o| o.address).collect();
        prop_assert!(order.windows(2).filter(|w| w[0] > w[1]).count() <= 1, "two ascending runs");
        for naive in twin.values().filter(|naive| naive.object.size > 0) {
            let inside = Va(naive.object.address.0 + (naive.object.size - 1));
            let found = registry.containing(inside).expect("an object contains its own last byte");
            prop_assert!(inside - found.address < found.size);
        }
    }

    #[test]
    fn depot_returns_what_was_stored(stacks in proptest::collection::vec(
        proptest::collection::vec(0..6u64, 0..5), 0..100)) {
        let mut depot = StackDepot::default();
        let stored: Vec<_> = stacks.iter().map(|s| {
            let frames: Vec<Va> = s.iter().map(|&f| Va(f)).collect();
            (depot.intern(&frames), frames)
        }).collect();
        for (id, frames) in &stored {
            prop_assert_eq!(depot.get(*id), frames.as_slice());
            prop_assert_eq!(depot.intern(frames), *id);
        }
        prop_assert!(depot.len() <= stored.len() + 1);
    }
}

#[test]
fn clear_forgets_objects_but_not_backtraces() {
    let mut registry = Registry::default();
    registry.alloc(&event(BASE, 6 << 32, &[Va(1), Va(2)]));
    let object = registry.get(Va(BASE)).unwrap();
    assert_eq!(object.size, 6 << 32);
    registry.clear();
    assert!(registry.is_empty() && registry.get(Va(BASE)).is_none());
    assert_eq!(registry.stacks.get(object.stack), [Va(1), Va(2)]);
    assert_eq!(registry.counters.allocs, 1);
}

#[test]
fn names_beyond_the_last_id_share_the_empty_one() {
    let mut names: Interner<u64, 2> = Interner::default();
    let ids: Vec<u32> = (1..6).map(|n| names.intern(n * 10)).collect();
    assert_eq!(ids, [1, 2, 3, 0, 0]);
    assert_eq!((names.get(2), names.get(0), names.get(9)), (20, 0, 0));
    assert_eq!(names.intern(30), 3);
}

/// One slab page of four 64-byte slots; slots 0, 1 and 3 are allocated.
fn slabs() -> SlabMap {
    let cache = Cache {
        va: Va(BASE + 0x100),
        name: "filp".into(),
        object_size: 56,
        size: 64,
        flags: 0,
        typesafe_by_rcu: false,
        no_leak_trace: false,
    };
    let page =
        SlabPage { cache: 0, start: Va(BASE + 0x1000), objects: 4, allocated: vec![0b1011], sampled: false };
    SlabMap { caches: vec![cache], pages: vec![page], damaged: Vec::new() }
}

#[test]
fn audit_agrees_with_an_exact_registry() {
    let mut registry = Registry::default();
    for slot in [0, 1] {
        registry.alloc(&event(BASE + 0x1000 + slot * 64, 56, &[]));
    }
    let audit = registry.audit(&Truth {
        slabs: Some(&slabs()),
        boot_objects: &[Va(BASE + 0x10c0)],
        ..Truth::default()
    });
    assert_eq!(audit, Audit { tracked: 2, ..Audit::default() });
}

#[test]
fn audit_names_missing_and_stale_objects() {
    let mut registry = Registry::default();
    registry.alloc(&event(BASE + 0x1000, 56, &[]));
    registry.alloc(&event(BASE + 0x1080, 56, &[]));
    registry.alloc(&event(BASE + 0x9000, 56, &[]));
    registry.alloc(&AllocEvent { kind: Kind::Large, ..event(BASE + 0xa000, 9000, &[]) });
    let audit = registry.audit(&Truth { slabs: Some(&slabs()), ..Truth::default() });
    assert_eq!((audit.tracked, audit.missing, audit.stale), (1, 2, 2));
    let named: Vec<_> = audit.examples.iter().map(|m| (m.address.0 - BASE, m.missing)).collect();
    assert_eq!(named, [(0x1040, true), (0x10c0, true), (0x1080, false), (0x9000, false)]);
    assert!(audit.examples.iter().all(|m| m.cache == "filp"));
}

#[test]
fn audit_looks_at_per_cpu_memory() {
    let mut registry = Registry::default();
    let percpu = |cookie, size| AllocEvent { kind: Kind::Percpu, cache: Va(0), ..event(cookie, size, &[]) };
    registry.alloc(&percpu(0x3b000, 8));
    registry.alloc(&percpu(0x3b100, 16));
    let chunk = PercpuChunk {
        cookie: Va(0x3b000),
        copies: vec![Va(BASE), Va(BASE + 0x10000)],
        size: 0x8000,
        allocated: vec![0..8, 8..12],
    };
    let audit = registry.audit(&Truth { percpu: &[chunk], ..Truth::default() });
    assert_eq!((audit.tracked, audit.missing, audit.stale), (1, 1, 1));
    let named: Vec<_> = audit.examples.iter().map(|m| (m.address.0, m.missing, m.cache.as_str())).collect();
    assert_eq!(named, [(0x3b008, true, "(percpu)"), (0x3b100, false, "(percpu)")]);
}

#[test]
fn audit_looks_at_what_vmap_mapped() {
    use crate::linux::vmalloc::{Area, Made};
    let mut registry = Registry::default();
    let area = |page: u64, pages: u64, made| Area {
        start: Va(BASE + page * 4096),
        size: pages * 4096,
        vm: None,
        vmap_area: Va(0),
        flags: 0,
        made,
        frames: Vec::new(),
    };
    // In its area, nowhere, in an area of vmalloc's, twice in a CPU's block, the second across its end, and in the middle
    // of what is one area.
    for (page, pages) in [(1, 2), (4, 1), (6, 1), (11, 2), (17, 2), (21, 1)] {
        let mapped = event(BASE + page * 4096, pages * 4096, &[]);
        registry.alloc(&AllocEvent { kind: Kind::Vmap, ..mapped });
    }
    let areas = [
        area(1, 2, Made::Map),
        area(6, 1, Made::Alloc),
        area(10, 8, Made::Block),
        area(20, 2, Made::MapRam),
        area(30, 1, Made::MapRamOrBlock),
    ];
    let audit = registry.audit(&Truth { areas: Some(&areas), ..Truth::default() });
    assert_eq!((audit.tracked, audit.missing, audit.stale), (2, 1, 4));
    let named: Vec<_> = audit.examples.iter().map(|m| ((m.address.0 - BASE) >> 12, m.missing)).collect();
    assert_eq!(named, [(20, true), (4, false), (6, false), (17, false), (21, false)]);
    assert!(audit.examples.iter().all(|m| m.cache == "(vmap)"));
    assert_eq!(registry.audit(&Truth::default()), Audit::default(), "not tracked, not compared");
}

#[test]
fn audit_looks_at_pages() {
    use crate::linux::pages::{PageMap, Use};
    let mut registry = Registry::default();
    for (page, pages) in [(1, 2), (4, 2), (6, 1)] {
        let block = event(BASE + page * 4096, pages * 4096, &[]);
        registry.alloc(&AllocEvent { kind: Kind::Page, ..block });
    }
    let uses = vec![
        Use::Reserved,
        Use::Kernel,
        Use::Slab,
        Use::User,
        Use::Kernel,
        Use::Free,
        Use::User,
        Use::PageTable,
        Use::Free,
    ];
    let audit = registry.audit(&Truth { pages: Some((&PageMap { uses }, Va(BASE))), ..Truth::default() });
    assert_eq!((audit.tracked, audit.missing, audit.stale), (2, 1, 1));
    let named: Vec<_> = audit.examples.iter().map(|m| (m.address.0 - BASE, m.missing)).collect();
    assert_eq!(named, [(0x7000, true), (0x4000, false)]);
}

/// Pairs of events on a registry of some thousand objects, at some hundred places with 16 frames each.
fn churn(pairs: u64) {
    let mut registry = Registry::default();
    let stacks: Vec<Vec<Va>> = (0..300)
        .map(|place| (0..16).map(|frame| Va(0xffff_ffff_8100_0000 + place * 16 + frame)).collect())
        .collect();
    let place = |number: u64| BASE + number / 21 * 4096 + number % 21 * 192;
    for number in 0..4000 + pairs {
        registry.alloc(&event(place(number), 192, &stacks[(number * 7 % 300) as usize]));
        if number >= 4000 {
            registry.free(Va(place(number - 4000)));
        }
    }
    assert_eq!((registry.len(), registry.counters.frees), (4000, pairs));
}

/// In the profile of tests, which optimises little: 2,400 when this was written.
#[test]
fn an_allocation_and_a_free_take_few_instructions() {
    let name = "registry::tests::an_allocation_and_a_free_take_few_instructions";
    if let Some(instructions) = instructions::per_item(name, 10_000, churn) {
        println!("{instructions:.0} instructions");
        assert!((50.0..4000.0).contains(&instructions), "{instructions} instructions for a pair");
    }
}

#[test]
fn scan_areas_end_with_their_object_and_stay_inside() {
    let mut registry = Registry::default();
    let event = |address: u64, size: u64| AllocEvent {
        address: Va(address),
        size,
        kind: Kind::Slab,
        cache: Va(1),
        comm: [0; 16],
        pid: 0,
        jiffies: 0,
        stack: Backtrace::Frames(&[]),
    };
    registry.alloc(&event(0x1000, 64));
    registry.add_scan_area(Va(0x1008), 16);
    registry.add_scan_area(Va(0x1030), u64::MAX);
    for (start, size) in [(0x1008, 0), (0x1008, 57), (0x1040, 8), (0x1000, u64::MAX - 1)] {
        registry.add_scan_area(Va(start), size);
    }
    let areas = |registry: &Registry, at: u64| registry.scan_areas().of(Va(at)).map(<[_]>::to_vec);
    assert_eq!(areas(&registry, 0x1000), Some(vec![0x8..0x18, 0x30..0x40]));
    let restored = Registry::restore(&registry.save(), 1 << 20);
    assert_eq!(areas(&restored, 0x1000), Some(vec![0x8..0x18, 0x30..0x40]));
    registry.free(Va(0x1000));
    registry.alloc(&event(0x1000, 32));
    assert_eq!(areas(&registry, 0x1000), None);
    registry.add_scan_area(Va(0x1000), 8);
    registry.alloc(&event(0x1000, 32));
    assert_eq!(areas(&registry, 0x1000), None, "its free was missed");
    for _ in 0..100 {
        registry.add_scan_area(Va(0x1000), 8);
    }
    assert_eq!(
        (areas(&registry, 0x1000).map(|areas| areas.len()), registry.counters.dropped),
        (Some(64), 36)
    );
    registry.clear();
    assert_eq!(areas(&registry, 0x1000), None);
}
