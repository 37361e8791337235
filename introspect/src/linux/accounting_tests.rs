//! The console's accounting on a synthetic guest.

use super::synthetic::*;
use crate::accounting::tasks;
use crate::arch::{CpuState, Registers};
use crate::memory::{MemoryError, Va};

const STACK: u64 = HEAP + 0x8000;

/// Two tasks besides the idle one: a leader that sleeps and a thread that runs.
fn busy() -> Guest {
    let mut guest = Guest::new(Era::Types);
    let init = Guest::init_task();
    let (leader, thread, signal) = (HEAP, HEAP + 0x1000, HEAP + 0x2000);
    guest.task(leader, b"leader", 1, signal);
    guest.put32(leader + 20, 0x402);
    guest.put(leader + 24, direct(STACK));
    guest.put(leader + 32, direct(STACK + 0x3f00));
    guest.task(thread, b"thread", 2, signal);
    guest.put(thread + 24, direct(STACK + 0x4000));
    guest.list(init + 48, &[leader + 48]);
    guest.list(signal, &[leader + 72, thread + 72]);
    guest.put(PERCPU, direct(thread));
    guest
}

fn cpu(sp: u64, user_mode: bool) -> CpuState {
    let registers = Registers::with_sp(sp);
    CpuState { registers, user_mode, online: true, ..CpuState::default() }
}

#[test]
fn tasks_are_listed_with_state_and_stack_in_use() {
    let guest = busy();
    let memory = guest.memory();
    let all = guest.linux.tasks(&memory).expect("tasks");
    let text = |cpu| tasks::table(&guest.linux, &memory, &all, &[cpu]).expect("a table").text();
    let wanted = "\
pid  state  cpu  stack_bytes  comm
  0  R        -            0  swapper/0
  1  I        -          256  leader
  2  R        0           64  thread
";
    assert_eq!(text(cpu(direct(STACK + 0x7fc0), false)), wanted);
    // In user code, and on another stack, nothing of the task's own is in use that could be told.
    for cpu in [cpu(direct(STACK + 0x7fc0), true), cpu(direct(STACK), false)] {
        assert_eq!(text(cpu), wanted.replace(" 64  ", "  0  "));
    }
    let table = tasks::table(&guest.linux, &memory, &all, &[cpu(direct(STACK + 0x7fc0), false)]);
    let rows = table.expect("a table").json();
    assert_eq!((&rows[0]["cpu"], &rows[2]["cpu"]), (&serde_json::Value::Null, &serde_json::json!(0)));
}

#[test]
fn a_cpu_without_memory_is_an_error_with_its_address() {
    let mut guest = busy();
    guest.set("__per_cpu_offset", (VMALLOC + 0x1000).0);
    let memory = guest.memory();
    let task = guest.linux.task(&memory, Va(direct(HEAP))).expect("a task");
    let error = tasks::table(&guest.linux, &memory, &[task], &[cpu(0, false)]);
    assert_eq!(error, Err(MemoryError::NotMapped { va: VMALLOC + 0x1000 }));
}
