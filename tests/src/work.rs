//! Work by which tracers and detectors are compared: what it takes by the guest's clock.

use crate::{Guest, no_kernel_complaint, program};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use std::{env, fs};

/// Each line `@NAME BEGIN END` is a measurement by the guest's clock.
const WORK: &str = "now() { read -r up rest < /proc/uptime; echo $up; }
    echo \"@boot 0 $(now)\"; begin=$(now)
    /bustle files 1500; /bustle sockets 1000
    echo \"@files-and-sockets $begin $(now)\"; begin=$(now)
    /bustle forks 150
    echo \"@processes $begin $(now)\"";

/// What was measured, by name: `boot`, `files-and-sockets` and `processes` in seconds, `kmalloc-pairs` in nanoseconds.
pub type Times = BTreeMap<String, f64>;

/// Boots `guest`, of `cpus` vCPUs, and has it work, on all of them for pairs of `kmalloc` and `kfree`. `churn` is that module,
/// built for its kernel.
///
/// # Errors
/// It does not come to its end, or its kernel complains.
pub fn times(guest: &mut Guest, churn: &Path, cpus: u32) -> Result<Times> {
    guest.option("--scan-at-exit", "no").file(churn, "/churn.ko").file(&program("bustle")?, "/bustle");
    guest.script(&format!(
        "{WORK}
         insmod /churn.ko pairs=20000 cpus={cpus}
         dmesg | sed -n 's/.*churn: .* in \\([0-9]*\\) ns/@kmalloc-pairs 0 \\1/p'"
    ))?;
    let finished = guest.boot(0)?;
    no_kernel_complaint(&finished.stdout)?;
    Ok(measured(&finished.stdout))
}

/// Boots of which the fastest counts: what else the host does can only make one slower.
pub const BOOTS: u32 = 3;

/// Keeps of each measurement the least.
pub fn keep_least(least: &mut Times, times: Times) {
    for (name, time) in times {
        least.entry(name).and_modify(|known| *known = known.min(time)).or_insert(time);
    }
}

/// What such lines of a guest's console say.
pub fn measured(console: &str) -> Times {
    let line = |line: &str| match line.trim().strip_prefix('@')?.split(' ').collect::<Vec<_>>()[..] {
        [name, begin, end] => Some((name.to_owned(), end.parse::<f64>().ok()? - begin.parse::<f64>().ok()?)),
        _ => None,
    };
    console.lines().filter_map(line).collect()
}

/// `traced` over `plain`, by name.
///
/// # Errors
/// Something was not measured, or took no time.
pub fn ratios(plain: &Times, traced: &Times) -> Result<Times> {
    ensure!(plain.len() == 4, "{plain:?}");
    let ratio = |(name, plain): (&String, &f64)| {
        ensure!(*plain > 0.0, "{name} took no time");
        let took = traced.get(name).with_context(|| format!("{name} was not measured"))?;
        Ok((name.clone(), took / plain))
    };
    plain.iter().map(ratio).collect()
}

/// A ratio and what it is called.
pub type Figure = (String, f64);

/// Writes ratios as lines of JSON where `KLEAK_BENCH` says, if it does, for `cargo xtask bench`.
///
/// # Errors
/// They cannot be written.
pub fn keep(figures: &[Figure]) -> Result<()> {
    let Some(file) = env::var_os("KLEAK_BENCH") else { return Ok(()) };
    let line =
        |(name, value): &Figure| format!("{}\n", json!({ "name": name, "value": value, "unit": "ratio" }));
    fs::write(&file, figures.iter().map(line).collect::<String>())
        .with_context(|| format!("Cannot write {}", file.display()))
}
