//! Results as they come: judged, said, and written at once, so that nothing that happens later can lose them.

use super::baseline::Baseline;
use super::boot::Sink;
use super::result::{BootResult, FOUND, Outcome, Results, TestResult};
use super::suite::Test;
use super::write;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// See the module.
pub struct Collector {
    state: Mutex<State>,
    /// Number of tests.
    tests: usize,
    baseline: Baseline,
    reports: Vec<PathBuf>,
    quiet: bool,
    began: Instant,
    /// Below the lines on a terminal; nothing elsewhere.
    bar: ProgressBar,
}

struct State {
    results: Results,
    /// The last attempt to write them failed, and the user knows.
    unwritten: bool,
}

impl Collector {
    /// For so many tests, judged by the baseline of the results.
    pub fn new(results: Results, tests: usize, reports: Vec<PathBuf>, quiet: bool) -> Self {
        let baseline = results.baseline.clone();
        let state = Mutex::new(State { results, unwritten: false });
        let bar = if quiet { ProgressBar::hidden() } else { bar(tests as u64) };
        Self { state, tests, baseline, reports, quiet, began: Instant::now(), bar }
    }

    /// Writes that there is nothing yet: what an earlier run left must not pass for this one's. With no tests, as in an empty
    /// shard, that is complete.
    pub fn begin(&self) {
        self.change(|_| {});
    }

    /// Tells the user.
    pub fn say(&self, text: &str) {
        if !self.quiet {
            self.print(&format!("kleak-vmm: {text}"));
        }
    }

    /// Prints a line on standard error, above the bar.
    fn print(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    /// All results.
    pub fn finish(self) -> Results {
        self.bar.finish_and_clear();
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).results
    }

    fn change(&self, change: impl FnOnce(&mut Results)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state.results);
        state.results.sort();
        let ended = state.results.tests.len() - state.results.count(Outcome::Interrupted);
        state.results.complete = ended == self.tests;
        state.results.millis = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let written = write::all(&state.results, &self.reports);
        if let (Err(error), false) = (&written, state.unwritten) {
            self.print(&format!("kleak-vmm: warning: {error:#}"));
        }
        state.unwritten = written.is_err();
    }
}

/// How many tests are done, how long it has taken and how long it may take; drawn on a terminal only.
fn bar(tests: u64) -> ProgressBar {
    const TEMPLATE: &str = "{elapsed_precise} {bar:30} {pos}/{len} tests, {eta} left";
    const REDRAW: Duration = Duration::from_secs(1);
    let bar = ProgressBar::new(tests);
    // Without it indicatif's own form stays.
    if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(REDRAW);
    bar
}

impl Sink for Collector {
    fn test(&self, mut result: TestResult, test: &Test) {
        result.judge(&test.expected, &self.baseline);
        if result.outcome == Outcome::Passed {
            result.console.clear();
        }
        let mut number = 0;
        let line = write::line(&result);
        self.change(|results| {
            results.tests.retain(|other| other.id != result.id);
            results.tests.push(result);
            number = results.tests.len();
        });
        self.bar.set_position(number as u64);
        self.say(&format!("[{number}/{}] {line}", self.tests));
    }

    fn boot(&self, result: BootResult) {
        if let Some(why) = result.canary.as_ref().filter(|canary| *canary != FOUND) {
            let what = "The detector did not find its canary on";
            self.print(&format!("kleak-vmm: error: {what} {}: {why}", result.kernel));
        }
        self.change(|results| results.boots.push(result));
    }
}
