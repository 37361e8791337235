//! Results as they come: judged, said, and written at once, so that nothing that happens later can lose them.

use super::baseline::Baseline;
use super::boot::Sink;
use super::result::{BootResult, FOUND, Results, TestResult};
use super::suite::Test;
use super::write;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// See the module.
pub struct Collector {
    state: Mutex<State>,
    /// Ids of all tests, in the suite's order.
    order: Vec<String>,
    baseline: Baseline,
    reports: Vec<PathBuf>,
    quiet: bool,
    began: Instant,
}

struct State {
    results: Results,
    /// The last attempt to write them failed, and the user knows.
    unwritten: bool,
}

impl Collector {
    /// For the tests with the ids of `order`.
    pub fn new(
        results: Results,
        order: Vec<String>,
        baseline: Baseline,
        reports: Vec<PathBuf>,
        quiet: bool,
    ) -> Self {
        let state = Mutex::new(State { results, unwritten: false });
        Self { state, order, baseline, reports, quiet, began: Instant::now() }
    }

    /// Writes that there is nothing yet: what an earlier run left must not pass for this one's. With no tests, as in an empty
    /// shard, that is complete.
    pub fn begin(&self) {
        self.change(|_| {});
    }

    /// Tells the user.
    pub fn say(&self, text: &str) {
        if !self.quiet {
            eprintln!("kleak-vmm: {text}");
        }
    }

    /// All results.
    pub fn finish(self) -> Results {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).results
    }

    fn change(&self, change: impl FnOnce(&mut Results)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state.results);
        let place = |test: &TestResult| self.order.iter().position(|id| *id == test.id);
        state.results.tests.sort_by_key(place);
        state.results.complete = state.results.tests.len() == self.order.len();
        state.results.millis = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let written = write::all(&state.results, &self.reports);
        if let (Err(error), false) = (&written, state.unwritten) {
            eprintln!("kleak-vmm: warning: {error:#}");
        }
        state.unwritten = written.is_err();
    }
}

impl Sink for Collector {
    fn test(&self, mut result: TestResult, test: &Test) {
        result.judge(&test.expected, &self.baseline);
        let mut number = 0;
        let line = write::line(&result);
        self.change(|results| {
            results.tests.retain(|other| other.id != result.id);
            results.tests.push(result);
            number = results.tests.len();
        });
        self.say(&format!("[{number}/{}] {line}", self.order.len()));
    }

    fn boot(&self, result: BootResult) {
        if let Some(why) = result.canary.as_ref().filter(|canary| *canary != FOUND) {
            eprintln!("kleak-vmm: error: The detector did not find its canary on {}: {why}", result.kernel);
        }
        self.change(|results| results.boots.push(result));
    }
}
