//! `cargo xtask build`: the release binary, static, so that the lab can run it.

use crate::cross;
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::env::consts::ARCH;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Options of `cargo xtask build`.
#[derive(Args)]
pub struct Options {
    /// Also the binary for arm64, which `--lab arm` needs beside the other
    #[arg(long)]
    arm64: bool,
}

/// Builds what is asked for and prints where it is.
pub fn run(options: &Options) -> Result<()> {
    let own = binary()?;
    println!("{}", own.display());
    if options.arm64 {
        println!("{}", beside(&own)?.display());
    }
    Ok(())
}

/// Builds `kleak-vmm` and returns where it is.
///
/// # Errors
/// It does not compile.
pub fn binary() -> Result<PathBuf> {
    let mut cargo = cargo("build");
    cargo.args(["--package", "kleak-vmm", "--target", &target(ARCH)]);
    finish(&mut cargo, ARCH, "kleak-vmm")
}

/// The same for one of its examples.
///
/// # Errors
/// It does not compile.
pub fn example(name: &str) -> Result<PathBuf> {
    let mut cargo = cargo("build");
    cargo.args(["--package", "kleak-vmm", "--example", name, "--target", &target(ARCH)]);
    finish(&mut cargo, ARCH, &format!("examples/{name}"))
}

/// Builds the binary for arm64 and puts it beside `own`, which may be for arm64 itself.
///
/// # Errors
/// It does not compile, or its tools cannot be installed.
pub fn beside(own: &Path) -> Result<PathBuf> {
    if ARCH == cross::ARCH {
        return Ok(own.to_owned());
    }
    let mut cargo = cross::cargo("build")?;
    cargo.args(["--package", "kleak-vmm"]);
    let built = finish(&mut cargo, cross::ARCH, "kleak-vmm")?;
    let place = own.with_file_name(format!("kleak-vmm-{}", cross::ARCH));
    // One that runs in a lab just now keeps its file.
    let work = place.with_extension("part");
    fs::copy(&built, &work)
        .and_then(|_| fs::rename(&work, &place))
        .with_context(|| format!("Cannot write {}", place.display()))?;
    Ok(place)
}

/// `cargo SUBCOMMAND` of this source tree, which builds where this program looks for it.
pub fn cargo(subcommand: &str) -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    in_tree(&mut cargo).arg(subcommand);
    cargo
}

/// Has a command of cargo's do its work in this source tree, as [`cargo`] does.
pub fn in_tree(command: &mut Command) -> &mut Command {
    command.current_dir(images::cache::workspace()).env("CARGO_TARGET_DIR", images::cache::target())
}

/// An architecture's glibc target; naming it keeps the flags away from build scripts and macros.
pub fn target(arch: &str) -> String {
    format!("{arch}-unknown-linux-gnu")
}

/// Has cargo build what it was told for release, static; where `place` is then.
fn finish(cargo: &mut Command, arch: &str, place: &str) -> Result<PathBuf> {
    let target = target(arch);
    let flags = format!("target.{target}.rustflags=[\"-C\",\"target-feature=+crt-static\"]");
    let status = cargo.args(["--release", "--config", &flags]).status().context("Cannot run cargo")?;
    ensure!(status.success(), "{place} does not compile for {arch}");
    let binary = images::cache::target().join(target).join("release").join(place);
    std::path::absolute(&binary).with_context(|| format!("Cannot find {}", binary.display()))
}
