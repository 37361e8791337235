//! From an unpacked kernel image to guest memory that its first instruction finds as it wants it.
//!
//! `load` checks the configuration against the image, places everything, and says how the boot vCPU must start.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "aarch64")]
pub(crate) use aarch64::write_tree;
#[cfg(target_arch = "aarch64")]
pub use aarch64::{Loaded, can_randomise, describe, load, settle};
#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{Loaded, can_randomise, describe, load, settle};

mod random;
