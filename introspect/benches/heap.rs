//! Registry and scan on a synthetic heap of a million objects: one line of JSON for each figure.
//!
//! The heap is harder than a kernel's: its references know no locality, so that every object comes from memory, and one
//! word of eight is one.

use introspect::memory::Va;
use introspect::registry::{AllocEvent, Kind, MAX_FRAMES, Registry};
use introspect::scan::index::{Block, Index};
use introspect::scan::mark::{Contents, Marker};
use std::collections::VecDeque;
use std::hint::black_box;

const OBJECTS: usize = 1_000_000;
const DIRECT: u64 = 0xffff_8880_0000_0000;
/// Memory that is read as roots; one word of 64 is a reference.
const ROOTS: usize = 64 << 20;
/// Sizes of objects, by how many of sixteen have them: most objects of a kernel are small, most bytes in large ones.
const SIZES: [u64; 16] = [64, 64, 96, 128, 192, 192, 256, 512, 512, 1024, 1024, 2048, 4096, 4096, 8192, 8192];
/// Places of a kernel that allocate. Nine of ten events come from a hundredth of them.
const STACKS: usize = 20_000;
/// Places that were freed and are not taken yet: an allocator's caches and partial slabs.
const VACANT: u64 = 1000;
/// Events are made up before they are measured, so many at a time.
const BURST: usize = 10_000;
const BURSTS: usize = 100;
/// Best of so many.
const ROUNDS: usize = 3;

/// `heap` and `registry`, or those named on the command line.
fn main() {
    let named: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wanted = |name: &str| named.is_empty() || named.iter().any(|one| one == name);
    if wanted("heap") {
        read_bandwidth_and_scan(&Heap::new());
    }
    if wanted("registry") {
        registry();
    }
}

fn say(name: &str, value: f64, unit: &str) {
    println!("{{\"name\":\"{name}\",\"value\":{value},\"unit\":\"{unit}\"}}");
}

/// Seconds of processor time that the fastest of [`ROUNDS`] takes: what else runs on the machine shall not count.
fn fastest(mut work: impl FnMut()) -> f64 {
    let seconds = (0..ROUNDS).map(|_| {
        let start = processor_time();
        work();
        processor_time() - start
    });
    seconds.fold(f64::INFINITY, f64::min)
}

/// Seconds that this thread has had a processor.
fn processor_time() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a place for the answer.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Splitmix64: the same heap in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// Memory of the direct map: roots, then slabs.
struct Heap {
    bytes: Vec<u8>,
    blocks: Vec<Block>,
}

impl Heap {
    /// Slabs of eight pages of one size each. In a random order every object refers to four later ones, and one word of
    /// eight to any; of the others half are zero, and the rest counters and text.
    fn new() -> Self {
        let mut numbers = Numbers(1);
        let mut blocks = Vec::with_capacity(OBJECTS);
        let mut at = DIRECT + ROOTS as u64;
        while blocks.len() < OBJECTS {
            let size = SIZES[numbers.below(SIZES.len())];
            let slab = 8 * 4096_u64.max(size);
            let objects = (0..slab / size).map(|n| Block { start: at + n * size, size });
            blocks.extend(objects.take(OBJECTS - blocks.len()));
            at += slab;
        }
        let mut order: Vec<usize> = (0..OBJECTS).collect();
        for last in (1..OBJECTS).rev() {
            order.swap(last, numbers.below(last + 1));
        }
        let mut words = vec![0; (at - DIRECT) as usize / 8];
        words[..ROOTS / 8].fill_with(|| match numbers.next() % 64 {
            0 => blocks[numbers.below(OBJECTS)].start,
            filler => filler,
        });
        words[0] = blocks[order[0]].start;
        for (place, &object) in order.iter().enumerate() {
            let first = (blocks[object].start - DIRECT) as usize / 8;
            for word in &mut words[first..first + blocks[object].size as usize / 8] {
                *word = match numbers.next() % 16 {
                    0 | 1 => blocks[numbers.below(OBJECTS)].start,
                    2..=9 => 0,
                    10..=12 => numbers.next() % 100_000,
                    _ => numbers.next() | 0x2020_2020_2020_2020,
                };
            }
            for child in 1..=4 {
                words[first + child] = order.get(4 * place + child).map_or(0, |&next| blocks[next].start);
            }
        }
        let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Self { bytes, blocks }
    }
}

impl Contents for Heap {
    fn pieces<'a>(&'a self, va: u64, len: u64, visit: &mut impl FnMut(u64, &'a [u8])) {
        let at = (va - DIRECT) as usize;
        visit(va, &self.bytes[at..at + len as usize]);
    }

    fn whole(&self) -> Vec<(u64, &[u8])> {
        vec![(DIRECT, &self.bytes)]
    }
}

fn read_bandwidth_and_scan(heap: &Heap) {
    let bytes = heap.bytes.len() as f64;
    let read = fastest(|| {
        let words = heap.bytes.as_chunks::<8>().0;
        black_box(words.iter().fold(0_u64, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word))));
    });
    say("read_bandwidth", bytes / read, "bytes/s");
    let direct = DIRECT..DIRECT + bytes as u64;
    let freeze = fastest(|| {
        black_box(Index::new(&heap.blocks, &direct));
    });
    say("index_freeze", freeze * 1e3, "ms");
    let (index, slots) = Index::new(&heap.blocks, &direct);
    let mut marked = 0;
    let mark = fastest(|| {
        let mut marker = Marker::new(&index, heap, &slots, ());
        marker.root(&heap.bytes[..ROOTS]);
        marker.run();
        marked = marker.bytes;
    });
    let all = heap.blocks.iter().map(|block| block.size).sum::<u64>() + ROOTS as u64;
    assert_eq!(marked, all, "every object is reachable");
    say("scan_bandwidth", marked as f64 / mark, "bytes/s");
    say("scan_bandwidth_over_read", marked as f64 / mark / (bytes / read), "ratio");
}

fn registry() {
    let mut numbers = Numbers(2);
    let stacks: Vec<[Va; MAX_FRAMES]> = (0..STACKS)
        .map(|_| std::array::from_fn(|_| Va(0xffff_ffff_8100_0000 + numbers.next() % (16 << 20))))
        .collect();
    // Slabs of a page, as those of kmalloc-192.
    let place_of = |n: u64| Va(DIRECT + n / 21 * 4096 + n % 21 * 192);
    let mut live: Vec<Va> = (0..OBJECTS as u64).map(place_of).collect();
    let mut registry = Registry::default();
    let event = |address, stack: usize| AllocEvent {
        address,
        size: 192,
        kind: Kind::Slab,
        cache: Va(DIRECT + (stack as u64 % 200) * 64),
        comm: *b"bench\0\0\0\0\0\0\0\0\0\0\0",
        pid: 1,
        jiffies: 4_294_892_296,
        stack: &stacks[stack],
    };
    let place = |numbers: &mut Numbers| {
        let rare = numbers.next().is_multiple_of(10);
        numbers.below(if rare { STACKS } else { STACKS / 100 })
    };
    for &address in &live {
        registry.alloc(&event(address, numbers.below(STACKS)));
    }
    say("bytes_per_object", registry.memory() as f64 / OBJECTS as f64, "bytes");
    let mut vacant: VecDeque<Va> = (0..VACANT).map(|n| place_of(OBJECTS as u64 + n)).collect();
    let mut pairs = vec![(Va(0), Va(0), 0); BURST];
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let mut seconds = 0.0;
        for _ in 0..BURSTS {
            // What is freed comes from anywhere; what is allocated has a place that was freed some time before.
            for pair in &mut pairs {
                let victim = &mut live[numbers.below(OBJECTS)];
                vacant.push_back(*victim);
                *victim = vacant.pop_front().expect("a place");
                let old = vacant[vacant.len() - 1];
                *pair = (old, *victim, place(&mut numbers));
            }
            let start = processor_time();
            for &(old, new, stack) in &pairs {
                registry.free(old);
                registry.alloc(&event(new, stack));
            }
            seconds += processor_time() - start;
        }
        best = best.min(seconds);
    }
    say("registry_ops", (BURST * BURSTS) as f64 / best, "pairs/s");
}
