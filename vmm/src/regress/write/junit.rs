//! JUnit's XML, as the common schema (Jenkins' xunit plug-in, `junit-10.xsd`) has it: one test suite for each kernel and
//! guest, whose properties say which kernel that is, a `failure` where the leaks are wrong, an `error` where the test could not be made.

use super::super::result::{Results, State, TestResult};
use super::text::describe;
use anyhow::{Context, Result};
use quick_xml::Writer;
use quick_xml::events::{BytesDecl, BytesEnd, BytesStart, BytesText, Event};

type Xml = Writer<Vec<u8>>;

/// The document.
///
/// # Errors
/// None in practice: it is written to memory.
pub fn junit(results: &Results) -> Result<String> {
    let mut xml = Writer::new_with_indent(Vec::new(), b' ', 2);
    document(&mut xml, results).context("Cannot write results as JUnit XML")?;
    let mut text = String::from_utf8(xml.into_inner()).context("JUnit XML")?;
    text.push('\n');
    Ok(text)
}

fn document(xml: &mut Xml, results: &Results) -> std::io::Result<()> {
    xml.write_event(Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None)))?;
    let tests: Vec<&TestResult> = results.tests.iter().collect();
    open(xml, "testsuites", &[("name", &results.suite)], &tests, results.millis)?;
    let key = |test: &TestResult| (test.kernel.clone(), test.release.clone(), test.guest.clone());
    for suite in tests.chunk_by(|a, b| key(a) == key(b)) {
        let name = format!("{}.{}.{}", results.suite, suite[0].kernel, suite[0].guest);
        let millis = suite.iter().map(|test| test.millis).sum();
        open(xml, "testsuite", &[("name", &name)], suite, millis)?;
        properties(xml, &[("kernel", &suite[0].kernel), ("release", suite[0].release_text())])?;
        suite.iter().try_for_each(|test| case(xml, &name, test))?;
        close(xml, "testsuite")?;
    }
    close(xml, "testsuites")
}

fn open(
    xml: &mut Xml,
    name: &str,
    attributes: &[(&str, &String)],
    tests: &[&TestResult],
    millis: u64,
) -> std::io::Result<()> {
    let count =
        |wanted: fn(&TestResult) -> bool| tests.iter().filter(|test| wanted(test)).count().to_string();
    let mut element = BytesStart::new(name);
    attributes.iter().for_each(|(key, value)| element.push_attribute((*key, clean(value).as_str())));
    element.push_attribute(("tests", tests.len().to_string().as_str()));
    element.push_attribute(("failures", count(is_failure).as_str()));
    element.push_attribute(("errors", count(|test| !test.outcome.is_verdict()).as_str()));
    element.push_attribute(("time", seconds(millis).as_str()));
    xml.write_event(Event::Start(element))
}

fn properties(xml: &mut Xml, properties: &[(&str, &str)]) -> std::io::Result<()> {
    xml.write_event(Event::Start(BytesStart::new("properties")))?;
    for (name, value) in properties {
        let mut element = BytesStart::new("property");
        element.push_attribute(("name", *name));
        element.push_attribute(("value", clean(value).as_str()));
        xml.write_event(Event::Empty(element))?;
    }
    close(xml, "properties")
}

fn close(xml: &mut Xml, name: &str) -> std::io::Result<()> {
    xml.write_event(Event::End(BytesEnd::new(name)))
}

/// The leaks are the news.
fn is_failure(test: &TestResult) -> bool {
    test.outcome.is_verdict() && test.outcome != super::super::result::Outcome::Passed
}

fn case(xml: &mut Xml, suite: &str, test: &TestResult) -> std::io::Result<()> {
    let mut element = BytesStart::new("testcase");
    element.push_attribute(("classname", clean(suite).as_str()));
    element.push_attribute(("name", clean(&test.test).as_str()));
    element.push_attribute(("time", seconds(test.millis).as_str()));
    xml.write_event(Event::Start(element))?;
    let trouble = match () {
        () if is_failure(test) => Some("failure"),
        () if !test.outcome.is_verdict() => Some("error"),
        () => None,
    };
    if let Some(name) = trouble {
        let mut element = BytesStart::new(name);
        element.push_attribute(("type", test.outcome.name()));
        element.push_attribute(("message", clean(&test.message).as_str()));
        xml.write_event(Event::Start(element))?;
        let news = test.groups.iter().filter(|group| group.state == State::New);
        xml.write_event(Event::Text(BytesText::new(&clean(&news.map(describe).collect::<String>()))))?;
        close(xml, name)?;
    }
    let expected = test.groups.iter().filter(|group| group.state != State::New).map(describe);
    for (name, text) in [("system-out", test.console.join("\n")), ("system-err", expected.collect())] {
        if !text.is_empty() {
            xml.write_event(Event::Start(BytesStart::new(name)))?;
            xml.write_event(Event::Text(BytesText::new(&clean(&text))))?;
            close(xml, name)?;
        }
    }
    close(xml, "testcase")
}

fn seconds(millis: u64) -> String {
    format!("{}.{:03}", millis / 1000, millis % 1000)
}

/// Without what no XML document may hold (XML 1.0, "Char"), not even escaped.
fn clean(text: &str) -> String {
    let allowed =
        |c: char| matches!(c, '\t' | '\n' | '\r') || (c >= ' ' && !matches!(c, '\u{fffe}' | '\u{ffff}'));
    text.chars().map(|c| if allowed(c) { c } else { '\u{fffd}' }).collect()
}
