//! A view of a running Linux guest from outside it.
//!
//! Nothing in this crate knows KVM: it sees guest physical memory
//! ([`memory::PhysicalMemory`]), registers ([`arch::Registers`]) and the guest's
//! kernel image, so all of it runs offline on a saved snapshot too.
//!
//! Data flow, one way: image -> symbols, types, stack tables -> hooks; events -> registry;
//! pause -> roots -> mark -> leaks -> report.

pub mod accounting;
pub mod arch;
pub mod callee_saved;
pub mod hooks;
pub mod image;
pub mod inspect;
#[cfg(test)]
mod instructions;
pub mod kernel;
pub mod linux;
pub mod memory;
pub mod registry;
pub mod report;
pub mod scan;
pub mod symbols;
pub mod types;
pub mod unwind;
pub mod vmcore;
