//! The screen: two lines on the machine, one on the last command, the table, one with the keys. Made for 80 columns and 24
//! lines; more are used, fewer cut.

use super::live::{Live, Row, SAMPLES};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::symbols::bar;
use ratatui::text::{Line, Text};
use ratatui::widgets::{self, Cell, Paragraph, Table};
use serde_json::Value;

/// Draws all of it.
pub fn draw(frame: &mut Frame<'_>, live: &Live) {
    let parts = [Constraint::Length(1), Constraint::Length(1), Constraint::Length(1), Constraint::Min(1)];
    let [machine, scans, message, table, keys] =
        Layout::vertical(parts.into_iter().chain([Constraint::Length(1)])).areas(frame.area());
    let reversed = Style::new().add_modifier(Modifier::REVERSED);
    frame.render_widget(Paragraph::new(machine_line(&live.status)).style(reversed), machine);
    frame.render_widget(Paragraph::new(scans_line(&live.status)), scans);
    frame.render_widget(Paragraph::new(live.message.escape_debug().to_string()), message);
    frame.render_widget(rows(live, table.height.into()), table);
    let help = format!(
        "Tab {} | o sort: {} | s scan | c clear | q quit",
        match live.view.word() {
            "sites" => "caches",
            _ => "sites",
        },
        live.sort.word()
    );
    frame.render_widget(Paragraph::new(help).style(reversed), keys);
}

fn machine_line(status: &Value) -> String {
    if status.is_null() {
        return "kleak-vmm: asking ...".to_owned();
    }
    let text = |member: &str| status[member].as_str().unwrap_or("?").escape_debug().to_string();
    let state = if status["paused"] == true { "paused".to_owned() } else { text("state") };
    format!(
        "{}, {state}, up {} s; {} objects, {}",
        text("guest"),
        status["uptime_s"],
        status["objects"],
        size(status["object_bytes"].as_f64().unwrap_or(0.0))
    )
}

fn scans_line(status: &Value) -> String {
    let mut line = match status["scans"].as_u64() {
        None | Some(0) => "no scan yet".to_owned(),
        Some(scans) => format!(
            "{} unreferenced; {scans} scans, the last paused the guest for {} ms",
            status["unreferenced"], status["last_scan_pause_ms"]
        ),
    };
    if let Some(dropped) = status["events_dropped"].as_u64().filter(|&dropped| dropped > 0) {
        line.push_str(&format!("; {dropped} EVENTS LOST"));
    }
    if status["tracking"] == false {
        line.push_str("; NOT TRACKING");
    }
    line
}

/// What fits into so many lines, the heading among them.
fn rows(live: &Live, height: usize) -> Table<'_> {
    let cells = |row: &Row| {
        let rate = row.rate.map_or_else(|| "-".to_owned(), |rate| format!("{}/s", signed(rate)));
        let numbers = [size(row.bytes as f64), row.objects.to_string(), rate];
        let numbers = numbers.map(|text| Cell::from(Text::from(text).right_aligned()));
        widgets::Row::new(
            numbers.into_iter().chain([Cell::from(sparkline(&row.history)), Cell::from(row.name.clone())]),
        )
    };
    let rows = live.rows();
    let room = height.saturating_sub(1);
    let shown = if rows.len() > room { room.saturating_sub(1) } else { rows.len() };
    let omitted = rows.len() - shown;
    let mut lines: Vec<widgets::Row<'_>> = rows.into_iter().take(shown).map(cells).collect();
    if omitted > 0 {
        let more = Cell::from(format!("and {omitted} more"));
        lines.push(widgets::Row::new([
            Cell::default(),
            Cell::default(),
            Cell::default(),
            Cell::default(),
            more,
        ]));
    }
    let headings = ["bytes", "objects", "rate"].map(|text| Cell::from(Text::from(text).right_aligned()));
    let headings = headings.into_iter().chain([Cell::from("history"), Cell::from(live.view.word())]);
    let widths = [
        Constraint::Length(9),
        Constraint::Length(8),
        Constraint::Length(11),
        Constraint::Length(SAMPLES as u16),
        Constraint::Min(16),
    ];
    let bold = Style::new().add_modifier(Modifier::BOLD);
    Table::new(lines, widths).header(widgets::Row::new(headings).style(bold))
}

/// A bar for each sample, between the least and the most; the lowest where nothing changes.
fn sparkline(history: &[i64]) -> Line<'static> {
    const BARS: [&str; 8] = [
        bar::ONE_EIGHTH,
        bar::ONE_QUARTER,
        bar::THREE_EIGHTHS,
        bar::HALF,
        bar::FIVE_EIGHTHS,
        bar::THREE_QUARTERS,
        bar::SEVEN_EIGHTHS,
        bar::FULL,
    ];
    let (least, most) = (history.iter().min().copied(), history.iter().max().copied());
    let range = most.zip(least).map_or(0, |(most, least)| most.saturating_sub(least)).max(1) as f64;
    let bar = |value: &i64| {
        let height = value.saturating_sub(least.unwrap_or(0)) as f64 / range;
        BARS[((height * 7.0).round() as usize).min(7)]
    };
    Line::from(history.iter().map(bar).collect::<String>())
}

/// Bytes in the largest unit of 1024 that leaves at least one.
fn size(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut scaled = bytes;
    let mut unit = 0;
    while scaled.abs() >= 1024.0 && unit + 1 < units.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{scaled:.0} B") } else { format!("{scaled:.1} {}", units[unit]) }
}

fn signed(bytes: f64) -> String {
    if bytes >= 0.5 { format!("+{}", size(bytes)) } else { size(bytes) }
}
