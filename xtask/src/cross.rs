//! Building for arm64 on another machine, with Debian's compiler, which has that architecture's standard library.

use crate::{build, setup};
use anyhow::{Result, ensure};
use images::host_packages::Purpose;
use std::process::Command;

/// What is built for, as Rust names it.
pub const ARCH: &str = "aarch64";
/// Debian's compiler, whatever comes first in the PATH.
const RUSTC: &str = "/usr/bin/rustc";
const CLIPPY: &str = "/usr/bin/cargo-clippy";

/// `cargo SUBCOMMAND` for arm64.
///
/// # Errors
/// The compiler cannot be installed.
pub fn cargo(subcommand: &str) -> Result<Command> {
    for_arm64(build::cargo(subcommand))
}

fn for_arm64(mut command: Command) -> Result<Command> {
    setup::install(&[Purpose::Arm64])?;
    let target = build::target(ARCH);
    let linker = format!("CARGO_TARGET_{}_LINKER", target.to_uppercase().replace('-', "_"));
    command.args(["--target", &target]).env("RUSTC", RUSTC).env(linker, "aarch64-linux-gnu-gcc");
    Ok(command)
}

/// `cargo xtask lint`: clippy on everything, for this machine and for arm64. What is only for the other architecture is
/// looked at by nothing else.
pub fn lint() -> Result<()> {
    let mut all = vec![build::cargo("clippy")];
    if std::env::consts::ARCH != ARCH {
        let mut clippy = Command::new(CLIPPY);
        build::in_tree(&mut clippy).env("CARGO", env!("CARGO")).arg("clippy");
        all.push(for_arm64(clippy)?);
    }
    for mut clippy in all {
        clippy.args(["--workspace", "--all-targets", "--", "-D", "warnings"]);
        let status = clippy.status();
        ensure!(status.is_ok_and(|status| status.success()), "clippy is not content");
    }
    Ok(())
}
