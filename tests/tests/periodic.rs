//! Periodic scans: they read only what was written since the one before, and find what a scan of everything finds.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};
use tests::{Client, Guest, RUN_TIMEOUT, kernel, long_test, module, no_kernel_complaint, sizes, test};

fn main() -> ExitCode {
    tests::main(vec![
        test("scans_of_what_was_written_6.1-cloud", || periodic("6.1-cloud")),
        long_test("scans_of_what_was_written_6.12-cloud", || periodic("6.12-cloud")),
    ])
}

/// Seconds between the first scans, while the guest sleeps.
const IDLE_S: u64 = 5;
/// Scans of all memory beside those of what was written, which must find the same.
const CHECKED: u64 = 2;
/// Many scans, each of which stands the guest still.
const TIMEOUT_S: u64 = 1200;
/// Of the bytes of a scan of all memory one so many may be read when the guest has slept meanwhile.
const LESS: u64 = 8;

/// First the guest sleeps, then it works; then something is lost.
const SCRIPT: &str = "echo READY; read -r go
    mkdir /tmp/a /tmp/b
    work() { while [ ! -e /tmp/stop ]; do cp -r /sys/module /tmp/$1 2>/dev/null; rm -rf /tmp/$1/module; /bin/true; done; }
    work a & work b & echo WORKING; read -r go; touch /tmp/stop; wait
    insmod /leaky.ko case=hidden; rmmod leaky; sleep 2; echo LOST; read -r go";

fn periodic(line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::new(&kernel, 2)?;
    // Not while it boots, which would take long with a guest that stands still so often.
    guest.option("--scan-period", "0").timeout(TIMEOUT_S);
    guest.file(&module(&kernel, "leaky")?, "/leaky.ko").script(SCRIPT)?;
    let mut session = guest.start()?;
    session.wait_for("\nREADY", RUN_TIMEOUT)?;
    let mut client = Client::of(&guest)?;
    client.ask(&format!("scan={IDLE_S}"))?;
    let full = until(&mut client, |status| kind(status) == Some("full"))?;
    let seen = number(&full, "scans_incremental")?;
    let idle = until(&mut client, |status| number(status, "scans_incremental").is_ok_and(|n| n >= seen + 3))?;
    for (what, status) in [("first", &full), ("asleep", &idle)] {
        let [bytes, pause] = ["last_scan_bytes", "last_scan_pause_ms"].map(|name| number(status, name));
        println!("{line} {what}: {} bytes read, paused for {} ms", bytes?, pause?);
    }
    let [all, some] = [&full, &idle].map(|status| number(status, "last_scan_bytes"));
    ensure!(kind(&idle) == Some("incremental") && some? < all? / LESS, "{idle:#}");

    session.type_line("go")?;
    session.wait_for("\nWORKING", RUN_TIMEOUT)?;
    client.ask("scan=1")?;
    let checked = number(&idle, "scans_checked")? + CHECKED;
    let busy = until(&mut client, |status| number(status, "scans_checked").is_ok_and(|n| n >= checked))?;
    ensure!(number(&busy, "scans_differed")? == 0, "{busy:#}");
    println!("{line} at work: {} bytes read", number(&busy, "last_scan_bytes")?);

    session.type_line("go")?;
    session.wait_for("\nLOST", RUN_TIMEOUT)?;
    client.ask("scan")?;
    let status = status(&mut client)?;
    ensure!(kind(&status) == Some("incremental") && number(&status, "scans_differed")? == 0, "{status:#}");
    let report: Value = serde_json::from_str(&client.ask("json report")?)?;
    ensure!(sizes(&report)?.len() == 1, "one object is lost: {:#}", report["leaks"]);
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    no_kernel_complaint(&finished.stdout)
}

fn kind(status: &Value) -> Option<&str> {
    status["last_scan_kind"].as_str()
}

fn number(status: &Value, name: &str) -> Result<u64> {
    status[name].as_u64().with_context(|| format!("no {name}: {status:#}"))
}

fn status(client: &mut Client) -> Result<Value> {
    Ok(serde_json::from_str(&client.ask("json status")?)?)
}

/// Asks for the status until it is as wanted.
fn until(client: &mut Client, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let end = Instant::now() + RUN_TIMEOUT;
    loop {
        let status = status(client)?;
        if wanted(&status) {
            return Ok(status);
        }
        ensure!(Instant::now() < end, "never: {status:#}");
        thread::sleep(Duration::from_millis(500));
    }
}
