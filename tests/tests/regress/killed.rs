//! What is killed or full: each hurts one test, and nothing is left behind.

use super::{Case, outcomes};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::HashMap;
use std::process::Command;
use std::time::{Duration, Instant};
use tests::{RUN_TIMEOUT, Session, kernel};

/// Processes that were asked to end are gone by then.
const GONE: Duration = Duration::from_secs(20);

/// SIGKILL of the process behind a boot, a disk that is full in the guest, and one on the host for one of the reports.
pub fn killed() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let mut suite = String::from("boot = \"per-test\"\n") + &super::head(&kernel.vmlinuz, 1);
    suite += "[[test]]\nname = \"killed\"\nrun = \"sleep 10000\"\ntimeout_s = 300\n";
    suite += "[[test]]\nname = \"full\"\nrun = \"mkdir /full && mount -t tmpfs -o size=64k none /full && \
              dd if=/dev/zero of=/full/x bs=1k count=100\"\n";
    let case = Case::new(&suite)?;
    let mut session = Session::start(case.arguments(&["--report", "/dev/full"]))?;
    let results = || -> Option<Value> {
        serde_json::from_str(&std::fs::read_to_string(case.0.path("results.json")).ok()?).ok()
    };
    let deadline = Instant::now() + RUN_TIMEOUT;
    while results().is_none_or(|results| results["tests"][0]["outcome"] != "passed") {
        ensure!(session.is_running()? && Instant::now() < deadline, "the boot is not tested");
        std::thread::sleep(Duration::from_millis(200));
    }
    // Of the second boot: the first has ended with its only test.
    let first = worker(session.pid())?;
    let second = loop {
        match worker(session.pid())? {
            Some(pid) if Some(pid) != first || first.is_none() => break pid,
            _ => std::thread::sleep(Duration::from_millis(200)),
        }
        ensure!(session.is_running()? && Instant::now() < deadline, "no second boot");
    };
    std::thread::sleep(Duration::from_secs(1));
    let below = descendants(second)?;
    ensure!(Command::new("kill").arg("-KILL").arg(second.to_string()).status()?.success(), "kill");
    let regress = session.pid();
    while session.is_running()? && Instant::now() < deadline + RUN_TIMEOUT {
        std::thread::sleep(Duration::from_millis(200));
    }
    let finished = session.finish()?;
    // What could not be written is an error of the command's, whatever the tests say.
    finished.expect_code(2)?;
    ensure!(finished.stderr.contains("/dev/full"), "{}", finished.stderr);
    let results = results().context("results")?;
    let wanted = [("boot", "passed", 0), ("killed", "worker", 0), ("full", "failed", 0)];
    ensure!(outcomes(&results)? == wanted, "{}\n{}", finished.stdout, finished.stderr);
    ensure!(results["complete"] == true, "{:#}", results["complete"]);
    nothing_left(regress, &below)
}

/// No process of those, and no file of that run's.
fn nothing_left(regress: u32, processes: &[u32]) -> Result<()> {
    let deadline = Instant::now() + GONE;
    let left = || processes.iter().filter(|&&pid| is_ours(pid)).copied().collect::<Vec<_>>();
    while !left().is_empty() {
        ensure!(Instant::now() < deadline, "still running: {:?} of {processes:?}", left());
        std::thread::sleep(Duration::from_millis(200));
    }
    let entries = std::fs::read_dir(std::env::temp_dir())?.filter_map(|entry| entry.ok());
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let of_run: Vec<String> =
        names.filter(|name| name.starts_with(&format!("kleak-vmm-{regress}-"))).collect();
    ensure!(of_run.is_empty(), "left behind: {of_run:?}");
    Ok(())
}

/// A process that is not just waiting to be collected.
fn is_ours(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Parents of all processes.
fn parents() -> Result<HashMap<u32, u32>> {
    let entries = std::fs::read_dir("/proc").context("/proc")?.flatten();
    let parent = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        Some((pid, stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?))
    };
    Ok(entries.filter_map(parent).collect())
}

/// The process that boots a guest for the run `regress`.
fn worker(regress: u32) -> Result<Option<u32>> {
    Ok(parents()?.into_iter().find(|&(_, parent)| parent == regress).map(|(pid, _)| pid))
}

/// A process and all below it.
fn descendants(of: u32) -> Result<Vec<u32>> {
    let parents = parents()?;
    let mut found = vec![of];
    let mut at = 0;
    while let Some(&pid) = found.get(at) {
        found.extend(parents.iter().filter(|&(_, &parent)| parent == pid).map(|(&child, _)| child));
        at += 1;
    }
    Ok(found)
}
