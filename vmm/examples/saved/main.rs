//! How fast scans and traced events are on a machine that was saved, whose file is the argument: one line of JSON for each
//! figure, for `cargo xtask bench`. (No benchmark to cargo, for which it would compile everything once more.)

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64 as platform;
#[cfg(target_arch = "x86_64")]
use x86_64 as platform;

use anyhow::{Context, Result, ensure};
use guest_profiles::hooks::Role;
use introspect::arch::Registers;
use introspect::linux::tasks::Task;
use introspect::memory::{FrozenMemory, PhysicalMemory, Va};
use introspect::registry::{Kind, Object, Registry};
use introspect::scan::{ScanInput, ScanResult, scan};
use introspect::unwind::SleepingFrame;
use kleak_vmm::detector::Detector;
use kleak_vmm::saved::{Opening, open};
use kleak_vmm::tracer::Moment;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Best of so many.
const ROUNDS: usize = 7;
/// Pairs of events of a round.
const EVENTS: usize = 200_000;

fn main() -> Result<()> {
    let file = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    let file = file.context("Name a file that snapshot=FILE saved")?;
    let opened = open(file.as_ref(), &Opening::default()).with_context(|| format!("Cannot open {file}"))?;
    scans(&opened.detector)?;
    let chosen = events(&opened.detector)?;
    for (name, seconds) in platform::by_ring(&opened.detector, &chosen)? {
        say(&format!("event_cost, {name}"), seconds / EVENTS as f64 * 1e9, "ns");
    }
    Ok(())
}

fn say(name: &str, value: f64, unit: &str) {
    println!("{{\"name\":\"{name}\",\"value\":{value},\"unit\":\"{unit}\"}}");
}

fn fastest(rounds: impl Iterator<Item = Duration>) -> f64 {
    rounds.map(|duration| duration.as_secs_f64()).fold(f64::INFINITY, f64::min)
}

fn scans(detector: &Detector) -> Result<()> {
    detector.look(|input| {
        let read = fastest((0..ROUNDS).map(|_| {
            let start = Instant::now();
            black_box(sum(input.memory));
            start.elapsed()
        }));
        let ram: u64 = input.memory.ranges().iter().map(|range| range.len).sum();
        say("machine, memory", ram as f64, "bytes");
        say("machine, objects", input.registry.len() as f64, "count");
        let bytes = input.registry.memory() as f64 / input.registry.len() as f64;
        say("machine, bytes_per_object", bytes, "bytes");
        say("machine, read_bandwidth", ram as f64 / read, "bytes/s");
        let mut found = None;
        let all = std::thread::available_parallelism()?.get();
        let mut bandwidth = Vec::new();
        for threads in if all > 1 { vec![1, all] } else { vec![1] } {
            let results: Vec<_> =
                (0..ROUNDS).map(|_| scan(&ScanInput { threads, ..*input })).collect::<Result<_>>()?;
            let mark = fastest(results.iter().map(|result| result.mark));
            let whole = fastest(results.iter().map(|r| r.prepare + r.mark + r.graph));
            let outcome = |r: &ScanResult| (r.leaks.len(), r.candidates, r.bytes_scanned);
            let first = *found.get_or_insert(outcome(&results[0]));
            ensure!(results.iter().all(|result| outcome(result) == first), "Scans of one machine differ");
            let name = if threads == 1 { "one thread" } else { "all threads" };
            let speed = first.2 as f64 / mark;
            bandwidth.push(speed);
            say(&format!("machine, scan_bandwidth, {name}"), speed, "bytes/s");
            say(&format!("machine, scan_bandwidth_over_read, {name}"), speed * read / ram as f64, "ratio");
            say(&format!("machine, mark, {name}"), mark * 1e3, "ms");
            say(&format!("machine, scan, {name}"), whole * 1e3, "ms");
        }
        if let Some((_, candidates, bytes)) = found {
            say("machine, candidates", candidates as f64 / (bytes as f64 / 8.0), "ratio");
        }
        if let [one, many] = bandwidth[..] {
            say("machine, scan_speedup", many / one, "ratio");
            let shared = fastest((0..ROUNDS).map(|_| {
                let start = Instant::now();
                black_box(sum_by(input.memory, all));
                start.elapsed()
            }));
            say("machine, read_speedup", read / shared, "ratio");
        }
        Ok(())
    })
}

/// Adds all words up.
fn sum(memory: &impl FrozenMemory) -> u64 {
    let ranges =
        memory.ranges().iter().filter_map(|range| memory.slice(range.start, range.len as usize).ok());
    let words = ranges.flat_map(|bytes| bytes.as_chunks::<8>().0.iter());
    words.fold(0, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)))
}

/// The same by so many threads, each a part of it.
fn sum_by(memory: &(impl FrozenMemory + Sync), threads: usize) -> u64 {
    let ranges = memory.ranges().iter().filter_map(|r| memory.slice(r.start, r.len as usize).ok());
    let all: Vec<&[[u8; 8]]> = ranges.map(|bytes| bytes.as_chunks::<8>().0).collect();
    let part = |n: usize| {
        let words =
            all.iter().flat_map(|words| &words[words.len() * n / threads..words.len() * (n + 1) / threads]);
        words.fold(0_u64, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)))
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|n| scope.spawn(move || part(n))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).fold(0, u64::wrapping_add)
    })
}

/// What a free and an allocation cost the machine monitor from the vCPU's exit on, on stacks that tasks really had.
fn events(detector: &Detector) -> Result<Vec<Object>> {
    let (stacks, objects) = detector.look(|input| Ok((stacks(input)?, objects(input.registry))))?;
    ensure!(!stacks.is_empty() && !objects.is_empty(), "nobody sleeps, or nothing is allocated");
    let recorder = &detector.parts().recorder;
    let step = (objects.len() / 2 + 1) | 1;
    let chosen: Vec<Object> = (0..EVENTS).map(|n| objects[n * step % objects.len()]).collect();
    let victims: Vec<Va> = chosen.iter().map(|object| object.address).collect();
    let (mut free, mut alloc) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for (n, victim) in victims.iter().enumerate() {
            let registers = platform::with_argument(&stacks[n % stacks.len()], victim.0);
            recorder.entered(Role::Free, 0, &registers, Moment::Now { cpu: 0 });
        }
        let freed = start.elapsed();
        for (n, victim) in victims.iter().enumerate() {
            let registers = platform::with_result(&stacks[n % stacks.len()], victim.0);
            recorder.returned(Role::SlabAlloc, &registers, Moment::Now { cpu: 0 });
        }
        free = free.min(freed.as_secs_f64());
        alloc = alloc.min((start.elapsed() - freed).as_secs_f64());
    }
    let state = recorder.state();
    let registry = &state.registry;
    let depths =
        victims.iter().filter_map(|&victim| Some(registry.stacks.get(registry.get(victim)?.stack).len()));
    let (count, frames) = depths.fold((0, 0), |(count, frames), depth| (count + 1, frames + depth));
    ensure!(count == EVENTS, "{count} of {EVENTS} objects are live again");
    say("event_cost, allocation", alloc / EVENTS as f64 * 1e9, "ns");
    say("event_cost, free", free / EVENTS as f64 * 1e9, "ns");
    say("event_cost, frames", frames as f64 / EVENTS as f64, "count");
    Ok(chosen)
}

/// Registers of CPUs that would be where tasks sleep.
fn stacks<M: FrozenMemory>(input: &ScanInput<'_, M>) -> Result<Vec<Registers>> {
    let linux = input.linux;
    let types = linux.kernel.types.as_ref().context("The kernel has no BTF")?;
    let frame =
        SleepingFrame::recover(types, &linux.kernel.symbols).context("Nobody knows how tasks sleep")?;
    let sleeping = linux.tasks(input.memory)?.into_iter().filter(|task| !task.on_cpu && task.stack != Va(0));
    let start = |task: &Task| frame.start(task, linux.placement.slide, linux.word_reader(input.memory));
    let starts = sleeping.filter_map(|task| start(&task)).filter(|start| !start.exact);
    Ok(starts.map(|start| platform::asleep(&start)).collect())
}

fn objects(registry: &Registry) -> Vec<Object> {
    registry.objects().filter(|object| object.kind == Kind::Slab).collect()
}
