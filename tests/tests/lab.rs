//! The lab: what runs in it behaves as if it ran outside, and nothing of it stays when it fails.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tests::{Guest, RUN_TIMEOUT, Session, ctl, in_vmx, kernel, report, run, test};

fn main() -> ExitCode {
    tests::main(vec![
        test("streams_files_and_socket_are_carried", || everything_is_carried(&waiting_guest()?, "svm")),
        in_vmx("streams_files_and_socket_are_carried", |exits| {
            everything_is_carried(&wait_in(Guest::trapped(&kernel("6.1-cloud")?, 1, exits)?)?, "vmx")
        }),
        test("the_doctor_measures_it", doctor),
        test("a_signal_ends_the_guest_and_the_run", signal),
        test("a_lab_that_dies_is_an_error_of_the_host", dead_lab),
        test("a_lab_that_dies_while_it_boots_is_started_again", dead_boot),
        test("the_lab_dies_with_its_user", dead_user),
    ])
}

/// A guest in the lab that says `up` and then waits to be told to go on.
fn waiting_guest() -> Result<Guest> {
    let mut guest = Guest::new(&kernel("6.1-cloud")?, 1)?;
    guest.option("--lab", "svm");
    wait_in(guest)
}

fn wait_in(mut guest: Guest) -> Result<Guest> {
    guest.tracer("off").cmdline("quiet");
    guest.script("echo guest is up; read word; echo guest read $word\n")?;
    Ok(guest)
}

fn started(guest: &Guest) -> Result<Session> {
    let session = guest.start()?;
    session.wait_for("guest is up", RUN_TIMEOUT)?;
    Ok(session)
}

fn everything_is_carried(guest: &Guest, lab: &str) -> Result<()> {
    let mut session = guest.start()?;
    session.wait_for("guest is up", guest.patience())?;
    let status = ctl(&guest.socket(), "status")?;
    ensure!(status.contains("state: running"), "{status}");
    let status: Value = serde_json::from_str(&ctl(&guest.socket(), "json status")?)?;
    ensure!(status["state"] == "running", "{status}");
    // The line discipline of the guest's terminal takes 4095 bytes in a line at most.
    let typed = "typed ".repeat(600);
    session.type_line(&typed)?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    ensure!(finished.stdout.contains(&format!("guest read {}", typed.trim())), "{}", finished.stdout);
    ensure!(!guest.socket().exists(), "the socket is still there");
    let report = report(&guest.report_path())?;
    ensure!(report["host"]["lab"] == lab, "{}", report["host"]);
    Ok(())
}

fn doctor() -> Result<()> {
    let finished = run(["doctor", "--json"])?;
    finished.expect_code(0)?;
    let report: Value = serde_json::from_str(&finished.stdout).context("the doctor's JSON")?;
    ensure!(report["schema"] == "kleak-doctor/1", "{report}");
    if report["kvm"]["state"] == "good" {
        ensure!(report["verdict"]["runs"] == "native", "{report}");
        return Ok(());
    }
    let lab = &report["lab"];
    ensure!(report["verdict"]["runs"] == "lab" && lab["start_ms"].is_u64(), "{report}");
    let pio = &lab["probe"]["pio"];
    ensure!(pio["result"] == "works" && pio["exit_ns"].as_u64().is_some_and(|ns| ns > 0), "{lab}");
    Ok(())
}

fn send(pid: u32, signal: &str) -> Result<()> {
    let status = std::process::Command::new("kill").args([signal, &pid.to_string()]).status();
    ensure!(status.context("Cannot run kill")?.success(), "kill {signal} {pid} failed");
    Ok(())
}

fn signal() -> Result<()> {
    let guest = waiting_guest()?;
    let session = started(&guest)?;
    let asked = Instant::now();
    send(session.pid(), "-TERM")?;
    session.finish()?.expect_code(0)?;
    ensure!(asked.elapsed() < Duration::from_secs(60), "it took {:?}", asked.elapsed());
    Ok(())
}

/// The process of QEMU that `parent` started.
fn qemu_of(parent: u32) -> Result<u32> {
    let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
    let is_qemu = |pid: &&str| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("qemu-system"))
    };
    let pid = children.split_whitespace().find(is_qemu).context("it has no QEMU")?;
    Ok(pid.parse()?)
}

fn dead_lab() -> Result<()> {
    let guest = waiting_guest()?;
    let session = started(&guest)?;
    send(qemu_of(session.pid())?, "-KILL")?;
    let finished = session.finish()?;
    finished.expect_code(4)?;
    let error = "kleak-vmm: error: The lab failed: QEMU ended";
    ensure!(finished.stderr.lines().any(|line| line.starts_with(error)), "{}", finished.stderr);
    ensure!(finished.stderr.contains("\nhint: "), "{}", finished.stderr);
    ensure!(!guest.socket().exists(), "the socket is still there");
    Ok(())
}

fn dead_boot() -> Result<()> {
    let guest = waiting_guest()?;
    let mut session = guest.start()?;
    let end = Instant::now() + Duration::from_secs(30);
    let first = loop {
        if let Ok(pid) = qemu_of(session.pid()) {
            break pid;
        }
        ensure!(Instant::now() < end && session.is_running()?, "it starts no QEMU");
        std::thread::sleep(Duration::from_millis(20));
    };
    send(first, "-KILL")?;
    session.wait_for("guest is up", RUN_TIMEOUT)?;
    ensure!(ctl(&guest.socket(), "status")?.contains("state: running"), "its socket is of no use");
    session.type_line("typed")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    ensure!(finished.stderr.contains("starting it again"), "{}", finished.stderr);
    Ok(())
}

fn dead_user() -> Result<()> {
    let guest = waiting_guest()?;
    let session = started(&guest)?;
    let qemu = qemu_of(session.pid())?;
    send(session.pid(), "-KILL")?;
    let finished = session.finish()?;
    ensure!(finished.code.is_none(), "{finished:?}");
    let end = Instant::now() + Duration::from_secs(5);
    // A zombie has no command line.
    let place = format!("/proc/{qemu}/cmdline");
    while std::fs::read(Path::new(&place)).is_ok_and(|line| !line.is_empty()) {
        ensure!(Instant::now() < end, "QEMU {qemu} outlives its user");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
