//! What is known of the machine, and what keys do to it.

use super::poller::{Ask, Update};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use rustc_hash::FxHashMap;
use serde_json::Value;
use std::cmp::Reverse;
use std::collections::VecDeque;
use std::time::Duration;

/// Samples kept of each row: what rates and sparklines are of.
pub const SAMPLES: usize = 16;

/// Which table is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum View {
    /// By allocation site.
    #[default]
    Sites,
    /// By slab cache.
    Caches,
}

impl View {
    /// The word behind `top`, and the member of its reply.
    pub fn word(self) -> &'static str {
        match self {
            Self::Sites => "sites",
            Self::Caches => "caches",
        }
    }

    /// The member that names a row.
    fn name(self) -> &'static str {
        match self {
            Self::Sites => "site",
            Self::Caches => "cache",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Sites => Self::Caches,
            Self::Caches => Self::Sites,
        }
    }
}

/// What rows are sorted by, largest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sort {
    /// Live bytes.
    #[default]
    Bytes,
    /// Live objects.
    Objects,
    /// Growth.
    Rate,
}

impl Sort {
    /// As the last line says it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Objects => "objects",
            Self::Rate => "rate",
        }
    }

    fn next(self) -> Self {
        match self {
            Self::Bytes => Self::Objects,
            Self::Objects => Self::Rate,
            Self::Rate => Self::Bytes,
        }
    }
}

/// A line of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Site or cache, without control characters.
    pub name: String,
    /// Live bytes.
    pub bytes: i64,
    /// Live objects.
    pub objects: i64,
    /// Bytes a second over the samples; None with the first.
    pub rate: Option<f64>,
    /// Live bytes over time, the oldest first.
    pub history: Vec<i64>,
}

/// What a key leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing but a new look.
    Nothing,
    /// A word to the machine.
    Ask(Ask),
    /// The end of the view.
    Quit,
}

/// Times since the start, and live bytes.
type History = VecDeque<(Duration, i64)>;

/// See the module.
#[derive(Debug, Default)]
pub struct Live {
    /// Shown.
    pub view: View,
    /// Order of the rows.
    pub sort: Sort,
    /// Reply of `status`; null before the first.
    pub status: Value,
    /// The last command's reply, or what is being waited for.
    pub message: String,
    rows: Vec<Row>,
    history: FxHashMap<(View, String), History>,
}

impl Live {
    /// Rows in their order.
    pub fn rows(&self) -> Vec<&Row> {
        let mut rows: Vec<&Row> = self.rows.iter().collect();
        match self.sort {
            Sort::Bytes => rows.sort_by_key(|row| Reverse(row.bytes)),
            Sort::Objects => rows.sort_by_key(|row| Reverse(row.objects)),
            Sort::Rate => {
                let rate = |row: &Row| row.rate.unwrap_or(0.0);
                rows.sort_by(|a, b| rate(b).total_cmp(&rate(a)));
            }
        }
        rows
    }

    /// Takes in what came back at a time since the start.
    pub fn apply(&mut self, update: Update, now: Duration) {
        match update {
            Update::Table { view, status, table } => {
                self.status = status;
                // The other one was asked for meanwhile.
                if view == self.view {
                    self.take(&table, now);
                }
            }
            Update::Said(text) | Update::Lost(text) => self.message = text,
        }
    }

    /// What a key does.
    pub fn key(&mut self, key: KeyEvent) -> Action {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => Action::Quit,
            KeyCode::Char('q') | KeyCode::Esc => Action::Quit,
            KeyCode::Char('s') => self.wait_for("scanning ...", Ask::Scan),
            KeyCode::Char('c') => self.wait_for("clearing ...", Ask::Clear),
            KeyCode::Char('o') => {
                self.sort = self.sort.next();
                Action::Nothing
            }
            KeyCode::Tab => {
                self.view = self.view.other();
                self.rows.clear();
                Action::Ask(Ask::Show(self.view))
            }
            _ => Action::Nothing,
        }
    }

    fn wait_for(&mut self, message: &str, ask: Ask) -> Action {
        self.message = message.to_owned();
        Action::Ask(ask)
    }

    fn take(&mut self, table: &Value, now: Duration) {
        let view = self.view;
        let rows = table[view.word()].as_array().map_or(&[][..], Vec::as_slice);
        self.rows.clear();
        for row in rows {
            let name = row[view.name()].as_str().unwrap_or_default().escape_debug().to_string();
            let number = |member: &str| row[member].as_i64().unwrap_or(0);
            let (bytes, objects) = (number("bytes"), number("objects"));
            let history = self.history.entry((view, name.clone())).or_default();
            history.push_back((now, bytes));
            if history.len() > SAMPLES {
                history.pop_front();
            }
            let (rate, history) = (rate(history), history.iter().map(|&(_, bytes)| bytes).collect());
            self.rows.push(Row { name, bytes, objects, rate, history });
        }
        let rows = &self.rows;
        self.history.retain(|(of, name), _| *of != view || rows.iter().any(|row| row.name == *name));
    }
}

/// Bytes a second between the first and the last sample.
fn rate(history: &History) -> Option<f64> {
    let (&(begin, before), &(end, after)) = (history.front()?, history.back()?);
    let seconds = end.checked_sub(begin)?.as_secs_f64();
    (seconds > 0.0).then(|| after.saturating_sub(before) as f64 / seconds)
}
