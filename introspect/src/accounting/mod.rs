//! What the guest's memory is used for, counted from outside: what the console's accounting commands answer.
//!
//! The readers of structures are in [`crate::linux`]; here their facts become tables, and texts in the layout of the
//! guest's own files in /proc.

pub mod areas;
pub mod calls;
pub mod counters;
pub mod growth;
pub mod kmem;
pub mod processes;
pub mod slabs;
mod table;
pub mod tasks;
pub mod zones;

pub use table::{Cell, Column, Role, Table};
