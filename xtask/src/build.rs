//! `cargo xtask build`: the release binary, static, so that the lab can run it.

use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::process::Command;

/// The architecture's glibc target; naming it keeps the flags below away from build scripts and macros.
#[cfg(target_arch = "x86_64")]
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds `kleak-vmm` and returns where it is.
///
/// # Errors
/// It does not compile.
pub fn binary() -> Result<PathBuf> {
    build(&["--package", "kleak-vmm"], "kleak-vmm")
}

/// The same for one of its examples.
///
/// # Errors
/// It does not compile.
pub fn example(name: &str) -> Result<PathBuf> {
    build(&["--package", "kleak-vmm", "--example", name], &format!("examples/{name}"))
}

fn build(what: &[&str], place: &str) -> Result<PathBuf> {
    let flags = format!("target.{TARGET}.rustflags=[\"-C\",\"target-feature=+crt-static\"]");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--release", "--target", TARGET, "--config", &flags])
        .args(what)
        .current_dir(images::cache::workspace())
        .status()
        .context("Cannot run cargo")?;
    ensure!(status.success(), "{place} does not compile");
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| images::cache::workspace().join("target"), PathBuf::from);
    let binary = target.join(TARGET).join("release").join(place);
    std::path::absolute(&binary).with_context(|| format!("Cannot find {}", binary.display()))
}
