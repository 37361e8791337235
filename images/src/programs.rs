//! Small static programs for the guest, compiled from `images/programs`.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{Cache, workspace};
use crate::command::run;

/// All of them.
pub const ALL: [&str; 3] = ["blocked", "bustle", "io_uring_setup"];

/// The program `name`, from `images/programs/NAME.c`.
///
/// # Errors
/// There is no such source, it does not compile, or there is no compiler.
pub fn build(cache: &Cache, name: &str) -> Result<PathBuf> {
    let source = workspace().join("images/programs").join(format!("{name}.c"));
    let text = std::fs::read(&source).with_context(|| format!("Cannot read {}", source.display()))?;
    let built = cache.entry(&format!("program-{name}"), &text, |folder| {
        let mut command = Command::new("gcc-12");
        command.args(["-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Werror", "-static", "-s", "-o"]);
        command.arg(folder.join(name)).arg(&source);
        run(&mut command).map(drop).with_context(|| format!("Cannot build {}", source.display()))
    })?;
    Ok(built.join(name))
}
