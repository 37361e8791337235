//! Tracers: how the guest's allocator events come out of the guest.
//!
//! [`breakpoint`] plants traps in the guest's text, one exit each; [`ring`] has jumps take their places once that text is
//! final, to stubs that write events down without an exit. Whatever the mechanism, events end in the [`Recorder`], which
//! knows what a hook's registers mean and keeps the registry.

pub mod breakpoint;
mod handover;
mod recorder;
pub mod ring;
mod slots;

pub use recorder::{Moment, Recorder, State};
