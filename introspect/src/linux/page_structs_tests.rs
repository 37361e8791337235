//! What `struct page`s keep of former users holds nothing, on a synthetic guest in both generations.

use super::synthetic::*;
use crate::linux::ModuleMap;
use crate::memory::{PAGE_SIZE, Va};
use crate::registry::{AllocEvent, Backtrace, Kind, Registry};
use crate::scan::{CacheTypes, ScanInput, Treatments, path, scan};

/// A large kmalloc of three pages, which has four.
const OBJECT: u64 = HEAP + 0x4_0000;
const FRAME: u64 = OBJECT / PAGE_SIZE;
const PAGES: u64 = 4;
/// Another's frame in the same eight, and one far away.
const NEIGHBOUR: u64 = FRAME + 6;
const STRANGER: u64 = FRAME + 0x40;
/// Members of `struct page` and `struct slab`.
const LINK: u64 = 16;
const FREELIST: u64 = 32;
const PRIVATE: u64 = 40;
/// Of `struct slab`, in place of its free list.
const RCU_HEAD: u64 = 32;

/// What is lost where words of `struct page`s are these: frame, member, value.
fn leaks(era: Era, words: &[(u64, u64, u64)]) -> Vec<u64> {
    let mut guest = guest(era);
    for &(frame, member, value) in words {
        guest.put(Guest::page(frame) + member, value);
    }
    leaks_of(guest)
}

/// A guest in which the frames named are in use.
fn guest(era: Era) -> Guest {
    let mut guest = Guest::new(era);
    for frame in (FRAME..FRAME + PAGES).chain([NEIGHBOUR, STRANGER]) {
        guest.put32(Guest::page(frame) + 48, u32::MAX);
    }
    guest
}

/// What is lost of the one object there is.
fn leaks_of(guest: Guest) -> Vec<u64> {
    let mut registry = Registry::default();
    registry.alloc(&AllocEvent {
        address: DIRECT_MAP + OBJECT,
        size: 3 * PAGE_SIZE,
        kind: Kind::Large,
        cache: Va(0),
        comm: [0; 16],
        pid: 1,
        jiffies: 0,
        stack: Backtrace::Frames(&[]),
    });
    let memory = guest.memory();
    let input = ScanInput {
        linux: &guest.linux,
        memory: &memory,
        registry: &registry,
        cpus: &[],
        modules: &ModuleMap::default(),
        treatments: &Treatments::default(),
        now_jiffies: 1000,
        min_age_ms: 0,
        stack: true,
        slab: true,
        types: &CacheTypes::default(),
        typed: false,
        threads: 1,
    };
    let found = scan(&input).expect("a scan").leaks;
    let held = path(&input, DIRECT_MAP + OBJECT).expect("a path");
    assert_eq!(format!("{held:?}").contains("Lost"), !found.is_empty(), "{held:?}");
    found.into_iter().map(|leak| leak.object.address - DIRECT_MAP).collect()
}

#[test]
fn a_large_kmalloc_is_not_held_by_what_former_users_left() {
    let inside = DIRECT_MAP.0 + OBJECT + 0x1040;
    let structs = PAGE_STRUCTS.0 + FRAME * PAGE_STRUCT;
    let none: &[u64] = &[];
    for era in [Era::Flags, Era::Types] {
        for (name, words, wanted) in [
            ("nothing", vec![], &[OBJECT][..]),
            ("its own free list", vec![(FRAME, FREELIST, inside)], &[OBJECT]),
            ("its own pages' structs", vec![(FRAME, LINK, inside), (FRAME + 3, PRIVATE, structs)], &[OBJECT]),
            ("the free list of its neighbour", vec![(NEIGHBOUR, FREELIST, inside)], &[OBJECT]),
            ("a neighbour's other word", vec![(NEIGHBOUR, PRIVATE, inside)], none),
            ("no free list of that page", vec![(STRANGER, FREELIST, inside)], none),
            ("its struct page", vec![(STRANGER, PRIVATE, structs + 2 * PAGE_STRUCT)], none),
        ] {
            assert_eq!(leaks(era, &words), wanted, "{era:?}: held by {name}");
        }
    }
}

/// In what was queued behind it; a slab in use has other members there, and what they are is no reference.
#[test]
fn a_slab_that_waits_for_a_grace_period_is_a_link() {
    for era in [Era::Flags, Era::Types] {
        let in_slab = |func: Option<&str>| {
            let mut guest = guest(era);
            let page = Guest::page(STRANGER);
            guest.put(page + RCU_HEAD, DIRECT_MAP.0 + OBJECT);
            guest.put(page + RCU_HEAD + 8, func.map_or(0, |name| guest.symbol(name).0));
            match era {
                Era::Flags => guest.put(page, 1 << 9),
                Era::Types => guest.put32(page + 48, 0xf5 << 24),
            }
            leaks_of(guest)
        };
        assert_eq!(in_slab(Some("_stext")), [0; 0], "{era:?}");
        assert_eq!(in_slab(None), [OBJECT], "{era:?}");
        assert_eq!(in_slab(Some("_etext")), [OBJECT], "{era:?}");
    }
}

/// In a page of the kernel's own, as any other, and in one that `kfree_rcu` collects pointers in, wherever it hangs.
#[test]
fn what_kfree_rcu_collected_holds_nothing() {
    for era in [Era::Flags, Era::Types] {
        let page = STRANGER * PAGE_SIZE;
        // The link in the page, and heads: kept for next time, waiting, of the second batch that is being freed.
        let (link, heads) = match era {
            Era::Flags => (8, [168, 16, 40 + 64 + 32]),
            Era::Types => (0, [168, 24, 40 + 64 + 32 + 16]),
        };
        let in_page = |head: Option<u64>| {
            let mut guest = guest(era);
            guest.put(page + 0x100, DIRECT_MAP.0 + OBJECT);
            if let Some(head) = head {
                let link = if head == 168 { 0 } else { link };
                let at = PERCPU + u64::from(KRC) + head;
                guest.put(at, DIRECT_MAP.0 + page + link);
                if era == Era::Types && head != 168 {
                    guest.put(page + link, DIRECT_MAP.0 + at);
                }
            }
            leaks_of(guest)
        };
        assert_eq!(in_page(None), [0; 0], "{era:?}");
        for head in heads {
            assert_eq!(in_page(Some(head)), [OBJECT], "{era:?}: {head}");
        }
    }
}
