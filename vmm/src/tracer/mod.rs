//! Tracers: how the guest's allocator events come out of the guest.
//!
//! [`breakpoint`] plants traps in the guest's text, one exit each; [`ring`] has jumps take their places while the kernel
//! does not patch that text, to stubs that write events down without an exit. Whatever the mechanism, events end in the [`Recorder`], which
//! knows what a hook's registers mean and keeps the registry.

#[cfg(target_arch = "aarch64")]
mod aarch64;
pub mod breakpoint;
mod bulk;
mod handover;
mod log;
mod origin;
mod recorder;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::ring;
pub use handover::RingStatus;
pub use log::EventLog;
pub use recorder::{Moment, Recorder, State};
#[cfg(target_arch = "x86_64")]
pub use x86_64::ring;
