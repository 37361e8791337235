//! Where objects keep their reference count: `data/counts.toml`, whose head says what the fields mean.

use anyhow::{Result, ensure};
use serde::Deserialize;

/// One row.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Count {
    /// Name of the slab cache.
    pub cache: String,
    /// Structure that its objects begin with.
    #[serde(rename = "type")]
    pub structure: String,
    /// Dotted path of the count in it.
    pub member: String,
    /// Dotted path of the member that references point to; the object's start when absent.
    pub within: Option<String>,
    /// References that every object counts without a pointer.
    #[serde(default)]
    pub own: u32,
    /// Which objects count one such reference, when not all do.
    pub own_if: Option<OwnIf>,
    /// Lines of the kernel source that count.
    pub source: Vec<String>,
    /// What is counted without a pointer.
    #[serde(default)]
    pub reason: String,
}

/// Objects from which a chain of pointers leads to one of some symbols, or ends.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnIf {
    /// Members that point to the next structure, from the object on; the last points to a symbol, or nowhere.
    pub path: Vec<String>,
    /// Names of variables of the kernel; those that a kernel does not have do not matter.
    #[serde(default)]
    pub symbols: Vec<String>,
    /// A null pointer fits.
    #[serde(default)]
    pub null: bool,
}

impl Count {
    /// Refuses what can match nothing.
    ///
    /// # Errors
    /// A name is empty, or a reference without a pointer without a reason.
    pub(crate) fn check(&self) -> Result<()> {
        let names = [&self.cache, &self.structure, &self.member];
        ensure!(names.iter().all(|name| !name.is_empty()), "A name is empty");
        let own = self.own > 0 || self.own_if.is_some();
        ensure!(!own || !self.reason.is_empty(), "A reference without a pointer needs its reason");
        let leads = |own_if: &OwnIf| !own_if.path.is_empty() && (own_if.null || !own_if.symbols.is_empty());
        ensure!(self.own_if.as_ref().is_none_or(leads), "own_if needs a path and symbols");
        Ok(())
    }
}
