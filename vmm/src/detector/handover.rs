//! From traps to the ring, as soon as the guest allows.

use super::Detector;
use anyhow::Result;
use introspect::memory::Va;
use std::ops::Range;
use std::time::Duration;

/// How often the ring is read while little happens, and while much does or is awaited.
const IDLE: Duration = Duration::from_millis(10);
const BUSY: Duration = Duration::from_millis(1);
/// So many events in one step are much.
const MUCH: u64 = 1000;
/// Between two attempts to hand hooks over, for as long as the guest stands in some of them: each pauses it. It begins
/// anew when the kernel has taken the jumps back.
const FIRST_RETRY: Duration = Duration::from_millis(5);
const LAST_RETRY: Duration = Duration::from_secs(10);
/// So many attempts may fail: the guest's lists may be half changed when it is paused.
const MAX_FAILURES: u32 = 5;

/// When to attempt to hand hooks over.
struct Attempts {
    wait: Duration,
    retry: Duration,
    failures: u32,
}

impl Attempts {
    fn new() -> Self {
        Self { wait: Duration::ZERO, retry: FIRST_RETRY, failures: 0 }
    }

    fn is_first(&self) -> bool {
        self.retry == FIRST_RETRY
    }

    fn are_due(&self) -> bool {
        self.wait.is_zero() && self.are_possible()
    }

    fn are_possible(&self) -> bool {
        self.failures < MAX_FAILURES
    }

    fn later(&mut self) {
        self.wait = self.retry;
        self.retry = (self.retry * 2).min(LAST_RETRY);
    }
}

impl Detector {
    /// Hands hooks over to the ring when the guest allows, and reads the ring, until the machine has ended. For a thread of
    /// its own. `verbose`: says how far it got.
    pub fn serve_ring(&self, verbose: bool) {
        let Some(ring) = self.parts.traps.ring() else { return };
        let traps = &self.parts.traps;
        let mut attempts = Attempts::new();
        let (mut events, mut early) = (0, traps.is_early());
        while self.parts.guest.outcome().is_none() {
            if std::mem::replace(&mut early, traps.is_early()) != early {
                attempts = Attempts::new();
            }
            if attempts.are_due() && traps.to_move() > 0 {
                self.attempt(&mut attempts, verbose);
            }
            ring.drain();
            let before = std::mem::replace(&mut events, ring.status().events);
            let awaited = early || attempts.is_first() && traps.to_move() > 0;
            let eager = awaited || events - before > MUCH;
            let step = if eager { BUSY } else { IDLE };
            std::thread::sleep(step);
            attempts.wait = attempts.wait.saturating_sub(step);
        }
        ring.drain();
    }

    fn attempt(&self, attempts: &mut Attempts, verbose: bool) {
        match self.hand_over() {
            Ok(false) => {}
            Ok(true) => {
                if verbose {
                    self.say_handed_over();
                }
                attempts.later();
            }
            Err(error) => {
                attempts.failures += 1;
                attempts.later();
                if !attempts.are_possible() && !self.parts.traps.is_early() {
                    eprintln!("kleak-vmm: warning: Hooks that are traps stay traps: {error:#}");
                }
            }
        }
    }

    /// Hands over what can be; false while it is too early.
    fn hand_over(&self) -> Result<bool> {
        let parts = &self.parts;
        if !parts.traps.prepare()? {
            return Ok(false);
        }
        let mut paused = parts.guest.pause()?;
        let memory = &paused.memory();
        let busy = self.allocator.busy(&parts.linux, memory, &parts.recorder, paused.cpus())?;
        // Whoever was interrupted between the bytes of a jump to be has that address on a stack, however it is unwound.
        let standing = self.allocator.standing(&parts.linux, memory, paused.cpus())?;
        let free = |function: &str, bytes: Range<Va>| !busy.contains(function) && !standing.is_inside(&bytes);
        parts.traps.hand_over(&mut paused, free)
    }

    fn say_handed_over(&self) {
        let traps = &self.parts.traps;
        let (moved, left, all) = (traps.moved(), traps.to_move(), traps.count());
        eprintln!("kleak-vmm: {moved} of {all} hooks write to the ring, {left} wait until nobody is in them");
        for why in traps.stuck() {
            eprintln!("kleak-vmm: one stays a trap: {why}");
        }
    }
}
