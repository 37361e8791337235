//! SARIF 2.1.0 (OASIS): one result for each leak of each test, by its group, so that code scanning tells old from new; and one
//! for each test that did not pass for another reason.
//!
//! GitHub's code scanning takes only results with a place in a file, and tells them apart by `primaryLocationLineHash`. The lines
//! that allocate are not known here, so the place is the suite's file, and the print that of the leak.

use super::super::result::{Fixed, Frame, Group, Outcome, Results, State, TestResult};
use introspect::report::plural;
use serde_json::{Value, json};
use std::fmt::Write;

const SCHEMA: &str = "https://json.schemastore.org/sarif-2.1.0.json";
/// The rules; a result names its own by index.
const RULES: [(&str, &str); 3] = [
    ("kernel-memory-leak", "An allocation of the kernel that nothing refers to any more."),
    ("test-not-made", "A test that could not be made, so that its leaks are not known."),
    ("leaks-not-as-expected", "A test that made more or fewer of the leaks that it is meant to make."),
];

/// The log.
pub fn sarif(results: &Results) -> Value {
    let rules = RULES.map(|(id, text)| json!({ "id": id, "shortDescription": { "text": text } }));
    let leaks = results.tests.iter().flat_map(|test| test.groups.iter().map(move |group| leak(test, group)));
    let others = results.tests.iter().filter(|test| !test.outcome.is_verdict()).map(|test| failed(test, 1));
    let amiss = results.tests.iter().filter(|test| is_amiss(test)).map(|test| failed(test, 2));
    let fixed = results.fixed.iter().flat_map(|leak| leak.tests.iter().map(move |test| fixed(test, leak)));
    let uri = uri(&results.file);
    let placed = |mut row: Value| {
        row["locations"][0]["physicalLocation"] =
            json!({ "artifactLocation": { "uri": uri }, "region": { "startLine": 1 } });
        row
    };
    json!({
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": "kleak-vmm",
                "version": env!("CARGO_PKG_VERSION"),
                "rules": rules,
            } },
            "automationDetails": { "id": format!("{}/", results.suite) },
            "invocations": [{ "executionSuccessful": results.complete && others.clone().next().is_none() }],
            "results": leaks.chain(others).chain(amiss).chain(fixed).map(placed).collect::<Vec<_>>(),
        }],
    })
}

/// A file's path as a URI reference (RFC 3986): relative ones stay so.
pub fn uri(file: &str) -> String {
    let mut uri = if file.starts_with('/') { "file://".to_owned() } else { String::new() };
    for byte in file.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                uri.push(byte.into())
            }
            _ => {
                let _ = write!(uri, "%{byte:02X}");
            }
        }
    }
    uri
}

fn row(rule: usize, level: &str, text: &str, fingerprint: &str, baseline: &str) -> Value {
    json!({
        "ruleId": RULES[rule].0,
        "ruleIndex": rule,
        "level": level,
        "message": { "text": text },
        "partialFingerprints": { "kleakGroup/v1": fingerprint, "primaryLocationLineHash": fingerprint },
        "baselineState": baseline,
    })
}

fn leak(test: &TestResult, group: &Group) -> Value {
    let (level, baseline) = match group.state {
        State::New => ("error", "new"),
        State::Known => ("warning", "unchanged"),
        State::Expected => ("note", "unchanged"),
    };
    let text = format!(
        "{} leaks {} object{} ({} direct) of {} bytes together (retained: {} bytes), allocated by {}",
        test.id,
        group.count,
        plural(group.count),
        group.direct,
        group.bytes,
        group.retained_bytes,
        group.site()
    );
    let mut row = row(0, level, &text, &fingerprint(&test.id, &group.id), baseline);
    row["locations"] = json!([location(&group.site())]);
    let frames: Vec<Value> = group.backtrace.iter().map(frame).collect();
    row["stacks"] = json!([{ "message": { "text": "Where it was allocated" }, "frames": frames }]);
    row["properties"] = json!({
        "test": test.id,
        "release": test.release,
        "group": group.id,
        "count": group.count,
        "direct": group.direct,
        "bytes": group.bytes,
        "retained_bytes": group.retained_bytes,
    });
    row
}

/// The same for a leak whether it is new, known or gone.
fn fingerprint(test: &str, group: &str) -> String {
    format!("{test}:{group}")
}

fn fixed(test: &str, leak: &Fixed) -> Value {
    let text = format!("Fixed: {test} no longer leaks what {} allocates", leak.site);
    let mut row = row(0, "none", &text, &fingerprint(test, &leak.id), "absent");
    row["locations"] = json!([location(&leak.site)]);
    row
}

/// It leaked only what it is meant to or is known to, but not as much.
fn is_amiss(test: &TestResult) -> bool {
    test.outcome.is_verdict() && test.outcome != Outcome::Passed && test.leaks(State::New) == 0
}

/// A test that has not passed, by this rule.
fn failed(test: &TestResult, rule: usize) -> Value {
    let text = format!("{}: {}: {}", test.id, test.outcome.name(), test.message);
    let mut row = row(rule, "error", &text, &test.id, "new");
    row["locations"] = json!([location(&test.id)]);
    row["properties"] = json!({ "test": test.id, "release": test.release });
    row
}

fn location(name: &str) -> Value {
    json!({ "logicalLocations": [{ "fullyQualifiedName": name, "kind": "function" }] })
}

fn frame(frame: &Frame) -> Value {
    let name = frame.symbol.as_deref().unwrap_or("?");
    let mut value =
        json!({ "location": { "logicalLocations": [{ "fullyQualifiedName": name, "kind": "function" }] } });
    if let Some(module) = &frame.module {
        value["module"] = json!(module);
    }
    value
}
