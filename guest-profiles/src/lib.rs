//! What is known of Linux kernels that no image says.

pub mod annotations;
pub mod counts;
pub mod hooks;
#[cfg(test)]
mod sites;
pub mod types;
