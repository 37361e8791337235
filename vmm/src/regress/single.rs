//! A run or a saved machine as the result of one test, for the forms that CI systems read.

use super::baseline::Baseline;
use super::result::{Group, Heap, Outcome, Results, TestResult};
use super::suite::Expected;
use super::write::{html, junit, sarif};
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::Path;

/// What was looked at, beside the report.
#[derive(Clone, Copy)]
pub struct Looked<'a> {
    /// The subcommand: `run`, `analyze`.
    pub by: &'a str,
    /// What stands for the test: the command in the guest, or the saved file.
    pub test: &'a str,
    /// Where a finding is shown to be: the kernel image, or the saved file.
    pub file: &'a Path,
    /// How the guest failed, if it did.
    pub failure: Option<&'a str>,
}

/// The forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// JUnit XML.
    Junit,
    /// SARIF 2.1.0.
    Sarif,
    /// A page.
    Html,
}

/// `report`, a `kleak-report/1` document, in a form of its own.
///
/// # Errors
/// It is no such document.
pub fn of_report(report: &Value, looked: &Looked<'_>, form: Form) -> Result<String> {
    let results = results(report, looked)?;
    Ok(match form {
        Form::Junit => junit(&results)?,
        Form::Sarif => format!("{:#}\n", sarif(&results)),
        Form::Html => html(&results),
    })
}

fn results(report: &Value, looked: &Looked<'_>) -> Result<Results> {
    let groups: Vec<Group> =
        serde_json::from_value(report["groups"].clone()).context("The report's groups")?;
    let number = |key: &str| report["scan"][key].as_u64().unwrap_or(0);
    let kernel = report["guest"]["release"].as_str().unwrap_or_default().to_owned();
    let guest = looked.by.to_owned();
    let mut test = TestResult {
        id: format!("{kernel}/{guest}/{}", looked.test),
        release: Some(kernel.clone()).filter(|release| !release.is_empty()),
        kernel,
        guest,
        test: looked.test.to_owned(),
        outcome: if looked.failure.is_some() { Outcome::Failed } else { Outcome::Passed },
        message: looked.failure.unwrap_or_default().to_owned(),
        status: None,
        millis: number("scan_ms"),
        groups,
        console: Vec::new(),
        heap: Some(Heap { objects: number("objects"), bytes: number("object_bytes") }),
    };
    test.judge(&Expected::default(), &Baseline::default());
    let mut results = Results::new(&format!("kleak-vmm {}", looked.by), looked.file, None);
    results.millis = test.millis;
    results.complete = true;
    results.tests.push(test);
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn looked(failure: Option<&str>) -> Looked<'_> {
        Looked { by: "run", test: "./t.sh", file: Path::new("bzImage"), failure }
    }

    fn report(groups: &Value) -> Value {
        json!({ "guest": { "release": "6.1.0" }, "scan": { "objects": 9, "object_bytes": 99 }, "groups": groups })
    }

    #[test]
    fn leaks_fail_the_test_and_so_does_the_guest() {
        let group = json!([{ "id": "ab", "count": 2, "direct": 1, "bytes": 64, "retained_bytes": 96, "kind": "slab",
            "cache": "kmalloc-32", "backtrace": [{ "symbol": "leak", "module": "m" }] }]);
        let leaked = results(&report(&group), &looked(None)).unwrap();
        assert_eq!(
            (leaked.tests[0].outcome, leaked.tests[0].message.as_str()),
            (Outcome::Leaked, "2 new leaks")
        );
        let clean = results(&report(&json!([])), &looked(None)).unwrap();
        assert_eq!(
            (clean.tests[0].outcome, clean.tests[0].id.as_str()),
            (Outcome::Passed, "6.1.0/run/./t.sh")
        );
        let failed = results(&report(&json!([])), &looked(Some("It panicked"))).unwrap();
        assert_eq!(
            (failed.tests[0].outcome, failed.tests[0].message.as_str()),
            (Outcome::Failed, "It panicked")
        );
        for (form, wanted) in [(Form::Junit, "<testcase"), (Form::Sarif, "2.1.0"), (Form::Html, "<html")] {
            let text = of_report(&report(&group), &looked(None), form).unwrap();
            assert!(text.contains(wanted) && text.contains("leak"), "{form:?}: {text}");
        }
        assert!(of_report(&json!({ "groups": 3 }), &looked(None), Form::Html).is_err());
    }
}
