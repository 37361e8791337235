//! kleak-vmm: a small KVM virtual machine monitor that finds memory leaks in a Linux kernel from outside it.
//!
//! The library is the whole program; the binary only calls [`cli::main`], so that integration tests reach every room.

pub mod arch;
pub mod boot;
pub mod cli;
pub mod console;
pub mod detector;
pub mod devices;
pub mod doctor;
mod files;
pub mod gdb;
pub mod lab;
pub mod machine;
mod meminfo;
pub mod probe;
pub mod regress;
pub mod run;
pub mod saved;
mod scratch;
pub mod top;
pub mod tracer;
