//! The reports of the last scan, where the user wants them.

use crate::cli::options::{ReportFormat, Reports};
use crate::cli::{Failure, print};
use crate::console::Target;
use crate::detector::Detector;
use crate::files::write_whole;
use crate::regress::{Form, Looked, of_report};
use anyhow::{Context, Result};
use std::path::Path;

/// Writes them, text on standard output where none was asked for, and a summary line unless `quiet`. `looked` is for the
/// forms of CI systems.
///
/// # Errors
/// A file cannot be written.
pub fn write(detector: &Detector, reports: &Reports, quiet: bool, looked: &Looked<'_>) -> Result<()> {
    let reports = &reports.0;
    if detector.scans() == 0 {
        if !reports.is_empty() {
            eprintln!("kleak-vmm: warning: Nothing was scanned, so no report was written");
        }
        return Ok(());
    }
    if reports.is_empty() {
        print(&detector.report_text()?)?;
    }
    for report in reports {
        let form = |form| of_report(&detector.report_json()?, looked, form);
        let text = match report.format {
            ReportFormat::Text => detector.report_text()?,
            ReportFormat::Json => format!("{:#}\n", detector.report_json()?),
            ReportFormat::Junit => form(Form::Junit)?,
            ReportFormat::Sarif => form(Form::Sarif)?,
            ReportFormat::Html => form(Form::Html)?,
        };
        if report.path == Path::new("-") {
            print(&text)?;
        } else {
            write_file(&report.path, &text)?;
        }
    }
    if !quiet {
        eprintln!("kleak-vmm: {}", detector.summary());
    }
    Ok(())
}

/// Writes one of them.
///
/// # Errors
/// As [`write()`].
pub fn write_file(path: &Path, text: &str) -> Result<()> {
    let failure = || Failure::usage(format!("Cannot write report {}", path.display())).hint("check --report");
    write_whole(path, text).with_context(failure)
}
