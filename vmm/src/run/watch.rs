//! From the first instruction to the exit code: periodic scans, the end, the last scan, the reports.

use super::reports;
use crate::cli::options::{RunOptions, ScanTrigger};
use crate::cli::{ExitCode, Failure};
use crate::console::{Answer, Target};
use crate::detector::Detector;
use crate::machine::{Machine, Outcome};
use crate::regress::Looked;
use anyhow::{Context, Result};
use images::initramfs::{EXEC_EXITED, FAILED};
use serde_json::json;
use std::fs::{DirEntry, read_dir};
use std::path::{Path, PathBuf};
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
    let first = || options.report_dir.as_deref().map_or(1, next_number);
    let mut number = options.report_number.unwrap_or_else(first);
    loop {
        if let Some(outcome) = machine.wait(Some(STEP)) {
            return Some(outcome);
        }
        if deadline.is_some_and(|d| Instant::now() >= d) {
            machine.stop();
            return None;
        }
        let period = detector.period();
        let due = period > 0 && last_scan.elapsed() >= Duration::from_secs(period) && !detector.is_off();
        let killed = machine.console_log().oom_kills();
        let oom = killed > ooms && options.scan_on.contains(&ScanTrigger::Oom);
        ooms = killed;
        if due || oom {
            last_scan = Instant::now();
            let new = if due { detector.scan_periodically() } else { detector.scan() };
            if let Err(error) = keep_scan(machine, detector, options, number, (new, oom)) {
                eprintln!("kleak-vmm: warning: {error:#}");
            }
            number = number.saturating_add(1);
        }
    }
}

/// After an automatic scan: says what is new, keeps its report, clears when asked. When the guest has run out of memory it also
/// says who holds it: most of that is referenced. What one part cannot do keeps nothing from the others; the first error is
/// returned.
fn keep_scan(
    machine: &Machine,
    detector: &Detector,
    options: &RunOptions,
    number: u32,
    (new, oom): (Result<usize>, bool),
) -> Result<()> {
    let holders = oom.then(|| detector.holders()).transpose();
    if let (Ok(Some(holders)), false) = (&holders, options.quiet) {
        eprint!("kleak-vmm: the guest has run out of memory\n{}", holders.text);
    }
    let files = options.report_dir.as_ref().map(|dir| numbered(dir, number));
    if let Ok(new @ 1..) = new {
        // In the words of the kernel's own.
        let notice = format!("kmemleak: {new} new suspected memory leaks");
        if options.notice_on_console {
            machine.announce(&notice);
        }
        let place =
            files.as_ref().map_or_else(|| "`report`".to_owned(), |[text, _]| text.display().to_string());
        if !options.quiet {
            eprintln!("kleak-vmm: {notice}; {place} has them");
        }
    }
    let kept = match &files {
        Some(files) if new.is_ok() || matches!(holders, Ok(Some(_))) => {
            keep(detector, files, new.is_ok(), holders.as_ref().ok().and_then(Option::as_ref))
        }
        _ => Ok(()),
    };
    // What could not be written is not to be forgotten.
    if options.clear_after_scan && new.is_ok() && kept.is_ok() {
        detector.clear()?;
    }
    new.map(drop).and(holders.map(drop)).and(kept)
}

/// The files of a report: as text, and as JSON.
fn numbered(dir: &Path, number: u32) -> [PathBuf; 2] {
    ["txt", "json"].map(|form| dir.join(format!("scan-{number:04}.{form}")))
}

/// The number behind the last one that reports in `dir` have: another run's are kept.
pub fn next_number(dir: &Path) -> u32 {
    let number = |entry: std::io::Result<DirEntry>| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        name.strip_prefix("scan-")?.split_once('.')?.0.parse().ok()
    };
    // Nothing there that can be read is nothing that could be overwritten.
    let last: Option<u32> = read_dir(dir).ok().and_then(|entries| entries.filter_map(number).max());
    last.map_or(1, |last| last.saturating_add(1))
}

/// Writes the report of a scan, if there was one, and who holds the memory.
fn keep(
    detector: &Detector,
    [text, json]: &[PathBuf; 2],
    scanned: bool,
    holders: Option<&Answer>,
) -> Result<()> {
    let (mut as_text, mut as_json) = match scanned {
        true => (detector.report_text()?, detector.report_json()?),
        false => ("# The scan failed\n".to_owned(), json!({})),
    };
    if as_text.is_empty() {
        as_text.push_str("# Nothing is unreferenced\n");
    }
    if let Some(holders) = holders {
        as_text.push_str("\n# The guest has run out of memory. Who holds it:\n");
        as_text.extend(holders.text.lines().map(|line| format!("# {line}\n")));
        as_json["holders"] = holders.json.clone();
    }
    reports::write_file(text, &as_text)?;
    reports::write_file(json, &format!("{as_json:#}\n"))
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
        if wanted && self.detector.is_off() {
            eprintln!("kleak-vmm: warning: Tracking was switched off, so nothing was scanned at the end");
        }
        let scanned = if wanted && !self.detector.is_off() { self.last_scan() } else { Ok(()) };
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
        Some(Outcome::PowerOff | Outcome::Halt | Outcome::Reset | Outcome::HostStop | Outcome::Saved) => None,
        Some(bad) => Some(bad.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_of_an_earlier_run_are_kept() {
        let dir = std::env::temp_dir().join(format!("kleak-watch-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        assert_eq!(next_number(&dir), 1);
        assert_eq!(next_number(Path::new("/nonexistent")), 1);
        for name in ["scan-0001.txt", "scan-0012.json", "scan-x.txt", "other-0099.txt"] {
            std::fs::write(dir.join(name), "").unwrap();
        }
        assert_eq!(next_number(&dir), 13);
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(numbered(Path::new("d"), 13)[0], Path::new("d/scan-0013.txt"));
    }

    #[test]
    fn only_an_end_that_was_meant_is_none() {
        for good in [Outcome::PowerOff, Outcome::Halt, Outcome::Reset, Outcome::HostStop] {
            assert_eq!(failure_of(Some(&good), None), None, "{good}");
        }
        for bad in [Outcome::Panic("x".into()), Outcome::TripleFault, Outcome::Error("y".into())] {
            assert_eq!(failure_of(Some(&bad), None), Some(bad.to_string()));
        }
        assert_eq!(failure_of(None, Some(7)).unwrap(), "The guest did not end within 7 s");
    }
}
