//! What we find in a kernel and its heap, against what the kernel's own build and its own kmemleak say: the oracle
//! kernel, built from source with CONFIG_DEBUG_KMEMLEAK.

mod accuracy;
mod speed;

use anyhow::{Context, Result, ensure};
use images::{Built, Cache};
use introspect::kernel::Kernel;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, ExitCode};
use tests::long_test;

fn main() -> ExitCode {
    tests::main(vec![
        long_test("symbols_are_those_of_nm", symbols),
        long_test("leaks_are_those_of_kmemleak", accuracy::compare),
        long_test("what_kmemleak_costs", speed::kmemleak),
    ])
}

/// Symbols that kallsyms leaves out (scripts/kallsyms.c and scripts/mksysmap): by their beginnings.
const LEFT_OUT: [&str; 8] =
    ["$", ".", "L0", "__crc_", "__kstrtab_", "__kstrtabns_", "__efistub_", "kallsyms_"];

/// A symbol: address and name.
type Symbol = (u64, String);

/// The symbols of an ELF file, without undefined ones, and those that are absolute.
fn nm(vmlinux: &Path) -> Result<(BTreeSet<Symbol>, BTreeSet<Symbol>)> {
    let output = Command::new("nm").arg(vmlinux).output().context("Cannot run nm")?;
    ensure!(output.status.success(), "nm: {}", String::from_utf8_lossy(&output.stderr));
    let (mut all, mut absolute) = (BTreeSet::new(), BTreeSet::new());
    for line in String::from_utf8(output.stdout)?.lines() {
        let mut words = line.split_whitespace();
        let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let symbol = (u64::from_str_radix(address, 16)?, name.to_owned());
        if kind.eq_ignore_ascii_case("a") {
            absolute.insert(symbol.clone());
        }
        all.insert(symbol);
    }
    Ok((all, absolute))
}

fn symbols() -> Result<()> {
    let oracle = Built::oracle(&Cache::of_workspace())?;
    let kernel = Kernel::open(&oracle.bzimage)?;
    let recovered: BTreeSet<Symbol> =
        kernel.symbols.iter().map(|symbol| (symbol.va.0, symbol.name.to_owned())).collect();
    let (all, absolute) = nm(&oracle.vmlinux)?;
    ensure!(recovered.len() > 20_000, "only {} symbols", recovered.len());
    let invented: Vec<&Symbol> = recovered.difference(&all).take(10).collect();
    ensure!(invented.is_empty(), "not in nm: {invented:x?}");
    let left_out = |name: &str| LEFT_OUT.iter().any(|start| name.starts_with(start));
    let missing: Vec<&Symbol> = all
        .difference(&recovered)
        .filter(|symbol| !left_out(&symbol.1) && !absolute.contains(*symbol))
        .collect();
    ensure!(missing.is_empty(), "{} not recovered: {:x?}", missing.len(), &missing[..missing.len().min(20)]);
    Ok(())
}
