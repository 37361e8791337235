//! The reports of the last scan, where the user wants them.

use crate::cli::options::{ReportFormat, ReportSpec, Reports};
use crate::cli::{Failure, print};
use crate::console::Target;
use crate::detector::Detector;
use crate::files::write_whole;
use crate::regress::{Form, Looked, of_report};
use anyhow::{Context, Result};
use serde_json::json;
use std::path::Path;

/// Writes them, text on standard output where none was asked for, and a summary line unless `quiet`. `looked` is for the
/// forms of CI systems.
///
/// # Errors
/// A file cannot be written.
pub fn write(detector: &Detector, reports: &Reports, quiet: bool, looked: &Looked<'_>) -> Result<()> {
    let reports = &reports.0;
    if detector.scans() == 0 || detector.is_off() {
        return without_scan(detector, reports, looked);
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
        put(report, &text)?;
    }
    if !quiet {
        eprintln!("kleak-vmm: {}", detector.summary());
    }
    Ok(())
}

/// What CI systems read has a run that was not scanned, too: as one that failed.
fn without_scan(detector: &Detector, reports: &[ReportSpec], looked: &Looked<'_>) -> Result<()> {
    let looked = Looked { failure: Some(looked.failure.unwrap_or("nothing was scanned")), ..*looked };
    let nothing = json!({ "guest": { "release": detector.release() }, "scan": {}, "groups": [] });
    for report in reports {
        let form = match report.format {
            ReportFormat::Junit => Form::Junit,
            ReportFormat::Sarif => Form::Sarif,
            ReportFormat::Html => Form::Html,
            ReportFormat::Text | ReportFormat::Json => {
                let path = report.path.display();
                eprintln!("kleak-vmm: warning: Nothing was scanned, so the report {path} was not written");
                continue;
            }
        };
        put(report, &of_report(&nothing, &looked, form)?)?;
    }
    Ok(())
}

/// Writes one of them where it belongs.
fn put(report: &ReportSpec, text: &str) -> Result<()> {
    match report.path == Path::new("-") {
        true => print(text),
        false => write_file(&report.path, text),
    }
}

/// Writes one of them.
///
/// # Errors
/// As [`write()`].
pub fn write_file(path: &Path, text: &str) -> Result<()> {
    let failure = || Failure::usage(format!("Cannot write report {}", path.display())).hint("check --report");
    write_whole(path, text).with_context(failure)
}
