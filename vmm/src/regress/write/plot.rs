//! Line plots of the HTML page: what lives after each test, and what keeps growing.

use super::super::result::{Growth, Results};
use super::html::escape;
use std::fmt::Write;

/// Size of a plot and room for its labels, in its own units.
const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 110.0;
const LEFT: f64 = 110.0;
const MARGIN: f64 = 12.0;

/// A point of a plot and what it stands for.
struct Point {
    value: u64,
    label: String,
}

/// Bytes live after each test, a plot for each kernel and guest; empty where no two tests say.
pub fn heaps(results: &Results) -> String {
    let mut plots = String::new();
    for tests in results.tests.chunk_by(|a, b| (&a.kernel, &a.guest) == (&b.kernel, &b.guest)) {
        let point = |test: &super::super::result::TestResult| {
            let heap = test.heap?;
            let label = format!("{}: {} objects, {} bytes", test.test, heap.objects, heap.bytes);
            Some(Point { value: heap.bytes, label })
        };
        let points: Vec<Point> = tests.iter().filter_map(point).collect();
        figure(&mut plots, &format!("{}/{}", tests[0].kernel, tests[0].guest), &points);
    }
    plots
}

/// Live objects of what grew at each scan of a boot; empty where nothing did.
pub fn growth(results: &Results) -> String {
    let mut plots = String::new();
    for boot in &results.boots {
        for Growth { kind, name, bytes_per_hour, history } in &boot.growth {
            let point = |(scan, &value): (usize, &u64)| Point {
                value,
                label: format!("scan {}: {value} objects", scan + 1),
            };
            let points: Vec<Point> = history.iter().enumerate().map(point).collect();
            let title =
                format!("{}/{}: {kind} {name}, {bytes_per_hour:.0} bytes an hour", boot.kernel, boot.guest);
            figure(&mut plots, &title, &points);
        }
    }
    plots
}

fn figure(plots: &mut String, title: &str, points: &[Point]) {
    if points.len() < 2 {
        return;
    }
    let values = || points.iter().map(|point| point.value);
    let (least, most) = (values().min().unwrap_or(0), values().max().unwrap_or(0));
    let step = (WIDTH - LEFT - MARGIN) / (points.len() - 1) as f64;
    let scale = (HEIGHT - 2.0 * MARGIN) / most.saturating_sub(least).max(1) as f64;
    let place = |(index, point): (usize, &Point)| {
        (LEFT + step * index as f64, HEIGHT - MARGIN - scale * (point.value - least) as f64)
    };
    let line: Vec<String> =
        points.iter().enumerate().map(place).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = writeln!(
        plots,
        "<figure><figcaption>{}</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n\
         <text x=\"0\" y=\"{:.1}\">{most}</text><text x=\"0\" y=\"{:.1}\">{least}</text>\n\
         <polyline points=\"{}\" fill=\"none\" stroke=\"#2a6fb0\" stroke-width=\"2\"/>",
        escape(title),
        2.0 * MARGIN,
        HEIGHT - MARGIN,
        line.join(" ")
    );
    for (at, point) in points.iter().enumerate() {
        let (x, y) = place((at, point));
        let _ = writeln!(
            plots,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"#2a6fb0\"><title>{}</title></circle>",
            escape(&point.label)
        );
    }
    plots.push_str("</svg></figure>\n");
}
