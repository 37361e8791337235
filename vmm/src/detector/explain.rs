//! The console's commands that explain a scan: why an object is reachable, and what the roots contribute.

use super::Detector;
use super::reporting::resolve;
use crate::console::Answer;
use crate::machine::FrozenRam;
use anyhow::{Context, Result};
use introspect::accounting::calls;
use introspect::memory::Va;
use introspect::registry::Object;
use introspect::scan::{ScanInput, coverage, object_at, path, refs};
use serde_json::json;

/// Objects that `refs=CACHE` shows.
const SHOWN: usize = 30;

impl Detector {
    pub(super) fn path_to(&self, address: Va) -> Result<Answer> {
        let path = self.look(|input| path(input, address))?;
        Ok(Answer { text: path.text(), json: path.json() })
    }

    pub(super) fn roots_now(&self) -> Result<Answer> {
        let coverage = self.look(|input| coverage(input).context("Cannot follow the roots"))?;
        Ok(Answer { text: coverage.text(), json: coverage.json() })
    }

    /// See [`object_at`]. The guest goes on meanwhile.
    pub(super) fn object_at(&self, address: Va) -> Result<(Va, Object)> {
        let containing = |va| self.parts.recorder.state().registry.containing(va);
        object_at(&self.parts.linux, self.ram(), address, containing)
    }

    pub(super) fn references_of(&self, address: Va) -> Result<Answer> {
        let refs = self.look(|input| refs::of_object(input, &self.parts.rules.counts, address))?;
        Ok(Answer { text: refs.text(), json: refs.json() })
    }

    pub(super) fn counts_of(&self, cache: &str) -> Result<Answer> {
        self.look(|input| {
            let found = refs::of_cache(input, &self.parts.rules.counts, cache)?;
            let symbolize = |va, at| resolve(input.linux, input.modules, va, at);
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
    fn look<T>(&self, look: impl FnOnce(&ScanInput<'_, FrozenRam<'_>>) -> Result<T>) -> Result<T> {
        let mut work = self.work();
        let paused = self.parts.machine.pause()?;
        self.refresh_treatments(&mut work);
        self.frozen(&work, &paused, look)
    }
}
