//! A guest in a process of its own: `kleak-vmm run`, so that nothing that happens to one can hurt the others.

use crate::console::client::Client;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest line of a console that is taken as one.
const MAX_LINE: u64 = 4096;
/// Lines of messages that are kept.
const MESSAGES: usize = 40;
/// Lines of a console that wait to be looked at; a guest that prints faster waits.
const WAITING: usize = 1024;
/// How often the wish to stop is looked at.
const STEP: Duration = Duration::from_millis(200);
/// Longest time a scan or a report may take; a lab is slow.
const REPLY: Duration = Duration::from_secs(300);
/// How long a process that was asked to end is waited for.
const PATIENCE: Duration = Duration::from_secs(15);

/// The processes that run, and the wish to end them all.
#[derive(Debug, Default)]
pub struct Live {
    stop: AtomicBool,
    pids: Mutex<BTreeSet<i32>>,
}

impl Live {
    /// Asks all to end, and none to begin.
    pub fn stop(&self) {
        let pids = self.pids.lock().unwrap_or_else(PoisonError::into_inner);
        self.stop.store(true, SeqCst);
        pids.iter().for_each(|&pid| signal(pid, libc::SIGTERM));
    }

    /// Whether no process runs.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.pids.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Whether all are to end.
    pub fn stopped(&self) -> bool {
        self.stop.load(SeqCst)
    }
}

fn signal(pid: i32, number: libc::c_int) {
    // SAFETY: no pointers. The process is a child that was not waited for, so the id is still its own.
    unsafe { libc::kill(pid, number) };
}

/// Why there is no line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoLine {
    /// The process has closed its output: it ends.
    Ended,
    /// Time is over.
    Late,
    /// All are to end.
    Stopped,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// Its exit code; None when a signal ended it.
    pub code: Option<i32>,
    /// The signal.
    pub signal: Option<i32>,
    /// What it said last of what is wrong, without its name in front.
    pub error: Option<String>,
}

/// See the module. Dropping it ends the process.
pub struct Worker {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    messages: Arc<Mutex<VecDeque<String>>>,
    message_reader: Option<JoinHandle<()>>,
    socket: PathBuf,
    client: Option<Client<UnixStream, UnixStream>>,
    live: Arc<Live>,
    ended: bool,
}

impl Worker {
    /// Starts `program` with these arguments; its control socket will be `socket`, and all it prints goes to `log`.
    ///
    /// # Errors
    /// It cannot be started, or nothing is to be started any more.
    pub fn start(
        program: &Path,
        arguments: &[OsString],
        socket: &Path,
        log: Option<File>,
        live: &Arc<Live>,
    ) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A terminal's ^C is for the one who started all this.
        command.process_group(0);
        // SAFETY: prctl is async-signal-safe and takes no pointers here. The thread that starts the process waits for its
        // end, so that its parent's death is that of the program.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let mut pids = live.pids.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(!live.stopped(), "It is to end before it began");
        let mut child = command.spawn().with_context(|| format!("Cannot start {}", program.display()))?;
        pids.insert(child.id() as i32);
        drop(pids);
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
            bail!("No pipes to {}", program.display())
        };
        let log = log.map(|log| Arc::new(Mutex::new(log)));
        let (send, lines) = mpsc::sync_channel(WAITING);
        let console = log.clone();
        // They end when the process closes its end.
        std::thread::spawn(move || follow(stdout, console.as_deref(), |line| send.send(line).is_ok()));
        let messages = Arc::new(Mutex::new(VecDeque::new()));
        let kept = Arc::clone(&messages);
        let message_reader =
            std::thread::spawn(move || follow(stderr, log.as_deref(), |line| keep(&kept, line)));
        Ok(Self {
            child,
            stdin,
            lines,
            messages,
            message_reader: Some(message_reader),
            socket: socket.to_owned(),
            client: None,
            live: Arc::clone(live),
            ended: false,
        })
    }

    /// The next line of the console.
    ///
    /// # Errors
    /// There is none until `deadline`.
    pub fn line(&self, deadline: Instant) -> Result<String, NoLine> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left.min(STEP)) {
                Ok(line) => return Ok(line),
                Err(RecvTimeoutError::Disconnected) if self.live.stopped() => return Err(NoLine::Stopped),
                Err(RecvTimeoutError::Disconnected) => return Err(NoLine::Ended),
                Err(RecvTimeoutError::Timeout) if self.live.stopped() => return Err(NoLine::Stopped),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Err(NoLine::Late),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Types on the console. That the process is gone shows elsewhere.
    pub fn type_text(&mut self, text: &str) {
        let _ = self.stdin.write_all(text.as_bytes()).and_then(|()| self.stdin.flush());
    }

    /// Carries out a console command; its reply in JSON.
    ///
    /// # Errors
    /// The command fails, or there is no reply.
    pub fn request(&mut self, command: &str) -> Result<Value> {
        self.ask(command)?.map_err(anyhow::Error::msg)
    }

    /// Carries out a console command; its reply in JSON, or why it failed.
    ///
    /// # Errors
    /// There is no reply.
    pub fn ask(&mut self, command: &str) -> Result<Result<Value, String>> {
        let client = match &mut self.client {
            Some(client) => client,
            None => {
                let connect = || format!("Cannot connect to {}", self.socket.display());
                let stream = UnixStream::connect(&self.socket).with_context(connect)?;
                stream.set_read_timeout(Some(REPLY)).with_context(connect)?;
                self.client.insert(Client::new(stream.try_clone().with_context(connect)?, stream))
            }
        };
        let value = client.json(command).with_context(|| format!("No reply to {command}"))?;
        match value.get("error").and_then(Value::as_str) {
            Some(error) => Ok(Err(error.to_owned())),
            None => Ok(Ok(value)),
        }
    }

    /// Waits for the end of the process; one that does not end is asked to, and then killed.
    pub fn finish(mut self) -> Ending {
        let status = self.end();
        if let Some(reader) = self.message_reader.take() {
            let _ = reader.join();
        }
        let messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let error = messages.iter().rev().find_map(|line| line.strip_prefix("kleak-vmm: error: "));
        Ending {
            code: status.and_then(|status| status.code()),
            signal: status.and_then(|status| status.signal()),
            error: error.map(str::to_owned),
        }
    }

    fn end(&mut self) -> Option<ExitStatus> {
        self.ended = true;
        self.client = None;
        let pid = self.child.id() as i32;
        let status = self.wait(PATIENCE).or_else(|| {
            signal(pid, libc::SIGTERM);
            self.wait(PATIENCE)
        });
        status.or_else(|| {
            // It and what it may have started.
            signal(-pid, libc::SIGKILL);
            self.wait(PATIENCE)
        })
    }

    fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            let mut pids = self.live.pids.lock().unwrap_or_else(PoisonError::into_inner);
            // Under the lock: nobody signals an id that is no longer ours.
            if let Ok(Some(status)) = self.child.try_wait() {
                pids.remove(&(self.child.id() as i32));
                return Some(status);
            }
            drop(pids);
            if Instant::now() >= deadline {
                return None;
            }
            // What it prints at its end must not hold it up.
            let _ = self.lines.recv_timeout(Duration::from_millis(20));
        }
    }

    /// Asks the process to end, whatever it does.
    pub fn ask_to_end(&self) {
        signal(self.child.id() as i32, libc::SIGTERM);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if !self.ended {
            self.ask_to_end();
            self.end();
        }
    }
}

fn keep(kept: &Mutex<VecDeque<String>>, line: String) -> bool {
    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.len() == MESSAGES {
        kept.pop_front();
    }
    kept.push_back(line);
    true
}

/// Hands on lines until there are no more, or nobody wants them.
fn follow(stream: impl Read, log: Option<&Mutex<File>>, mut each: impl FnMut(String) -> bool) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    let mut wanted = true;
    while matches!((&mut stream).take(MAX_LINE).read_until(b'\n', &mut line), Ok(read) if read > 0) {
        if let Some(log) = log {
            // A log that cannot be written is no reason to lose a result.
            let _ = log.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line);
        }
        let text = String::from_utf8_lossy(&line);
        wanted = wanted && each(text.trim_end_matches(['\r', '\n']).to_owned());
        line.clear();
    }
}
