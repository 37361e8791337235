//! Registry and scan on synthetic heaps of a million objects, and of ten: one line of JSON for each figure.
//!
//! The heap is harder than a kernel's: its references know no locality, so that every object comes from memory, and one
//! word of eight is one.

use introspect::memory::Va;
use introspect::registry::{AllocEvent, Backtrace, Kind, MAX_FRAMES, Registry};
use introspect::scan::index::{Block, Index};
use introspect::scan::mark::{Contents, Marker};
use std::collections::VecDeque;
use std::hint::black_box;
use std::time::Instant;

const OBJECTS: usize = 1_000_000;
/// Of a large machine, spread over so much memory.
const MANY: usize = 10_000_000;
const SPARSE: u64 = 16 << 30;
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

/// `heap`, `sparse` and `registry`, or those named on the command line.
fn main() {
    let named: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wanted = |name: &str| named.is_empty() || named.iter().any(|one| one == name);
    if wanted("heap") {
        let mut numbers = Numbers(1);
        read_bandwidth_and_scan("", &Heap::new(&mut numbers, OBJECTS, &SIZES, 1));
    }
    if wanted("sparse") {
        let (mut numbers, sizes) = (Numbers(1), &SIZES[..8]);
        let bytes: u64 =
            Heap::new(&mut Numbers(1), OBJECTS, sizes, 1).blocks.iter().map(|block| block.size).sum();
        let apart = SPARSE / (bytes * (MANY / OBJECTS) as u64);
        read_bandwidth_and_scan("sparse, ", &Heap::new(&mut numbers, MANY, sizes, apart));
    }
    if wanted("registry") {
        registry();
    }
}

fn say(name: &str, value: f64, unit: &str) {
    println!("{{\"name\":\"{name}\",\"value\":{value},\"unit\":\"{unit}\"}}");
}

/// Seconds that the fastest of [`ROUNDS`] takes, by a clock: by that of the processor's time, where one thread works, so that
/// what else runs on the machine does not count.
fn fastest(clock: impl Fn() -> f64, mut work: impl FnMut()) -> f64 {
    let seconds = (0..ROUNDS).map(|_| {
        let start = clock();
        work();
        clock() - start
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
    memory: Memory,
    blocks: Vec<Block>,
}

/// Zeros of the host's that take no memory before they are written.
struct Memory {
    at: *mut u8,
    len: usize,
}

// SAFETY: once it is filled it is only read.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(len: usize) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping touches nothing that is there.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert!(at != libc::MAP_FAILED, "no {len} bytes of addresses");
        Self { at: at.cast(), len }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: mapped, and written only through `words`.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }

    fn words(&mut self) -> &mut [u64] {
        // SAFETY: mapped, aligned to pages, and borrowed from the only owner.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast(), self.len / 8) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody borrows it any more.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

impl Heap {
    /// Slabs of eight pages of one size each, of which one is where `apart` could be. In a random order every object refers
    /// to four later ones, and one word of eight to any; of the others half are zero, and the rest counters and text.
    fn new(numbers: &mut Numbers, objects: usize, sizes: &[u64], apart: u64) -> Self {
        let mut blocks = Vec::with_capacity(objects);
        let mut at = DIRECT + ROOTS as u64;
        while blocks.len() < objects {
            let size = sizes[numbers.below(sizes.len())];
            let slab = 8 * 4096_u64.max(size);
            let some = (0..slab / size).map(|n| Block { start: at + n * size, size });
            blocks.extend(some.take(objects - blocks.len()));
            at += slab * apart;
        }
        let mut order: Vec<usize> = (0..objects).collect();
        for last in (1..objects).rev() {
            order.swap(last, numbers.below(last + 1));
        }
        let mut memory = Memory::new((at - DIRECT) as usize);
        let words = memory.words();
        words[..ROOTS / 8].fill_with(|| match numbers.next() % 64 {
            0 => blocks[numbers.below(objects)].start,
            filler => filler,
        });
        words[0] = blocks[order[0]].start;
        for (place, &object) in order.iter().enumerate() {
            let first = (blocks[object].start - DIRECT) as usize / 8;
            for word in &mut words[first..first + blocks[object].size as usize / 8] {
                *word = match numbers.next() % 16 {
                    0 | 1 => blocks[numbers.below(objects)].start,
                    2..=9 => 0,
                    10..=12 => numbers.next() % 100_000,
                    _ => numbers.next() | 0x2020_2020_2020_2020,
                };
            }
            for child in 1..=4 {
                words[first + child] = order.get(4 * place + child).map_or(0, |&next| blocks[next].start);
            }
        }
        Self { memory, blocks }
    }
}

impl Contents for Heap {
    fn pieces<'a>(&'a self, va: u64, len: u64, visit: &mut impl FnMut(u64, &'a [u8])) {
        let at = (va - DIRECT) as usize;
        visit(va, &self.memory.bytes()[at..at + len as usize]);
    }

    fn whole(&self) -> Vec<(u64, &[u8])> {
        vec![(DIRECT, self.memory.bytes())]
    }
}

/// All bytes of roots and objects, added up word by word in the order of addresses.
fn sum(heap: &Heap) -> u64 {
    let bytes = heap.memory.bytes();
    let objects = heap.blocks.iter().map(|block| {
        let first = (block.start - DIRECT) as usize;
        &bytes[first..first + block.size as usize]
    });
    let words = std::iter::once(&bytes[..ROOTS]).chain(objects).flat_map(|part| part.as_chunks::<8>().0);
    words.fold(0, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)))
}

fn read_bandwidth_and_scan(of: &str, heap: &Heap) {
    let all = heap.blocks.iter().map(|block| block.size).sum::<u64>() + ROOTS as u64;
    let read = all as f64 / fastest(processor_time, || _ = black_box(sum(heap)));
    say(&format!("{of}read_bandwidth"), read, "bytes/s");
    let direct = DIRECT..DIRECT + heap.memory.len as u64;
    let freeze = fastest(processor_time, || _ = black_box(Index::new(&heap.blocks, &direct)));
    say(&format!("{of}index_freeze"), freeze * 1e3, "ms");
    let (index, slots) = Index::new(&heap.blocks, &direct);
    let mark = |threads| {
        let mut marker = Marker::new(&index, heap, &slots, ());
        marker.share(threads, 2048);
        marker.roots(&[&heap.memory.bytes()[..ROOTS]]);
        marker.run();
        assert_eq!(marker.bytes, all, "all memory is read");
        marker
    };
    let marker = mark(1);
    assert!(heap.blocks.iter().all(|block| marker.is_reached(block.start)), "every object is reachable");
    drop(marker);
    let alone = fastest(processor_time, || drop(mark(1)));
    say(&format!("{of}scan_bandwidth"), all as f64 / alone, "bytes/s");
    say(&format!("{of}scan_bandwidth_over_read"), all as f64 / alone / read, "ratio");
    say(&format!("{of}mark"), alone * 1e3, "ms");
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let begin = Instant::now();
    let elapsed = || begin.elapsed().as_secs_f64();
    let [one, many] = [1, threads].map(|threads| fastest(elapsed, || drop(mark(threads))));
    say(&format!("{of}scan_speedup"), one / many, "ratio");
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
        stack: Backtrace::Frames(&stacks[stack]),
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
