//! The x86-64 machine: what KVM is asked for, the vCPUs' first state, ports, exits.

mod cache;
mod counter;
mod cpuid;
mod debug;
mod exits;
mod hardware;
pub mod layout;
mod platform;
mod registers;
mod setup;
mod trap;

pub use cache::synchronise_code;
pub use counter::counter_khz;
pub use debug::{
    DebugArch, DebugRegisters, DebugStatus, Point, PointKind, debug_registers, reflect_debug,
    set_debug_registers, set_debugging, set_instruction_pointer,
};
pub use exits::ExitRecord;
pub use hardware::Hardware;
pub use platform::Platform;
pub use registers::{
    cpu_state, describe_failure, enable_traps, is_reset, reflect, resumed, set_trap_registers, trap_places,
    trap_registers,
};
pub use setup::{assemble, check_capabilities, has_gigabyte_pages, page_table_levels};
pub use trap::{TRAP_PORT, TrapChoice, TrapInstruction};

/// What the guest calls its console.
pub const CONSOLE: &str = "ttyS0";
/// The guest's serial port to the detector.
pub const GUEST_PORT: &str = "/dev/ttyS1";
/// What kernels it runs, for hints.
pub const KERNELS: &str = "an x86-64 bzImage or vmlinux (arm64 kernels run with --lab arm)";
