//! `cargo xtask demo`: plants leaks in a stock kernel and finds them.

use crate::{build, setup};
use anyhow::{Context, Result, anyhow, ensure};
use images::host_packages::Purpose;
use images::kernel::Headers;
use images::{Cache, KernelPackage, leaky, modules};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

/// Stock kernel of the demonstration.
const KERNEL: &str = "6.1-cloud";

/// What is planted: leaks of every kind, and things that look like leaks and are none.
const CASES: [&str; 12] = [
    "kmalloc", "vmalloc", "cache", "hidden", "list", "cycle", "tree", "indirect", "stack", "percpu", "timer",
    "rcu",
];

/// Boots, plants, finds, and checks that every planted leak was named and nothing else.
pub fn run() -> Result<()> {
    setup::install(&[Purpose::Guests])?;
    let cache = Cache::of_workspace();
    // The first time, both take long.
    let (binary, guest) = thread::scope(|scope| {
        let guest = scope.spawn(|| guest(&cache));
        (build::binary(), guest.join())
    });
    let binary = binary?;
    let (kernel, module) = guest.map_err(|_| anyhow!("Preparing the guest panicked"))??;
    let mut spec = module.into_os_string();
    for case in CASES {
        spec.push(format!(",case={case}"));
    }
    let report = cache.folder().join("demo.json");
    println!("Booting {} with a module that loses memory in {} ways", kernel.release, CASES.len());
    let status = Command::new(&binary)
        .args(["run", "--cmdline", "quiet", "--report", "-", "--report"])
        .arg(&report)
        .arg("--kernel")
        .arg(&kernel.vmlinuz)
        .arg("--module")
        .arg(&spec)
        .env("KLEAK_LAB_DIR", cache.folder().join("lab"))
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("Cannot run {}", binary.display()))?;
    ensure!(status.success(), "kleak-vmm ended with {status}");
    check(&std::fs::read_to_string(&report).context("Cannot read the report")?)
}

/// The stock kernel, and the module built for it.
fn guest(cache: &Cache) -> Result<(KernelPackage, PathBuf)> {
    let kernel = KernelPackage::fetch(cache, KERNEL)?;
    let module = modules::own(cache, &Headers::fetch(cache, &kernel)?, "leaky")?;
    Ok((kernel, module))
}

/// The report against what was planted: by function, since each case allocates in one named after it.
fn check(report: &str) -> Result<()> {
    let report: serde_json::Value = serde_json::from_str(report).context("The report is no JSON")?;
    let leaks = report["leaks"].as_array().context("The report has no leaks")?;
    let mut named = 0;
    for case in leaky::CASES.iter().filter(|case| CASES.contains(&case.name)) {
        let function = case.function();
        let through = |leak: &&serde_json::Value| {
            leak["backtrace"].as_array().is_some_and(|b| b.iter().any(|f| f["symbol"] == function.as_str()))
        };
        let found = leaks.iter().filter(through).count();
        let planted = case.reported.len();
        println!("  {:<10} planted {planted}, found {found}", case.name);
        ensure!(found == planted, "Case {} is not found as planted", case.name);
        named += found;
    }
    ensure!(leaks.len() == named, "{} objects reported that were not planted", leaks.len() - named);
    println!("Every planted leak was found: {named} objects, and nothing else.");
    Ok(())
}
