//! The x86-64 machine: what KVM is asked for, the vCPUs' first state, ports, exits.

mod counter;
mod cpuid;
mod exits;
pub mod layout;
mod platform;
mod registers;
mod setup;

pub use counter::counter_khz;
pub use exits::{ExitRecord, Next};
pub use platform::Platform;
pub use registers::{
    cpu_state, describe_failure, enable_traps, is_reset, reflect, set_shared_registers, shared_registers,
};
pub use setup::{check_capabilities, create_vcpus, page_table_levels};
