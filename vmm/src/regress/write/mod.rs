//! Results as files: each form by the file's ending, each file whole or not at all.

mod html;
mod junit;
mod plot;
mod sarif;
mod text;

pub use html::html;
pub use junit::junit;
pub use sarif::sarif;
pub use text::{line, text};

use super::result::Results;
use crate::cli::Failure;
use crate::files::write_whole;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Writes the results to all of these files.
///
/// # Errors
/// A file cannot be written: exit code 2. The others are.
pub fn all(results: &Results, files: &[PathBuf]) -> Result<()> {
    let mut outcome = Ok(());
    for path in files {
        let written = form(results, path).and_then(|text| whole(path, &text));
        outcome = outcome.and(written);
    }
    outcome
}

fn form(results: &Results, path: &Path) -> Result<String> {
    Ok(match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => serde_json::to_string_pretty(results).context("Cannot write results as JSON")? + "\n",
        Some("xml") => junit(results)?,
        Some("sarif") => format!("{:#}\n", sarif(results)),
        Some("html" | "htm") => html(results),
        _ => text(results),
    })
}

/// Writes a file.
///
/// # Errors
/// Exit code 2: no place to write to, or no room.
pub fn whole(path: &Path, text: &str) -> Result<()> {
    let failure = || {
        Failure::usage(format!("Cannot write {}", path.display()))
            .hint("check the path, and the room on its disk")
    };
    write_whole(path, text).with_context(failure)
}

#[cfg(test)]
mod tests;
