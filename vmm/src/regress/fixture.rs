//! What the tests of this room are made of.

use super::result::{Frame, Group, Outcome, Results, State, TestResult};
use super::suite::{self, Suite};
use std::path::Path;

/// A suite of this text, read as from a file.
pub fn suite(text: &str) -> Suite {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("kleak-fixture-{}-{}.toml", std::process::id(), NEXT.fetch_add(1, Relaxed));
    let path = std::env::temp_dir().join(name);
    std::fs::write(&path, text).unwrap();
    let suite = suite::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    suite
}

/// A group of `count` leaks of 64 bytes made by `function`, called by `init`.
pub fn group(id: &str, count: u64, function: &str) -> Group {
    let frame = |symbol: &str| Frame { symbol: Some(symbol.to_owned()), module: None };
    Group {
        id: id.to_owned(),
        count,
        direct: count,
        bytes: 64 * count,
        retained_bytes: 64 * count,
        kind: "slab".to_owned(),
        cache: Some("kmalloc-64".to_owned()),
        backtrace: vec![frame(function), frame("init")],
        state: State::New,
    }
}

/// A test that ran, with these leaks.
pub fn test(id: &str, groups: Vec<Group>) -> TestResult {
    let mut names = id.split('/').map(str::to_owned);
    let mut next = || names.next().unwrap_or_default();
    TestResult {
        kernel: next(),
        release: Some("6.1.0-test".to_owned()),
        guest: next(),
        test: next(),
        id: id.to_owned(),
        outcome: if groups.is_empty() { Outcome::Passed } else { Outcome::Leaked },
        message: if groups.is_empty() { String::new() } else { "leaks".to_owned() },
        status: Some(0),
        millis: 1500,
        groups,
        console: Vec::new(),
        heap: None,
    }
}

/// Complete results of these tests.
pub fn results(tests: Vec<TestResult>) -> Results {
    let new = Results::new("suite", Path::new("suites/my suite.toml"), None);
    Results { complete: true, started: 1_700_000_000, millis: 3000, tests, ..new }
}
