//! `kleak-vmm top`: who holds the guest's memory, live, in a terminal.
//!
//! A client of the control socket like any other: it asks for `json status` and for `json top` of the table that is shown,
//! and so pauses the guest no more than these commands do.
//!
//! ```text
//! control socket <-> poller thread -> updates -> live (what is known) -> draw -> terminal
//!                          ^                        |
//!                          +------- asks <- keys ---+
//! ```

mod draw;
mod live;
mod poller;
#[cfg(test)]
mod tests;

use crate::cli::{ExitCode, Failure, ctl};
use crate::console::client::Client;
use crate::console::{signals, terminal};
use anyhow::{Context, Result, bail};
use live::{Action, Live};
use poller::{Poller, Update};
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::EnterAlternateScreen;
use ratatui::{Terminal, TerminalOptions, Viewport};
use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// How long a key is waited for before the screen is brought up to date.
const STEP: Duration = Duration::from_millis(100);

/// Shows the machine whose control socket is `socket` until the user has seen enough; asks anew every `period`.
///
/// # Errors
/// This is no terminal; nobody answers on the socket, or no more.
pub fn top(socket: &Path, period: Duration) -> Result<ExitCode> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        let failure = Failure::usage("The live view needs a terminal");
        return Err(failure.hint("kleak-vmm ctl top prints the same table once").into());
    }
    let client = Client::connect(socket).with_context(|| ctl::unanswered(socket))?;
    let ended = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&ended);
    signals::watch(move |_| flag.store(true, SeqCst)).context("Cannot watch for signals")?;
    let poller = Poller::start(client, period)?;
    // Restored when dropped, and by signals and panics.
    let raw = terminal::RawTerminal::enter_screen(&io::stdin()).context("Cannot use the terminal")?;
    if raw.is_none() {
        return Err(Failure::usage("The live view cannot run in the background").into());
    }
    execute!(io::stdout(), EnterAlternateScreen).context("Cannot use the terminal")?;
    show(&poller, &ended)
        .with_context(|| Failure::host(format!("The virtual machine on {} is gone", socket.display())))
}

fn show(poller: &Poller, ended: &AtomicBool) -> Result<ExitCode> {
    let options = TerminalOptions { viewport: Viewport::Fullscreen };
    let backend = CrosstermBackend::new(io::stdout());
    let mut terminal = Terminal::with_options(backend, options).context("Cannot use the terminal")?;
    let (mut live, begin) = (Live::default(), Instant::now());
    loop {
        terminal.draw(|frame| draw::draw(frame, &live)).context("Cannot draw")?;
        if ended.load(SeqCst) {
            return Ok(ExitCode::Success);
        }
        if event::poll(STEP).context("Cannot read keys")?
            && let Event::Key(key) = event::read().context("Cannot read keys")?
            && key.kind == KeyEventKind::Press
        {
            match live.key(key) {
                Action::Quit => return Ok(ExitCode::Success),
                Action::Ask(ask) => poller.ask(ask),
                Action::Nothing => {}
            }
        }
        while let Some(update) = poller.update() {
            match update {
                Update::Lost(error) => bail!(error),
                update => live.apply(update, begin.elapsed()),
            }
        }
    }
}
