//! Damage that is made to be slow, on a synthetic guest: an error with an address, within a second.

use super::synthetic::*;
use crate::memory::{MemoryError, PAGE_SIZE, Va};
use std::time::{Duration, Instant};

/// A command on a damaged guest answers in a second; what is hardly optimised gets more.
const PATIENCE: Duration = Duration::from_secs(if cfg!(debug_assertions) { 5 } else { 1 });

/// Calls `read` and checks that it finds damage in time.
fn damaged<T: std::fmt::Debug>(read: impl FnOnce() -> Result<T, MemoryError>) -> MemoryError {
    let begin = Instant::now();
    let error = read().expect_err("damage");
    assert!(begin.elapsed() < PATIENCE, "{:?} for {error}", begin.elapsed());
    error
}

#[test]
fn every_shape_of_a_broken_list_is_told_with_an_address() {
    let nodes: Vec<u64> = (0..3000).map(|n| HEAP + 64 * n).collect();
    let (first, last) = (nodes[0], nodes[nodes.len() - 1]);
    let shapes = [
        ("itself", last, direct(last)),
        ("a long cycle", last, direct(first)),
        ("a cycle far behind the head", last, direct(nodes[1700])),
        ("nothing", last, 0),
        ("where nothing is mapped", last, 0xffff_dead_0000_0100),
        ("no address at all", last, 0xdead_0000_0000_0100),
        ("user space", first, 0x7ffd_0000_1000),
    ];
    for era in [Era::Flags, Era::Types] {
        for (name, at, next) in shapes {
            let mut guest = Guest::new(era);
            for list in ["slab_caches", "modules"] {
                guest.list_at(list, &nodes);
            }
            guest.put(at, next);
            let memory = guest.memory();
            for error in [
                damaged(|| guest.linux.modules(&memory)),
                damaged(|| guest.linux.caches(&memory)),
                damaged(|| guest.linux.slab_map(&memory)),
            ] {
                assert!(error.to_string().contains("0x"), "{name}: {error}");
            }
        }
    }
}

/// Every leader's threads are those of one process: as many steps as leaders times threads.
#[test]
fn leaders_that_share_their_threads_end_soon() {
    const MANY: u64 = 16 << 10;
    let mut guest = Guest::new(Era::Types);
    let (signal, leaders, threads) = (HEAP, HEAP + 0x1_0000, HEAP + 0x10_0000);
    // Closer together than real ones: only their links matter.
    let leader = |n: u64| leaders + 32 * n;
    let thread = |n: u64| threads + 16 * n;
    let links: Vec<u64> = (0..MANY).map(|n| leader(n) + 48).collect();
    guest.list(Guest::init_task() + 48, &links);
    guest.list(signal, &(0..MANY).map(thread).collect::<Vec<_>>());
    (0..MANY).for_each(|n| guest.put(leader(n) + 64, direct(signal)));
    let memory = guest.memory();
    let error = damaged(|| guest.linux.tasks(&memory));
    assert!(matches!(error, MemoryError::Corrupt { va, .. } if va == Va(direct(signal))), "{error}");
}

/// More pages on the lists of two CPUs than there are.
#[test]
fn cpus_that_share_their_lists_of_pages_are_damage() {
    let mut guest = Guest::new(Era::Types);
    let (node, pageset) = (HEAP, 0x200);
    guest.set("node_data", direct(node));
    guest.put(node, pageset);
    (0..14).for_each(|list| guest.list(PERCPU + pageset + 16 + 16 * list, &[]));
    let pages: Vec<u64> = (0..RAM / PAGE_SIZE / 2 + 1).map(|n| HEAP + 0x1000 + 16 * n).collect();
    guest.list(PERCPU + pageset + 16, &pages);
    guest.linux.page_map(&guest.memory()).expect("one CPU has them");
    guest.set("nr_cpu_ids", 2);
    guest.set_second("__per_cpu_offset", (DIRECT_MAP + PERCPU).0);
    let memory = guest.memory();
    damaged(|| guest.linux.page_map(&memory));
}
