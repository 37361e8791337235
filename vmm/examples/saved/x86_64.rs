//! Registers of x86-64, and its ring.

use anyhow::Result;
use guest_profiles::hooks::Role;
use introspect::arch::Registers;
use introspect::hooks::record::{self, Record, Slot};
use introspect::memory::Va;
use introspect::registry::Object;
use introspect::unwind::Start;
use kleak_vmm::detector::Detector;
use kleak_vmm::tracer::Moment;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Those of a CPU that would be where a task sleeps.
pub fn asleep(start: &Start) -> Registers {
    Registers { rip: start.ip.0, rsp: start.sp.0, rbp: start.bp.0, ..Registers::default() }
}

/// With the first argument of a function.
pub fn with_argument(registers: &Registers, argument: u64) -> Registers {
    Registers { rdi: argument, ..*registers }
}

/// With the result of a function.
pub fn with_result(registers: &Registers, result: u64) -> Registers {
    Registers { rax: result, ..*registers }
}

/// Seconds for a free and for an allocation of each of these objects by records of the ring, as stubs would write them on
/// stacks that tasks really had.
pub fn by_ring(detector: &Detector, objects: &[Object]) -> Result<Vec<(&'static str, f64)>> {
    let slots = detector.look(|input| {
        let mut read = input.linux.word_reader(input.memory);
        Ok(crate::stacks(input)?.iter().map(|registers| slot(registers, &mut read)).collect::<Vec<_>>())
    })?;
    let recorder = &detector.parts().recorder;
    let set = |slot: &Slot, at: usize, value: u64| slot[at / 8].store(value, Ordering::Relaxed);
    let (mut free, mut alloc) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..crate::ROUNDS {
        let start = Instant::now();
        for (n, object) in objects.iter().enumerate() {
            let record = Record::new(&slots[n % slots.len()], |_| false);
            let registers = Registers { rdi: object.address.0, ..Registers::default() };
            recorder.entered(Role::Free, 0, &registers, Moment::Past(&record));
        }
        let freed = start.elapsed();
        for (n, object) in objects.iter().enumerate() {
            let slot = &slots[n % slots.len()];
            set(slot, record::CACHE, object.cache.0);
            set(slot, record::OBJECT_SIZE, object.size);
            let record = Record::new(slot, |_| true);
            let word = |at| record.word(at);
            let registers = Registers {
                rip: word(record::RDI),
                rsp: word(record::RSP),
                rbp: word(record::RBP),
                rax: object.address.0,
                ..Registers::default()
            };
            recorder.returned(Role::SlabAlloc, &registers, Moment::Past(&record));
        }
        free = free.min(freed.as_secs_f64());
        alloc = alloc.min((start.elapsed() - freed).as_secs_f64());
    }
    Ok(vec![("allocation by the ring", alloc), ("free by the ring", free)])
}

/// What a stub would have written there; where that is instead of the first argument.
fn slot(registers: &Registers, mut read: impl FnMut(Va) -> Option<u64>) -> Box<Slot> {
    let slot: Box<Slot> = Box::new(std::array::from_fn(|_| AtomicU64::new(0)));
    let set = |at: usize, value: u64| slot[at / 8].store(value, Ordering::Relaxed);
    set(record::RDI, registers.rip);
    set(record::RSP, registers.rsp);
    set(record::RBP, registers.rbp);
    let words = (registers.rsp..).step_by(8).map_while(|at| read(Va(at))).take(record::MAX_WORDS);
    let count = words.enumerate().map(|(n, word)| set(record::STACK + 8 * n, word)).count();
    set(record::WORDS, count as u64);
    slot
}
