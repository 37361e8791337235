//! Results as one HTML page that needs nothing else: no script, no network, and browsers are told to refuse both.

use super::super::result::{Outcome, Results, State, TestResult};
use super::plot;
use super::text::describe;
use std::collections::BTreeMap;
use std::fmt::Write;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222}\
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3em .6em;border-bottom:1px solid #ddd;\
vertical-align:top}pre{background:#f6f6f4;padding:.6em;overflow-x:auto;font-size:13px}.passed{color:#176f2c}\
.leaked,.missing{color:#b00020;font-weight:600}.error{color:#8a4b00;font-weight:600}svg{width:100%;height:auto}\
svg text{font:11px monospace}summary{cursor:pointer}figure{margin:.6em 0}";

/// Nothing but the page's own styles (W3C, Content Security Policy Level 3).
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// Width of the flame graph, and height of a row of it, in its own units.
const WIDTH: f64 = 1000.0;
const ROW: f64 = 18.0;
/// Narrower boxes are left out.
const LEAST: f64 = 1.0;
/// Width of a character of a label.
const CHARACTER: f64 = 6.7;
/// Functions deep at most.
const DEPTH: usize = 64;

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
    let leaks = [State::New, State::Known, State::Expected].map(|state| test.leaks(state));
    let _ = write!(
        page,
        "<tr><td>{}</td><td>{}</td><td>{}</td><td><span class=\"{class}\">{}</span> {}",
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

/// Backtraces as a tree, outermost function first; bytes of all below.
#[derive(Default)]
struct Node {
    bytes: u64,
    below: BTreeMap<String, Node>,
}

/// A flame graph, upside down (an icicle): a box's width is the bytes that leaks below it retain. Empty without leaks.
fn flame(results: &Results) -> String {
    let mut root = Node::default();
    for group in
        results.tests.iter().flat_map(|test| &test.groups).filter(|group| group.state != State::Expected)
    {
        root.bytes += group.retained_bytes;
        let mut node = &mut root;
        for frame in group.backtrace.iter().rev().take(DEPTH) {
            node = node.below.entry(frame.text()).or_default();
            node.bytes += group.retained_bytes;
        }
    }
    if root.bytes == 0 {
        return String::new();
    }
    let mut boxes = String::new();
    let depth = draw(&mut boxes, &root, "all", 0.0, 0, WIDTH / root.bytes as f64);
    let height = ROW * depth as f64;
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n{boxes}</svg>")
}

/// Draws a node and those below it; how many rows that takes from the top.
fn draw(boxes: &mut String, node: &Node, name: &str, x: f64, depth: usize, scale: f64) -> usize {
    let width = node.bytes as f64 * scale;
    if width < LEAST {
        return depth;
    }
    let y = ROW * depth as f64;
    // Warm colours, one for each name.
    let hue = crc32fast::hash(name.as_bytes()) % 50;
    let shown: String = name.chars().take((width / CHARACTER) as usize).collect();
    let _ = writeln!(
        boxes,
        "<g><title>{} ({} bytes)</title><rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{}\" \
         fill=\"hsl({hue},80%,70%)\" stroke=\"#fff\"/><text x=\"{:.1}\" y=\"{}\">{}</text></g>",
        escape(name),
        node.bytes,
        ROW - 1.0,
        x + 2.0,
        y + 12.0,
        escape(&shown)
    );
    let (mut deepest, mut at) = (depth + 1, x);
    for (name, below) in &node.below {
        deepest = deepest.max(draw(boxes, below, name, at, depth + 1, scale));
        at += below.bytes as f64 * scale;
    }
    deepest
}

/// Text in HTML.
pub fn escape(text: &str) -> String {
    quick_xml::escape::escape(text).into_owned()
}
