//! The ring tracer: its stubs, one by one, and guests that are traced by it.

#[cfg(target_arch = "x86_64")]
mod bulk;
#[cfg(target_arch = "x86_64")]
mod events;
#[cfg(target_arch = "x86_64")]
mod guests;
#[cfg(target_arch = "x86_64")]
mod inside;
#[cfg(target_arch = "x86_64")]
mod paths;
#[cfg(target_arch = "x86_64")]
mod processor;
#[cfg(target_arch = "x86_64")]
mod stubs;
#[cfg_attr(target_arch = "aarch64", path = "aarch64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
mod trials;

use std::process::ExitCode;

fn main() -> ExitCode {
    tests::main(trials::trials())
}
