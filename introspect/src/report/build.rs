//! From what a scan found to what a reader wants to know.

use super::{
    Frame, GuestInfo, HostInfo, Leak, Order, Report, SCHEMA, ScanInfo, SuppressionUse, TextStyle, group,
};
use crate::memory::Va;
use crate::registry::{Audit, Registry, StackId};
use crate::scan::{self, ScanResult};
use crate::symbols::Resolved;
use guest_profiles::annotations::Suppression;

/// What [`Report::new`] joins.
pub struct ReportInput<'a> {
    /// The guest.
    pub guest: GuestInfo,
    /// The host.
    pub host: HostInfo,
    /// Counts scans from 1.
    pub number: u64,
    /// How long the machine was paused, milliseconds.
    pub pause_ms: u64,
    /// What the scan found.
    pub result: &'a ScanResult,
    /// The registry it looked at.
    pub registry: &'a Registry,
    /// Ticks per second of `jiffies`.
    pub hz: u64,
    /// The audit of the same pause, if one was made.
    pub audit: Option<Audit>,
    /// Leaks that are known.
    pub suppressions: &'a [Suppression],
    /// Of groups.
    pub order: Order,
    /// Names an address as it was at an event's place in the order of all events.
    pub symbolize: &'a dyn Fn(Va, u64) -> Option<Resolved<'a>>,
}

impl Report {
    /// Builds the report of one scan. Names backtraces, groups leaks and takes the suppressed ones out.
    pub fn new(input: ReportInput<'_>) -> Self {
        let mut suppressed: Vec<SuppressionUse> = Vec::new();
        let (mut leaks, mut components) = (Vec::new(), Vec::new());
        for found in &input.result.leaks {
            let leak = name(&input, found);
            match input.suppressions.iter().find(|s| covers(s, &leak)) {
                Some(rule) => count(&mut suppressed, rule, leak.size),
                None => {
                    leaks.push(leak);
                    components.push(found.component);
                }
            }
        }
        let groups = group::group(&leaks, &components, input.order);
        let style = TextStyle::of_release(&input.guest.release);
        let scan = scan_info(&input);
        let ReportInput { guest, host, audit, .. } = input;
        Self { schema: SCHEMA, guest, host, scan, audit, leaks, groups, suppressed, style }
    }
}

fn scan_info(input: &ReportInput<'_>) -> ScanInfo {
    let (result, counters) = (input.result, input.registry.counters);
    let white = result.leaks.len() as u64;
    let time = result.prepare + result.mark + result.graph;
    ScanInfo {
        number: input.number,
        jiffies: result.jiffies,
        pause_ms: input.pause_ms,
        scan_ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
        bytes_scanned: result.bytes_scanned,
        objects: result.objects,
        object_bytes: result.object_bytes,
        white,
        gray: result.objects.saturating_sub(white),
        events_alloc: counters.allocs,
        events_free: counters.frees,
        events_dropped: counters.dropped,
    }
}

fn name(input: &ReportInput<'_>, found: &scan::Leak) -> Leak {
    let object = &found.object;
    let backtrace = backtrace(input, object.stack, object.sequence);
    let ticks = input.result.jiffies.saturating_sub(object.jiffies);
    Leak {
        address: object.address,
        size: object.size,
        kind: object.kind,
        cache: found.cache.clone(),
        comm: comm_text(&input.registry.comm(object.comm)),
        pid: object.pid,
        jiffies: object.jiffies,
        age_ms: ticks.saturating_mul(1000) / input.hz.max(1),
        head: found.head.clone(),
        checksum: found.checksum,
        direct: found.direct,
        retained_bytes: found.retained,
        group: group::id(object.kind, object.size, &backtrace),
        new: !object.reported,
        backtrace,
    }
}

fn backtrace(input: &ReportInput<'_>, stack: StackId, sequence: u64) -> Vec<Frame> {
    let frame = |&ip: &Va| match (input.symbolize)(ip, sequence) {
        Some(r) => Frame {
            ip,
            symbol: Some(r.name.to_owned()),
            offset: r.offset,
            size: r.size,
            module: r.module.map(str::to_owned),
        },
        None => Frame { ip, symbol: None, offset: 0, size: 0, module: None },
    };
    input.registry.stacks.get(stack).iter().map(frame).collect()
}

/// A task's name up to its NUL. The guest chooses it and it is printed to terminals: control characters become "?".
pub fn comm_text(bytes: &[u8; 16]) -> String {
    let len = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(&bytes[..len]);
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn covers(rule: &Suppression, leak: &Leak) -> bool {
    let frames = leak.backtrace.iter().filter_map(|f| Some((f.symbol.as_deref()?, f.module.as_deref())));
    rule.matches(leak.cache.as_deref().unwrap_or_default(), frames)
}

fn count(used: &mut Vec<SuppressionUse>, rule: &Suppression, bytes: u64) {
    match used.iter_mut().find(|u| u.name == rule.name && u.place == rule.place) {
        Some(entry) => {
            entry.count += 1;
            entry.bytes += bytes;
        }
        None => {
            used.push(SuppressionUse { name: rule.name.clone(), place: rule.place.clone(), count: 1, bytes })
        }
    }
}
