//! What tracing costs the guest: the same kernel, machine and work, traced and not, in one run. `cargo xtask bench` prints
//! it; the figures of a lab are those of its emulation. And the saved machine that `cargo xtask bench` scans.

use anyhow::{Context, Result, ensure};
use images::{Cache, KernelPackage};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};
use tests::{Exits, Guest, despite_qemu, in_vmx, kernel, long_test, module, no_kernel_complaint, run, work};

/// Changes whenever the saved machines are to be made anew.
const FILLED: u32 = 1;

fn main() -> ExitCode {
    // To fill it takes the lab ten minutes and more.
    let sizes = [("2-gib", "2G", filling(240, 320, 200, 100)), ("512-mib", "512M", filling(40, 50, 50, 50))];
    let saved = sizes.map(|(size, mem, filling)| {
        let name = format!("a_machine_of_{}_is_saved_6.1-cloud", size.replace('-', "_"));
        let saved = long_test(name, move || saved_machine(&format!("machine-of-{size}"), mem, &filling));
        match env::var_os("KLEAK_BENCH") {
            Some(_) => saved,
            None => saved.with_kind("needs xtask bench").with_ignored_flag(true),
        }
    });
    let in_instructions = in_vmx("instructions_by_tracer_6.1-cloud", instructions);
    let slowdown = long_test("slowdown_of_tracers_6.1-cloud", slowdown);
    tests::main([slowdown, in_instructions].into_iter().chain(saved).collect())
}

/// What fills the memory of a machine that is saved: folders of 500 files of which half have contents, of which every fourth
/// is removed again up to number `thinned`; a find over all; a file of so many MiB, and processes that stay.
fn filling(thinned: u32, folders: u32, mib: u32, processes: u32) -> String {
    format!(
        "mkdir -p /tmp/work/0; cd /tmp/work
    n=0; while [ $n -lt 250 ]; do echo text > 0/$n; : > 0/empty$n; n=$((n + 1)); done
    n=1; while [ $n -lt {thinned} ]; do cp -r 0 $n; [ $((n % 4)) -eq 3 ] && rm -r $n; [ $((n % 40)) -eq 0 ] && echo \"@copied $n\"; n=$((n + 1)); done
    n={thinned}; while [ $n -lt {folders} ]; do cp -r 0 $n; n=$((n + 1)); done
    find . -name '1*' | sort | tail -n 1
    dd if=/dev/zero of=/tmp/large bs=1M count={mib}
    n=0; while [ $n -lt {processes} ]; do sleep 100000 & n=$((n + 1)); done
    echo READY; read -r go; kill $(jobs -p)"
    )
}

/// The file's name goes where `KLEAK_BENCH` says. It is made once; again when it cannot be read any more.
fn saved_machine(name: &str, mem: &str, filling: &str) -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let cache = Cache::of_workspace();
    let key = (FILLED, filling, &kernel.release);
    let readable = |file: &Path| {
        let looked = run([Path::new("analyze"), file, Path::new("-c"), Path::new("status")])?;
        Ok::<_, anyhow::Error>(looked.code == Some(0))
    };
    if let Some(folder) = cache.find(name, key)
        && !readable(&folder.join("machine.snap"))?
    {
        fs::remove_dir_all(&folder).with_context(|| format!("Cannot remove {}", folder.display()))?;
    }
    let file =
        cache.entry(name, key, |folder| save_filled(&kernel, mem, filling, &folder.join("machine.snap")))?;
    let file = file.join("machine.snap");
    ensure!(readable(&file)?, "{} cannot be analyzed", file.display());
    match env::var_os("KLEAK_BENCH") {
        Some(place) => fs::write(&place, file.as_os_str().as_encoded_bytes())
            .with_context(|| format!("Cannot write {}", PathBuf::from(&place).display())),
        None => Ok(()),
    }
}

fn save_filled(kernel: &KernelPackage, mem: &str, filling: &str, file: &Path) -> Result<()> {
    let mut guest = Guest::new(kernel, 1)?;
    guest.option("--mem", mem).option("--scan-at-exit", "no").timeout(3000).script(filling)?;
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
        let how = format!("{cpus} CPU");
        figures.extend(slowdowns(|| Guest::new(&kernel, cpus), &kernel, cpus, &how, work::BOOTS)?);
    }
    work::keep(&figures)
}

/// The same by instructions: time in the lab `vmx` is that.
fn instructions(exits: Exits) -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    work::keep(&slowdowns(|| Guest::trapped(&kernel, 1, exits), &kernel, 1, "instructions", 1)?)
}

fn slowdowns(
    guest: impl Fn() -> Result<Guest>,
    kernel: &KernelPackage,
    cpus: u32,
    how: &str,
    boots: u32,
) -> Result<Vec<work::Figure>> {
    let churn = module(kernel, "churn")?;
    // A boot of a dozen is started again, not all of them.
    let times = |tracer| {
        let label = format!("A boot with tracer {tracer}, {how},");
        despite_qemu(&label, || work::times(guest()?.tracer(tracer), &churn, cpus))
    };
    let mut least = ["off", "breakpoint", "ring"].map(|tracer| (tracer, work::Times::new()));
    for boot in 0..boots {
        // One by traps takes as long as the others together, and is many times slower than anything beside it makes it.
        for (tracer, least) in least.iter_mut().filter(|(tracer, _)| boot == 0 || *tracer != "breakpoint") {
            work::keep_least(least, times(tracer)?);
        }
    }
    let ([(_, untraced), traced @ ..], mut figures) = (least, Vec::new());
    for (tracer, traced) in &traced {
        for (name, ratio) in work::ratios(&untraced, traced)? {
            let name = format!("slowdown_{tracer}, {name}, {how}");
            println!("{name}: {ratio:.2}");
            // Each of these allocates or frees all the time; the ring's price may be lost in the clock's.
            let least = if *tracer == "ring" { 0.5 } else { 1.1 };
            ensure!((least..10_000.0).contains(&ratio), "{name}: {ratio}");
            figures.push((name, ratio));
        }
    }
    Ok(figures)
}
