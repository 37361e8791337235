//! Instruction caches, which see every write of any CPU.

use crate::machine::GuestRam;
use introspect::memory::Pa;

/// Makes what was written to guest memory at `at` what every CPU executes from there on (Intel SDM volume 3, 8.1.3): it is.
pub fn synchronise_code(_ram: &GuestRam, _at: Pa, _len: usize) {}
