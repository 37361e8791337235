//! What is killed, ended or full: each hurts one test or those that are left, and nothing is left behind.

use super::{Case, outcomes};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tests::{RUN_TIMEOUT, Session, kernel};

/// Processes that were asked to end are gone by then.
const GONE: Duration = Duration::from_secs(20);
/// Between two looks.
const STEP: Duration = Duration::from_millis(200);

/// SIGKILL of the process behind a boot, a disk that is full in the guest, and one on the host for one of the reports.
pub fn killed() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let mut suite = String::from("boot = \"per-test\"\n") + &super::head(&kernel.vmlinuz, 1);
    suite += "[[test]]\nname = \"killed\"\nrun = \"sleep 10000\"\ntimeout_s = 300\n";
    suite += "[[test]]\nname = \"full\"\nrun = \"mkdir /full && mount -t tmpfs -o size=64k none /full && \
              dd if=/dev/zero of=/full/x bs=1k count=100\"\n";
    let case = Case::new(&suite)?;
    let mut session = Session::start(case.arguments(&["--report", "/dev/full"]))?;
    let results = || written(&case);
    let deadline = Instant::now() + RUN_TIMEOUT;
    let second =
        second_boot(&mut session, || results().is_some_and(|results| has_passed(&results)), deadline)?;
    let below = descendants(second)?;
    ensure!(Command::new("kill").arg("-KILL").arg(second.to_string()).status()?.success(), "kill");
    let regress = session.pid();
    while session.is_running()? && Instant::now() < deadline + RUN_TIMEOUT {
        std::thread::sleep(STEP);
    }
    let finished = session.finish()?;
    // What could not be written is an error of the command's, whatever the tests say.
    finished.expect_code(2)?;
    ensure!(finished.stderr.contains("/dev/full"), "{}", finished.stderr);
    let results = results().context("results")?;
    let wanted = [("boot", "passed", 0), ("killed", "worker", 0), ("full", "failed", 0)];
    ensure!(outcomes(&results)? == wanted, "{}\n{}", finished.stdout, finished.stderr);
    ensure!(results["complete"] == true, "{:#}", results["complete"]);
    nothing_left(&[&[regress], &*below].concat())
}

/// SIGINT and SIGTERM, as a terminal or a CI system sends them, while the second of three boots is at its test: results that are
/// there stay, the others say why there are none.
pub fn ended() -> Result<()> {
    for signal in ["INT", "TERM"] {
        ended_by(signal).with_context(|| format!("SIG{signal}"))?;
    }
    Ok(())
}

fn ended_by(signal: &str) -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let mut suite = String::from("boot = \"per-test\"\n") + &super::head(&kernel.vmlinuz, 1);
    suite += "[[test]]\nname = \"long\"\nrun = \"echo it-runs; sleep 10000\"\ntimeout_s = 3000\n";
    suite += "[[test]]\nname = \"later\"\nrun = \"true\"\n";
    let case = Case::new(&suite)?;
    let mut session = Session::start(case.arguments(&[]))?;
    let passed = || written(&case).is_some_and(|results| has_passed(&results));
    let deadline = Instant::now() + RUN_TIMEOUT;
    second_boot(&mut session, passed, deadline)?;
    let logged = || {
        let logs = std::fs::read_dir(case.0.path("logs")).into_iter().flatten().flatten();
        logs.filter_map(|log| std::fs::read_to_string(log.path()).ok()).any(|text| text.contains("it-runs"))
    };
    while !logged() {
        ensure!(session.is_running()? && Instant::now() < deadline + RUN_TIMEOUT, "the test does not run");
        std::thread::sleep(STEP);
    }
    let all = descendants(session.pid())?;
    ensure!(all.len() > 1, "no guest: {all:?}");
    let sent = Command::new("kill").arg(format!("-{signal}")).arg(session.pid().to_string()).status()?;
    ensure!(sent.success(), "kill");
    let began = Instant::now();
    while session.is_running()? && began.elapsed() < GONE * 3 {
        std::thread::sleep(STEP);
    }
    ensure!(!session.is_running()?, "it goes on");
    let finished = session.finish()?;
    // No code of a shell's: the results are written and say what is missing.
    finished.expect_code(3)?;
    let results = written(&case).context("results")?;
    let wanted = [("boot", "passed", 0), ("long", "interrupted", 0), ("later", "interrupted", 0)];
    ensure!(outcomes(&results)? == wanted, "{}\n{}", finished.stdout, finished.stderr);
    ensure!(results["complete"] == false, "{:#}", results["complete"]);
    ensure!(
        finished.stdout.contains(" (incomplete): 3 tests: 1 passed, 2 interrupted"),
        "{}",
        finished.stdout
    );
    for name in ["results.xml", "results.sarif", "results.html"] {
        let text = std::fs::read_to_string(case.0.path(name))?;
        ensure!(text.contains("later") && text.contains("interrupted"), "{name}: {text}");
    }
    nothing_left(&all)
}

/// The results as they are.
fn written(case: &Case) -> Option<Value> {
    serde_json::from_str(&std::fs::read_to_string(case.0.path("results.json")).ok()?).ok()
}

/// Whether the first test has.
fn has_passed(results: &Value) -> bool {
    results["tests"][0]["outcome"] == "passed"
}

/// Waits for the process behind the second boot: another than what was there before `passed` said that the first has ended with
/// its only test.
fn second_boot(session: &mut Session, passed: impl Fn() -> bool, deadline: Instant) -> Result<u32> {
    let mut first = None;
    loop {
        // In this order: what is seen before that is the first.
        let (worker, is_second) = (worker(session.pid())?, passed());
        match worker {
            Some(pid) if is_second && Some(pid) != first => {
                // Into its own work.
                std::thread::sleep(Duration::from_secs(1));
                return Ok(pid);
            }
            Some(pid) if !is_second => first = Some(pid),
            _ => {}
        }
        ensure!(session.is_running()? && Instant::now() < deadline, "no boot after that of {first:?}");
        std::thread::sleep(STEP);
    }
}

/// None of these processes, and no file or socket of theirs.
fn nothing_left(processes: &[u32]) -> Result<()> {
    let deadline = Instant::now() + GONE;
    let left = || processes.iter().filter(|&&pid| is_ours(pid)).copied().collect::<Vec<_>>();
    while !left().is_empty() {
        ensure!(Instant::now() < deadline, "still running: {:?} of {processes:?}", left());
        std::thread::sleep(STEP);
    }
    let files: Vec<_> = places()?.iter().flat_map(|place| files_of(place, processes)).collect();
    ensure!(files.is_empty(), "left behind: {files:?}");
    Ok(())
}

/// Where the binary puts files of the moment, and sockets that were given no path.
fn places() -> Result<Vec<PathBuf>> {
    let user = std::fs::metadata("/proc/self").context("/proc")?.uid();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let folders = [Some(format!("/run/user/{user}").into()), runtime].into_iter().flatten();
    let sockets = folders.map(|folder| folder.join("kleak-vmm"));
    let temporary = std::env::temp_dir();
    Ok([temporary.join(format!("kleak-vmm-{user}")), temporary].into_iter().chain(sockets).collect())
}

/// Files in a folder that are named after one of these processes: `kleak-vmm-PID-N`, `PID.sock`.
fn files_of(folder: &Path, processes: &[u32]) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let is_theirs = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let begins =
            |pid: u32| name.starts_with(&format!("kleak-vmm-{pid}-")) || name == format!("{pid}.sock");
        processes.iter().any(|&pid| begins(pid))
    };
    entries.map(|entry| entry.path()).filter(is_theirs).collect()
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
