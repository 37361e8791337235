//! From the first instruction to the exit code: periodic scans, the end, the last scan, the reports.

use super::reports;
use crate::cli::options::{RunOptions, ScanTrigger};
use crate::cli::{ExitCode, Failure};
use crate::console::Target;
use crate::detector::Detector;
use crate::machine::{Machine, Outcome};
use crate::regress::Looked;
use anyhow::{Context, Result};
use images::initramfs::{EXEC_EXITED, FAILED};
use std::time::{Duration, Instant};

/// How often the guest's state is looked at.
const STEP: Duration = Duration::from_millis(200);

/// Waits for the machine's end and scans meanwhile as asked. None: time ran out.
pub fn until_end(
    machine: &Machine,
    detector: &Detector,
    options: &RunOptions,
    timeout: Option<Duration>,
) -> Option<Outcome> {
    let deadline = timeout.map(|t| Instant::now() + t);
    let mut last_scan = Instant::now();
    let mut ooms = 0;
    let mut reports = 0;
    loop {
        if let Some(outcome) = machine.wait(Some(STEP)) {
            return Some(outcome);
        }
        if deadline.is_some_and(|d| Instant::now() >= d) {
            machine.stop();
            return None;
        }
        let period = detector.period();
        let due = period > 0 && last_scan.elapsed() >= Duration::from_secs(period);
        let killed = machine.console_log().oom_kills();
        let oom = killed > ooms && options.scan_on.contains(&ScanTrigger::Oom);
        ooms = killed;
        if due || oom {
            last_scan = Instant::now();
            reports += 1;
            if let Err(error) = scan_and_keep(machine, detector, options, reports, oom) {
                eprintln!("kleak-vmm: warning: {error:#}");
            }
        }
    }
}

/// One automatic scan: says what is new, keeps its report, clears when asked. When the guest has run out of memory it also
/// says who holds it: most of that is referenced.
fn scan_and_keep(
    machine: &Machine,
    detector: &Detector,
    options: &RunOptions,
    number: u32,
    oom: bool,
) -> Result<()> {
    let new = detector.scan()?;
    let holders = if oom { Some(detector.holders()?) } else { None };
    if let Some(holders) = holders.as_ref().filter(|_| !options.quiet) {
        eprint!("kleak-vmm: the guest has run out of memory\n{}", holders.text);
    }
    if new > 0 {
        // In the words of the kernel's own.
        let notice = format!("kmemleak: {new} new suspected memory leaks");
        if options.notice_on_console {
            machine.announce(&notice);
        }
        if !options.quiet {
            eprintln!("kleak-vmm: {notice}; `report` shows them");
        }
    }
    if let Some(dir) = &options.report_dir {
        let (mut text, mut json) = (detector.report_text()?, detector.report_json()?);
        if let Some(holders) = holders {
            text.push_str("\n# The guest has run out of memory. Who holds it:\n");
            text.extend(holders.text.lines().map(|line| format!("# {line}\n")));
            json["holders"] = holders.json;
        }
        reports::write_file(&dir.join(format!("scan-{number:04}.txt")), &text)?;
        reports::write_file(&dir.join(format!("scan-{number:04}.json")), &format!("{json:#}\n"))?;
    }
    if options.clear_after_scan {
        detector.clear()?;
    }
    Ok(())
}

/// A machine that has ended.
pub struct Ended<'a> {
    /// It.
    pub machine: &'a Machine,
    /// Its detector.
    pub detector: &'a Detector,
    /// What was asked.
    pub options: &'a RunOptions,
}

impl Ended<'_> {
    /// The last scan, the reports and the exit code.
    pub fn conclude(&self, outcome: Option<Outcome>) -> Result<ExitCode> {
        let failure = failure_of(outcome.as_ref(), self.options.timeout_s);
        let looked = self.look(outcome.as_ref(), failure.as_deref());
        let Some(what) = failure else {
            looked?;
            return self.judge();
        };
        // The news is that the guest failed. That it left too little to scan or to report is not.
        if let Err(error) = looked {
            eprintln!("kleak-vmm: warning: {error:#}");
        }
        eprint!("{}", self.machine.diagnosis(&|ip| self.detector.name(ip)));
        let hint = "the lines above say where each vCPU was and what the guest printed last";
        Err(Failure::guest(what).hint(hint).into())
    }

    /// The last scan, where it is asked for, and the reports, of an earlier scan if that one fails.
    fn look(&self, outcome: Option<&Outcome>, failure: Option<&str>) -> Result<()> {
        let panicked = matches!(outcome, Some(Outcome::Panic(_)));
        let trigger = if panicked { ScanTrigger::Panic } else { ScanTrigger::Exit };
        let wanted = self.options.scan_at_exit && self.options.scan_on.contains(&trigger);
        let scanned = if wanted { self.last_scan() } else { Ok(()) };
        let of_job = if failure.is_none() { self.embedded_init().err() } else { None };
        let of_job = of_job.map(|error| format!("{error:#}"));
        let kernel = self.options.kernel_path();
        let looked = Looked {
            by: "run",
            test: self.options.exec.as_deref().unwrap_or("boot"),
            file: &kernel,
            failure: failure.or(of_job.as_deref()),
        };
        let reported = reports::write(self.detector, &self.options.reports, self.options.quiet, &looked);
        scanned.and(reported)
    }

    fn last_scan(&self) -> Result<()> {
        self.detector.scan().context("The last scan failed")?;
        // A machine can end with a CPU inside the allocator: then the report holds the last audit before, if any.
        let _ = self.detector.audit();
        Ok(())
    }

    /// The exit code for a guest that ended well.
    fn judge(&self) -> Result<ExitCode> {
        let leaks = self.detector.unreferenced();
        if leaks > 0 && self.options.fail_on_leak {
            return Ok(ExitCode::Leaks);
        }
        self.embedded_init().map(|()| ExitCode::Success)
    }

    /// What the embedded init said of its job.
    fn embedded_init(&self) -> Result<()> {
        if !self.options.embedded_init() {
            return Ok(());
        }
        let lines = self.machine.console_log().tail(usize::MAX);
        let said = |prefix| lines.iter().find_map(|line| Some(line.split_once(prefix)?.1.trim()));
        if let Some(why) = said(FAILED) {
            return Err(Failure::guest(format!("The guest could not do its job: {why}"))
                .hint("the lines above have the guest's own words")
                .into());
        }
        match said(EXEC_EXITED) {
            Some(status) if status != "0" => {
                let command = self.options.exec.as_deref().unwrap_or("the command");
                // As shells say it (POSIX, "Exit Status for Commands").
                let hint = match status {
                    "127" => {
                        "its output is above; the guest has only busybox (no bash) and what --file brings"
                    }
                    _ => "its output is above",
                };
                Err(Failure::guest(format!("{command:?} exited with {status} in the guest"))
                    .hint(hint)
                    .into())
            }
            _ => Ok(()),
        }
    }
}

/// What is wrong with the way a guest ended (None: time ran out); None when nothing is.
fn failure_of(outcome: Option<&Outcome>, timeout_s: Option<u64>) -> Option<String> {
    match outcome {
        None => Some(format!("The guest did not end within {} s", timeout_s.unwrap_or(0))),
        Some(Outcome::PowerOff | Outcome::Reset | Outcome::HostStop | Outcome::Saved) => None,
        Some(bad) => Some(bad.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_end_that_was_meant_is_none() {
        for good in [Outcome::PowerOff, Outcome::Reset, Outcome::HostStop] {
            assert_eq!(failure_of(Some(&good), None), None, "{good}");
        }
        for bad in [Outcome::Panic("x".into()), Outcome::TripleFault, Outcome::Error("y".into())] {
            assert_eq!(failure_of(Some(&bad), None), Some(bad.to_string()));
        }
        assert_eq!(failure_of(None, Some(7)).unwrap(), "The guest did not end within 7 s");
    }
}
