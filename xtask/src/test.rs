//! `cargo xtask test`: every test, boots of real kernels included.

use crate::{build, setup};
use anyhow::{Context, Result, ensure};
use clap::Args;
use images::host_packages::Purpose;
use images::kernel::Headers;
use images::{Cache, KernelPackage, cache, modules};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Kernels that the tests boot, and the modules built for each.
const GUESTS: [(&str, &[&str]); 8] = [
    ("6.1-cloud", &modules::OWN),
    ("6.12-cloud", &modules::OWN),
    ("6.12-cloud-arm64", &[]),
    ("6.1", &[]),
    ("6.1-rt", &[]),
    ("6.12", &[]),
    ("6.12-rt", &[]),
    ("6.1.0-47-cloud", &[]),
];

/// See the module.
#[derive(Args)]
pub struct Options {
    /// The long tests too
    #[arg(long)]
    full: bool,

    /// Trace guests by this, where a test does not choose: breakpoint or ring
    #[arg(long, value_name = "NAME")]
    tracer: Option<String>,

    /// Only tests whose name contains this
    filter: Option<String>,
}

/// Prepares what the tests need and runs them.
pub fn run(options: &Options) -> Result<()> {
    setup::install(&[Purpose::Guests, Purpose::Tests, Purpose::Arm64])?;
    if options.full {
        setup::install(&[Purpose::Oracle, Purpose::LongTests])?;
    }
    // Where `--lab arm` looks for it.
    build::beside(&build::binary()?)?;
    let cache = Cache::of_workspace();
    for (name, own) in GUESTS {
        let kernel = KernelPackage::fetch(&cache, name)?;
        for module in own {
            modules::own(&cache, &Headers::fetch(&cache, &kernel)?, module)?;
        }
    }
    let mut command = cargo_test(&cache)?;
    command.args(["--workspace", "--no-fail-fast"]);
    command.args(options.filter.iter().flat_map(|filter| ["--", filter]));
    if options.full {
        command.env("KLEAK_FULL", "1");
    }
    command.envs(options.tracer.iter().map(|tracer| ("KLEAK_TRACER", tracer)));
    let failures = cache::target().join("failures");
    let _ = fs::remove_dir_all(&failures);
    fs::create_dir_all(&failures).with_context(|| format!("Cannot make {}", failures.display()))?;
    let result = finish(command.env("KLEAK_FAILURES", &failures));
    repeat(&failures)?;
    result
}

/// Prints once more what the tests that boot guests said when they failed, behind everything else; it stays in that folder.
fn repeat(failures: &Path) -> Result<()> {
    const LINES: usize = 60;
    for entry in fs::read_dir(failures)? {
        let path = entry?.path();
        let said = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
        let lines: Vec<&str> = said.lines().collect();
        println!("\n---- failed: {}", path.file_name().unwrap_or_default().display());
        if lines.len() > LINES {
            println!("(the last {LINES} of {} lines; all are in {})", lines.len(), path.display());
        }
        println!("{}", lines[lines.len().saturating_sub(LINES)..].join("\n"));
    }
    Ok(())
}

/// Runs one test of one test program, a long one too, with a variable in its environment.
pub fn one(program: &str, name: &str, needs: &[Purpose], (variable, value): (&str, &Path)) -> Result<()> {
    setup::install(needs)?;
    let mut command = cargo_test(&Cache::of_workspace())?;
    command.args(["--package", "tests", "--test", program, "--", name]);
    finish(command.env("KLEAK_FULL", "1").env(variable, value))
}

/// `cargo test` with what tests rely on.
fn cargo_test(cache: &Cache) -> Result<Command> {
    let binary = build::binary()?;
    let mut command = build::cargo("test");
    command
        .env("KLEAK_VMM", &binary)
        .env("KLEAK_REQUIRE", "1")
        .env(cache::FOLDER_VARIABLE, cache.folder())
        .env("KLEAK_LAB_DIR", cache.folder().join("lab"));
    Ok(command)
}

fn finish(command: &mut Command) -> Result<()> {
    let status = command.status().context("Cannot run cargo")?;
    ensure!(status.success(), "Some tests failed");
    Ok(())
}
