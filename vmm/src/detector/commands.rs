//! The console's commands on the detector.

use super::Detector;
use crate::console::{Account, Annotation, Answer, Audit, SaveAs, Target, TopBy, When};
use crate::machine::Outcome;
use anyhow::{Result, bail, ensure};
use guest_profiles::hooks::Tracked;
use introspect::memory::Va;
use introspect::registry::Paint;
use introspect::scan::object_at;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

impl Target for Detector {
    fn scan(&self) -> Result<usize> {
        self.scan_now()
    }

    fn report_text(&self) -> Result<String> {
        self.text_report()
    }

    fn report_json(&self) -> Result<Value> {
        self.json_report()
    }

    fn clear(&self) -> Result<usize> {
        let work = self.work();
        Ok(self.clear_reported(&work))
    }

    fn off(&self) -> Result<()> {
        let mut work = self.work();
        // While a vCPU is between the question whether to record and the record, the registry would not stay empty.
        let _paused = self.parts.guest.pause()?;
        self.parts.recorder.enable(false);
        self.parts.recorder.state().reset();
        work.history.clear();
        work.scanned = None;
        work.off = true;
        Ok(())
    }

    fn on(&self) -> Result<usize> {
        let mut work = self.work();
        if self.parts.recorder.enabled() {
            return Ok(self.parts.recorder.state().registry.len());
        }
        if self.parts.traps.count() == 0 {
            bail!("Nothing can be tracked: this machine was started without traps");
        }
        work.scanned = None;
        let seeded = self.reseed()?;
        work.off = false;
        Ok(seeded)
    }

    fn set_stack(&self, on: bool) -> Result<()> {
        self.work().options.stack = on;
        Ok(())
    }

    fn set_typed(&self, on: bool) -> Result<()> {
        self.work().options.typed = on;
        Ok(())
    }

    fn set_scan_period(&self, seconds: u64) -> Result<()> {
        if seconds > 0 {
            self.work().last_period = seconds;
        }
        self.period.store(seconds, Relaxed);
        Ok(())
    }

    fn set_periodic_scan(&self, on: bool) -> Result<u64> {
        let period = if on { self.work().last_period } else { 0 };
        self.period.store(period, Relaxed);
        Ok(period)
    }

    fn dump(&self, address: Va) -> Result<Answer> {
        self.dump_of(address)
    }

    fn path(&self, address: Va) -> Result<Answer> {
        self.path_to(address)
    }

    fn roots(&self) -> Result<Answer> {
        self.roots_now()
    }

    fn possible(&self) -> Result<Answer> {
        self.possible_now()
    }

    fn canary(&self) -> Result<Answer> {
        self.canary_now()
    }

    fn status(&self) -> Result<Vec<(String, Value)>> {
        let work = self.work();
        let parts = &self.parts;
        let (counters, objects, bytes, blocks) = {
            let state = parts.recorder.state();
            let bytes: u64 = state.registry.objects().map(|o| o.size).sum();
            let blocks: u64 = state.registry.blocks().map(|o| o.size).sum();
            (state.registry.counters, state.registry.len(), bytes, blocks)
        };
        let mut status: Vec<(String, Value)> = Vec::new();
        let mut say = |key: &str, value: Value| status.push((key.to_owned(), value));
        say("guest", json!(parts.linux.kernel.image.release()));
        say("state", json!(parts.guest.outcome().map_or("running".to_owned(), |o| o.to_string())));
        say("paused", json!(parts.guest.held()));
        say("pauses", json!(parts.guest.pauses()));
        // A machine that was saved has run as long as its own clock says.
        let uptime = match parts.guest.outcome() {
            Some(Outcome::Saved) => parts.linux.uptime_s(parts.guest.ram()).ok(),
            _ => Some(self.started.elapsed().as_secs()),
        };
        say("uptime_s", json!(uptime));
        say("tracking", json!(parts.recorder.enabled()));
        say("tracer", json!(parts.host.tracer));
        say("trap", json!(parts.host.trap));
        say("track", json!(parts.tracked.iter().map(|what| what.name()).collect::<Vec<_>>()));
        say("lab", json!(parts.host.lab.as_deref().unwrap_or("none")));
        say("hooks", json!(parts.traps.count()));
        say("uncovered", json!(parts.plan.gaps.iter().map(|g| g.cover.as_str()).collect::<Vec<_>>()));
        say("traps_taken", json!(parts.traps.hits()));
        say("traps_rearmed", json!(parts.traps.rearmed()));
        say("text_changes", json!(parts.traps.patches()));
        if let Some(ring) = parts.traps.ring() {
            let status = ring.status();
            say("hooks_by_ring", json!(parts.traps.moved()));
            say("hooks_to_move", json!(parts.traps.to_move()));
            say("hooks_stuck", json!(parts.traps.stuck()));
            say("ring_events", json!(status.events));
            say("ring_lag", json!(status.lag));
            say("ring_waits", json!(status.waits));
            say("ring_fallbacks", json!(status.fallbacks));
            say("ring_known", json!(status.known));
        }
        say("objects", json!(objects));
        say("object_bytes", json!(bytes));
        if self.tracks(Tracked::Pages) {
            say("page_bytes", json!(blocks));
        }
        say("events_alloc", json!(counters.allocs));
        say("events_free", json!(counters.frees));
        say("events_dropped", json!(counters.dropped));
        say("unknown_frees", json!(counters.unknown_frees));
        say("overwritten", json!(counters.overwrites));
        say("stack", json!(work.options.stack));
        say("typed", json!(work.options.typed));
        say("scan_period_s", json!(self.period()));
        say("min_age_ms", json!(work.options.min_age_ms));
        say("scans", json!(work.scans));
        if let Some(again) = &work.again {
            say("scans_incremental", json!(again.scans));
            say("scans_checked", json!(again.checked));
            say("scans_differed", json!(again.differed));
        }
        if let Some(scanned) = &work.scanned {
            say("last_scan_pause_ms", json!(scanned.pause.as_millis() as u64));
            say("last_scan_bytes", json!(scanned.result.bytes_scanned));
            let kind = if scanned.result.again { "incremental" } else { "full" };
            say("last_scan_kind", json!(kind));
            let typed = scanned.result.typed;
            say("last_scan_typed", json!({ "caches": typed.caches, "objects": typed.objects }));
            say("dropped no object", json!({ "words": scanned.result.no_object }));
            say("dropped no pointer by its type", json!({ "words": typed.dropped }));
            say("unreferenced", json!(self.current_leaks(&work)));
            for root in &scanned.result.roots {
                say(
                    &format!("root {}", root.name),
                    json!({ "bytes": root.bytes, "references": root.references }),
                );
            }
        }
        // Looked up only when somebody asks for the roots.
        for (name, words) in work.dropped.iter().flatten() {
            say(&format!("dropped {name}"), json!({ "words": words }));
        }
        Ok(status)
    }

    fn audit(&self) -> Result<Audit> {
        let audit = self.audit_now()?;
        let describe = |m: &introspect::registry::Mismatch| {
            format!("{} {} {}", if m.missing { "missing" } else { "stale" }, m.address, m.cache)
        };
        Ok(Audit {
            tracked: audit.tracked as usize,
            missing: audit.missing as usize,
            stale: audit.stale as usize,
            examples: audit.examples.iter().map(describe).collect(),
        })
    }

    fn top(&self, by: TopBy) -> Result<Answer> {
        self.top_now(by)
    }

    fn alloc_calls(&self, cache: &str) -> Result<Answer> {
        self.alloc_calls_of(cache)
    }

    fn growth(&self) -> Result<Answer> {
        self.growth_now()
    }

    fn annotate(&self, how: Annotation, address: Va) -> Result<Answer> {
        let _work = self.work();
        // One guard over both: between them the address may be freed and become another object's.
        let registry = &mut self.parts.recorder.state().registry;
        let containing = |va| registry.containing(va);
        let (_, object) = object_at(&self.parts.linux, self.ram(), address, containing)?;
        match how {
            Annotation::NotLeak => registry.paint(object.address, Paint::Gray),
            Annotation::Ignore => registry.paint(object.address, Paint::Black),
            Annotation::NoScan => registry.set_no_scan(object.address),
        };
        let text = format!("{}: object {:#018x} (size {})", how.name(), object.address.0, object.size);
        let json =
            json!({ how.name(): { "address": format!("{:#x}", object.address.0), "size": object.size } });
        Ok(Answer { text, json })
    }

    fn accounting(&self, account: Account, when: When) -> Result<Answer> {
        self.account(account, when)
    }

    fn kmem_cache(&self, name: &str, when: When) -> Result<Answer> {
        self.kmem_cache_named(name, when)
    }

    fn refs(&self, address: Va) -> Result<Answer> {
        self.references_of(address)
    }

    fn refs_of(&self, cache: &str) -> Result<Answer> {
        self.counts_of(cache)
    }

    fn mark(&self) -> Result<()> {
        self.mark_now()
    }

    fn ps(&self) -> Result<Answer> {
        self.tasks_now()
    }

    fn procrank(&self) -> Result<Answer> {
        self.procrank_now()
    }

    fn backtrace(&self, pid: Option<i32>) -> Result<Answer> {
        self.backtrace_of(pid)
    }

    fn regs(&self) -> Result<Answer> {
        self.registers_now()
    }

    fn save(&self, how: SaveAs, path: &Path) -> Result<Answer> {
        self.save_now(how, path)
    }

    fn pause(&self) -> Result<bool> {
        self.parts.guest.hold()
    }

    fn resume(&self) -> Result<bool> {
        let guest = &self.parts.guest;
        let released = guest.release();
        ensure!(!guest.debugger_has_stopped(), "A debugger keeps the machine stopped: continue there");
        Ok(released)
    }

    fn quit(&self) {
        self.parts.guest.stop();
    }
}
