//! Where prepared images are kept: a folder of entries, each made once, whole or not at all, also when several
//! processes want it at the same time.

use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::debian::PackageCache;

/// Names the folder for [`Cache::of_workspace`].
pub const FOLDER_VARIABLE: &str = "KLEAK_IMAGES";

/// See the module.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// A cache in `folder`, which is created when first needed.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The cache of this source tree's tools and tests: `$KLEAK_IMAGES`, else `images` in cargo's target folder.
    pub fn of_workspace() -> Self {
        Self::new(named(FOLDER_VARIABLE).unwrap_or_else(|| target().join("images")))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Debian packages, unpacked.
    pub fn packages(&self) -> PackageCache {
        PackageCache::new(self.folder.join("packages"))
    }

    /// The folder of the entry `name`, made by `make` where it is not there yet. `key` stands for everything the
    /// entry is made from: another key is another entry.
    ///
    /// `make` fills the folder it is given, which is moved to its place afterwards: its content must not depend on
    /// where it is.
    ///
    /// # Errors
    /// Those of `make`; and no place to write to.
    pub fn entry(
        &self,
        name: &str,
        key: impl Hash,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let name = entry_name(name, key);
        let place = self.folder.join(&name);
        if place.is_dir() {
            return Ok(place);
        }
        let _lock = self.lock(&name)?;
        if place.is_dir() {
            return Ok(place);
        }
        let work = self.folder.join(format!("{name}.part"));
        // What an interrupted process left.
        if work.exists() {
            fs::remove_dir_all(&work).with_context(|| format!("Cannot remove {}", work.display()))?;
        }
        fs::create_dir_all(&work).with_context(|| format!("Cannot create {}", work.display()))?;
        make(&work)?;
        fs::rename(&work, &place).with_context(|| format!("Cannot move to {}", place.display()))?;
        Ok(place)
    }

    /// The folder of an entry that is there already.
    pub fn find(&self, name: &str, key: impl Hash) -> Option<PathBuf> {
        Some(self.folder.join(entry_name(name, key))).filter(|place| place.is_dir())
    }

    /// Waits for whoever makes the same entry now.
    fn lock(&self, name: &str) -> Result<File> {
        let place = self.folder.join("locks");
        fs::create_dir_all(&place).with_context(|| format!("Cannot create {}", place.display()))?;
        lock_file(&place.join(name))
    }
}

/// Locks a file, which is made when needed, against everybody else who does. The lock goes with the value, and with its
/// process.
pub(crate) fn lock_file(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("Cannot create {}", path.display()))?;
    while let Err(error) = file.lock() {
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error).with_context(|| format!("Cannot lock {}", path.display()));
        }
    }
    Ok(file)
}

fn entry_name(name: &str, key: impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    format!("{name}-{:016x}", hasher.finish())
}

/// The root of the source tree this was built from.
pub fn workspace() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_owned()
}

/// Cargo's target folder of that tree.
pub fn target() -> PathBuf {
    named("CARGO_TARGET_DIR").unwrap_or_else(|| workspace().join("target"))
}

/// The place that an environment variable says, whatever folder this or what it starts runs in; an empty one says nothing.
fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).and_then(|value| std::path::absolute(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("kleak-cache-{name}-{}", std::process::id()))
    }

    #[test]
    fn an_entry_is_made_once_per_key() {
        let folder = scratch("once");
        let cache = Cache::new(&folder);
        let made = AtomicUsize::new(0);
        assert_eq!(cache.find("thing", 1), None);
        let make = |path: &Path| {
            made.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_millis(20));
            Ok(fs::write(path.join("content"), "whole")?)
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let place = cache.entry("thing", 1, make).unwrap();
                    assert_eq!(fs::read_to_string(place.join("content")).unwrap(), "whole");
                });
            }
        });
        assert_eq!(made.load(Ordering::SeqCst), 1);
        assert!(cache.find("thing", 1).is_some() && cache.find("thing", 2).is_none());
        assert_ne!(cache.entry("thing", 2, make).unwrap(), cache.entry("thing", 1, make).unwrap());
        assert_eq!(made.load(Ordering::SeqCst), 2);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_failed_entry_is_not_there_and_can_be_tried_again() {
        let folder = scratch("failed");
        let cache = Cache::new(&folder);
        let fail = |path: &Path| {
            fs::write(path.join("half"), "")?;
            anyhow::bail!("no")
        };
        assert!(cache.entry("thing", "key", fail).is_err());
        let place = cache.entry("thing", "key", |_| Ok(())).unwrap();
        assert!(!place.join("half").exists());
        fs::remove_dir_all(folder).unwrap();
    }
}
