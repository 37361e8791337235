//! The console's commands that explain a scan: what is known of an object, why it is reachable, and what the roots contribute.

use super::Detector;
use crate::console::Answer;
use crate::machine::FrozenRam;
use anyhow::{Context, Result};
use introspect::accounting::calls;
use introspect::memory::Va;
use introspect::registry::Paint;
use introspect::scan::{ScanInput, coverage, object_at, path, possible, refs};
use serde_json::{Value, json};
use std::fmt::Write;

/// Rows that `refs=CACHE` and `possible` show.
const SHOWN: usize = 30;

impl Detector {
    pub(super) fn path_to(&self, address: Va) -> Result<Answer> {
        let path = self.look(|input| path(input, address))?;
        Ok(Answer { text: path.text(), json: path.json() })
    }

    pub(super) fn roots_now(&self) -> Result<Answer> {
        let coverage = self.look(|input| coverage(input).context("Cannot follow the roots"))?;
        let counted = coverage.not_read.iter().filter_map(|part| Some((part.name, part.references?)));
        self.work().dropped = Some(counted.collect());
        Ok(Answer { text: coverage.text(), json: coverage.json() })
    }

    pub(super) fn possible_now(&self) -> Result<Answer> {
        self.look(|input| {
            let found = possible::possible(input).context("Cannot look at all references")?;
            let symbolize = |va, at| input.linux.resolve(input.modules, va, at);
            let mut table = possible::table(&found, &|object| {
                calls::site(input.registry.stacks.get(object.stack), object.sequence, &symbolize)
            });
            let rows = table.json();
            table.truncate(SHOWN);
            let objects: usize = found.iter().map(|group| group.objects.len()).sum();
            let text = format!(
                "{}# {objects} objects of {} origins are in use only by a pointer into their middle\n",
                table.text(),
                found.len()
            );
            let json = json!({ "possible": rows, "objects": objects });
            Ok(Answer { text, json })
        })
    }

    /// Everything that is known of an object.
    pub(super) fn dump_of(&self, address: Va) -> Result<Answer> {
        self.look(|input| {
            let refs = refs::of_object(input, &self.parts.rules.counts, address)?;
            let (at, object) =
                object_at(input.linux, input.memory, address, |va| input.registry.containing(va))?;
            let comm = String::from_utf8_lossy(&input.registry.comm(object.comm)).into_owned();
            let comm = comm.trim_end_matches('\0');
            let paint = match object.paint {
                Paint::Normal => "normal",
                Paint::Gray => "gray",
                Paint::Black => "black",
            };
            let rule = input.treatments.of(&object, refs.cache.as_deref().unwrap_or_default());
            let frames = input.registry.stacks.get(object.stack);
            let age_ms =
                input.now_jiffies.saturating_sub(object.jiffies).saturating_mul(1000) / input.linux.hz();
            let mut text = refs.heading();
            text.push('\n');
            if at != object.address {
                let _ = writeln!(text, "  the address is at offset {:#x}", at - object.address);
            }
            let _ = write!(text, "  comm {comm:?}, pid {}, jiffies {}", object.pid, object.jiffies);
            let _ = writeln!(text, " (age {}.{:03}s)", age_ms / 1000, age_ms % 1000);
            let known = if object.reported { "reported before" } else { "not reported yet" };
            let scanned = if object.no_scan { "not scanned" } else { "scanned" };
            let _ = writeln!(text, "  painted {paint}, {scanned}, {known}");
            if let Some(rule) = rule {
                let _ = writeln!(text, "  annotation {:?}: {}", rule.action, rule.reason);
            }
            text.push_str("  backtrace:\n");
            for &frame in frames {
                let _ = writeln!(text, "    {}", self.symbolise(frame, object.sequence, input.modules));
            }
            text.push_str(&refs.referenced_by());
            let backtrace: Vec<Value> =
                frames.iter().map(|&ip| self.frame(ip, object.sequence, input.modules)).collect();
            let json = json!({ "dump": {
                "address": format!("{:#x}", object.address.0), "size": object.size, "kind": object.kind,
                "cache": refs.cache, "offset": at - object.address, "comm": comm, "pid": object.pid,
                "jiffies": object.jiffies, "age_ms": age_ms, "paint": paint, "no_scan": object.no_scan,
                "reported": object.reported, "annotation": rule.map(|rule| &rule.reason),
                "backtrace": backtrace, "references": refs.references_json(), "omitted": refs.omitted,
            } });
            Ok(Answer { text, json })
        })
    }

    pub(super) fn references_of(&self, address: Va) -> Result<Answer> {
        let refs = self.look(|input| refs::of_object(input, &self.parts.rules.counts, address))?;
        Ok(Answer { text: refs.text(), json: refs.json() })
    }

    pub(super) fn counts_of(&self, cache: &str) -> Result<Answer> {
        self.look(|input| {
            let found = refs::of_cache(input, &self.parts.rules.counts, cache)?;
            let symbolize = |va, at| input.linux.resolve(input.modules, va, at);
            let mut table = found.table(&|counted| {
                let frames = input.registry.stacks.get(counted.object.stack);
                calls::site(frames, counted.object.sequence, &symbolize)
            });
            table.truncate(SHOWN);
            let counter = &found.counter;
            let json = json!({
                "refs": table.json(), "cache": counter.cache, "type": counter.structure,
                "member": counter.member, "objects": found.objects, "omitted": table.omitted,
            });
            let text = format!("{}{}\n", table.text(), found.summary());
            Ok(Answer { text, json })
        })
    }

    /// Pauses the machine and looks at what a scan would look at.
    ///
    /// # Errors
    /// It cannot be paused, or its clock cannot be read; and those of `look`.
    pub fn look<T>(&self, look: impl FnOnce(&ScanInput<'_, FrozenRam<'_>>) -> Result<T>) -> Result<T> {
        let mut work = self.work();
        let paused = self.parts.guest.pause()?;
        self.refresh_treatments(&mut work);
        self.frozen(&work, &paused, look)
    }
}
