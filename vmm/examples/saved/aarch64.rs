//! Registers of arm64.

use anyhow::Result;
use introspect::arch::Registers;
use introspect::registry::Object;
use introspect::unwind::Start;
use kleak_vmm::detector::Detector;

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

/// arm64 has no ring.
pub fn by_ring(_: &Detector, _: &[Object]) -> Result<Vec<(&'static str, f64)>> {
    Ok(Vec::new())
}
