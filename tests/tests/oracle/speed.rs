//! What the in-kernel kmemleak costs the guest, and how long its scan takes beside ours. `cargo xtask bench` prints it.

use anyhow::{Context, Result, ensure};
use images::{Built, Cache, modules};
use tests::{Guest, RUN_TIMEOUT, despite_qemu, work};

/// Its first scan finds what the boot left to find; the second is one of many.
const SCAN: &str = "mount -t debugfs none /sys/kernel/debug; cd /sys/kernel/debug; echo scan=off > kmemleak; echo scan > kmemleak
    now() { read -r up rest < /proc/uptime; echo $up; }
    begin=$(now); echo scan > kmemleak; echo \"@scan $begin $(now)\"; echo READY; read -r go";

/// Work on one vCPU and on several, and a scan.
pub fn kmemleak() -> Result<()> {
    let cache = Cache::of_workspace();
    let churn = modules::own(&cache, &Built::oracle(&cache)?.headers, "churn")?;
    let mut figures = Vec::new();
    for cpus in [1, 2, 4] {
        let times = |kmemleak| {
            let label = format!("A boot with kmemleak {kmemleak}, {cpus} CPU,");
            despite_qemu(&label, || {
                work::times(oracle(kmemleak, cpus)?.option("--tracer", "off"), &churn, cpus)
            })
        };
        let (mut off, mut on) = (work::Times::new(), work::Times::new());
        for _ in 0..work::BOOTS {
            work::keep_least(&mut off, times("off")?);
            work::keep_least(&mut on, times("on")?);
        }
        for (name, ratio) in work::ratios(&off, &on)? {
            figures.push((format!("slowdown_kmemleak, {name}, {cpus} CPU"), ratio));
        }
    }
    figures.push(("scan_vs_kmemleak".to_owned(), scans()?));
    figures.iter().for_each(|(name, ratio)| println!("{name}: {ratio:.2}"));
    work::keep(&figures)
}

/// Time of the kernel's scan over the guest's pause for ours, of the same heap.
fn scans() -> Result<f64> {
    let mut guest = oracle("on", 1)?;
    let mut session = guest.option("--scan-at-exit", "no").script(SCAN)?.start()?;
    session.wait_for("\nREADY", RUN_TIMEOUT)?;
    guest.ctl("scan")?;
    guest.ctl("scan")?;
    let pause = guest.json("status")?["last_scan_pause_ms"].as_f64().context("last_scan_pause_ms")?;
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    let theirs = *work::measured(&finished.stdout).get("scan").context("no scan of the kernel's")?;
    ensure!(theirs > 0.0 && pause > 0.0, "{theirs} s, {pause} ms");
    Ok(theirs * 1e3 / pause)
}

/// A guest with the kernel that has a kmemleak.
fn oracle(kmemleak: &str, cpus: u32) -> Result<Guest> {
    let mut guest = Guest::of_image(&Built::oracle(&Cache::of_workspace())?.bzimage, cpus)?;
    guest.cmdline(&format!("kmemleak={kmemleak}"));
    Ok(guest)
}
