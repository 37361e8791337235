//! What tracing costs the guest: the same kernel, machine and work, traced and not, in one run. `cargo xtask bench` prints
//! it; the figures of a lab are those of its emulation. And the saved machine that `cargo xtask bench` scans.

use anyhow::{Context, Result, ensure};
use images::{Cache, KernelPackage};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};
use tests::{Exits, Guest, in_vmx, kernel, long_test, module, no_kernel_complaint, run, work};

/// What fills the memory of the machine that is saved: 120,000 files of which half have contents, those of every fourth
/// folder removed again; a find over all, and a hundred processes that stay.
const FILLING: &str = "mkdir -p /tmp/work/0; cd /tmp/work
    n=0; while [ $n -lt 250 ]; do echo text > 0/$n; : > 0/empty$n; n=$((n + 1)); done
    n=1; while [ $n -lt 240 ]; do cp -r 0 $n; [ $((n % 4)) -eq 3 ] && rm -r $n; [ $((n % 40)) -eq 0 ] && echo \"@copied $n\"; n=$((n + 1)); done
    n=240; while [ $n -lt 320 ]; do cp -r 0 $n; n=$((n + 1)); done
    find . -name '1*' | sort | tail -n 1
    dd if=/dev/zero of=/tmp/large bs=1M count=200
    n=0; while [ $n -lt 100 ]; do sleep 100000 & n=$((n + 1)); done
    echo READY; read -r go; kill $(jobs -p)";
/// Changes whenever the saved machine is to be made anew.
const FILLED: u32 = 1;

fn main() -> ExitCode {
    // To fill it takes the lab ten minutes and more.
    let saved = long_test("a_machine_of_2_gib_is_saved_6.1-cloud", saved_machine);
    let saved = match env::var_os("KLEAK_BENCH") {
        Some(_) => saved,
        None => saved.with_kind("needs xtask bench").with_ignored_flag(true),
    };
    let in_instructions = in_vmx("instructions_by_tracer_6.1-cloud", instructions);
    tests::main(vec![long_test("slowdown_of_tracers_6.1-cloud", slowdown), in_instructions, saved])
}

/// The file's name goes where `KLEAK_BENCH` says. It is made once; again when it cannot be read any more.
fn saved_machine() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let cache = Cache::of_workspace();
    let (name, key) = ("machine-of-2-gib", (FILLED, FILLING, &kernel.release));
    let readable = |file: &Path| {
        let looked = run([Path::new("analyze"), file, Path::new("-c"), Path::new("status")])?;
        Ok::<_, anyhow::Error>(looked.code == Some(0))
    };
    if let Some(folder) = cache.find(name, key)
        && !readable(&folder.join("machine.snap"))?
    {
        fs::remove_dir_all(&folder).with_context(|| format!("Cannot remove {}", folder.display()))?;
    }
    let file = cache.entry(name, key, |folder| save_filled(&kernel, &folder.join("machine.snap")))?;
    let file = file.join("machine.snap");
    ensure!(readable(&file)?, "{} cannot be analyzed", file.display());
    match env::var_os("KLEAK_BENCH") {
        Some(place) => fs::write(&place, file.as_os_str().as_encoded_bytes())
            .with_context(|| format!("Cannot write {}", PathBuf::from(&place).display())),
        None => Ok(()),
    }
}

fn save_filled(kernel: &KernelPackage, file: &Path) -> Result<()> {
    let mut guest = Guest::new(kernel, 1)?;
    guest.option("--mem", "2G").option("--scan-at-exit", "no").timeout(3000).script(FILLING)?;
    let mut session = guest.start()?;
    session.wait_for("\nREADY", std::time::Duration::from_secs(2500))?;
    guest.ctl("pause")?;
    let reply = guest.ctl(&format!("snapshot={}", file.display()))?;
    ensure!(reply.starts_with("saved: "), "{reply}");
    guest.ctl("resume")?;
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    no_kernel_complaint(&finished.stdout)
}

/// Boot, files and sockets, processes and pairs on one vCPU and on several, by every tracer.
fn slowdown() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let mut figures = Vec::new();
    for cpus in [1, 2, 4] {
        figures.extend(slowdowns(|| Guest::new(&kernel, cpus), &kernel, cpus, &format!("{cpus} CPU"))?);
    }
    work::keep(&figures)
}

/// The same by instructions: time in the lab `vmx` is that.
fn instructions(exits: Exits) -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    work::keep(&slowdowns(|| Guest::trapped(&kernel, 1, exits), &kernel, 1, "instructions")?)
}

fn slowdowns(
    guest: impl Fn() -> Result<Guest>,
    kernel: &KernelPackage,
    cpus: u32,
    how: &str,
) -> Result<Vec<work::Figure>> {
    let churn = module(kernel, "churn")?;
    let times = |tracer| work::times(guest()?.tracer(tracer), &churn, cpus);
    let (untraced, mut figures) = (times("off")?, Vec::new());
    for tracer in ["breakpoint", "ring"] {
        for (name, ratio) in work::ratios(&untraced, &times(tracer)?)? {
            let name = format!("slowdown_{tracer}, {name}, {how}");
            println!("{name}: {ratio:.2}");
            // Each of these allocates or frees all the time; the ring's price may be lost in the clock's.
            let least = if tracer == "ring" { 0.5 } else { 1.1 };
            ensure!((least..10_000.0).contains(&ratio), "{name}: {ratio}");
            figures.push((name, ratio));
        }
    }
    Ok(figures)
}
