//! What the guest printed on its console: the last lines, and whether its kernel panicked or halted.

use super::control::Outcome;
use crate::devices::{SerialSink, Unread};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Lines kept.
const LINES: usize = 200;
/// A longer line is cut there.
const LINE_BYTES: usize = 1024;

// kernel/panic.c: first line, and what comes last when the kernel stays (`panic=0`) or waits before it restarts.
const PANIC: &str = "Kernel panic - not syncing";
const PANIC_END: &str = "---[ end Kernel panic - not syncing";
const PANIC_WAIT: &str = "Rebooting in ";
/// kernel/reboot.c: a kernel that cannot power off halts (and says so since 6.9).
const HALTS: [&str; 2] = ["reboot: System halted", "reboot: Power off not available: System halted instead"];
/// mm/oom_kill.c, of the whole machine or of a memory cgroup.
const OOM_KILLS: [&str; 2] = ["Out of memory: Killed process", "Memory cgroup out of memory: Killed process"];

/// See the module.
pub struct ConsoleLog(Mutex<Log>);

struct Log {
    lines: VecDeque<String>,
    partial: Vec<u8>,
    panicked: Option<(String, Instant)>,
    ended: Option<Outcome>,
    oom_kills: u64,
}

impl Default for ConsoleLog {
    fn default() -> Self {
        let (lines, partial) = (VecDeque::new(), Vec::new());
        Self(Mutex::new(Log { lines, partial, panicked: None, ended: None, oom_kills: 0 }))
    }
}

impl ConsoleLog {
    /// The last lines, at most `count`, oldest first; control characters are dots.
    pub fn tail(&self, count: usize) -> Vec<String> {
        let log = self.lock();
        let partial = (!log.partial.is_empty()).then(|| printable(&log.partial));
        let lines: Vec<String> = log.lines.iter().cloned().chain(partial).collect();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }

    /// The line in which the kernel said that it panicked, and when.
    pub fn panicked(&self) -> Option<(String, Instant)> {
        self.lock().panicked.clone()
    }

    /// How often the kernel said that its OOM killer ran.
    pub fn oom_kills(&self) -> u64 {
        self.lock().oom_kills
    }

    /// True while the last line has no end yet, such as a prompt.
    pub fn is_within_line(&self) -> bool {
        !self.lock().partial.is_empty()
    }

    /// How the kernel ended, once it has printed all it has to say and nothing else tells: it panicked or halted.
    pub fn ended(&self) -> Option<Outcome> {
        self.lock().ended.clone()
    }

    fn add(&self, bytes: &[u8]) {
        let mut log = self.lock();
        for &byte in bytes {
            match byte {
                b'\n' => log.end_line(),
                b'\r' => {}
                _ if log.partial.len() < LINE_BYTES => log.partial.push(byte),
                _ => {}
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log {
    fn end_line(&mut self) {
        let line = printable(&std::mem::take(&mut self.partial));
        let text = message(&line);
        if self.panicked.is_none() && text.starts_with(PANIC) {
            self.panicked = Some((text.to_owned(), Instant::now()));
        }
        if let Some((panic, _)) = &self.panicked
            && (text.starts_with(PANIC_END) || text.starts_with(PANIC_WAIT))
        {
            self.ended = Some(Outcome::Panic(panic.clone()));
        } else if HALTS.contains(&text) {
            self.ended = Some(Outcome::Halt);
        }
        self.oom_kills += u64::from(OOM_KILLS.iter().any(|kill| text.starts_with(kill)));
        if self.lines.len() == LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

/// A console line without its time stamp and caller (`[    1.234567]`, `[    T1]`).
fn message(line: &str) -> &str {
    let mut text = line;
    while let Some((prefix, rest)) = text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        if !prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b' ' || b == b'@') {
            break;
        }
        text = rest;
    }
    text.strip_prefix(' ').unwrap_or(text)
}

fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().map(|c| if c.is_control() && c != '\t' { '.' } else { c }).collect()
}

/// Passes the console's output on, and keeps it.
pub(super) struct Watched {
    log: Arc<ConsoleLog>,
    sink: Box<dyn SerialSink>,
}

impl Watched {
    pub fn new(log: Arc<ConsoleLog>, sink: Box<dyn SerialSink>) -> Self {
        Self { log, sink }
    }
}

impl SerialSink for Watched {
    fn output(&mut self, bytes: &[u8]) {
        self.log.add(bytes);
        self.sink.output(bytes);
    }

    fn open_changed(&mut self, open: bool, unread: usize) -> Unread {
        self.sink.open_changed(open, unread)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(text: &str) -> ConsoleLog {
        let log = ConsoleLog::default();
        log.add(text.as_bytes());
        log
    }

    #[test]
    fn the_tail_is_the_last_lines_with_the_unfinished_one() {
        let log = log("one\r\ntwo\x1b[m\r\nthr");
        assert_eq!(log.tail(2), ["two.[m", "thr"]);
        assert!(log.is_within_line());
        log.add(b"ee\r\n");
        assert!(!log.is_within_line());
    }

    #[test]
    fn a_panic_is_seen_with_and_without_stamps() {
        for stamp in ["", "[    1.500000] ", "[    1.500000][    T1] "] {
            let log = log(&format!("{stamp}Kernel panic - not syncing: Attempted to kill init!\r\n"));
            assert!(log.panicked().unwrap().0.ends_with("kill init!"), "{stamp}");
            assert_eq!(log.ended(), None);
            log.add(format!("{stamp}---[ end Kernel panic - not syncing: x ]---\n").as_bytes());
            assert_eq!(log.ended(), log.panicked().map(|(line, _)| Outcome::Panic(line)));
        }
    }

    #[test]
    fn a_wait_before_the_restart_is_the_end() {
        let log = log("[ 1.0] Kernel panic - not syncing: x\n[ 1.1] Rebooting in 10 seconds..\n");
        assert!(matches!(log.ended(), Some(Outcome::Panic(_))));
    }

    #[test]
    fn a_halt_is_an_end() {
        for line in HALTS {
            assert_eq!(log(&format!("[    1.5] {line}")).ended(), None, "the line has no end yet");
            assert_eq!(log(&format!("[    1.5] {line}\r\n")).ended(), Some(Outcome::Halt));
            assert_eq!(log(&format!("it said {line}\n{line}?\n")).ended(), None);
        }
    }

    #[test]
    fn talk_of_panics_is_none() {
        let log =
            log("# grep 'Kernel panic - not syncing' log\nRebooting in 3\nsaw Kernel panic - not syncing\n");
        assert!(log.panicked().is_none() && log.ended().is_none());
    }

    #[test]
    fn an_endless_line_is_cut() {
        assert_eq!(log(&"x".repeat(10_000)).tail(1)[0].len(), LINE_BYTES);
    }
}
