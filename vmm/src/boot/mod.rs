//! From an unpacked kernel image to guest memory that its first instruction finds as it wants it.
//!
//! `load` checks the configuration against the image, places everything, and says how the boot vCPU must start.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{Loaded, load};
