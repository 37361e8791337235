//! What we find in a kernel and its heap, against what the kernel's own build and its own kmemleak say: the oracle
//! kernel, built from source with CONFIG_DEBUG_KMEMLEAK.

use anyhow::{Context, Result, ensure};
use images::{Cache, Oracle, leaky, modules};
use introspect::kernel::Kernel;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, ExitCode};
use tests::{Guest, long_test, no_kernel_complaint};

fn main() -> ExitCode {
    tests::main(vec![
        long_test("symbols_are_those_of_nm", symbols),
        long_test("leaks_are_those_of_kmemleak", leaks),
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
    let oracle = Oracle::build(&Cache::of_workspace())?;
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

/// Addresses in `unreferenced object 0x...` lines.
fn addresses(text: &str) -> BTreeSet<String> {
    let objects = text.lines().filter_map(|line| line.strip_prefix("unreferenced object "));
    objects.filter_map(|rest| Some(rest.split_once(' ')?.0.to_owned())).collect()
}

/// One boot, both detectors, every case of `leaky`: ours finds what it must, and the kernel's nothing that ours does not,
/// but what is only in a page, where it cannot look.
fn leaks() -> Result<()> {
    let cache = Cache::of_workspace();
    let oracle = Oracle::build(&cache)?;
    let mut guest = Guest::of_image(&oracle.bzimage, 2)?;
    guest.cmdline("kmemleak=on").option("--scan-at-exit", "no");
    guest.file(&modules::own(&cache, &oracle.headers, "leaky")?, "/leaky.ko").script(
        "mount -t debugfs none /sys/kernel/debug
         echo scan=off > /sys/kernel/debug/kmemleak
         insmod /leaky.ko case=all; sleep 10
         echo scan > /sys/kernel/debug/kmemleak; sleep 6; echo scan > /sys/kernel/debug/kmemleak
         echo THEIRS; cat /sys/kernel/debug/kmemleak
         echo scan > /dev/ttyS1; cat /dev/ttyS1 > /dev/null
         echo OURS; echo json report > /dev/ttyS1; cat /dev/ttyS1; echo; echo END",
    )?;
    let finished = guest.boot(0)?;
    no_kernel_complaint(&finished.stdout)?;
    let stdout = finished.stdout.replace('\r', "");
    let (_, rest) = stdout.split_once("THEIRS\n").context("no report of the kernel's")?;
    let (theirs, rest) = rest.split_once("OURS\n").context("no report of ours")?;
    let (ours, _) = rest.split_once("END\n").context("no end")?;
    let theirs = addresses(theirs);
    let ours: Value = serde_json::from_str(ours.trim()).context("our report")?;
    let leaks = ours["leaks"].as_array().context("leaks")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let found: BTreeSet<String> = leaks.iter().map(|leak| text(&leak["address"])).collect();
    let expected: usize = leaky::CASES.iter().map(|case| case.reported_at(leaky::Since::Load).len()).sum();
    ensure!(found.len() == expected, "we found {}, wanted {expected}: {:#}", found.len(), ours["groups"]);
    let only_pages: usize = leaky::CASES.iter().map(|case| case.kmemleak_adds.len()).sum();
    let only_theirs: Vec<&String> = theirs.difference(&found).collect();
    ensure!(only_theirs.len() <= only_pages, "kmemleak alone reports {only_theirs:?}");
    let only_ours: Vec<&String> = found.difference(&theirs).collect();
    println!("both report {}, only we {only_ours:?}", found.len() - only_ours.len());
    // Stale words hide some from kmemleak, never most.
    ensure!(only_ours.len() * 4 < expected, "kmemleak misses {}", only_ours.len());
    Ok(())
}
