//! Every event as the registry sees it, a line of JSON each (`run --events`).
//!
//! `{"schema":"kleak-events/1"}` is the first line. A backtrace has a line of its own, before the first event that names it:
//! most events come from where others came from.

use anyhow::Result;
use introspect::memory::Va;
use introspect::registry::{AllocEvent, Object};
use introspect::report::comm_text;
use rustc_hash::FxHashMap;
use serde::Serialize;
use serde_json::json;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most bytes of it; the boot of a distribution's kernel makes a fifth of that.
const MAX_BYTES: u64 = 64 << 20;
/// A file that changes seldom is sent out of the lab seldom.
const BUFFER: usize = 256 << 10;

/// The file.
pub struct EventLog(Mutex<Writing<File>>);

impl EventLog {
    /// Begins it; what is there is replaced.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        Ok(Self(Mutex::new(Writing::new(File::create(path)?, MAX_BYTES))))
    }

    /// The turn to write. Whoever takes it before the registry changes, and gives it back after the line, keeps the order.
    pub fn turn(&self) -> MutexGuard<'_, Writing<File>> {
        // Half a line may be there, and nothing worse.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What has been written, and where to.
pub struct Writing<W: Write> {
    /// None once it is full, or cannot be written.
    out: Option<BufWriter<W>>,
    room: u64,
    /// Numbers of the backtraces that are there.
    stacks: FxHashMap<Box<[Va]>, u32>,
    next_stack: u32,
}

/// A line of an event; what is not known is left out.
#[derive(Serialize)]
struct Line<'a> {
    event: &'a str,
    address: String,
    #[serde(flatten)]
    what: Option<What<'a>>,
    #[serde(flatten)]
    who: Option<Who>,
    #[serde(skip_serializing_if = "Option::is_none")]
    caller: Option<String>,
}

#[derive(Serialize)]
struct What<'a> {
    size: u64,
    kind: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<String>,
}

#[derive(Serialize)]
struct Who {
    comm: String,
    pid: i32,
    jiffies: u64,
    stack: u32,
}

impl<W: Write> Writing<W> {
    fn new(out: W, room: u64) -> Self {
        let out = Some(BufWriter::with_capacity(BUFFER, out));
        let mut this = Self { out, room, stacks: FxHashMap::default(), next_stack: 0 };
        this.line(&json!({ "schema": "kleak-events/1" }));
        this
    }

    /// An allocation with this backtrace, from a slab cache of this name.
    pub fn alloc(
        &mut self,
        event: &AllocEvent<'_>,
        frames: &[Va],
        cache: Option<String>,
        name: impl Fn(Va) -> Option<String>,
    ) {
        let stack = self.stack(frames, name);
        let (comm, pid, jiffies) = (comm_text(&event.comm), event.pid, event.jiffies);
        self.line(&Line {
            event: "alloc",
            address: event.address.to_string(),
            what: Some(What { size: event.size, kind: event.kind.name(), cache }),
            who: Some(Who { comm, pid, jiffies, stack }),
            caller: None,
        });
    }

    /// A free, of an object that was known or not, by what is behind the call.
    pub fn free(&mut self, address: Va, object: Option<&Object>, caller: Option<String>) {
        let what = object.map(|object| What { size: object.size, kind: object.kind.name(), cache: None });
        let address = address.to_string();
        self.line(&Line { event: "free", address, what, who: None, caller });
    }

    /// `size` bytes of pages are given back.
    pub fn free_pages(&mut self, address: Va, size: u64) {
        let what = Some(What { size, kind: "page", cache: None });
        self.line(&Line { event: "free", address: address.to_string(), what, who: None, caller: None });
    }

    /// Something else that happens to an object.
    pub fn other(&mut self, event: &str, address: Va) {
        self.line(&Line { event, address: address.to_string(), what: None, who: None, caller: None });
    }

    /// Names of code are others from now on.
    pub fn names_change(&mut self) {
        self.stacks.clear();
    }

    /// Has all of it in the file.
    pub fn flush(&mut self) {
        if let Some(Err(error)) = self.out.as_mut().map(Write::flush) {
            self.end(&error.to_string());
        }
    }

    /// The number of a backtrace.
    fn stack(&mut self, stack: &[Va], name: impl Fn(Va) -> Option<String>) -> u32 {
        if let Some(&number) = self.stacks.get(stack) {
            return number;
        }
        let number = self.next_stack;
        self.next_stack += 1;
        let backtrace: Vec<String> =
            stack.iter().map(|&ip| name(ip).unwrap_or_else(|| ip.to_string())).collect();
        self.line(&json!({ "stack": number, "backtrace": backtrace }));
        self.stacks.insert(stack.into(), number);
        number
    }

    fn line(&mut self, line: &impl Serialize) {
        let Some(out) = &mut self.out else { return };
        let Ok(mut text) = serde_json::to_vec(line) else { return };
        text.push(b'\n');
        if text.len() as u64 > self.room {
            self.end("it is full");
            return;
        }
        self.room -= text.len() as u64;
        if let Err(error) = out.write_all(&text) {
            self.end(&error.to_string());
        }
    }

    fn end(&mut self, why: &str) {
        eprintln!("kleak-vmm: warning: No more events are written to --events: {why}");
        // What is in the buffer fits.
        self.out = None;
        self.stacks = FxHashMap::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use introspect::registry::{Backtrace, Kind};

    const STACK: [Va; 2] = [Va(0x1000), Va(0x2000)];

    fn event() -> AllocEvent<'static> {
        AllocEvent {
            address: Va(0xffff_8880_0000_1000),
            size: 64,
            kind: Kind::Slab,
            cache: Va(1),
            comm: *b"churn/0\0\0\0\0\0\0\0\0\0",
            pid: 7,
            jiffies: 9,
            stack: Backtrace::Frames(&STACK),
        }
    }

    fn written(room: u64, write: impl FnOnce(&mut Writing<&mut Vec<u8>>)) -> Vec<String> {
        let mut bytes = Vec::new();
        let mut writing = Writing::new(&mut bytes, room);
        write(&mut writing);
        drop(writing);
        String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_backtrace_is_written_once_until_names_change() {
        fn alloc(writing: &mut Writing<&mut Vec<u8>>) {
            writing
                .alloc(&event(), &STACK, Some("kmalloc-64".to_owned()), |ip| Some(format!("f+{:#x}", ip.0)));
        }
        let lines = written(MAX_BYTES, |writing| {
            alloc(writing);
            writing.free(event().address, None, Some("g".to_owned()));
            alloc(writing);
            writing.names_change();
            alloc(writing);
        });
        let line = |stack| {
            format!(
                r#"{{"event":"alloc","address":"0xffff888000001000","size":64,"kind":"slab","cache":"kmalloc-64","comm":"churn/0","pid":7,"jiffies":9,"stack":{stack}}}"#
            )
        };
        let stack = |number| format!(r#"{{"backtrace":["f+0x1000","f+0x2000"],"stack":{number}}}"#);
        let free = r#"{"event":"free","address":"0xffff888000001000","caller":"g"}"#;
        let schema = r#"{"schema":"kleak-events/1"}"#;
        assert_eq!(lines, [schema, &stack(0), &line(0), free, &line(0), &stack(1), &line(1)]);
    }

    #[test]
    fn it_ends_with_a_whole_line_when_it_is_full() {
        let lines = written(200, |writing| {
            (0..100).for_each(|page| writing.free_pages(Va(page << 12), 4096));
        });
        let last = r#"{"event":"free","address":"0x1000","size":4096,"kind":"page"}"#;
        assert_eq!(lines.last().map(String::as_str), Some(last), "{lines:?}");
        assert!(lines.iter().map(|line| line.len() + 1).sum::<usize>() <= 200);
    }
}
