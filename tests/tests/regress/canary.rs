//! The canary: found where the detector works, not found where it does not.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::{Guest, RUN_TIMEOUT, kernel, run};

const PLANT: &str =
    "mkdir -p /kleak/canary; mount -t ramfs kleak-canary-of-this-guest /kleak/canary; sleep 2; echo READY
                     read -r go; cat /proc/mounts; umount /kleak/canary && echo UNMOUNTED";

pub fn found() -> Result<()> {
    let mut guest = Guest::new(&kernel("6.12-cloud")?, 2)?;
    guest.script(PLANT)?;
    let mut session = guest.start()?;
    session.wait_for("\nREADY", RUN_TIMEOUT)?;
    let reply: Value = serde_json::from_str(&guest.ctl("json canary")?)?;
    ensure!(reply["canary"]["found"] == true, "{reply}");
    let functions = reply["canary"]["functions"].to_string();
    ensure!(functions.contains("alloc_vfsmnt") || functions.contains("vfs_create_mount"), "{functions}");
    // It is no leak of the guest's, before or after.
    ensure!(guest.ctl("scan")?.contains(" 0 new"), "the canary stayed lost");
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    for part in ["kleak-canary-of-this-guest /kleak/canary ramfs", "\nUNMOUNTED"] {
        ensure!(finished.stdout.contains(part), "no {part:?}: {}", tests::tail(&finished.stdout, 60));
    }
    tests::no_kernel_complaint(&finished.stdout)
}

pub fn untraced() -> Result<()> {
    let mut guest = Guest::new(&kernel("6.1-cloud")?, 1)?;
    guest.tracer("off").script(PLANT)?;
    let mut session = guest.start()?;
    session.wait_for("\nREADY", RUN_TIMEOUT)?;
    let socket = guest.socket();
    let finished = run(["ctl", "--control", socket.to_str().context("socket")?, "canary"])?;
    finished.expect_code(2)?;
    ensure!(finished.stderr.contains("was not traced"), "{}", finished.stderr);
    session.type_line("go")?;
    session.finish()?.expect_code(0)?;
    Ok(())
}
