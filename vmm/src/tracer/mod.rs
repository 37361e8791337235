//! Tracers: how the guest's allocator events come out of the guest.
//!
//! [`breakpoint`] plants traps in the guest's text. Whatever the mechanism, events end in the
//! [`Recorder`], which knows what a hook's registers mean and keeps the registry.

pub mod breakpoint;
mod recorder;

pub use recorder::{Recorder, State};
