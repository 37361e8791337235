//! Running other programs.

use std::io::ErrorKind;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Lines of a failed program's output that an error carries: a compiler's complaint is longer than one.
const SHOWN_LINES: usize = 12;

/// Runs `command` to its end; its standard output.
///
/// # Errors
/// It is not there (the error names the Debian package that has it, where [`tool_package`] knows), or it fails; then
/// with the end of what it said.
pub(crate) fn run(command: &mut Command) -> Result<Vec<u8>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = match command.output() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let package = tool_package(&program).map_or(String::new(), |p| format!(" (Debian package {p})"));
            bail!("{program} is not on this machine{package}");
        }
        other => other.with_context(|| format!("Cannot run {program}"))?,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = said.lines().collect();
        let tail = lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n");
        bail!("{program} failed ({}): {}", output.status, tail.trim());
    }
    Ok(output.stdout)
}

/// The Debian package a tool of ours comes from.
fn tool_package(program: &str) -> Option<&'static str> {
    let packages = crate::host_packages::ALL.iter();
    packages.filter(|package| package.tools.contains(&program)).map(|package| package.name).next()
}
