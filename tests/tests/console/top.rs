//! The live view, driven in a terminal of 80 columns and 24 lines.

use anyhow::{Context, Result, bail, ensure};
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use tests::{Guest, Scratch, binary};

/// How long the screen may take to show something; natively it is moments.
const PATIENCE: Duration = Duration::from_secs(60);
const COLUMNS: usize = 80;
const LINES: usize = 24;
/// Shown last, when all else that is looked at is on the screen.
const ENDED: &str = "that was all";

/// A program in a tmux of its own.
pub struct Pane {
    scratch: Scratch,
}

impl Pane {
    /// The view of a guest; behind it, its exit code, the terminal's modes and [`ENDED`].
    ///
    /// # Errors
    /// No tmux.
    pub fn of(guest: &Guest) -> Result<Self> {
        let pane = Self { scratch: Scratch::new()? };
        let (binary, socket) = (binary()?, guest.socket());
        let line = format!(
            "'{}' top --every 1 --control '{}'; echo \"exit $?\"; stty -a; echo {ENDED}; sleep 1000",
            binary.display(),
            socket.display()
        );
        let (columns, lines) = (COLUMNS.to_string(), LINES.to_string());
        pane.tmux(&[
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-x",
            &columns,
            "-y",
            &lines,
            "sh",
            "-c",
            &line,
        ])?;
        Ok(pane)
    }

    /// Presses a key, by tmux's name for it.
    ///
    /// # Errors
    /// tmux is gone.
    pub fn press(&self, key: &str) -> Result<()> {
        self.tmux(&["send-keys", key]).map(drop)
    }

    /// Waits for a screen with `text`.
    ///
    /// # Errors
    /// It does not come.
    pub fn wait_for(&self, text: &str) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let output = self.tmux(&["capture-pane", "-p", "-J"])?;
            let screen = String::from_utf8(output.stdout).context("screen")?;
            let screen: String = screen.lines().map(|line| format!("{}\n", line.trim_end())).collect();
            if screen.contains(text) {
                return Ok(screen);
            }
            if Instant::now() > deadline {
                bail!("no {text:?} on the screen:\n{screen}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn tmux(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new("tmux");
        command.arg("-u").arg("-S").arg(self.scratch.path("tmux.sock")).args(arguments);
        let output = command.env("LC_ALL", "C.UTF-8").output().context("Cannot run tmux")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "tmux {arguments:?}: {said}");
        Ok(output)
    }
}

impl Drop for Pane {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]);
    }
}

/// A terminal that goes away takes the view with it.
pub fn ends_with_its_terminal(guest: &Guest) -> Result<()> {
    let pane = Pane::of(guest)?;
    pane.wait_for("+0x")?;
    ensure!(views_of(guest)? == 1, "no view is running");
    drop(pane);
    let deadline = Instant::now() + PATIENCE;
    while views_of(guest)? > 0 {
        ensure!(Instant::now() < deadline, "the view is still running");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Processes that show the guest.
fn views_of(guest: &Guest) -> Result<usize> {
    let wanted = format!("\0top\0--every\x001\0--control\0{}\0", guest.socket().display());
    let processes = std::fs::read_dir("/proc").context("/proc")?.flatten();
    let lines = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    Ok(lines.filter(|line| String::from_utf8_lossy(line).ends_with(&wanted)).count())
}

/// Every key once, and the terminal as it was before.
pub fn drive(guest: &Guest) -> Result<()> {
    let pane = Pane::of(guest)?;
    let screen = pane.wait_for("+0x")?;
    let lines: Vec<&str> = screen.lines().collect();
    ensure!(lines.len() <= LINES && lines.iter().all(|line| line.chars().count() <= COLUMNS), "{screen}");
    ensure!(lines[0].starts_with("6.") && lines[0].contains(", running, up "), "{screen}");
    ensure!(lines[3].trim_start().starts_with("bytes  objects") && lines[3].ends_with("sites"), "{screen}");
    ensure!(lines.last().is_some_and(|line| line.ends_with("q quit")), "{screen}");
    // A rate takes two looks.
    pane.wait_for("B/s")?;
    pane.press("Tab")?;
    let screen = pane.wait_for("dentry")?;
    ensure!(!screen.contains("+0x"), "{screen}");
    pane.press("o")?;
    pane.wait_for("sort: objects")?;
    pane.press("s")?;
    pane.wait_for(" new suspected memory leaks")?;
    pane.press("c")?;
    pane.wait_for("objects painted gray")?;
    pane.press("q")?;
    let screen = pane.wait_for(ENDED)?;
    ensure!(screen.contains("exit 0") && !screen.contains("sort: "), "{screen}");
    ensure!(screen.contains(" icanon") && screen.contains(" echo"), "{screen}");
    Ok(())
}

/// The view of a machine that has ended says so in a line.
pub fn says_that_it_is_gone(pane: &Pane) -> Result<()> {
    let screen = pane.wait_for(ENDED)?;
    ensure!(screen.contains("exit 4") && screen.contains(" icanon"), "{screen}");
    let said: Vec<&str> = screen.lines().take_while(|line| !line.starts_with("exit ")).collect();
    ensure!(said.len() == 1 && said[0].starts_with("kleak-vmm: error: The virtual machine on "), "{screen}");
    Ok(())
}
