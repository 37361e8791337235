//! What the in-kernel kmemleak costs the guest, and how long its scan takes beside ours. `cargo xtask bench` prints it.

use anyhow::{Context, Result, ensure};
use images::{Built, Cache, modules};
use std::collections::BTreeMap;
use std::{env, fs};
use tests::{Guest, RUN_TIMEOUT, no_kernel_complaint};

/// Each line `@NAME BEGIN END` is a measurement by the guest's clock.
const WORK: &str = "now() { read -r up rest < /proc/uptime; echo $up; }
    echo \"@boot 0 $(now)\"; mkdir -p /tmp/work; cd /tmp/work; begin=$(now)
    for n in 0 1 2 3 4 5 6 7 8 9 a b c d e f g h i j; do for m in 0 1 2 3 4 5 6 7 8 9; do echo text > $n$m; done; rm ??; done
    echo \"@files $begin $(now)\"; begin=$(now)
    for n in 0 1 2 3 4 5 6 7 8 9; do /bin/true; /bin/true; /bin/true; /bin/true; /bin/true; done
    echo \"@processes $begin $(now)\"; insmod /churn.ko pairs=20000
    dmesg | sed -n 's/.*churn: .* in \\([0-9]*\\) ns/@kmalloc-pairs 0 \\1/p'";
/// Its first scan finds what the boot left to find; the second is one of many.
const SCAN: &str = "mount -t debugfs none /sys/kernel/debug; cd /sys/kernel/debug; echo scan=off > kmemleak; echo scan > kmemleak
    now() { read -r up rest < /proc/uptime; echo $up; }
    begin=$(now); echo scan > kmemleak; echo \"@scan $begin $(now)\"; echo READY; read -r go";

/// Ratios, as lines of JSON where `KLEAK_BENCH` says.
pub fn kmemleak() -> Result<()> {
    let [without, with] = [work("off")?, work("on")?];
    ensure!(without.len() == 4, "{without:?}");
    let mut text = String::new();
    let mut say = |name: &str, value: f64| {
        println!("{name}: {value:.2}");
        text += &serde_json::json!({ "name": name, "value": value, "unit": "ratio" }).to_string();
        text.push('\n');
    };
    for (name, plain) in &without {
        ensure!(*plain > 0.0, "{name} took no time");
        let took = with.get(name).with_context(|| format!("{name} was not measured"))?;
        say(&format!("slowdown_kmemleak, {name}"), took / plain);
    }
    say("scan_vs_kmemleak", scans()?);
    match env::var_os("KLEAK_BENCH") {
        Some(file) => fs::write(&file, text).with_context(|| format!("Cannot write {}", file.display())),
        None => Ok(()),
    }
}

/// How long the kernel's work takes with its kmemleak on or off.
fn work(kmemleak: &str) -> Result<BTreeMap<String, f64>> {
    let (cache, mut guest) = (Cache::of_workspace(), oracle(kmemleak)?);
    let headers = Built::oracle(&cache)?.headers;
    guest.option("--tracer", "off").file(&modules::own(&cache, &headers, "churn")?, "/churn.ko");
    let finished = guest.script(WORK)?.boot(0)?;
    no_kernel_complaint(&finished.stdout)?;
    Ok(times(&finished.stdout))
}

/// Time of the kernel's scan over the guest's pause for ours, of the same heap.
fn scans() -> Result<f64> {
    let mut guest = oracle("on")?;
    let mut session = guest.script(SCAN)?.start()?;
    session.wait_for("\nREADY", RUN_TIMEOUT)?;
    guest.ctl("scan")?;
    guest.ctl("scan")?;
    let pause = guest.json("status")?["last_scan_pause_ms"].as_f64().context("last_scan_pause_ms")?;
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    let theirs = *times(&finished.stdout).get("scan").context("no scan of the kernel's")?;
    ensure!(theirs > 0.0 && pause > 0.0, "{theirs} s, {pause} ms");
    Ok(theirs * 1e3 / pause)
}

/// A guest of one vCPU with the kernel that has a kmemleak.
fn oracle(kmemleak: &str) -> Result<Guest> {
    let mut guest = Guest::of_image(&Built::oracle(&Cache::of_workspace())?.bzimage, 1)?;
    guest.cmdline(&format!("kmemleak={kmemleak}")).option("--scan-at-exit", "no");
    Ok(guest)
}

/// Seconds, or nanoseconds of what the module says, by name.
fn times(console: &str) -> BTreeMap<String, f64> {
    let line = |line: &str| match line.trim().strip_prefix('@')?.split(' ').collect::<Vec<_>>()[..] {
        [name, begin, end] => Some((name.to_owned(), end.parse::<f64>().ok()? - begin.parse::<f64>().ok()?)),
        _ => None,
    };
    console.lines().filter_map(line).collect()
}
