//! A guest whose own lists are damaged makes a command answer with an error that names an address, soon, and nothing else:
//! the machine, the other commands and the guest go on.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::time::{Duration, Instant};
use tests::{Guest, RUN_TIMEOUT, kernel, long_test, module, run, test};

/// How long a list stays broken, seconds of the guest.
const BROKEN_S: u32 = 8;
/// A command may take so long, its process and the lab's line included; natively it is milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// The tests.
pub fn trials() -> Vec<Trial> {
    vec![
        test("damaged_lists_6.1-cloud", || damaged_lists("6.1-cloud")),
        long_test("damaged_lists_6.12-cloud", || damaged_lists("6.12-cloud")),
    ]
}

fn damaged_lists(line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::new(&kernel, 1)?;
    guest.file(&module(&kernel, "breaking")?, "/breaking.ko").script(&format!(
        "echo READY
         while read -r how; do
             insmod /breaking.ko list=tasks how=$how seconds={BROKEN_S}; rmmod breaking; echo \"after $how\"; done"
    ))?;
    let mut session = guest.start()?;
    session.wait_for("READY", RUN_TIMEOUT)?;
    for (before, how) in ["loop", "null", "wild", "user"].into_iter().enumerate() {
        session.type_line(how)?;
        session.wait_for_times("breaking: broken", before + 1, RUN_TIMEOUT)?;
        broken(&guest).with_context(|| format!("how={how}"))?;
        session.wait_for(&format!("after {how}"), RUN_TIMEOUT)?;
    }
    let healthy = guest.ctl("ps")?;
    ensure!(healthy.contains("kthreadd"), "{healthy}");
    guest.ctl("scan")?;
    guest.ctl("quit")?;
    session.finish()?.expect_code(0)?;
    Ok(())
}

/// While the list of tasks is broken.
fn broken(guest: &Guest) -> Result<()> {
    for command in ["ps", "scan"] {
        let asked = Instant::now();
        let socket = guest.socket();
        let socket = socket.to_str().context("socket path")?;
        let finished = run(["ctl", "--control", socket, command])?;
        let took = asked.elapsed();
        ensure!(took < PATIENCE, "{command} took {took:?}");
        let said = format!("{}{}", finished.stdout, finished.stderr);
        ensure!(finished.code != Some(0), "{command} found nothing wrong: {said}");
        let names_address = said.contains("0xffff") || said.contains("0x7ffd") || said.contains("0x0");
        ensure!(said.contains("error") && names_address, "{command}: {said}");
        ensure!(said.trim().lines().count() == 1, "{command} says more than a line: {said}");
    }
    ensure!(guest.ctl("status")?.contains("state: running"), "status");
    Ok(())
}
