//! Periodic scans: they read only the pages that were written since the scan before.

use crate::machine::{FrozenRam, Paused};
use anyhow::{Context, Result};
use introspect::scan::{Memo, ScanInput, ScanResult, Written, scan, scan_again};

/// Of scans that do not read everything one of so many is made in full, too, and both must agree.
const CHECKED: u64 = 8;

/// What one scan leaves for the next, from the first periodic scan on.
#[derive(Default)]
pub(super) struct Again {
    memo: Memo,
    /// Scans that did not read everything.
    pub scans: u64,
    /// Those that were made in full, too.
    pub checked: u64,
    /// Those that found something else then.
    pub differed: u64,
}

impl Again {
    /// Scans the machine, in which no page was written since the last time but those of `written`.
    pub fn scan(
        &mut self,
        input: &ScanInput<'_, FrozenRam<'_>>,
        written: Option<&Written>,
    ) -> Result<ScanResult> {
        let result = scan_again(input, &mut self.memo, written).context("The scan failed")?;
        if !result.again {
            return Ok(result);
        }
        self.scans += 1;
        if !self.scans.is_multiple_of(CHECKED) {
            return Ok(result);
        }
        let full = scan(input).context("The scan failed")?;
        self.checked += 1;
        if result.agrees(&full) {
            return Ok(result);
        }
        self.differed += 1;
        self.memo = Memo::default();
        eprintln!(
            "kleak-vmm: warning: a scan of the pages that the host says were written found {} unreferenced objects, one of \
             all pages {}: the latter counts. Please report it",
            result.leaks.len(),
            full.leaks.len()
        );
        Ok(full)
    }
}

/// The pages that were written since this was last asked; None where the host does not say.
pub(super) fn written(paused: &mut Paused<'_>) -> Option<Written> {
    paused.take_written().unwrap_or_else(|error| {
        eprintln!("kleak-vmm: warning: everything is scanned: {error:#}");
        None
    })
}
