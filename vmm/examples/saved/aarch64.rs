//! Registers of arm64.

use introspect::arch::Registers;
use introspect::unwind::Start;

/// Those of a CPU that would be where a task sleeps.
pub fn asleep(start: &Start) -> Registers {
    let mut registers = Registers { pc: start.ip.0, sp: start.sp.0, ..Registers::default() };
    registers.x[29] = start.fp.0;
    registers.x[30] = start.ip.0;
    registers
}

/// With the first argument of a function.
pub fn with_argument(registers: &Registers, argument: u64) -> Registers {
    with_result(registers, argument)
}

/// With the result of a function, which is where its first argument was.
pub fn with_result(registers: &Registers, result: u64) -> Registers {
    let mut registers = *registers;
    registers.x[0] = result;
    registers
}
