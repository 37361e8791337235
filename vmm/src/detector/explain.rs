//! The console's commands that explain a scan: why an object is reachable, and what the roots contribute.

use super::Detector;
use crate::console::Answer;
use anyhow::{Context, Result};
use introspect::memory::Va;
use introspect::scan::{coverage, path};

impl Detector {
    pub(super) fn path_to(&self, address: Va) -> Result<Answer> {
        let mut work = self.work();
        let paused = self.parts.machine.pause()?;
        self.refresh_treatments(&mut work);
        let path = self.frozen(&work, &paused, |input| path(input, address))?;
        drop(paused);
        Ok(Answer { text: path.text(), json: path.json() })
    }

    pub(super) fn roots_now(&self) -> Result<Answer> {
        let mut work = self.work();
        let paused = self.parts.machine.pause()?;
        self.refresh_treatments(&mut work);
        let coverage =
            self.frozen(&work, &paused, |input| coverage(input).context("Cannot follow the roots"))?;
        drop(paused);
        Ok(Answer { text: coverage.text(), json: coverage.json() })
    }
}
