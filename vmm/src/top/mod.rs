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
use anyhow::{Context, Result, anyhow, bail};
use live::{Action, Live};
use poller::{Poller, Update};
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::event::{self, Event, KeyEvent, KeyEventKind};
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
    let end = move |signal| {
        flag.store(true, SeqCst);
        // The main thread ends the process within a step, unless the terminal holds it: one that hung up can.
        std::thread::sleep(10 * STEP);
        terminal::restore();
        std::process::exit(128 + signal);
    };
    signals::watch(end).context("Cannot watch for signals")?;
    let poller = Poller::start(client, period)?;
    // Restored when dropped, and by signals and panics.
    let raw = terminal::RawTerminal::enter_screen(&io::stdin()).context("Cannot use the terminal")?;
    if raw.is_none() {
        return Err(Failure::usage("The live view cannot run in the background").into());
    }
    execute!(io::stdout(), EnterAlternateScreen).context("Cannot use the terminal")?;
    show(&poller, &ended, socket)
}

fn show(poller: &Poller, ended: &AtomicBool, socket: &Path) -> Result<ExitCode> {
    let options = TerminalOptions { viewport: Viewport::Fullscreen };
    let backend = CrosstermBackend::new(io::stdout());
    let mut terminal = Terminal::with_options(backend, options).context("Cannot use the terminal")?;
    let (mut live, begin) = (Live::default(), Instant::now());
    loop {
        terminal.draw(|frame| draw::draw(frame, &live)).context("Cannot draw")?;
        if ended.load(SeqCst) {
            return Ok(ExitCode::Success);
        }
        while let Some(key) = key()? {
            match live.key(key) {
                Action::Quit => return Ok(ExitCode::Success),
                Action::Ask(ask) => poller.ask(ask),
                Action::Nothing => {}
            }
        }
        wait_for_input()?;
        while let Some(update) = poller.update() {
            match update {
                Update::Lost(error) => {
                    let gone = Failure::host(format!("The virtual machine on {} is gone", socket.display()));
                    return Err(anyhow!(error).context(gone));
                }
                update => live.apply(update, begin.elapsed()),
            }
        }
    }
}

/// A key that was pressed and not looked at yet.
fn key() -> Result<Option<KeyEvent>> {
    while !has_hung_up(Duration::ZERO)? && event::poll(Duration::ZERO).context("Cannot read keys")? {
        if let Event::Key(key) = event::read().context("Cannot read keys")?
            && key.kind == KeyEventKind::Press
        {
            return Ok(Some(key));
        }
    }
    Ok(None)
}

/// Waits for a key, for a step at most.
///
/// # Errors
/// The terminal is gone.
fn wait_for_input() -> Result<()> {
    if has_hung_up(STEP)? {
        bail!("The terminal is gone");
    }
    Ok(())
}

/// True when nobody is at the other end of the terminal any more: crossterm would read from it for ever. Waits for input
/// first.
fn has_hung_up(wait: Duration) -> Result<bool> {
    let mut input = libc::pollfd { fd: libc::STDIN_FILENO, events: libc::POLLIN, revents: 0 };
    let wait = libc::c_int::try_from(wait.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: one structure, which lives on the stack.
    if unsafe { libc::poll(&raw mut input, 1, wait) } >= 0 {
        return Ok(input.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0);
    }
    match io::Error::last_os_error() {
        // A signal, such as that the window has another size.
        error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
        error => Err(error).context("Cannot wait for keys"),
    }
}
