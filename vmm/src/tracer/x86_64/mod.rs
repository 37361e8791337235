//! x86-64: the ring.

pub mod ring;
mod slots;
