//! Leaks that are known, `kleak-baseline/1`: a JSON file to be kept beside the suite. Sorted, one leak after the other, so
//! that a change of it reads well.

use super::result::{Results, State};
use crate::cli::Failure;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Name and version of the file.
const SCHEMA: &str = "kleak-baseline/1";

/// A leak.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its group.
    pub id: String,
    /// The function that made it, for the reader.
    pub site: String,
    /// Ids of the tests that made it.
    pub tests: BTreeSet<String>,
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Baseline {
    /// By group.
    pub entries: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema: String,
    leaks: Vec<Entry>,
}

impl Baseline {
    /// Reads the file. One that is not there is empty, if it `may_be_missing`: it is about to be made.
    ///
    /// # Errors
    /// Exit code 2: it is not there, or no baseline.
    pub fn read(path: &Path, may_be_missing: bool) -> Result<Self> {
        let failure = || {
            Failure::usage(format!("Cannot read baseline {}", path.display()))
                .hint("--update-baseline makes one of the leaks found")
        };
        let text = match std::fs::read_to_string(path) {
            Err(error) if may_be_missing && error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            other => other.with_context(failure)?,
        };
        let file: File = serde_json::from_str(&text).with_context(failure)?;
        if file.schema != SCHEMA {
            return Err(anyhow::anyhow!("Its schema is {:?}, not {SCHEMA:?}", file.schema).context(failure()));
        }
        Ok(Self { entries: file.leaks })
    }

    /// As it is written.
    pub fn text(&self) -> String {
        let file = File { schema: SCHEMA.to_owned(), leaks: self.entries.clone() };
        // Every value has a JSON form.
        serde_json::to_string_pretty(&file).unwrap_or_default() + "\n"
    }

    /// Whether the leak of this group is known.
    pub fn has(&self, id: &str) -> bool {
        self.entries.iter().any(|entry| entry.id == id)
    }

    /// Takes in what another says.
    pub fn join(&mut self, other: Self) {
        for entry in other.entries {
            match self.entries.iter_mut().find(|known| known.id == entry.id) {
                Some(known) => known.tests.extend(entry.tests),
                None => self.entries.push(entry),
            }
        }
        self.entries.sort();
    }

    /// Makes it say what these results found. What tests that did not run, or not to their end, were known to leak
    /// stays; what others no longer leak goes.
    pub fn update(&mut self, results: &Results) {
        let ran: BTreeSet<&str> = results
            .tests
            .iter()
            .filter(|test| test.outcome.is_verdict())
            .map(|test| test.id.as_str())
            .collect();
        let mut leaks: BTreeMap<String, Entry> = BTreeMap::new();
        for mut entry in std::mem::take(&mut self.entries) {
            entry.tests.retain(|id| !ran.contains(id.as_str()));
            if !entry.tests.is_empty() {
                leaks.insert(entry.id.clone(), entry);
            }
        }
        for test in &results.tests {
            for group in test.groups.iter().filter(|group| group.state != State::Expected) {
                let new = || Entry { id: group.id.clone(), site: group.site(), tests: BTreeSet::new() };
                leaks.entry(group.id.clone()).or_insert_with(new).tests.insert(test.id.clone());
            }
        }
        self.entries = leaks.into_values().collect();
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{group, results, test};
    use super::super::result::{Outcome, TestResult};
    use super::*;

    fn ids(baseline: &Baseline) -> Vec<(&str, usize)> {
        baseline.entries.iter().map(|entry| (entry.id.as_str(), entry.tests.len())).collect()
    }

    #[test]
    fn an_update_says_what_was_found() {
        let mut baseline = Baseline::default();
        let (a, b) = (|| group("a", 1, "a_probe"), || group("b", 1, "b_probe"));
        let mut meant = group("c", 1, "c_probe");
        meant.state = State::Expected;
        baseline.update(&results(vec![test("k/g/1", vec![b(), meant]), test("k/g/2", vec![a(), b()])]));
        assert_eq!(ids(&baseline), [("a", 1), ("b", 2)], "sorted, without what is meant to leak");
        baseline.update(&results(vec![test("k/g/2", vec![])]));
        assert_eq!(ids(&baseline), [("b", 1)], "the first test did not run");
        let crashed = TestResult { outcome: Outcome::Crashed, ..test("k/g/1", vec![]) };
        baseline.update(&results(vec![crashed]));
        assert_eq!(ids(&baseline), [("b", 1)], "it did not run to its end");
        baseline.update(&results(vec![test("k/g/1", vec![])]));
        assert_eq!(ids(&baseline), []);
    }

    #[test]
    fn the_file_is_read_as_it_was_written_and_nothing_else() {
        let path = std::env::temp_dir().join(format!("kleak-baseline-{}.json", std::process::id()));
        assert_eq!(Baseline::read(&path, true).unwrap(), Baseline::default());
        assert!(Baseline::read(&path, false).is_err());
        let mut baseline = Baseline::default();
        baseline.update(&results(vec![test("k/g/1", vec![group("b", 1, "b_probe")])]));
        std::fs::write(&path, baseline.text()).unwrap();
        assert_eq!(Baseline::read(&path, false).unwrap(), baseline);
        for wrong in ["", "{}", r#"{"schema":"kleak-report/1","leaks":[]}"#] {
            std::fs::write(&path, wrong).unwrap();
            let error = Baseline::read(&path, true).unwrap_err();
            assert_eq!(crate::cli::failure::exit_code(&error), crate::cli::ExitCode::Usage, "{wrong}");
        }
        std::fs::remove_file(&path).unwrap();
    }
}
