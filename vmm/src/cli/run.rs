//! `kleak-vmm run`.

pub use crate::run::run;
