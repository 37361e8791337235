//! Talks to the machine, so that the screen never waits for it.

use super::live::View;
use crate::console::client::Client;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// What the user wants of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// This table from now on.
    Show(View),
    /// A scan.
    Scan,
    /// No word more of the leaks found so far.
    Clear,
}

/// What came back.
#[derive(Debug)]
pub enum Update {
    /// The machine's state, and a table.
    Table {
        /// Which.
        view: View,
        /// Reply of `json status`.
        status: Value,
        /// Reply of `json top`.
        table: Value,
    },
    /// What a command came to, or why it failed.
    Said(String),
    /// The connection has ended, for this reason.
    Lost(String),
}

/// See the module.
pub struct Poller {
    asks: Sender<Ask>,
    updates: Receiver<Update>,
}

impl Poller {
    /// Asks for the first table at once, and again every `period`, on a thread of its own. The thread ends with the
    /// connection, or when nobody wants to know any more.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn start<R, W>(client: Client<R, W>, period: Duration) -> Result<Self>
    where
        R: Read + Send + 'static,
        W: Write + Send + 'static,
    {
        let (asks, asked) = channel();
        let (sender, updates) = channel();
        let thread = std::thread::Builder::new().name("poller".into());
        thread.spawn(move || poll(client, period, &asked, &sender)).context("Cannot ask the machine")?;
        Ok(Self { asks, updates })
    }

    /// To be done next.
    pub fn ask(&self, ask: Ask) {
        // A poller that has ended has said so.
        let _ = self.asks.send(ask);
    }

    /// What came back, if anything did.
    pub fn update(&self) -> Option<Update> {
        self.updates.try_recv().ok()
    }

    /// What comes back next; None when nothing does in time.
    #[cfg(test)]
    pub fn wait(&self, patience: Duration) -> Option<Update> {
        self.updates.recv_timeout(patience).ok()
    }
}

fn poll<R: Read, W: Write>(
    mut client: Client<R, W>,
    period: Duration,
    asked: &Receiver<Ask>,
    updates: &Sender<Update>,
) {
    let mut view = View::default();
    loop {
        let update = match table(&mut client, view) {
            Ok(update) => update,
            Err(error) => Update::Lost(format!("{error:#}")),
        };
        let lost = matches!(update, Update::Lost(_));
        if updates.send(update).is_err() || lost {
            return;
        }
        let said = match asked.recv_timeout(period) {
            Ok(Ask::Show(other)) => {
                view = other;
                continue;
            }
            Ok(Ask::Scan) => command(&mut client, "scan"),
            Ok(Ask::Clear) => command(&mut client, "clear"),
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let update = said.map_or_else(|error| Update::Lost(format!("{error:#}")), Update::Said);
        let lost = matches!(update, Update::Lost(_));
        if updates.send(update).is_err() || lost {
            return;
        }
    }
}

fn table<R: Read, W: Write>(client: &mut Client<R, W>, view: View) -> Result<Update> {
    let status = client.json("status")?;
    let table = client.json(&format!("top {}", view.word()))?;
    match table["error"].as_str() {
        Some(error) => Ok(Update::Said(error.to_owned())),
        None => Ok(Update::Table { view, status, table }),
    }
}

/// A command's first line, an error included.
fn command<R: Read, W: Write>(client: &mut Client<R, W>, line: &str) -> Result<String> {
    let reply = client.request(line)?;
    match reply.body.lines().next() {
        Some(first) => Ok(first.to_owned()),
        None => bail!("The reply to {line} is empty"),
    }
}
