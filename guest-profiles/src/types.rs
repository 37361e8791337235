//! What the objects of slab caches are: `data/types.toml`, whose head says what the fields mean.

use anyhow::{Result, ensure};
use serde::Deserialize;

/// One row.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheType {
    /// Name of the slab cache.
    pub cache: String,
    /// Structure that each of its objects is.
    #[serde(rename = "type")]
    pub structure: String,
    /// Dotted paths of members that hold no pointers although their types could.
    #[serde(default)]
    pub numbers: Vec<String>,
    /// Array at the end of the structure that objects have only the first elements of.
    #[serde(default)]
    pub cut: Option<String>,
    /// Lines of the kernel source that create the cache.
    pub source: Vec<String>,
}

impl CacheType {
    /// Refuses what can match nothing.
    ///
    /// # Errors
    /// A name is empty.
    pub(crate) fn check(&self) -> Result<()> {
        let mut names = [&self.cache, &self.structure].into_iter().chain(&self.numbers).chain(&self.cut);
        ensure!(names.all(|name| !name.is_empty()), "A name is empty");
        Ok(())
    }
}
