//! Results for a terminal or a log.

use super::super::result::{Group, Outcome, Results, State, TestResult};
use introspect::report::plural;
use std::fmt::Write;

/// Functions of a backtrace that are shown.
const FRAMES: usize = 12;

/// One line on one test: `KERNEL/GUEST/TEST: passed (1.5 s)`.
pub fn line(test: &TestResult) -> String {
    let mut text = format!("{}: {}", test.id, test.outcome.name());
    if !test.message.is_empty() {
        let _ = write!(text, ": {}", test.message);
    }
    let also = [(State::Expected, "expected"), (State::Known, "known")]
        .map(|(state, word)| (test.leaks(state), word));
    for (leaks, word) in also.into_iter().filter(|(leaks, _)| *leaks > 0) {
        let _ = write!(text, ", {leaks} {word} leak{}", plural(leaks));
    }
    let _ = write!(text, " ({}.{} s)", test.millis / 1000, test.millis % 1000 / 100);
    text
}

/// All of it: what is wrong in full, the rest in a line each.
pub fn text(results: &Results) -> String {
    let mut text = String::new();
    for test in &results.tests {
        let _ = writeln!(text, "{}", line(test));
        for group in
            test.groups.iter().filter(|group| group.state == State::New || test.outcome == Outcome::Leaked)
        {
            leak(&mut text, group);
        }
        if !test.outcome.is_verdict() {
            test.console.iter().rev().take(20).rev().for_each(|line| {
                let _ = writeln!(text, "  | {line}");
            });
        }
    }
    for fixed in &results.fixed {
        let _ = writeln!(text, "fixed: {} {}", fixed.id, fixed.site);
    }
    let mut kernels: Vec<(&str, &str)> = Vec::new();
    for kernel in results.tests.iter().map(|test| (test.kernel.as_str(), test.release_text())) {
        if !kernels.contains(&kernel) {
            kernels.push(kernel);
        }
    }
    for (name, release) in kernels {
        let _ = writeln!(text, "kernel {name}: {release}");
    }
    let unasked: u64 = results.boots.iter().map(|boot| boot.unasked_leaks).sum();
    if unasked > 0 {
        let _ = writeln!(
            text,
            "{unasked} leaks of the boots themselves were not judged: a test without run would"
        );
    }
    let counts = Outcome::ALL.iter().map(|&outcome| (results.count(outcome), outcome.name()));
    let counts: Vec<String> = counts.filter(|(n, _)| *n > 0).map(|(n, name)| format!("{n} {name}")).collect();
    let found = results
        .boots
        .iter()
        .filter(|boot| boot.canary.as_deref() == Some(super::super::result::FOUND))
        .count();
    let _ = writeln!(
        text,
        "{}{}: {} test{}: {}; leaks: {} new, {} known, {} expected, {} fixed; canary found in {found} of {} boots",
        results.suite,
        if results.complete { "" } else { " (incomplete)" },
        results.tests.len(),
        plural(results.tests.len() as u64),
        if counts.is_empty() { "none".to_owned() } else { counts.join(", ") },
        results.leaks(State::New),
        results.leaks(State::Known),
        results.leaks(State::Expected),
        results.fixed.len(),
        results.boots.len(),
    );
    text
}

/// A leak in full.
fn leak(text: &mut String, group: &Group) {
    let state = match group.state {
        State::New => "new",
        State::Known => "known",
        State::Expected => "expected",
    };
    let _ = writeln!(
        text,
        "  {state} leak {}: {} object{}, {} direct, {} bytes, retains {} bytes, {}{}",
        group.id,
        group.count,
        plural(group.count),
        group.direct,
        group.bytes,
        group.retained_bytes,
        group.kind,
        group.cache.as_deref().map(|cache| format!(" {cache}")).unwrap_or_default(),
    );
    for frame in group.backtrace.iter().take(FRAMES) {
        let _ = writeln!(text, "    {}", frame.text());
    }
}

/// As it is said in JUnit and SARIF: one leak's numbers and backtrace.
pub fn describe(group: &Group) -> String {
    let mut text = String::new();
    leak(&mut text, group);
    text
}
