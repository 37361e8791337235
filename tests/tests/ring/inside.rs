//! Whoever is in a stub is, in backtraces, where the kernel would be without it.

use anyhow::{Context, Result, ensure};
use introspect::arch::layout::TRACER_CODE;
use serde_json::Value;
use std::path::Path;
use tests::{Client, Guest, RUN_TIMEOUT, Scratch, kernel, module, run};

/// So often a vCPU is to be found in a stub, and at most so often looked for there.
const WANTED: u32 = 12;
const LOOKS: u32 = 600;

/// A guest that is in stubs much of its time: `bt` whenever it is, and once of the machine saved there.
pub fn backtraces(line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let scratch = Scratch::new()?;
    let saved = scratch.path("saved.snap");
    let mut guest = Guest::new(&kernel, 1)?;
    guest.tracer("ring").option("--mem", "128M").option("--scan-at-exit", "no");
    guest.file(&module(&kernel, "churn")?, "/churn.ko");
    guest.script(&format!("{}\necho BUSY; insmod /churn.ko pairs=1000000000", crate::guests::HANDED_OVER))?;
    let session = guest.start()?;
    session.wait_for("\nBUSY", RUN_TIMEOUT)?;
    let mut client = Client::of(&guest)?;
    let (mut inside, mut looks) = (0, 0);
    while inside < WANTED {
        looks += 1;
        ensure!(looks <= LOOKS, "in a stub {inside} times of {looks}");
        client.ask("pause")?;
        if is_inside(&mut client)? {
            let live = client.ask("bt")?;
            ensure!(!live.contains("not complete") && !live.contains("] 0x"), "{live}");
            if live.contains("churn_thread") {
                inside += 1;
            }
            if inside == 1 && !saved.exists() {
                client.ask(&format!("snapshot={}", saved.display()))?;
                let again = run([Path::new("analyze"), &saved, Path::new("-c"), Path::new("bt")])?;
                again.expect_code(0)?;
                ensure!(again.stdout == live, "saved:\n{}live:\n{live}", again.stdout);
            }
        }
        client.ask("resume")?;
    }
    println!("{line}: in a stub {inside} times of {looks}");
    client.ask("quit")?;
    session.finish()?.expect_code(0)?;
    Ok(())
}

fn is_inside(client: &mut Client) -> Result<bool> {
    let registers: Value = serde_json::from_str(&client.ask("json regs")?)?;
    let rip = registers["regs"][0]["rip"].as_str().with_context(|| format!("no rip: {registers}"))?;
    let rip = u64::from_str_radix(rip.trim_start_matches("0x"), 16)?;
    Ok((TRACER_CODE.0..TRACER_CODE.0 + (1 << 30)).contains(&rip))
}
