//! SARIF 2.1.0 (OASIS): one result for each leak of each test, by its group, so that code scanning tells old from new.

use super::super::result::{Frame, Group, Results, State, TestResult};
use serde_json::{Value, json};

const SCHEMA: &str = "https://json.schemastore.org/sarif-2.1.0.json";
/// The rules; a result names its own by index.
const RULES: [(&str, &str); 2] = [
    ("kernel-memory-leak", "An allocation of the kernel that nothing refers to any more."),
    ("test-not-made", "A test that could not be made, so that its leaks are not known."),
];

/// The log.
pub fn sarif(results: &Results) -> Value {
    let rules = RULES.map(|(id, text)| json!({ "id": id, "shortDescription": { "text": text } }));
    let leaks = results.tests.iter().flat_map(|test| test.groups.iter().map(move |group| leak(test, group)));
    let others = results.tests.iter().filter(|test| !test.outcome.is_verdict()).map(not_made);
    let fixed = results.fixed.iter().map(|fixed| {
        let mut row = row(0, "none", &format!("Fixed: {}", fixed.site), &fixed.id, "absent");
        row["locations"] = json!([location(&fixed.site)]);
        row
    });
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
            "results": leaks.chain(others).chain(fixed).collect::<Vec<_>>(),
        }],
    })
}

fn row(rule: usize, level: &str, text: &str, fingerprint: &str, baseline: &str) -> Value {
    json!({
        "ruleId": RULES[rule].0,
        "ruleIndex": rule,
        "level": level,
        "message": { "text": text },
        "partialFingerprints": { "kleakGroup/v1": fingerprint },
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
        "{} leaks {} objects of {} bytes together (retained: {} bytes), allocated by {}",
        test.id,
        group.count,
        group.bytes,
        group.retained_bytes,
        group.site()
    );
    let mut row = row(0, level, &text, &format!("{}:{}", test.id, group.id), baseline);
    row["locations"] = json!([location(&group.site())]);
    let frames: Vec<Value> = group.backtrace.iter().map(frame).collect();
    row["stacks"] = json!([{ "message": { "text": "Where it was allocated" }, "frames": frames }]);
    row["properties"] =
        json!({ "test": test.id, "group": group.id, "count": group.count, "bytes": group.bytes });
    row
}

fn not_made(test: &TestResult) -> Value {
    let text = format!("{}: {}: {}", test.id, test.outcome.name(), test.message);
    let mut row = row(1, "error", &text, &test.id, "new");
    row["locations"] = json!([location(&test.id)]);
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
