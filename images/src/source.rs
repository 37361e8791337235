//! Debian's kernel source: for the oracle kernel, and for upstream's kmemleak test.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cache::Cache;
use crate::command::run;

/// The line of kernels whose source is used.
pub const VERSION: &str = "6.1";

/// Single files of the source in a folder of their own.
///
/// # Errors
/// The source cannot be fetched, or has no such file.
pub(crate) fn files(cache: &Cache, name: &str, paths: &[&str]) -> Result<PathBuf> {
    let package = package(cache)?;
    cache.entry(&format!("source-{name}"), (&package, paths), |folder| {
        let mut command = tar(&package, folder);
        command.args(paths.iter().map(|path| format!("linux-source-{VERSION}/{path}")));
        run(command.arg("--transform=s|.*/||")).map(drop).context("Cannot unpack the kernel's source")
    })
}

/// The whole source tree, 1.4 GB.
///
/// # Errors
/// It cannot be fetched or unpacked.
pub fn tree(cache: &Cache) -> Result<PathBuf> {
    let package = package(cache)?;
    cache.entry(&format!("source-linux-{VERSION}"), &package, |folder| {
        run(tar(&package, folder).arg("--strip-components=1"))
            .context("Cannot unpack the kernel's source")?;
        ensure!(folder.join("Kconfig").is_file(), "The kernel's source package has no Kconfig");
        Ok(())
    })
}

fn package(cache: &Cache) -> Result<PathBuf> {
    let name = format!("linux-source-{VERSION}");
    cache.packages().fetch(&name).with_context(|| format!("Cannot get {name}"))
}

/// Unpacks the source package's archive into `folder`.
fn tar(package: &Path, folder: &Path) -> Command {
    let mut command = Command::new("tar");
    command.arg("-xJf").arg(package.join(format!("usr/src/linux-source-{VERSION}.tar.xz")));
    command.arg("-C").arg(folder);
    command
}
