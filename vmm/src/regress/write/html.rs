//! Results as one HTML page that needs nothing else: no script, no network, and browsers are told to refuse both.

use super::super::result::{Outcome, Results, State, TestResult};
use super::plot;
use super::text::describe;
use inferno::flamegraph;
use std::fmt::Write;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222}\
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3em .6em;border-bottom:1px solid #ddd;\
vertical-align:top}pre{background:#f6f6f4;padding:.6em;overflow-x:auto;font-size:13px}.passed{color:#176f2c}\
.leaked,.missing{color:#b00020;font-weight:600}.error{color:#8a4b00;font-weight:600}svg{width:100%;height:auto}\
svg text{font:11px monospace}summary{cursor:pointer}figure{margin:.6em 0}";

/// Nothing but the page's own styles (W3C, Content Security Policy Level 3).
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// The page.
pub fn html(results: &Results) -> String {
    let name = escape(&results.suite);
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{name}: kernel memory leaks</title>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body>\n<h1>{name}</h1>\n"
    );
    let summary = super::text(results);
    let _ = writeln!(page, "<p>{}</p>", escape(summary.lines().last().unwrap_or_default()));
    page.push_str("<table><tr><th>kernel</th><th>guest</th><th>test</th><th>outcome</th><th>leaks</th><th>s</th></tr>\n");
    results.tests.iter().for_each(|test| row(&mut page, test));
    page.push_str("</table>\n");
    let flame = flame(results);
    if !flame.is_empty() {
        let _ = writeln!(page, "<h2>Retained bytes of new and known leaks by backtrace</h2>\n{flame}");
    }
    for (title, plots) in [
        ("Bytes live after each test", plot::heaps(results)),
        ("Live objects of what keeps growing, by scan", plot::growth(results)),
    ] {
        if !plots.is_empty() {
            let _ = writeln!(page, "<h2>{title}</h2>\n{plots}");
        }
    }
    if !results.fixed.is_empty() {
        page.push_str("<h2>Fixed</h2>\n<ul>\n");
        for fixed in &results.fixed {
            let _ = writeln!(page, "<li>{} ({})</li>", escape(&fixed.site), escape(&fixed.id));
        }
        page.push_str("</ul>\n");
    }
    page.push_str("</body></html>\n");
    page
}

fn row(page: &mut String, test: &TestResult) {
    let class = match test.outcome {
        Outcome::Passed | Outcome::Leaked | Outcome::Missing => test.outcome.name(),
        _ => "error",
    };
    // A run's kernel has no other name.
    let release = match test.release_text() {
        same if same == test.kernel => String::new(),
        other => format!("<br><small>{}</small>", escape(other)),
    };
    let leaks = [State::New, State::Known, State::Expected].map(|state| test.leaks(state));
    let _ = write!(
        page,
        "<tr><td>{}{release}</td><td>{}</td><td>{}</td><td><span class=\"{class}\">{}</span> {}",
        escape(&test.kernel),
        escape(&test.guest),
        escape(&test.test),
        test.outcome.name(),
        escape(&test.message)
    );
    let groups: String = test.groups.iter().map(describe).collect();
    for (what, text) in [("leaks", groups), ("console", test.console.join("\n"))] {
        if !text.is_empty() {
            let _ = write!(page, "<details><summary>{what}</summary><pre>{}</pre></details>", escape(&text));
        }
    }
    let [new, known, expected] = leaks;
    let _ = writeln!(
        page,
        "</td><td>{new} new, {known} known, {expected} expected</td><td>{}.{}</td></tr>",
        test.millis / 1000,
        test.millis % 1000 / 100
    );
}

/// A flame graph, upside down (an icicle), by inferno and without its script: a box's width is the bytes that leaks below it
/// retain. Empty without leaks.
fn flame(results: &Results) -> String {
    let groups = results.tests.iter().flat_map(|test| &test.groups);
    let lines: Vec<String> = groups
        .filter(|group| group.state != State::Expected && group.retained_bytes > 0)
        .map(|group| {
            // A semicolon parts functions, and a space the bytes.
            let names = group.backtrace.iter().rev().map(|frame| frame.text().replace([';', ' '], "_"));
            let stack = names.collect::<Vec<_>>().join(";");
            let stack = if stack.is_empty() { "no backtrace" } else { &stack };
            format!("{} {}", stack.replace(' ', "_"), group.retained_bytes)
        })
        .collect();
    let mut options = flamegraph::Options::default();
    options.title = String::new();
    options.count_name = "bytes".to_owned();
    options.direction = flamegraph::Direction::Inverted;
    options.no_javascript = true;
    options.hash = true;
    let mut drawing = Vec::new();
    // It draws to memory; what it cannot draw is nothing at all.
    match flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), &mut drawing) {
        Ok(()) if !lines.is_empty() => still(&String::from_utf8_lossy(&drawing)),
        _ => String::new(),
    }
}

/// A drawing as a part of a page, without the settings of a script that is not there.
fn still(drawing: &str) -> String {
    let body = drawing.find("<svg").map_or("", |start| &drawing[start..]);
    let (before, rest) = body.split_once("<script").unwrap_or((body, ""));
    let after = rest.split_once("</script>").map_or("", |(_, after)| after);
    format!("{}{after}", before.replacen(" onload=\"init(evt)\"", "", 1))
}

/// Text in HTML.
pub fn escape(text: &str) -> String {
    quick_xml::escape::escape(text).into_owned()
}
