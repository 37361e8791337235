//! The process under test: what is typed and printed, and connections to its control socket.

use crate::{Finished, Guest, RUN_TIMEOUT, binary, tail};
use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

struct Output {
    text: Mutex<(String, bool)>,
    changed: Condvar,
}

impl Output {
    fn follow(stream: impl Read + Send + 'static) -> Arc<Self> {
        let output = Arc::new(Self { text: Mutex::new((String::new(), false)), changed: Condvar::new() });
        let shared = Arc::clone(&output);
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(reader.read_until(b'\n', &mut line), Ok(n) if n > 0) {
                shared.lock().0.push_str(&String::from_utf8_lossy(&line));
                shared.changed.notify_all();
                line.clear();
            }
            shared.lock().1 = true;
            shared.changed.notify_all();
        });
        output
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (String, bool)> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A `kleak-vmm` process.
pub struct Session {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Arc<Output>,
    stderr: Arc<Output>,
    patience: Duration,
}

impl Session {
    /// Starts the binary with these arguments, and with no signal ignored: shells have SIGINT ignored by what they start in the
    /// background, this test perhaps.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<Self> {
        Self::start_with(arguments, None)
    }

    /// The same; a program that is in this folder is taken from there.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_with<A: AsRef<std::ffi::OsStr>>(
        arguments: impl IntoIterator<Item = A>,
        programs: Option<&Path>,
    ) -> Result<Self> {
        let mut command = Command::new("env");
        command.arg("--default-signal").arg(binary()?).args(arguments);
        if let Some(programs) = programs {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let folders = std::iter::once(programs.to_owned()).chain(std::env::split_paths(&path));
            command.env("PATH", std::env::join_paths(folders)?);
        }
        Self::spawn(command)
    }

    /// The same on a terminal, which `script` (of bsdutils, which every Debian has) makes: what is typed and shown goes
    /// through it, standard error included.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_on_terminal(arguments: impl IntoIterator<Item = OsString>) -> Result<Self> {
        let words = std::iter::once(binary()?.into_os_string()).chain(arguments);
        let quoted = |word: OsString| format!("'{}'", word.to_string_lossy().replace('\'', "'\\''"));
        let line: Vec<String> = words.map(quoted).collect();
        let mut command = Command::new("script");
        command.args(["--quiet", "--flush", "--return", "--command"]).arg(line.join(" ")).arg("/dev/null");
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("Cannot start kleak-vmm")?;
        let stdin = child.stdin.take();
        let stdout = Output::follow(child.stdout.take().context("No stdout")?);
        let stderr = Output::follow(child.stderr.take().context("No stderr")?);
        Ok(Self { child, stdin, stdout, stderr, patience: RUN_TIMEOUT })
    }

    /// The same, given this long to end.
    pub(crate) fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the guest's console has printed `text`.
    ///
    /// # Errors
    /// The process ended or `timeout` passed before.
    pub fn wait_for(&self, text: &str, timeout: Duration) -> Result<()> {
        self.wait_for_times(text, 1, timeout)
    }

    /// The same until it was printed `times` times.
    ///
    /// # Errors
    /// As [`Session::wait_for`].
    pub fn wait_for_times(&self, text: &str, times: usize, timeout: Duration) -> Result<()> {
        let enough = |shown: &str| (shown.matches(text).count() >= times).then_some(());
        self.wait_for_shown(timeout, enough).with_context(|| format!("no {text:?} on the console"))
    }

    /// Waits until what the guest's console has printed so far, in whole lines, is what `found` looks for.
    ///
    /// # Errors
    /// As [`Session::wait_for`].
    pub fn wait_for_shown<T>(&self, timeout: Duration, found: impl Fn(&str) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + timeout;
        let mut state = self.stdout.lock();
        loop {
            if let Some(found) = found(&state.0) {
                return Ok(found);
            }
            let now = Instant::now();
            if state.1 || now >= deadline {
                let why = if state.1 { "it ended" } else { "time ran out" };
                bail!("{why}\n{}\n--- stderr\n{}", tail(&state.0, 60), self.stderr.lock().0);
            }
            state = self
                .stdout
                .changed
                .wait_timeout(state, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// False once the process has ended.
    ///
    /// # Errors
    /// It cannot be asked.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().context("Cannot wait")?.is_none())
    }

    /// Types a line on the guest's console.
    ///
    /// # Errors
    /// The process is gone.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.type_bytes(format!("{line}\n").as_bytes())
    }

    /// Presses keys.
    ///
    /// # Errors
    /// The process is gone.
    pub fn type_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self.stdin.as_mut().context("stdin is closed")?;
        stdin.write_all(bytes).context("Cannot type")?;
        stdin.flush().context("Cannot type")
    }

    /// What the guest's console, or the terminal, has shown so far, in whole lines.
    pub fn shown(&self) -> String {
        self.stdout.lock().0.clone()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// It does not end in time; it is killed then.
    pub fn finish(mut self) -> Result<Finished> {
        let deadline = Instant::now() + self.patience;
        let status = loop {
            if let Some(status) = self.child.try_wait().context("Cannot wait")? {
                break status;
            }
            if Instant::now() > deadline {
                bail!("kleak-vmm does not end\n{}", tail(&self.stdout.lock().0, 60));
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        for output in [&self.stdout, &self.stderr] {
            let mut state = output.lock();
            while !state.1 {
                state = output.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        let (stdout, stderr) = (self.stdout.lock().0.clone(), self.stderr.lock().0.clone());
        Ok(Finished { code: status.code(), stdout, stderr })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the binary to its end.
///
/// # Errors
/// It cannot be started, or does not end.
pub fn run<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<Finished> {
    let mut session = Session::start(arguments)?;
    session.stdin = None;
    session.finish()
}

/// A client of a guest's control socket that keeps its connection: no process for each command.
pub struct Client(BufReader<UnixStream>);

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn of(guest: &Guest) -> Result<Self> {
        Ok(Self(BufReader::new(UnixStream::connect(guest.socket()).context("Cannot connect")?)))
    }

    /// The reply to a command, in text; an error, too, is one.
    ///
    /// # Errors
    /// The connection ends.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.0.get_mut().write_all(format!("{command}\n").as_bytes())?;
        let mut reply = String::new();
        // A reply of one line of JSON has no end behind it.
        let json = command.starts_with("json ");
        while !reply.ends_with(if json { "\n" } else { "\u{4}\n" }) {
            ensure!(self.0.read_line(&mut reply)? > 0, "{command}: the connection ended after {reply:?}");
        }
        Ok(reply.trim_end_matches("\u{4}\n").to_owned())
    }
}
