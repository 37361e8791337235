//! `snapshot=` and `core=`: the machine as it stands, into a file.

use super::{Detector, Work};
use crate::console::{Answer, SaveAs};
use crate::files::resolved;
use crate::machine::{FrozenRam, Paused};
use crate::saved::{Facts, Sink, Writing, format};
use anyhow::{Context, Result};
use introspect::memory::{FrozenMemory, Pa, PhysicalMemory, RamRange};
use introspect::vmcore::{Attached, Content, Head};
use serde_json::json;
use std::io::Write;
use std::path::Path;
use std::sync::PoisonError;
use std::time::Instant;

/// Bytes of memory that are written at once.
const CHUNK: u64 = 1 << 20;

/// What was written.
pub(super) struct Saved {
    /// Bytes of the file, holes included.
    bytes: u64,
    /// Crash and drgn need what the kernel says of itself.
    has_vmcoreinfo: bool,
}

impl Detector {
    pub(super) fn save_now(&self, how: SaveAs, path: &Path) -> Result<Answer> {
        let work = self.work();
        let begin = Instant::now();
        let paused = self.parts.guest.pause()?;
        let saved = self.write(&work, &paused, how, path)?;
        drop(paused);
        let (pause_ms, path) = (begin.elapsed().as_millis(), path.display());
        let mut text = format!("saved: {} MiB to {path}, {pause_ms} ms", saved.bytes.div_ceil(1 << 20));
        if !saved.has_vmcoreinfo {
            text.push_str("; it has no VMCOREINFO, which crash and drgn need");
        }
        let json = json!({
            "saved": path.to_string(), "bytes": saved.bytes, "pause_ms": pause_ms as u64,
            "vmcoreinfo": saved.has_vmcoreinfo,
        });
        Ok(Answer { text, json })
    }

    /// Saves the paused machine where the user wants it when leaks were found, once.
    pub(super) fn save_leak(&self, work: &mut Work, paused: &Paused<'_>) {
        let Some(path) = work.save_leak.clone() else { return };
        match self.write(work, paused, SaveAs::Snapshot, &path) {
            Ok(_) => {
                eprintln!("kleak-vmm: the machine is saved to {}", path.display());
                work.save_leak = None;
            }
            Err(error) => eprintln!("kleak-vmm: warning: {error:#}"),
        }
    }

    /// Writes the paused machine to a file.
    pub(super) fn write(&self, work: &Work, paused: &Paused<'_>, how: SaveAs, path: &Path) -> Result<Saved> {
        let linux = &self.parts.linux;
        let memory = &paused.memory();
        let kernel = linux.kernel.image.file();
        let state = match how {
            SaveAs::Snapshot => Some(self.state(work, paused)?),
            SaveAs::Core => None,
        };
        // A kernel that is not that far yet, or has damaged it, can be saved all the same.
        let vmcoreinfo = linux.vmcoreinfo(memory).ok().flatten();
        let pid = |cpu: usize| linux.allocating_comm_and_pid(memory, cpu).map_or(0, |(_, pid)| pid);
        let cpus: Vec<_> = paused.cpus().iter().map(|cpu| (*cpu, pid(cpu.index))).collect();
        let head = Head::new(&Content {
            ranges: memory.ranges(),
            direct_map: linux.direct_map_base(memory).ok(),
            image: linux.image_mapping(),
            cpus: &cpus,
            vmcoreinfo: vmcoreinfo.as_deref(),
            attached: state.as_ref().map(|state| Attached {
                format: format(),
                crc: crc32fast::hash(state),
                offset: 0,
                len: state.len() as u64,
                kernel_len: kernel.len() as u64,
            }),
        })?;
        let failure = || format!("Cannot save to {}", path.display());
        let mut sink = Sink::create(&resolved(path), head.file_len).with_context(failure)?;
        let written = (|| {
            sink.write_all(&head.bytes)?;
            self.write_memory(&mut sink, memory)?;
            if let Some(state) = state {
                sink.write_all(&state)?;
                sink.write_all(kernel)?;
            }
            Ok(())
        })();
        // What the other end says of it explains more than a pipe that broke.
        let placed = sink.place();
        placed.map_err(anyhow::Error::from).and(written).with_context(failure)?;
        Ok(Saved { bytes: head.file_len, has_vmcoreinfo: vmcoreinfo.is_some() })
    }

    /// What only the tracker knows.
    fn state(&self, work: &Work, paused: &Paused<'_>) -> Result<Vec<u8>> {
        let parts = &self.parts;
        let facts = Facts {
            placement: parts.linux.placement,
            cpus: paused.cpus().to_vec(),
            tracked: parts.tracked.clone(),
            host: parts.host.clone(),
            types: parts.linux.kernel.types_file.clone(),
            rule_files: parts.rule_files.clone(),
            scans: work.scans,
            min_age_ms: work.options.min_age_ms,
            stack: work.options.stack,
            typed: work.options.typed,
        };
        let modules = parts.recorder.modules.read().unwrap_or_else(PoisonError::into_inner);
        let state = parts.recorder.state();
        let registry = state.registry.save();
        let all: Writing<'_> = (&facts, &registry, &modules, &state.freed_by, &work.history);
        postcard::to_allocvec(&all).context("Cannot write the tracker's state")
    }

    /// All RAM, with the kernel's own instructions where traps are.
    fn write_memory(&self, out: &mut Sink, memory: &FrozenRam<'_>) -> Result<()> {
        let originals = self.parts.traps.originals()?;
        for range in memory.ranges() {
            for start in (0..range.len).step_by(CHUNK as usize) {
                let chunk = RamRange { start: range.start + start, len: CHUNK.min(range.len - start) };
                let bytes = memory.slice(chunk.start, chunk.len as usize)?;
                let first = originals.partition_point(|(at, bytes)| *at + bytes.len() as u64 <= chunk.start);
                let within = originals[first..].iter().take_while(|(at, _)| *at < chunk.start + chunk.len);
                match within.clone().next() {
                    None => out.write_all(bytes)?,
                    Some(_) => out.write_all(&patched(bytes, chunk.start, within))?,
                }
            }
        }
        Ok(())
    }
}

/// `bytes` of memory at `start` with what lies in them replaced.
fn patched<'a>(bytes: &[u8], start: Pa, patches: impl Iterator<Item = &'a (Pa, Vec<u8>)>) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for (at, patch) in patches {
        for (k, &byte) in patch.iter().enumerate() {
            let place = (*at + k as u64).0.checked_sub(start.0).and_then(|k| out.get_mut(k as usize));
            if let Some(place) = place {
                *place = byte;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_cut_at_the_edges_of_a_chunk() {
        let patches = [(Pa(99), vec![1, 2]), (Pa(103), vec![3]), (Pa(107), vec![4, 5])];
        assert_eq!(patched(&[0; 8], Pa(100), patches.iter()), [2, 0, 0, 3, 0, 0, 0, 4]);
    }
}
