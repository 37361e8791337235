//! Guests whose events come by the ring: exact from before the hand-over to the end, and the same as by traps.

use crate::events::{self, Stream};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;
use tests::{Guest, RUN_TIMEOUT, Scratch, kernel, kmemleak_test, module, no_kernel_complaint, tail};

/// In the guest: waits until every hook that can is at the ring, and prints `status`.
pub const HANDED_OVER: &str =
    "n=0; while [ $n -lt 90 ]; do echo status > /dev/ttyS1; cat /dev/ttyS1 > /tmp/status
    grep -q '^hooks_to_move: 0' /tmp/status && break; sleep 1; n=$((n+1)); done";
const WORK: &str = "work() { i=0; while [ $i -lt 10 ]; do (:); mkdir -p /tmp/d$1/a; ls -lR /proc/sys > /dev/null; rm -r /tmp/d$1;
    i=$((i+1)); done; }";
/// Of the module that does the same every time.
const STEPS: usize = 3000;
const AUDIT: &str = "echo audit > /dev/ttyS1; cat /dev/ttyS1";
const STATUS: &str = "echo status > /dev/ttyS1; cat /dev/ttyS1";

fn guest(line: &str, cpus: u32) -> Result<Guest> {
    let mut guest = Guest::new(&kernel(line)?, cpus)?;
    guest.tracer("ring");
    Ok(guest)
}

/// A number of the last `status` on the console.
fn status(stdout: &str, key: &str) -> Result<u64> {
    let prefix = format!("{key}: ");
    let value = stdout.lines().rev().find_map(|line| line.trim().strip_prefix(&prefix));
    value.and_then(|v| v.parse().ok()).with_context(|| format!("no {key}: {}", tail(stdout, 60)))
}

/// Nothing was lost, the guest saw nothing of it, and the ring did the work.
fn check(stdout: &str) -> Result<()> {
    no_kernel_complaint(stdout)?;
    let audits: Vec<&str> = stdout.lines().filter(|line| line.starts_with("audit: ")).collect();
    ensure!(!audits.is_empty(), "no audit: {}", tail(stdout, 40));
    ensure!(audits.iter().all(|a| a.trim().ends_with("missing 0, stale 0")), "{audits:?}");
    ensure!(status(stdout, "hooks_to_move")? == 0, "not handed over: {}", tail(stdout, 60));
    ensure!(status(stdout, "hooks_by_ring")? >= 10, "hardly any hook is at the ring");
    ensure!(status(stdout, "ring_events")? > 500, "hardly any event came by the ring");
    for nothing in ["events_dropped", "traps_rearmed", "overwritten", "unknown_frees"] {
        ensure!(status(stdout, nothing)? == 0, "{nothing}: {}", tail(stdout, 60));
    }
    Ok(())
}

/// Boots with `words` on its command line, works on every CPU, and is audited.
pub fn clean(line: &str, cpus: u32, words: &str) -> Result<()> {
    let mut guest = guest(line, cpus)?;
    // The lab emulates all of them on what CPUs the host has.
    guest.cmdline(words).timeout(RUN_TIMEOUT.as_secs() * u64::from(cpus.max(2)) / 2);
    let jobs: String = (0..cpus).map(|cpu| format!("work {cpu} & ")).collect();
    guest.flag("--fail-on-leak").script(&format!(
        "{HANDED_OVER}
         {WORK}
         {AUDIT}; {jobs} wait; {AUDIT}; {jobs} wait; {AUDIT}; {STATUS}"
    ))?;
    let finished = guest.boot(0)?;
    check(&finished.stdout)?;
    // Few of a boot's events come before the ring is there, or while the kernel patches its text.
    let (traps, events) =
        (status(&finished.stdout, "traps_taken")?, status(&finished.stdout, "ring_events")?);
    ensure!(traps < events / 50, "{traps} traps beside {events} events by the ring");
    // Of the events that are allocations most come from where others came from.
    let known = status(&finished.stdout, "ring_known")?;
    ensure!(known > events / 5, "stubs knew {known} of {events}");
    Ok(())
}

/// More at once than the ring holds: the guest waits, nothing is lost.
pub fn floods(line: &str, cpus: u32) -> Result<()> {
    let mut guest = guest(line, cpus)?;
    guest.file(&module(&kernel(line)?, "churn")?, "/churn.ko");
    guest.script(&format!("{HANDED_OVER}\ninsmod /churn.ko pairs=20000; rmmod churn\n{AUDIT}; {STATUS}"))?;
    let finished = guest.boot(0)?;
    check(&finished.stdout)?;
    ensure!(status(&finished.stdout, "ring_waits")? > 0, "the ring was never full");
    Ok(())
}

/// Audits from outside, from the first moments of boot to long after the hand-over, while the guest works and that is
/// `tracked`; where pages are, exactly so once there are all.
pub fn audits(line: &str, cpus: u32, tracked: &str) -> Result<()> {
    let mut guest = guest(line, cpus)?;
    guest.option("--track", tracked).script(
        "load() { while :; do ls -lR /sys/kernel > /dev/null; mkdir -p /tmp/d$1/a/b; rm -r /tmp/d$1; (:); done; }
         load 1 & load 2 & echo BUSY; read -r go; kill %1 %2; wait",
    )?;
    let mut session = guest.start()?;
    let exact = || {
        let reply = guest.ctl("audit")?;
        ensure!(reply.contains("missing 0, stale 0"), "{reply}");
        Ok(())
    };
    let mut early = 0;
    while session.wait_for("\nBUSY", Duration::from_millis(300)).is_err() && session.is_running()? {
        if guest.socket().exists() && guest.ctl("audit").is_ok_and(|reply| reply.contains("audit")) {
            // Page frames that the kernel has set up, and not yet given to its allocator, look as if somebody had them
            // (`deferred_init_memmap`).
            if !tracked.contains("pages") {
                exact()?;
            }
            early += 1;
        }
    }
    ensure!(early > 0, "no audit was made during boot");
    let mut state = Value::Null;
    for _ in 0..60 {
        exact()?;
        state = guest.json("status")?;
        if state["hooks_to_move"] == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    ensure!(state["hooks_to_move"] == 0, "not handed over: {state}");
    ensure!(state["hooks_stuck"].as_array().is_some_and(Vec::is_empty), "{}", state["hooks_stuck"]);
    for _ in 0..5 {
        exact()?;
        std::thread::sleep(Duration::from_millis(700));
    }
    let state = guest.json("status")?;
    ensure!(state["events_dropped"] == 0 && state["ring_events"].as_u64() > Some(1000), "{state}");
    session.wait_for("\nBUSY", RUN_TIMEOUT)?;
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    no_kernel_complaint(&finished.stdout)
}

/// Upstream's own test module: 13 objects after insmod.
pub fn upstream(line: &str) -> Result<()> {
    let mut guest = guest(line, 2)?;
    guest.file(&kmemleak_test(&kernel(line)?)?, "/kmemleak-test.ko").script(&format!(
        "{HANDED_OVER}
         {WORK}
         work 0; insmod /kmemleak-test.ko; sleep 3; echo scan > /dev/ttyS1; cat /dev/ttyS1; {AUDIT}; {STATUS}"
    ))?;
    let finished = guest.boot(0)?;
    check(&finished.stdout)?;
    let found = finished.stdout.lines().find(|line| line.contains("new suspected memory leaks"));
    ensure!(found.is_some_and(|line| line.contains("kmemleak: 13 new")), "{found:?}");
    Ok(())
}

/// What a leak is known by, whatever the tracer.
type Leak = (String, u64, Vec<String>);

/// What a guest with two modules leaks, by what is the same in every run, with how often each is there; and the events of
/// one that does the same every time.
fn seen(line: &str, tracer: &str) -> Result<(BTreeMap<Leak, usize>, Stream)> {
    let scratch = Scratch::new()?;
    let events = scratch.path("events");
    let mut guest = Guest::new(&kernel(line)?, 2)?;
    guest.tracer(tracer).option("--events", &events);
    guest.file(&module(&kernel(line)?, "leaky")?, "/leaky.ko");
    guest.file(&module(&kernel(line)?, "churn")?, "/churn.ko");
    // The module unmaps some: an unknown free where that is not tracked.
    guest.option("--track", "slab,vmalloc,percpu,ioremap");
    let wait = if tracer == "ring" { HANDED_OVER } else { "sleep 1" };
    guest.script(&format!(
        "{wait}
         insmod /churn.ko pairs=0 steps={STEPS}; rmmod churn
         insmod /leaky.ko case=all; sleep 3; rmmod leaky; sleep 2
         {AUDIT}; {STATUS}"
    ))?;
    let finished = guest.boot(0)?;
    if tracer == "ring" {
        check(&finished.stdout)?;
    }
    let report = guest.report()?;
    let mut leaks = BTreeMap::new();
    for leak in report["leaks"].as_array().context("no leaks")? {
        let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
        let frames = leak["backtrace"].as_array().context("no backtrace")?;
        // Whom an interrupt came upon is another matter in every run, and who does its late work: a timer's may be any CPU.
        let is_other = |name: &str| {
            name.starts_with("asm_sysvec_") || ["handle_softirqs", "call_timer_fn"].contains(&name)
        };
        let own = frames.iter().take_while(|f| !is_other(&text(&f["symbol"])));
        let frames = own.map(|f| format!("{}+{}", text(&f["symbol"]), f["offset"])).collect();
        let key = (text(&leak["kind"]), leak["size"].as_u64().context("no size")?, frames);
        *leaks.entry(key).or_insert(0) += 1;
    }
    Ok((leaks, events::of_task(&events, "churn/0")?))
}

/// The same events, in the same order, and the same leaks, each with the same frames, as by traps.
pub fn as_by_traps(line: &str) -> Result<()> {
    let ((traps, trapped), (ring, written)) = (seen(line, "breakpoint")?, seen(line, "ring")?);
    ensure!(trapped.len() > STEPS, "only {} events", trapped.len());
    events::same(&trapped, &written)?;
    println!("{line}: {} events of one task by both", trapped.len());
    ensure!(traps.len() >= 10, "only {} kinds of leaks", traps.len());
    let only = |these: &BTreeMap<Leak, usize>, those: &BTreeMap<Leak, usize>| {
        let other = these.iter().filter(|(leak, count)| those.get(leak) != Some(count));
        other.map(|(leak, count)| format!("{count} x {leak:?}")).collect::<Vec<_>>()
    };
    ensure!(
        traps == ring,
        "by traps only: {:#?}\nby the ring only: {:#?}",
        only(&traps, &ring),
        only(&ring, &traps)
    );
    Ok(())
}
