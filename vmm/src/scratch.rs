//! A folder for files of the moment, which does not outlive the run: if a signal ended this one at once, the next one removes it.

use crate::cli::Failure;
use anyhow::{Context, Result};
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Begins the folder's name; the process and a number follow.
const PREFIX: &str = "kleak-vmm-";

/// A folder that goes with the value, for this user alone.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one among the system's temporary files.
    ///
    /// # Errors
    /// Exit code 4: there is no place for it.
    pub fn new() -> Result<Self> {
        let parent = std::env::temp_dir();
        remove_stale(&parent);
        Self::within(&parent)
            .with_context(|| Failure::host(format!("Cannot create a folder in {}", parent.display())))
    }

    fn within(parent: &Path) -> io::Result<Self> {
        let mut number = 0;
        loop {
            let path = parent.join(format!("{PREFIX}{}-{number}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                // Another run's of this process, or one of a user who had this id before.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                made => return made.map(|()| Self(path)),
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes this user's folders whose processes are gone. What cannot be removed is in nobody's way.
fn remove_stale(parent: &Path) {
    // SAFETY: no arguments; it cannot fail.
    let user = unsafe { libc::geteuid() };
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split_once('-'));
        let Some(pid) = owner.and_then(|(pid, _)| pid.parse().ok()) else { continue };
        let own = entry.metadata().is_ok_and(|found| found.is_dir() && found.uid() == user);
        if own && is_gone(pid) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Whether there is no process of this id.
fn is_gone(pid: u32) -> bool {
    let Ok(pid @ 1..) = i32::try_from(pid) else { return false };
    // SAFETY: no pointers; signal 0 only asks.
    let there = unsafe { libc::kill(pid, 0) } == 0;
    !there && io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_dead_processes_go_and_others_are_in_nobodys_way() {
        let parent = std::env::temp_dir().join(format!("kleak-scratch-{}", std::process::id()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let own = std::process::id();
        let names = [
            (format!("{PREFIX}{}-0", child.id()), false),
            (format!("{PREFIX}{own}-0"), true),
            (format!("{PREFIX}0-0"), true),
            (format!("{PREFIX}{}-0", u32::MAX), true),
            (format!("{PREFIX}mine-0"), true),
            (format!("kleak-other-{}-0", child.id()), true),
        ];
        for (name, _) in &names {
            fs::create_dir_all(parent.join(name).join("1-1")).unwrap();
        }
        remove_stale(&parent);
        for (name, stays) in &names {
            assert_eq!(parent.join(name).exists(), *stays, "{name}");
        }
        let made = Scratch::within(&parent).unwrap();
        assert_eq!(made.path(), parent.join(format!("{PREFIX}{own}-1")));
        let path = made.path().to_owned();
        drop(made);
        assert!(!path.exists());
        assert_eq!(
            Scratch::within(&parent.join("absent")).err().map(|e| e.kind()),
            Some(ErrorKind::NotFound)
        );
        fs::remove_dir_all(&parent).unwrap();
    }
}
