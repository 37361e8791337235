//! Installs what is missing on a Debian-like machine.

use anyhow::{Context, Result, bail, ensure};
use images::host_packages::{ALL, Purpose};
use std::process::Command;

/// Installs the packages for these purposes, where they are missing.
///
/// # Errors
/// One is missing and cannot be installed: no apt, no network, no root.
pub fn install(purposes: &[Purpose]) -> Result<()> {
    let needed = ALL.iter().filter(|package| purposes.contains(&package.purpose));
    let missing: Vec<_> = needed.filter(|package| !package.is_installed()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    for package in &missing {
        eprintln!("installing {} ({})", package.name, package.reason);
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    if names.iter().any(|name| name.ends_with(":arm64")) {
        // For those there are no lists yet.
        as_root("dpkg", &["--add-architecture", "arm64"])?;
        apt(&["update"])?;
    }
    let install = || apt(&[&["install", "--yes", "--no-install-recommends"], &names[..]].concat());
    if install().is_err() {
        // The package lists may be old or, in a container, absent. One broken third-party source fails this command
        // although Debian's own lists came, so only the installation's result counts.
        let _ = apt(&["update"]);
        install().with_context(|| format!("Cannot install {}", names.join(" ")))?;
    }
    let left: Vec<&str> = missing.iter().filter(|package| !package.is_installed()).map(|p| p.name).collect();
    ensure!(left.is_empty(), "Installed {}, but what it should bring is not there", left.join(" "));
    Ok(())
}

fn apt(arguments: &[&str]) -> Result<()> {
    as_root("apt-get", &[&["--quiet"], arguments].concat())
}

/// Runs a tool of Debian's as root. Its output is shown only when it fails.
fn as_root(tool: &str, arguments: &[&str]) -> Result<()> {
    // SAFETY: no arguments, cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let mut command = if root {
        Command::new(tool)
    } else {
        let mut sudo = Command::new("sudo");
        sudo.arg(tool);
        sudo
    };
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    let output = command
        .output()
        .with_context(|| format!("Cannot run {tool}; xtask installs packages on Debian-like systems only"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let why = said.lines().filter(|line| line.starts_with("E:")).collect::<Vec<_>>().join("; ");
        bail!("{tool} {} failed: {why}", arguments.join(" "));
    }
    Ok(())
}
