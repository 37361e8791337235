//! What tracing costs the guest: the same kernel, machine and work, traced and not, in one run. `cargo xtask bench` prints
//! it; the figures of a lab are those of its emulation.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::{env, fs};
use tests::{Guest, kernel, long_test, module, no_kernel_complaint};

/// Each line `@NAME BEGIN END` is a measurement by the guest's clock.
const WORK: &str = "now() { read -r up rest < /proc/uptime; echo $up; }
    echo \"@boot 0 $(now)\"
    mkdir -p /tmp/work; cd /tmp/work; begin=$(now)
    for n in 0 1 2 3 4 5 6 7 8 9 a b c d e f g h i j; do for m in 0 1 2 3 4 5 6 7 8 9; do echo text > $n$m; done; rm ??; done
    echo \"@files $begin $(now)\"; begin=$(now)
    for n in 0 1 2 3 4 5 6 7 8 9; do /bin/true; /bin/true; /bin/true; /bin/true; /bin/true; done
    echo \"@processes $begin $(now)\"
    insmod /churn.ko pairs=5000
    dmesg | sed -n 's/.*churn: .* in \\([0-9]*\\) ns/@kmalloc-pairs 0 \\1/p'";

fn main() -> ExitCode {
    tests::main(vec![long_test("slowdown_of_breakpoints_6.1-cloud", slowdown)])
}

fn slowdown() -> Result<()> {
    let untraced = measure("off")?;
    let traced = measure("breakpoint")?;
    let mut text = String::new();
    for (name, plain) in &untraced {
        let ratio = traced.get(name).with_context(|| format!("{name} was not measured"))? / plain;
        println!("slowdown_breakpoint {name}: {ratio:.2}");
        text += &serde_json::json!({ "name": format!("slowdown_breakpoint, {name}"), "value": ratio, "unit": "ratio" })
            .to_string();
        text.push('\n');
        ensure!(*plain > 0.0, "{name} took no time");
        // Each of these allocates or frees all the time.
        ensure!((1.1..10_000.0).contains(&ratio), "{name}: {ratio}");
    }
    ensure!(untraced.len() == 4, "{untraced:?}");
    match env::var_os("KLEAK_BENCH") {
        Some(file) => fs::write(&file, text).with_context(|| format!("Cannot write {}", file.display())),
        None => Ok(()),
    }
}

/// What the guest's clock says, by name.
fn measure(tracer: &str) -> Result<BTreeMap<String, f64>> {
    let kernel = kernel("6.1-cloud")?;
    let mut guest = Guest::new(&kernel, 1)?;
    guest.option("--tracer", tracer).option("--scan-at-exit", "no");
    guest.file(&module(&kernel, "churn")?, "/churn.ko").script(WORK)?;
    let finished = guest.boot(0)?;
    no_kernel_complaint(&finished.stdout)?;
    let mut times = BTreeMap::new();
    for line in finished.stdout.lines().filter_map(|line| line.trim().strip_prefix('@')) {
        if let [name, begin, end] = line.split(' ').collect::<Vec<_>>()[..] {
            times.insert(name.to_owned(), end.parse::<f64>()? - begin.parse::<f64>()?);
        }
    }
    Ok(times)
}
