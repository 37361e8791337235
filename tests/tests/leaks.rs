//! Planted leaks and real ones: everything that was lost is named, and nothing else.

use anyhow::{Context, Result, ensure};
use images::kernel::ARM64_LINES;
use images::{Built, Cache, KernelPackage, leaky, modules};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tests::{
    ARM_PACKAGES, Exits, Finished, Guest, RUN_TIMEOUT, in_vmx, kernel, long_test, module,
    no_kernel_complaint, sizes, test, with_packages,
};

fn main() -> ExitCode {
    let mut trials = vec![test("all_cases_and_pages_6.1-cloud", || all_cases_and_pages("6.1-cloud"))];
    trials.push(test("all_cases_6.12-cloud", || all_cases("6.12-cloud", Exits::Usual)));
    trials.push(long_test("all_cases_6.1-cloud", || all_cases("6.1-cloud", Exits::Usual)));
    for line in ARM64_LINES {
        let trial = long_test(format!("all_cases_{line}"), || all_cases(line, Exits::Usual));
        trials.push(with_packages(trial, &ARM_PACKAGES));
    }
    for (line, words) in [
        ("6.1-cloud", "maxcpus=1"),
        ("6.1-cloud", "nokaslr mitigations=off"),
        ("6.1-cloud", "nosmp"),
        ("6.12-cloud", "nosmp"),
    ] {
        let name = format!("all_cases_{line}_{}", words.replace(' ', "_"));
        trials.push(long_test(name, move || all_cases_with(words, line)));
    }
    for line in ["6.1-cloud", "6.12-cloud"] {
        let name = format!("all_cases_{line}_five_levels");
        trials.push(long_test(name, move || all_cases_with_five_levels(line)));
    }
    trials.push(long_test("all_cases_without_orc_and_btf", all_cases_with_frame_pointers));
    for line in ["6.1-cloud", "6.12-cloud"] {
        trials.push(in_vmx(&format!("all_cases_{line}"), move |exits| all_cases(line, exits)));
    }
    for line in ["6.12-cloud", "6.1", "6.12", "6.1-rt", "6.12-rt"] {
        trials.push(long_test(format!("all_cases_and_pages_{line}"), move || all_cases_and_pages(line)));
    }
    trials.push(long_test("what_a_system_call_holds_6.1-cloud", || blocked("6.1-cloud")));
    trials.push(test("what_a_system_call_holds_6.12-cloud", || blocked("6.12-cloud")));
    trials.push(test("a_number_is_no_pointer_6.12-cloud", || number("6.12-cloud")));
    trials.push(long_test("a_number_is_no_pointer_6.1-cloud", || number("6.1-cloud")));
    trials.push(test("what_holds_an_object_6.1-cloud", || held("6.1-cloud")));
    trials.push(test("one_line_finds_a_lost_list", lost_list));
    trials.push(test("one_line_passes_a_clean_module", clean_module));
    trials.push(test("a_module_of_another_kernel_is_named_before_the_boot", foreign_module));
    trials.push(test("io_uring_leak_of_6.1.0-47", || io_uring("6.1.0-47-cloud", true)));
    trials.push(test("io_uring_is_clean_on_the_newest_6.1", || io_uring("6.1-cloud", false)));
    tests::main(trials)
}

/// Every case of `leaky` at once, against its table, by function: each case's objects are allocated in a function
/// named after it.
fn all_cases(line: &str, exits: Exits) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::trapped(&kernel, 2, exits)?;
    all_cases_in(&mut guest, &leaky(&kernel)?, "", leaky::Case::reported_by_default).map(drop)
}

/// The same with other words on the kernel's command line.
fn all_cases_with(cmdline: &str, line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::new(&kernel, 2)?;
    all_cases_in(guest.cmdline(cmdline), &leaky(&kernel)?, "", leaky::Case::reported_by_default).map(drop)
}

/// The same with five levels of page tables, which the kernel says it has.
fn all_cases_with_five_levels(line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::new(&kernel, 2)?;
    guest.option("--paging", "5");
    let work = "grep -q la57 /proc/cpuinfo && echo FIVE LEVELS";
    let finished = all_cases_in(&mut guest, &leaky(&kernel)?, work, leaky::Case::reported_by_default)?;
    ensure!(finished.stdout.contains("\nFIVE LEVELS"), "{}", tests::tail(&finished.stdout, 20));
    Ok(())
}

/// The same on a kernel with frame pointers, whose types are in a file beside it.
fn all_cases_with_frame_pointers() -> Result<()> {
    let cache = Cache::of_workspace();
    let kernel = Built::frame_pointers(&cache)?;
    let mut guest = Guest::of_image(&kernel.bzimage, 2)?;
    guest.option("--types", kernel.types.context("no types")?);
    let module = modules::own(&cache, &kernel.headers, "leaky")?;
    all_cases_in(&mut guest, &module, "", leaky::Case::reported_by_default).map(drop)
}

fn leaky(kernel: &KernelPackage) -> Result<PathBuf> {
    module(kernel, "leaky")
}

/// The same where blocks of pages and device memory are tracked, too; and whose pages are whose is known exactly.
fn all_cases_and_pages(line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::new(&kernel, 2)?;
    guest.option("--track", "slab,vmalloc,percpu,pages,ioremap");
    let work = "ls -lR /sys/kernel > /tmp/all; cp /tmp/all /tmp/more; rm /tmp/all /tmp/more";
    all_cases_in(&mut guest, &leaky(&kernel)?, work, |case| case.reported).map(drop)
}

/// `work` is what the guest does before it is audited. A word that an earlier call left on a stack can hide an object from the
/// scan at the end: there are other calls before it.
fn all_cases_in(
    guest: &mut Guest,
    module: &Path,
    work: &str,
    wanted: impl Fn(&leaky::Case) -> &'static [leaky::Lost],
) -> Result<Finished> {
    guest.file(module, "/leaky.ko").script(&format!(
        "insmod /leaky.ko case=all; sleep 3
         echo scan > /dev/ttyS1; cat /dev/ttyS1 > /dev/null
         rmmod leaky; sleep 2; {work}
         echo audit > /dev/ttyS1; cat /dev/ttyS1
         for i in 1 2 3; do ls -lR /proc/self /dev > /dev/null; sleep 1; done",
    ))?;
    let finished = guest.boot(0)?;
    no_kernel_complaint(&finished.stdout)?;
    let audit = finished.stdout.lines().find(|line| line.starts_with("audit: ")).context("no audit")?;
    ensure!(audit.ends_with(", missing 0, stale 0"), "{}", tests::tail(&finished.stdout, 40));
    cases_are_named(&guest.report()?, wanted)?;
    Ok(finished)
}

/// The size of a lost object on the report's kernel. On arm64, 6.1 has no smaller `kmalloc` caches than of 128 bytes, and none
/// of 192 (`ARCH_KMALLOC_MINALIGN`; 6.5 and newer have them where devices do not need that).
fn size_on(report: &Value, case: &leaky::Case, size: u64) -> u64 {
    let (arch, release) = (&report["guest"]["arch"], report["guest"]["release"].as_str());
    let coarse = arch == "aarch64" && release.is_some_and(|release| release.starts_with("6.1."));
    match size {
        // Of a CPU's copy.
        _ if !coarse || case.name == "percpu_lost" => size,
        ..128 => 128,
        192 => 256,
        _ => size,
    }
}

/// Each case's objects are in the report, and nothing else.
fn cases_are_named(report: &Value, wanted: impl Fn(&leaky::Case) -> &'static [leaky::Lost]) -> Result<()> {
    let mut expected = 0;
    for case in leaky::CASES {
        let mut found = leaks_of(report, &case.function())?;
        let mut wanted: Vec<u64> = wanted(case).iter().map(|lost| size_on(report, case, lost.size)).collect();
        found.sort_unstable();
        wanted.sort_unstable();
        ensure!(found == wanted, "case {}: found {found:?}, wanted {wanted:?}", case.name);
        expected += wanted.len();
    }
    ensure!(sizes(report)?.len() == expected, "more than the cases: {:#}", report["groups"]);
    Ok(())
}

/// Objects that only a sleeping system call's frames hold, most of them in saved registers, are none.
fn blocked(line: &str) -> Result<()> {
    let mut guest = Guest::new(&kernel(line)?, 2)?;
    guest.file(&tests::program("blocked")?, "/blocked").script(
        "/blocked > /tmp/blocked & sleep 8
         cat /tmp/blocked
         echo scan > /dev/ttyS1; echo while they sleep: $(cat /dev/ttyS1)
         echo report > /dev/ttyS1; cat /dev/ttyS1",
    )?;
    let finished = guest.boot(0)?;
    no_kernel_complaint(&finished.stdout)?;
    for said in ["10 of 10 calls sleep", "while they sleep: kmemleak: 0 new suspected memory leaks"] {
        ensure!(finished.stdout.contains(said), "not {said:?}: {}", tests::tail(&finished.stdout, 200));
    }
    Ok(())
}

/// A number that looks like the only pointer to an object hides it from a scan that takes every word for a pointer, as
/// kmemleak does, and from no other; and the rest of the kernel is clean either way.
fn number(line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::new(&kernel, 2)?;
    guest.file(&module(&kernel, "leaky")?, "/leaky.ko").script(
        "insmod /leaky.ko case=typed; sleep 3
         say() { echo $2 > /dev/ttyS1; echo $1: $(cat /dev/ttyS1); }
         for typed in off on; do
             say $typed typed=$typed
             for i in 1 2 3; do ls -lR /proc/self /dev > /dev/null; say $typed scan; done
             say $typed status
         done",
    )?;
    let finished = guest.boot(0)?;
    no_kernel_complaint(&finished.stdout)?;
    for (typed, new) in [("off", 0), ("on", 1)] {
        // A word that an earlier call left on a stack can hide it from one scan.
        let said = format!("{typed}: kmemleak: 1 new suspected memory leaks");
        let found = finished.stdout.lines().filter(|line| line.starts_with(&said)).count();
        ensure!(found == new, "{found} of {new}, typed={typed}: {}", tests::tail(&finished.stdout, 200));
    }
    let status = finished.stdout.lines().find(|line| line.starts_with("on: guest:")).context("no status")?;
    let words = status.split(" dropped no pointer by its type: words ").nth(1).context("dropped words")?;
    let words = words.split(' ').next().and_then(|number| number.parse::<u64>().ok());
    ensure!(status.contains(" typed: true ") && words.is_some_and(|words| words > 0), "{status}");
    let report = guest.report()?;
    ensure!(
        leaks_of(&report, "leaky_typed")? == [192] && sizes(&report)?.len() == 1,
        "{:#}",
        report["groups"]
    );
    Ok(())
}

/// Leaks with `function` in their backtrace.
fn through<'r>(report: &'r Value, function: &str) -> Result<Vec<&'r Value>> {
    let leaks = report["leaks"].as_array().context("leaks")?;
    let through = |leak: &&Value| {
        let frames = leak["backtrace"].as_array();
        frames.is_some_and(|frames| frames.iter().any(|f| f["symbol"] == function))
    };
    Ok(leaks.iter().filter(through).collect())
}

/// Their sizes.
fn leaks_of(report: &Value, function: &str) -> Result<Vec<u64>> {
    Ok(through(report, function)?.iter().filter_map(|leak| leak["size"].as_u64()).collect())
}

/// `path=` and `roots` explain what scans find: who holds an object, or from which lost one it hangs.
fn held(line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::new(&kernel, 2)?;
    guest.file(&module(&kernel, "leaky")?, "/leaky.ko").script(
        "insmod /leaky.ko case=interior,tree,stack; sleep 3
         at=$(dmesg | sed -n 's/.*interior is at //p')
         echo path=$at > /dev/ttyS1; echo interior: $(cat /dev/ttyS1)
         echo READY; read -r go; rmmod leaky",
    )?;
    let mut session = guest.start()?;
    session.wait_for("\nREADY", RUN_TIMEOUT)?;
    guest.ctl("scan")?;
    lost_tree(&guest, &guest.json("report")?)?;
    every_root_refers(&guest.json("roots")?)?;
    let possible = guest.json("possible")?;
    let rows = possible["possible"].as_array().context("possible")?;
    let site = |row: &&Value| row["site"].as_str().is_some_and(|site| site.starts_with("leaky_interior+"));
    let row = rows.iter().find(site).with_context(|| format!("no leaky_interior: {possible:#}"))?;
    ensure!(row["objects"] == 1 && row["others"] == 0 && row["offsets"] == "0x28", "{row}");
    // Without stacks what only a stack holds is reported, and so its address known.
    guest.ctl("stack=off")?;
    guest.ctl("scan")?;
    let report = guest.json("report")?;
    guest.ctl("stack=on")?;
    let on_stack = through(&report, "leaky_stack")?;
    let address = on_stack.first().and_then(|leak| leak["address"].as_str()).context("leaky_stack")?;
    let path = guest.ctl(&format!("path={address}"))?;
    ensure!(path.starts_with("root task stacks: word at 0x"), "{path}");
    ensure!(path.contains("stack of \"leaky/stack\", pid "), "{path}");
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    no_kernel_complaint(&finished.stdout)?;
    let interior = finished.stdout.lines().find(|line| line.starts_with("interior: ")).context("interior")?;
    let parts = [
        "root module leaky: word at 0x",
        ", leaky_interior_pointer+0x0/",
        "+0x28 (size 512): slab, cache kmalloc-",
    ];
    ensure!(parts.iter().all(|part| interior.contains(part)), "{interior}");
    Ok(())
}

/// Each of the six below the lost root of a binary tree has its chain from there, and the root has none.
fn lost_tree(guest: &Guest, report: &Value) -> Result<()> {
    let tree = through(report, "leaky_tree")?;
    let root = tree.iter().find(|leak| leak["direct"] == true).context("no direct leak")?;
    let mut lengths = Vec::new();
    for leak in &tree {
        let address = leak["address"].as_str().context("address")?;
        let path = guest.json(&format!("path={address}"))?["path"].take();
        let chain = path["chain"].as_array().context("chain")?;
        let state = if leak["direct"] == true { "lost" } else { "indirect" };
        ensure!(path["state"] == state && path["cycle"] == 1 && path["root"].is_null(), "{path}");
        ensure!(chain[0]["address"] == root["address"], "{path}");
        ensure!(chain.last().is_some_and(|last| last["address"] == leak["address"]), "{path}");
        // `struct leaky_branch`: two children behind 72 bytes.
        let child = |hop: &Value| hop["word"] == 72 || hop["word"] == 80;
        ensure!(chain[..chain.len() - 1].iter().all(child), "{path}");
        lengths.push(chain.len());
    }
    lengths.sort_unstable();
    ensure!(lengths == [1, 2, 2, 3, 3, 3, 3], "{lengths:?}");
    Ok(())
}

fn every_root_refers(reply: &Value) -> Result<()> {
    let number = |list: &str, name: &str, member: &str| {
        let all = reply[list].as_array();
        let row = all.and_then(|all| all.iter().find(|row| row["name"] == name));
        row.and_then(|row| row[member].as_u64()).with_context(|| format!("no {member} of {name}: {reply:#}"))
    };
    for name in ["data", "bss", "percpu0", "percpu1", "task stacks", "module leaky"] {
        let (references, bytes) = (number("roots", name, "references")?, number("roots", name, "bytes")?);
        ensure!((1..=bytes / 8).contains(&references), "{name}: {references} in {bytes} bytes");
    }
    // The regions read first are the first to reach almost all that they refer to.
    ensure!(
        number("roots", "task stacks", "first")? > 0 && number("roots", "data", "first")? > 0,
        "{reply:#}"
    );
    for name in [
        "free pages",
        "page tables",
        "text and read-only data",
        "task stacks, not in use",
        "exception stacks, not in use",
    ] {
        ensure!(number("not_read", name, "bytes")? > 0, "{name}: {reply:#}");
    }
    number("not_read", "dead words of sleeping tasks' stacks", "references")?;
    Ok(())
}

/// The driver developer's one line.
fn lost_list() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let mut guest = Guest::new(&kernel, 1)?;
    let mut with_case = module(&kernel, "leaky")?.into_os_string();
    with_case.push(",case=list");
    guest.option("--module", with_case).flag("--fail-on-leak");
    guest.boot(1)?;
    let report = guest.report()?;
    let list = leaky::CASES.iter().find(|case| case.name == "list").context("no case list")?;
    let found = leaks_of(&report, "leaky_list")?;
    ensure!(
        found.len() == list.reported.len() && sizes(&report)?.len() == found.len(),
        "{:#}",
        report["groups"]
    );
    let modules: Vec<&Value> = report["leaks"].as_array().into_iter().flatten().collect();
    let named = |leak: &&&Value| {
        leak["backtrace"].as_array().is_some_and(|f| f.iter().any(|f| f["module"] == "leaky"))
    };
    ensure!(modules.iter().filter(named).count() == found.len(), "module names are missing");
    Ok(())
}

fn clean_module() -> Result<()> {
    let kernel = kernel("6.12-cloud")?;
    let mut guest = Guest::new(&kernel, 1)?;
    guest.option("--module", module(&kernel, "clean")?).flag("--fail-on-leak");
    guest.boot(0)?;
    ensure!(sizes(&guest.report()?)?.is_empty(), "leaks");
    Ok(())
}

fn foreign_module() -> Result<()> {
    let other = module(&kernel("6.12-cloud")?, "clean")?;
    let mut guest = Guest::new(&kernel("6.1-cloud")?, 1)?;
    guest.option("--module", other);
    let finished = guest.start()?.finish()?;
    finished.expect_code(2)?;
    ensure!(
        finished.stderr.contains("vermagic") && finished.stderr.contains("hint: "),
        "{}",
        finished.stderr
    );
    ensure!(!finished.stdout.contains("Linux version"), "it was booted");
    Ok(())
}

/// Debian's real bug: `io_wq_create` forgets a cpumask for each process that sets up an io_uring.
fn io_uring(name: &str, leaks: bool) -> Result<()> {
    const PROCESSES: usize = 20;
    let kernel = kernel(name)?;
    let mut guest = Guest::new(&kernel, 1)?;
    guest.file(&tests::program("io_uring_setup")?, "/io_uring_setup");
    guest.option("--exec", format!("/io_uring_setup {PROCESSES}"));
    guest.boot(0)?;
    let report = guest.report()?;
    let found = leaks_of(&report, "io_wq_create")?;
    let wanted = if leaks { vec![8; PROCESSES] } else { Vec::new() };
    ensure!(found == wanted, "{found:?}, wanted {wanted:?}");
    ensure!(sizes(&report)?.len() == wanted.len(), "something else: {:#}", report["groups"]);
    Ok(())
}
