//! What the detector of a boot has to say: leaks, whether it still works, what lives and what grows.

use super::result::{Group, Growth, Heap};
use super::worker::Worker;
use anyhow::{Context, Result};
use serde_json::Value;

/// Most growing sites and caches that a result keeps.
const MAX_GROWTH: usize = 12;

/// Scans, adds what is reported to `taken`, and has it cleared.
///
/// # Errors
/// The detector does not do it.
pub fn take_leaks(worker: &mut Worker, taken: &mut Vec<Group>) -> Result<()> {
    worker.request("scan")?;
    let mut report = worker.request("report")?;
    let groups = report.get_mut("groups").map(Value::take).unwrap_or_default();
    let groups: Vec<Group> = serde_json::from_value(groups).context("The report's groups")?;
    if !groups.is_empty() {
        add(taken, groups);
        worker.request("clear")?;
    }
    Ok(())
}

/// Number of leaks.
pub fn count(groups: &[Group]) -> u64 {
    groups.iter().map(|group| group.count).sum()
}

/// Adds leaks, those of the same group together.
pub fn add(groups: &mut Vec<Group>, more: Vec<Group>) {
    for group in more {
        match groups.iter_mut().find(|known| known.id == group.id) {
            Some(known) => {
                known.count += group.count;
                known.direct += group.direct;
                known.bytes += group.bytes;
                known.retained_bytes += group.retained_bytes;
            }
            None => groups.push(group),
        }
    }
}

/// Looks for the canary. When it was allocated, in allocator events, where it is found and younger than `since`; else why
/// the detector does not count as alive. An older one proves nothing: what is freed unseen stays in the registry, and its memory may
/// hold the name of the next.
///
/// # Errors
/// There is no reply.
pub fn canary(worker: &mut Worker, since: Option<u64>) -> Result<Result<Option<u64>, String>> {
    let reply = match worker.ask("canary")? {
        Ok(reply) => reply,
        Err(why) => return Ok(Err(why)),
    };
    let canary = &reply["canary"];
    match canary["sequence"].as_u64() {
        at if canary["found"] == true && at > since => Ok(Ok(at)),
        Some(_) if canary["found"] == true => {
            Ok(Err("what it found was allocated before this test, so it missed what came later".to_owned()))
        }
        _ => Ok(Err(format!("unexpected reply {reply}"))),
    }
}

/// What the detector says of itself.
pub struct Status {
    /// What lives.
    pub heap: Heap,
    traps_rearmed: u64,
    events_dropped: u64,
}

/// Asks the detector how it does.
///
/// # Errors
/// There is no reply, or not the one expected.
pub fn status(worker: &mut Worker) -> Result<Status> {
    let status = worker.request("status")?;
    let number =
        |key: &str| status[key].as_u64().with_context(|| format!("The detector's status has no {key}"));
    Ok(Status {
        heap: Heap { objects: number("objects")?, bytes: number("object_bytes")? },
        traps_rearmed: number("traps_rearmed")?,
        events_dropped: number("events_dropped")?,
    })
}

impl Status {
    /// What went past the detector since the boot began; None: nothing.
    pub fn losses(&self) -> Option<String> {
        let counts = [(self.traps_rearmed, "overwritten traps"), (self.events_dropped, "dropped events")];
        let lost: Vec<String> =
            counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{what}: {n}")).collect();
        (!lost.is_empty()).then(|| lost.join(", "))
    }
}

/// What keeps growing, the fastest first; nothing where there were too few scans to say, or no answer.
pub fn growth(worker: &mut Worker) -> Vec<Growth> {
    let Ok(mut reply) = worker.request("growth") else { return Vec::new() };
    let all = reply.get_mut("growth").map(Value::take).unwrap_or_default();
    let mut all: Vec<Growth> = serde_json::from_value(all).unwrap_or_default();
    all.truncate(MAX_GROWTH);
    all
}
