//! The frequency of this machine's time-stamp counter.
//!
//! QEMU's TCG hands its own machine's counter to the guest. A helper kernel that measures the frequency itself, against an
//! emulated timer and on a loaded machine, may be interrupted between starting the timer and reading the counter: it was
//! seen to find little more than half the frequency, and every time limit in the lab then passes too early.

use std::arch::x86_64::_rdtsc;
use std::time::{Duration, Instant};

/// How long to measure: the error is a reading's over this.
const SPAN: Duration = Duration::from_millis(20);
/// Readings taken for one, of which the one that was interrupted least counts.
const READINGS: usize = 32;

/// kHz.
pub fn khz() -> u64 {
    let (start, from) = reading();
    std::thread::sleep(SPAN);
    let (end, to) = reading();
    let elapsed = to.duration_since(from).as_nanos().max(1);
    u64::try_from(u128::from(end.wrapping_sub(start)) * 1_000_000 / elapsed).unwrap_or(0)
}

/// The counter, and the time at which it had that value.
fn reading() -> (u64, Instant) {
    let readings = (0..READINGS).map(|_| {
        // SAFETY: every x86-64 CPU has the instruction, and user mode may use it.
        let before = unsafe { _rdtsc() };
        let now = Instant::now();
        // SAFETY: as above.
        let after = unsafe { _rdtsc() };
        (after.wrapping_sub(before), before, now)
    });
    let (_, counter, now) = readings.min_by_key(|reading| reading.0).unwrap_or((0, 0, Instant::now()));
    (counter, now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_measures_the_same_twice() {
        let (first, second) = (khz(), khz());
        assert!(first > 100_000 && first.abs_diff(second) < first / 1000, "{first} {second}");
    }
}
