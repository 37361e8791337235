//! A machine saved to a file, to be looked at later: memory and registers as a vmcore that crash and drgn open, too, and
//! behind the memory of a snapshot what only the tracker knows, with the kernel image.
//!
//! ```text
//! detector (saving.rs) -> sink -> file, or through the lab to the host
//! file -> open -> detector on a guest that does not run
//! ```

mod open;
mod sink;
#[cfg(test)]
pub mod tests;

pub use open::{Opened, Opening, open};
pub use sink::Sink;

use crate::detector::HostFacts;
use crate::run::RuleFiles;
use guest_profiles::hooks::Tracked;
use introspect::accounting::growth::{FreedBy, History};
use introspect::arch::CpuState;
use introspect::linux::{ModuleMap, Placement};
use introspect::registry::SavedRegistry;
use introspect::vmcore::fingerprint;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// What the tracker knows of a machine beside its heap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Where the kernel is.
    pub placement: Placement,
    /// Every vCPU.
    pub cpus: Vec<CpuState>,
    /// What was tracked.
    pub tracked: Vec<Tracked>,
    /// Where it ran.
    pub host: HostFacts,
    /// Structure layouts that the kernel image does not have.
    pub types: Option<Vec<u8>>,
    /// Its guest profile and suppressions.
    pub rule_files: RuleFiles,
    /// Scans until then.
    pub scans: u64,
    /// `--min-age`.
    pub min_age_ms: u64,
    /// `--stack`.
    pub stack: bool,
    /// `--typed`.
    pub typed: bool,
}

/// The state as it is written.
pub type Writing<'a> = (&'a Facts, &'a SavedRegistry, &'a ModuleMap, &'a FreedBy, &'a History);
/// The state as it is read.
type Read5 = (Facts, SavedRegistry, ModuleMap, FreedBy, History);

/// What stands in a file for the form of the state: the same only where it is read as it was written.
pub fn format() -> u32 {
    fingerprint::<Read5>()
}

/// True for the beginning of an ELF core of 64 bits.
pub fn is_core(bytes: &[u8]) -> bool {
    const ET_CORE: u8 = 4;
    bytes.starts_with(b"\x7fELF\x02") && bytes.get(16..18) == Some(&[ET_CORE, 0])
}

/// Whether a core may be written to `path`: what is there and is no core is not replaced.
///
/// # Errors
/// It is something else, or cannot be read.
pub fn check_place(path: &Path) -> io::Result<()> {
    // Before it is opened, which can wait for ever, or do things.
    match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Ok(there) if there.is_file() => {}
        Ok(_) => return Err(io::Error::other("it is no regular file")),
        Err(error) => return Err(error),
    }
    let mut beginning = Vec::new();
    File::open(path)?.take(18).read_to_end(&mut beginning)?;
    match beginning.is_empty() || is_core(&beginning) {
        true => Ok(()),
        false => Err(io::Error::other("there is a file of that name which is no core; remove it first")),
    }
}
