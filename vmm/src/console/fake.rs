//! A target for tests: counts what is asked of it, and fails where told to.

use super::{Account, Annotation, Answer, Audit, SaveAs, Target, TopBy, When};
use introspect::memory::Va;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// Two leaks, as the report room would print them.
pub const REPORT: &str = "\
unreferenced object 0xffff888003a8e000 (size 32):
  comm \"insmod\", pid 74, jiffies 4294893012 (age 3.180s)
  hex dump (first 32 bytes):
    6b 6b 6b 6b 6b 6b 6b 6b 6b 6b 6b 6b 6b 6b 6b 6b  kkkkkkkkkkkkkkkk
  backtrace:
    [<ffffffff81301f2a>] kmalloc_trace+0x2a/0xa0
";

/// See the module.
#[derive(Default)]
pub struct FakeTarget {
    /// Names of the calls made, in order.
    pub calls: Mutex<Vec<String>>,
    /// What `report` prints; empty for no leaks.
    pub report: Mutex<String>,
    /// Every command fails.
    pub broken: AtomicBool,
}

impl FakeTarget {
    /// A target whose report is [`REPORT`].
    pub fn leaky() -> Self {
        Self { report: Mutex::new(REPORT.to_owned()), ..Self::default() }
    }

    fn called<T>(&self, name: &str, value: T) -> anyhow::Result<T> {
        self.calls.lock().unwrap().push(name.to_owned());
        anyhow::ensure!(!self.broken.load(SeqCst), "The guest is gone");
        Ok(value)
    }

    /// Calls so far, joined by spaces.
    pub fn log(&self) -> String {
        self.calls.lock().unwrap().join(" ")
    }
}

impl Target for FakeTarget {
    fn scan(&self) -> anyhow::Result<usize> {
        self.called("scan", 3)
    }
    fn report_text(&self) -> anyhow::Result<String> {
        let report = self.report.lock().unwrap().clone();
        self.called("report", report)
    }
    fn report_json(&self) -> anyhow::Result<Value> {
        self.called("report_json", json!({ "schema": "kleak-report/1", "leaks": [] }))
    }
    fn clear(&self) -> anyhow::Result<usize> {
        self.called("clear", 2)
    }
    fn off(&self) -> anyhow::Result<()> {
        self.called("off", ())
    }
    fn on(&self) -> anyhow::Result<usize> {
        self.called("on", 7)
    }
    fn set_stack(&self, on: bool) -> anyhow::Result<()> {
        self.called(if on { "stack=on" } else { "stack=off" }, ())
    }
    fn set_typed(&self, on: bool) -> anyhow::Result<()> {
        self.called(if on { "typed=on" } else { "typed=off" }, ())
    }
    fn set_scan_period(&self, seconds: u64) -> anyhow::Result<()> {
        self.called(&format!("period={seconds}"), ())
    }
    fn set_periodic_scan(&self, on: bool) -> anyhow::Result<u64> {
        self.called(if on { "scan=on" } else { "scan=off" }, if on { 600 } else { 0 })
    }
    fn dump(&self, address: Va) -> anyhow::Result<Answer> {
        let text = format!("object {address} (size 64)\n  comm \"evil\x1b[2J\x04\"\n");
        self.called("dump", answer(&text, json!({ "dump": { "size": 64 } })))
    }
    fn path(&self, address: Va) -> anyhow::Result<Answer> {
        let text = format!("unreachable: not referenced, lost\n  -> {address} (size 64): slab");
        self.called("path", answer(&text, json!({ "path": { "state": "lost" } })))
    }
    fn roots(&self) -> anyhow::Result<Answer> {
        self.called("roots", answer("name  bytes\ndata      8", json!({ "roots": [] })))
    }
    fn possible(&self) -> anyhow::Result<Answer> {
        self.called("possible", answer("objects  site", json!({ "possible": [] })))
    }
    fn canary(&self) -> anyhow::Result<Answer> {
        self.called("canary", answer("canary: found", json!({ "canary": { "found": true } })))
    }
    fn status(&self) -> anyhow::Result<Vec<(String, Value)>> {
        self.called("status", vec![("tracer".into(), json!("breakpoint")), ("objects".into(), json!(12))])
    }
    fn audit(&self) -> anyhow::Result<Audit> {
        self.called(
            "audit",
            Audit { tracked: 10, missing: 1, stale: 0, examples: vec!["missing 0xffff888000001000".into()] },
        )
    }
    fn top(&self, by: TopBy) -> anyhow::Result<Answer> {
        self.called(&format!("top {by:?}"), answer("bytes  objects\n", json!({ "top": [] })))
    }
    fn alloc_calls(&self, cache: &str) -> anyhow::Result<Answer> {
        self.called(&format!("alloc_calls {cache}"), answer(cache, json!({ "alloc_calls": [] })))
    }
    fn growth(&self) -> anyhow::Result<Answer> {
        self.called("growth", answer("objects  what", json!({ "growth": [] })))
    }
    fn annotate(&self, how: Annotation, address: Va) -> anyhow::Result<Answer> {
        self.called(how.name(), answer(&format!("{how:?} {address}"), json!({ how.name(): "done" })))
    }
    fn accounting(&self, account: Account, when: When) -> anyhow::Result<Answer> {
        let text = format!("{account:?} {when:?}");
        self.called(&text, answer(&format!("# {text}"), json!({ account.name(): [] })))
    }
    fn kmem_cache(&self, name: &str, when: When) -> anyhow::Result<Answer> {
        self.called("kmem_cache", answer(&format!("CACHE {name} {when:?}"), json!({ "kmem -s": [] })))
    }
    fn refs(&self, address: Va) -> anyhow::Result<Answer> {
        self.called("refs", answer(&format!("object {address}: count 2"), json!({ "refs": [] })))
    }
    fn refs_of(&self, cache: &str) -> anyhow::Result<Answer> {
        self.called("refs_of", answer(&format!("count  found  {cache}"), json!({ "refs": [] })))
    }
    fn mark(&self) -> anyhow::Result<()> {
        self.called("mark", ())
    }
    fn ps(&self) -> anyhow::Result<Answer> {
        self.called("ps", answer("pid  comm", json!({ "ps": [] })))
    }
    fn procrank(&self) -> anyhow::Result<Answer> {
        self.called("procrank", answer("pid  pss_kib", json!({ "procrank": [] })))
    }
    fn backtrace(&self, pid: Option<i32>) -> anyhow::Result<Answer> {
        self.called("bt", answer(&format!("pid {pid:?}"), json!({ "bt": [] })))
    }
    fn regs(&self) -> anyhow::Result<Answer> {
        self.called("regs", answer("cpu 0", json!({ "regs": [] })))
    }
    fn save(&self, how: SaveAs, path: &Path) -> anyhow::Result<Answer> {
        let text = format!("saved: 512 MiB to {}, 3 ms", path.display());
        self.called(how.name(), Answer { text, json: json!({ "saved": path.to_string_lossy() }) })
    }
    fn pause(&self) -> anyhow::Result<bool> {
        self.called("pause", true)
    }
    fn resume(&self) -> anyhow::Result<bool> {
        self.called("resume", false)
    }
    fn quit(&self) {
        self.calls.lock().unwrap().push("quit".to_owned());
    }
}

fn answer(text: &str, json: Value) -> Answer {
    Answer { text: text.to_owned(), json }
}
