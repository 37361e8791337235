//! `kleak-vmm doctor`.

use anyhow::Context;

use super::{DoctorOptions, ExitCode, print};
use crate::doctor::{Report, Runs};
use crate::lab;

/// Prints what this host can do. Exit code 4 when no guest runs here, not even in the lab.
///
/// # Errors
/// The lab is to be prepared and cannot be. An unfit host is the answer, not an error.
pub fn doctor(options: &DoctorOptions) -> anyhow::Result<ExitCode> {
    if let Some(lab) = options.prepare_lab {
        lab::prepare(lab)?;
    }
    let report = Report::make();
    if options.json {
        let json = serde_json::to_string(&report).context("Cannot write the report as JSON")?;
        print(&format!("{json}\n"))?;
    } else {
        print(&report.to_string())?;
    }
    Ok(if report.verdict.runs == Runs::Nowhere { ExitCode::Host } else { ExitCode::Success })
}
