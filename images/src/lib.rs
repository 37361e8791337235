//! Guest kernels, initramfs, kernel modules and lab images: recipes that fetch or build them.

pub mod built;
pub mod cache;
mod command;
pub mod cpio;
pub mod debian;
pub mod host_packages;
pub mod initramfs;
pub mod kernel;
#[cfg(feature = "lab")]
pub mod lab;
pub mod leaky;
pub mod module_file;
pub mod modules;
pub mod programs;
pub mod source;

pub use built::Built;
pub use cache::Cache;
pub use kernel::KernelPackage;
