//! The canary: a leak made to be found. A detector that has silently died reports no leaks either; this tells the two
//! apart, on any kernel and without a module.
//!
//! The guest mounts a file system from a source named [`CANARY`]. The kernel keeps a copy of that name: an allocation like
//! any other, with one reference (`mount.mnt_devname`, from `alloc_vfsmnt` in fs/namespace.c). The detector looks for the
//! object in its registry, by its contents: it is there only if the allocation was traced. Then, while the machine stands
//! still, it takes the references out of the guest's memory, which makes the object lost indeed, scans and
//! builds a report as ever, and puts the references back before the machine goes on. Nothing in tracer, marking or report
//! knows that this is a test.

use super::{Detector, Scanned, Work};
use crate::console::Answer;
use crate::machine::Paused;
use anyhow::{Context, Result, bail, ensure};
use introspect::memory::{Pa, PhysicalMemory};
use introspect::registry::{Kind, Object, Paint};
use introspect::report::Leak;
use introspect::scan::{Reference, Referrer, referrers, scan};
use serde_json::json;
use std::time::{Duration, Instant};

/// What the guest mounts: `mount -t ramfs kleak-canary-of-this-guest DIR`.
pub const CANARY: &str = "kleak-canary-of-this-guest";

/// More references than these are not one mount's.
const MAX_REFERENCES: usize = 16;

/// A word taken out of the guest's memory.
struct Hidden {
    pa: Pa,
    word: u64,
}

impl Detector {
    /// Hides the references to the canary, scans, puts them back. An error if it is not found.
    pub(super) fn canary_now(&self) -> Result<Answer> {
        let mut work = self.work();
        let mut paused = self.pause_with_traps()?;
        self.refresh_treatments(&mut work);
        let object = self.find_canary(&paused)?;
        let words = self.references(&work, &paused, &object)?;
        let mut hidden = Vec::new();
        let taken = hide(&mut paused, &words, &mut hidden);
        let found = taken.and_then(|()| self.scan_for(&work, &paused, &object));
        restore(&mut paused, &hidden)?;
        let leak = found?;
        let symbols: Vec<&str> = leak.backtrace.iter().filter_map(|f| f.symbol.as_deref()).collect();
        ensure!(!symbols.is_empty(), "The canary was found, but without a backtrace");
        let text = format!(
            "canary: found object {} (size {}) with {} of its references hidden, allocated by {}",
            leak.address,
            leak.size,
            hidden.len(),
            symbols.join(" < ")
        );
        let json = json!({ "canary": {
            "found": true,
            "address": leak.address.to_string(),
            "size": leak.size,
            "hidden_references": hidden.len(),
            "group": leak.group,
            "sequence": object.sequence,
            "functions": symbols,
        } });
        Ok(Answer { text, json })
    }

    /// The youngest tracked object that holds the canary's name.
    fn find_canary(&self, paused: &Paused<'_>) -> Result<Object> {
        let memory = &paused.memory();
        let linux = &self.parts.linux;
        let state = self.parts.recorder.state();
        let long_enough = |o: &Object| o.kind == Kind::Slab && o.size > CANARY.len() as u64 && o.size <= 64;
        let named = |o: &Object| {
            let mut head = [0; CANARY.len() + 1];
            linux.read(memory, o.address, &mut head).is_ok()
                && head.strip_suffix(b"\0") == Some(CANARY.as_bytes())
        };
        let candidates = state.registry.objects().filter(|o| long_enough(o) && o.paint == Paint::Normal);
        candidates.filter(named).max_by_key(|o| o.sequence).with_context(|| {
            format!(
                "No tracked object holds {CANARY:?}: its allocation was not traced, or the guest has not mounted it yet: \
                 mount -t ramfs {CANARY} DIR"
            )
        })
    }

    /// Where the words are that refer to the object.
    fn references(&self, work: &Work, paused: &Paused<'_>, object: &Object) -> Result<Vec<Pa>> {
        let found = self.frozen(work, paused, |input| referrers(input, object))?;
        ensure!(!found.is_empty(), "Nothing refers to the canary at {}: it was lost before", object.address);
        ensure!(
            found.len() <= MAX_REFERENCES,
            "{} words refer to the canary at {}",
            found.len(),
            object.address
        );
        let place = |reference: &Reference| match &reference.holder {
            Referrer::Root { pa, .. } => Ok(Pa(*pa)),
            Referrer::Object { object, .. } if object.kind == Kind::Percpu => {
                bail!("A per-CPU object, {}, refers to the canary", object.address)
            }
            Referrer::Object { object, offset } => {
                let va = object.address + *offset;
                let pa = self.parts.linux.translate(&paused.memory(), va);
                pa.with_context(|| format!("Cannot reach the canary's reference at {va}"))
            }
            Referrer::Register { cpu } => bail!("A register of vCPU {cpu} refers to the canary; try again"),
        };
        let mut places: Vec<Pa> = found.iter().map(place).collect::<Result<_>>()?;
        // Two mappings of one page are one word.
        places.sort_unstable_by_key(|pa| pa.0);
        places.dedup();
        Ok(places)
    }

    /// Scans as any scan does, without keeping the result, and looks for the object in the report.
    fn scan_for(&self, work: &Work, paused: &Paused<'_>, object: &Object) -> Result<Leak> {
        let begin = Instant::now();
        self.frozen(work, paused, |input| {
            let result = scan(input).context("The scan failed")?;
            let scanned = Scanned { result, pause: Duration::ZERO, took: begin.elapsed() };
            let report = self.report_of(work, &scanned, input.registry, input.modules);
            let leak = report.leaks.into_iter().find(|leak| leak.address == object.address);
            leak.with_context(|| {
                format!(
                    "The canary at {} was not found although nothing refers to it any more",
                    object.address
                )
            })
        })
    }
}

/// Zeroes the words; what was there goes to `hidden` as it is taken.
fn hide(paused: &mut Paused<'_>, words: &[Pa], hidden: &mut Vec<Hidden>) -> Result<()> {
    for &pa in words {
        let word = paused.memory().read_u64(pa)?;
        paused.write(pa, &0u64.to_le_bytes())?;
        hidden.push(Hidden { pa, word });
    }
    Ok(())
}

/// Puts the words back, all that can be; last taken, first put back.
fn restore(paused: &mut Paused<'_>, hidden: &[Hidden]) -> Result<()> {
    let written: Vec<_> = hidden.iter().rev().map(|h| paused.write(h.pa, &h.word.to_le_bytes())).collect();
    written.into_iter().collect::<Result<(), _>>().context("Cannot put the canary's references back")
}
