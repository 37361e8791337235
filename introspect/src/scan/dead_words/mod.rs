//! Words of a sleeping task's stack that are dead although they lie above the stack pointer: nobody will read them
//! again.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "aarch64")]
pub use aarch64::DeadWords;
#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::DeadWords;
