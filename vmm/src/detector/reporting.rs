//! Reports of the last scan.

use super::{Detector, Scanned, Work};
use crate::machine::{GuestRam, Outcome};
use anyhow::{Context, Result, bail};
use introspect::linux::ModuleMap;
use introspect::memory::{PhysicalMemory, Va};
use introspect::registry::{Paint, Registry};
use introspect::report::{GuestInfo, HostInfo, Report, ReportInput};
use introspect::scan::{Leak, ScanResult};
use serde_json::Value;
use std::sync::PoisonError;

impl Detector {
    /// kmemleak's text of all unreferenced objects; empty before the first scan, as kmemleak's file is.
    pub(super) fn text_report(&self) -> Result<String> {
        let work = self.work();
        Ok(self.current_report(&work).map_or_else(String::new, |report| report.text()))
    }

    pub(super) fn json_report(&self) -> Result<Value> {
        let work = self.work();
        let Some(report) = self.current_report(&work) else {
            bail!("No scan has been made yet");
        };
        serde_json::to_value(report).context("Cannot write the report as JSON")
    }

    /// What the last scan found and is still there, not cleared since.
    fn current_report(&self, work: &Work) -> Option<Report> {
        let modules = self.parts.recorder.modules.read().unwrap_or_else(PoisonError::into_inner);
        let state = self.parts.recorder.state();
        self.report_now(work, &state.registry, &modules)
    }

    fn report_now(&self, work: &Work, registry: &Registry, modules: &ModuleMap) -> Option<Report> {
        let scanned = work.scanned.as_ref()?;
        let leaks = scanned.result.leaks.iter().filter(|l| still_there(registry, l)).cloned().collect();
        let result = ScanResult { leaks, ..scanned.result.clone() };
        Some(self.report_of(work, &Scanned { result, ..*scanned }, registry, modules))
    }

    /// What is reported now.
    pub(super) fn current_leaks(&self, work: &Work) -> usize {
        self.current_report(work).map_or(0, |report| report.leaks.len())
    }

    /// Paints gray what is reported now; how many objects that is.
    pub(super) fn clear_reported(&self, work: &Work) -> usize {
        let modules = self.parts.recorder.modules.read().unwrap_or_else(PoisonError::into_inner);
        // One guard over both: between them an address may be freed and become another object's.
        let mut state = self.parts.recorder.state();
        let report = self.report_now(work, &state.registry, &modules);
        let addresses: Vec<Va> =
            report.iter().flat_map(|report| report.leaks.iter().map(|leak| leak.address)).collect();
        for &address in &addresses {
            state.registry.paint(address, Paint::Gray);
        }
        addresses.len()
    }

    pub(super) fn report_of(
        &self,
        work: &Work,
        scanned: &Scanned,
        registry: &Registry,
        modules: &ModuleMap,
    ) -> Report {
        let parts = &self.parts;
        let symbolize = |va, at| parts.linux.resolve(modules, va, at);
        Report::new(ReportInput {
            guest: self.guest_info(),
            host: HostInfo {
                kvm: parts.host.kvm.clone(),
                tracer: parts.host.tracer.clone(),
                trap: parts.host.trap.clone(),
                lab: parts.host.lab.clone(),
            },
            number: work.scans,
            pause_ms: scanned.pause.as_millis() as u64,
            result: &scanned.result,
            registry,
            hz: parts.linux.hz(),
            audit: work.audit.clone(),
            suppressions: &parts.rules.suppressions,
            order: work.options.order,
            symbolize: &symbolize,
        })
    }

    fn guest_info(&self) -> GuestInfo {
        let Self { parts, .. } = self;
        let image = &parts.linux.kernel.image;
        GuestInfo {
            release: image.release().to_owned(),
            version: image.banner.clone(),
            arch: std::env::consts::ARCH.to_owned(),
            cpus: parts.guest.cpu_count() as u32,
            mem_bytes: self.ram().ranges().iter().map(|r| r.len).sum(),
            kaslr_offset: parts.linux.placement.slide,
        }
    }

    /// `uname -r` of the guest.
    pub fn release(&self) -> &str {
        self.parts.linux.kernel.image.release()
    }

    pub(super) fn ram(&self) -> &GuestRam {
        self.parts.guest.ram()
    }

    /// `name+0xOFF/0xSIZE [module]` of a code address, as it is now.
    pub fn name(&self, va: Va) -> Option<String> {
        self.parts.recorder.name(va)
    }

    /// A frame of a backtrace taken at event `at`.
    pub(super) fn symbolise(&self, va: Va, at: u64, modules: &ModuleMap) -> String {
        let name = self.parts.linux.resolve(modules, va, at).map(|r| r.to_string());
        format!("[<{:016x}>] {}", va.0, name.unwrap_or_else(|| va.to_string()))
    }

    /// One line on what was found and what it cost.
    pub fn summary(&self) -> String {
        let work = self.work();
        let leaks = self.current_leaks(&work);
        let registry = &self.parts.recorder.state().registry;
        let mut text = format!("{leaks} unreferenced objects of {} tracked", registry.len());
        if let Some(scanned) = &work.scanned {
            let young = scanned.result.young;
            if young > 0 {
                let age = work.options.min_age_ms;
                text.push_str(&format!(
                    "; {young} more are younger than {age} ms, too young to judge (--min-age)"
                ));
            }
            text.push_str(&format!("; last scan {} ms", scanned.took.as_millis()));
        }
        let is_saved = self.parts.guest.outcome() == Some(Outcome::Saved);
        if self.parts.host.tracer != "off" && !is_saved {
            text.push_str(&format!("; {} traps taken", self.parts.traps.hits()));
        }
        if let Some(ring) = self.parts.traps.ring() {
            text.push_str(&format!(", {} events by the ring", ring.status().events));
        }
        if registry.counters.dropped > 0 {
            text.push_str(&format!(
                "; {} allocator events lost, so leaks may be missing or false",
                registry.counters.dropped
            ));
        }
        text
    }
}

pub(super) fn still_there(registry: &Registry, leak: &Leak) -> bool {
    registry
        .get(leak.object.address)
        .is_some_and(|now| now.sequence == leak.object.sequence && now.paint == Paint::Normal)
}
