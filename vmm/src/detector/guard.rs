//! Traps that the guest overwrites while it changes its text are planted again as soon as it has done so.

use super::Detector;
use std::time::Duration;

/// How long the end of the machine may go unnoticed.
const STEP: Duration = Duration::from_millis(200);

impl Detector {
    /// Plants traps again whenever the guest has overwritten some, and makes good what was missed, until the machine has
    /// ended. For a thread of its own: the vCPU that finds out goes on meanwhile, for no pause waits for itself.
    pub fn guard_traps(&self) {
        while self.parts.guest.outcome().is_none() {
            if self.parts.traps.wait_for_loss(STEP) {
                // Commands wait: two that find the same gap would both close it.
                let _turn = self.work();
                if let Err(error) = self.pause_with_traps() {
                    eprintln!("kleak-vmm: warning: Traps that the guest overwrote stay lost: {error:#}");
                }
            }
        }
    }
}
