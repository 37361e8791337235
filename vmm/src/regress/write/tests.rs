//! Each form of results: what it must have, and what must not get through.

use super::super::fixture::{group, results, test};
use super::super::result::{BootResult, Fixed, Group, Growth, Heap, Outcome, Results, State, TestResult};
use super::*;
use quick_xml::events::Event;
use serde_json::json;
use std::collections::BTreeMap;

/// One test of each kind, with text that no form may take as it is.
fn sample() -> Results {
    let evil = "<script>&\"'\u{1b}]]>";
    let mut known = group("k", 2, "known_probe");
    known.state = State::Known;
    let new = Group { direct: 1, ..group("n", 3, evil) };
    let leaked = TestResult { message: evil.into(), ..test("6.1/small/leaky", vec![new, known]) };
    let crashed = TestResult {
        outcome: Outcome::Crashed,
        message: "Kernel panic".into(),
        console: vec![evil.into()],
        ..test("6.1/small/crash", Vec::new())
    };
    let mut all = results(vec![
        test("6.1/small/fine", Vec::new()),
        leaked,
        crashed,
        test("6.12/small/fine", Vec::new()),
    ]);
    all.tests[3].release = None;
    let tests = ["6.1/small/fine".to_owned(), "6.12/small/fine".to_owned()].into();
    all.fixed.push(Fixed { id: "f".into(), site: "fixed_probe".into(), tests });
    for (test, bytes) in all.tests.iter_mut().zip([3000, 1000, 2000]) {
        test.heap = Some(Heap { objects: 10, bytes });
    }
    let growth =
        Growth { kind: "site".into(), name: evil.into(), bytes_per_hour: 1.5, history: vec![1, 2, 3, 4, 6] };
    all.boots.push(BootResult {
        kernel: "6.1".into(),
        guest: "small".into(),
        millis: 1,
        canary: None,
        unasked_leaks: 0,
        growth: vec![growth],
    });
    all
}

/// Name and attributes.
type Element = (String, BTreeMap<String, String>);

/// Elements of a document with their attributes, and its text. Panics where it is not well-formed.
fn parsed(xml: &str) -> (Vec<Element>, String) {
    let mut reader = quick_xml::Reader::from_str(xml);
    let (mut elements, mut depth, mut text) = (Vec::new(), 0, String::new());
    loop {
        match reader.read_event().unwrap() {
            event @ (Event::Start(_) | Event::Empty(_)) => {
                depth += i32::from(matches!(event, Event::Start(_)));
                let (Event::Start(element) | Event::Empty(element)) = event else { unreachable!() };
                let attributes = element.attributes().map(|attribute| {
                    let attribute = attribute.unwrap();
                    let value = quick_xml::escape::unescape(&attribute.value).unwrap().into_owned();
                    (attribute.key.as_ref().to_owned(), value)
                });
                elements.push((element.name().as_ref().to_owned(), attributes.collect()));
            }
            Event::End(_) => depth -= 1,
            Event::Text(part) => text.push_str(&part),
            Event::Eof => break,
            _ => {}
        }
    }
    assert_eq!(depth, 0);
    (elements, text)
}

#[test]
fn junit_counts_failures_and_errors() {
    let xml = junit::junit(&sample()).unwrap();
    assert!(xml.chars().all(|c| c == '\n' || c >= ' '), "control characters: {xml}");
    let (elements, text) = parsed(&xml);
    let of = |name: &str| {
        elements.iter().filter(|(element, _)| element == name).map(|(_, a)| a).collect::<Vec<_>>()
    };
    let all = of("testsuites")[0];
    assert_eq!((all["tests"].as_str(), all["failures"].as_str(), all["errors"].as_str()), ("4", "1", "1"));
    assert_eq!(all["time"], "3.000");
    let suites = of("testsuite");
    assert_eq!(suites.iter().map(|s| s["tests"].as_str()).collect::<Vec<_>>(), ["3", "1"]);
    assert_eq!((suites[0]["name"].as_str(), suites[0]["time"].as_str()), ("suite.6.1.small", "4.500"));
    let properties = of("property");
    let says = |at: usize| (properties[at]["name"].as_str(), properties[at]["value"].as_str());
    assert_eq!([says(0), says(1)], [("kernel", "6.1"), ("release", "6.1.0-test")]);
    assert_eq!([says(2), says(3)], [("kernel", "6.12"), ("release", "release unknown")]);
    assert_eq!(
        of("testcase").iter().map(|c| c["name"].as_str()).collect::<Vec<_>>(),
        ["fine", "leaky", "crash", "fine"]
    );
    assert_eq!((of("failure").len(), of("error").len()), (1, 1));
    assert_eq!(of("failure")[0]["message"], "<script>&\"'\u{fffd}]]>");
    assert_eq!(of("error")[0]["type"], "crashed");
    assert!(text.contains("new leak n: 3 objects, 1 direct, 192 bytes"), "{text}");
}

#[test]
fn sarif_has_a_result_for_each_leak() {
    let log = sarif::sarif(&sample());
    assert_eq!((log["version"].as_str(), log["runs"].as_array().map(Vec::len)), (Some("2.1.0"), Some(1)));
    let run = &log["runs"][0];
    assert_eq!(run["tool"]["driver"]["name"], "kleak-vmm");
    assert_eq!(run["invocations"][0]["executionSuccessful"], false);
    let results = run["results"].as_array().unwrap();
    let states: Vec<_> = results
        .iter()
        .map(|r| {
            let rule = r["ruleIndex"].as_u64().unwrap() as usize;
            assert_eq!(run["tool"]["driver"]["rules"][rule]["id"], r["ruleId"]);
            assert!(r["message"]["text"].is_string());
            // What GitHub's code scanning needs of each.
            let place = &r["locations"][0]["physicalLocation"];
            assert_eq!(place["artifactLocation"]["uri"], "suites/my%20suite.toml");
            assert_eq!(place["region"]["startLine"], 1);
            (r["level"].as_str().unwrap(), r["baselineState"].as_str().unwrap())
        })
        .collect();
    let fixed = ("none", "absent");
    assert_eq!(states, [("error", "new"), ("warning", "unchanged"), ("error", "new"), fixed, fixed]);
    let prints = |key: &str| {
        results.iter().map(|r| r["partialFingerprints"][key].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(
        prints("kleakGroup/v1"),
        [
            "6.1/small/leaky:n",
            "6.1/small/leaky:k",
            "6.1/small/crash",
            "6.1/small/fine:f",
            "6.12/small/fine:f"
        ]
    );
    assert_eq!(prints("primaryLocationLineHash"), prints("kleakGroup/v1"));
    assert_eq!(
        (&results[0]["properties"]["direct"], &results[1]["properties"]["direct"]),
        (&json!(1), &json!(2))
    );
    assert!(results[..3].iter().all(|result| result["properties"]["release"] == "6.1.0-test"), "{results:?}");
    let says = results[0]["message"]["text"].as_str().unwrap();
    assert!(says.contains(" leaks 3 objects (1 direct) of 192 bytes"), "{says}");
    assert_eq!(results[0]["stacks"][0]["frames"].as_array().map(Vec::len), Some(2));
}

#[test]
fn sarif_has_what_is_wrong_without_a_new_leak() {
    let meant = || vec![Group { state: State::Expected, ..group("m", 6, "meant_probe") }];
    let ended = |id: &str, outcome: Outcome, groups| TestResult {
        outcome,
        message: "6 leaks, 5 expected".into(),
        ..test(id, groups)
    };
    let all = results(vec![
        ended("k/g/none", Outcome::Missing, Vec::new()),
        ended("k/g/more", Outcome::Leaked, meant()),
        ended("k/g/fine", Outcome::Passed, meant()),
        ended("k/g/new", Outcome::Leaked, vec![group("n", 1, "new_probe")]),
    ]);
    let log = sarif::sarif(&all);
    let errors: Vec<_> = log["runs"][0]["results"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|result| result["level"] == "error")
        .map(|result| {
            let print = &result["partialFingerprints"]["primaryLocationLineHash"];
            (result["ruleId"].as_str().unwrap(), print.as_str().unwrap())
        })
        .collect();
    let amiss = "leaks-not-as-expected";
    assert_eq!(errors, [("kernel-memory-leak", "k/g/new:n"), (amiss, "k/g/none"), (amiss, "k/g/more")]);
    assert_eq!(log["runs"][0]["invocations"][0]["executionSuccessful"], true, "they were made");
}

#[test]
fn sarif_names_the_suite_by_a_uri() {
    let table =
        [("a/b.toml", "a/b.toml"), ("/a b/\u{e4}%.toml", "file:///a%20b/%C3%A4%25.toml"), ("a:b", "a%3Ab")];
    for (file, uri) in table {
        assert_eq!(sarif::uri(file), uri);
    }
}

#[test]
fn html_is_one_page_of_its_own() {
    let page = html::html(&sample());
    // Names of what elements mean are no addresses, and a colour of the page itself is no file.
    let page_without_comments: String =
        page.split("<!--").map(|part| part.split_once("-->").map_or(part, |(_, rest)| rest)).collect();
    let bare = page_without_comments
        .split(' ')
        .filter(|word| !word.starts_with("xmlns"))
        .collect::<Vec<_>>()
        .join(" ");
    let bare = bare.replace("url(#background)", "");
    let foreign = ["<script", "://", "src=", "href=", "url(", "onload"];
    assert!(!foreign.iter().any(|part| bare.contains(part)), "{bare}");
    assert!(page.starts_with("<!DOCTYPE html>") && page.trim_end().ends_with("</html>"));
    assert!(page.contains("&lt;script&gt;") && page.contains("new leak n: 3 objects, 1 direct, "));
    assert_eq!(page.matches("<td>6.1<br><small>6.1.0-test</small></td>").count(), 3);
    assert_eq!(page.matches("<td>6.12<br><small>release unknown</small></td>").count(), 1);
    // Every leak has its box: 3 * 64 and 2 * 64 bytes below "all" and "init".
    let boxes: Vec<&str> =
        page.split("<title>").skip(2).map(|rest| rest.split("</title>").next().unwrap()).collect();
    assert_eq!(boxes.iter().filter(|title| title.contains("(320 bytes, 100")).count(), 2, "{boxes:?}");
    assert!(boxes.contains(&"known_probe (128 bytes, 40.00%)"), "{boxes:?}");
    assert!(!html::html(&results(vec![test("k/g/t", Vec::new())])).contains("<svg"));
}

#[test]
fn html_plots_what_lives_and_what_grows() {
    let page = html::html(&sample());
    let plots: Vec<Vec<(f64, f64)>> = page
        .split("<polyline points=\"")
        .skip(1)
        .map(|rest| {
            let points = rest.split('"').next().unwrap().split(' ');
            points
                .map(|p| p.split_once(',').unwrap())
                .map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap()))
                .collect()
        })
        .collect();
    assert_eq!(
        plots.iter().map(Vec::len).collect::<Vec<_>>(),
        [3, 5],
        "the last kernel has one test, without a heap"
    );
    assert!(
        plots.iter().flatten().all(|&(x, y)| (0.0..=1000.0).contains(&x) && (0.0..=110.0).contains(&y)),
        "{plots:?}"
    );
    let [most, least, middle] = [0, 1, 2].map(|at| plots[0][at].1);
    assert!(most < middle && middle < least && (middle - most - (least - middle)).abs() < 0.2, "{plots:?}");
    assert!(
        page.contains("<title>crash: 10 objects, 2000 bytes</title>")
            && page.contains("<title>scan 5: 6 objects</title>")
    );
}

#[test]
fn text_says_all_that_is_wrong_and_counts() {
    let text = text(&sample());
    for part in [
        "6.1/small/fine: passed (1.5 s)\n",
        "6.1/small/leaky: leaked: ",
        ", 2 known leaks (1.5 s)\n",
        "  new leak n: 3 objects, 1 direct, 192 bytes, retains 192 bytes, slab kmalloc-64\n",
        "6.1/small/crash: crashed: Kernel panic (1.5 s)\n  | ",
        "fixed: f fixed_probe\nkernel 6.1: 6.1.0-test\nkernel 6.12: release unknown\n",
        "suite: 4 tests: 2 passed, 1 leaked, 1 crashed; leaks: 3 new, 2 known, 0 expected, 1 fixed;",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn a_file_is_whole_or_not_there() {
    let folder = std::env::temp_dir().join(format!("kleak-write-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let files = ["r.json", "r.xml", "r.sarif", "r.html", "r.txt"].map(|name| folder.join(name));
    all(&sample(), &files).unwrap();
    let begins = ["{", "<?xml", "{", "<!DOCTYPE", "6.1/"];
    for (file, begin) in files.iter().zip(begins) {
        assert!(std::fs::read_to_string(file).unwrap().starts_with(begin), "{}", file.display());
    }
    let absent = folder.join("absent/r.json");
    let error = all(&sample(), &[absent, folder.join("last.txt")]).unwrap_err();
    assert_eq!(crate::cli::failure::exit_code(&error), crate::cli::ExitCode::Usage);
    assert!(folder.join("last.txt").exists(), "one that cannot be written must not keep the others");
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 6, "no half files");
    std::fs::remove_dir_all(&folder).unwrap();
}
