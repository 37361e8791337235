//! Registers of x86-64.

use introspect::arch::Registers;
use introspect::unwind::Start;

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
