//! Planted leaks and real ones: everything that was lost is named, and nothing else.

use anyhow::{Context, Result, ensure};
use images::leaky;
use serde_json::Value;
use std::process::ExitCode;
use tests::{Guest, kernel, module, no_kernel_complaint, sizes, test};

fn main() -> ExitCode {
    let mut trials = vec![test("all_cases_6.1-cloud", || all_cases("6.1-cloud"))];
    trials.push(test("all_cases_6.12-cloud", || all_cases("6.12-cloud")));
    trials.push(test("what_a_system_call_holds_6.1-cloud", || blocked("6.1-cloud")));
    trials.push(test("what_a_system_call_holds_6.12-cloud", || blocked("6.12-cloud")));
    trials.push(test("one_line_finds_a_lost_list", lost_list));
    trials.push(test("one_line_passes_a_clean_module", clean_module));
    trials.push(test("a_module_of_another_kernel_is_named_before_the_boot", foreign_module));
    trials.push(test("io_uring_leak_of_6.1.0-47", || io_uring("6.1.0-47-cloud", true)));
    trials.push(test("io_uring_is_clean_on_the_newest_6.1", || io_uring("6.1-cloud", false)));
    tests::main(trials)
}

/// Every case of `leaky` at once, against its table, by function: each case's objects are allocated in a function
/// named after it.
fn all_cases(line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::new(&kernel, 2)?;
    guest.file(&module(&kernel, "leaky")?, "/leaky.ko").script(
        "insmod /leaky.ko case=all; sleep 3
         echo scan > /dev/ttyS1; cat /dev/ttyS1 > /dev/null
         rmmod leaky; sleep 2",
    )?;
    let finished = guest.boot(0)?;
    no_kernel_complaint(&finished.stdout)?;
    let report = guest.report()?;
    let mut expected = 0;
    for case in leaky::CASES {
        let mut found = leaks_of(&report, &case.function())?;
        let mut wanted = sizes_of(case);
        found.sort_unstable();
        wanted.sort_unstable();
        ensure!(found == wanted, "case {}: found {found:?}, wanted {wanted:?}", case.name);
        expected += wanted.len();
    }
    ensure!(sizes(&report)?.len() == expected, "more than the cases: {:#}", report["groups"]);
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

/// Sizes of what a case loses, once the module is unloaded.
fn sizes_of(case: &leaky::Case) -> Vec<u64> {
    case.reported.iter().map(|lost| lost.size).collect()
}

/// Sizes of the leaks with `function` in their backtrace.
fn leaks_of(report: &Value, function: &str) -> Result<Vec<u64>> {
    let leaks = report["leaks"].as_array().context("leaks")?;
    let through = |leak: &&Value| {
        let frames = leak["backtrace"].as_array();
        frames.is_some_and(|frames| frames.iter().any(|f| f["symbol"] == function))
    };
    Ok(leaks.iter().filter(through).filter_map(|leak| leak["size"].as_u64()).collect())
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
        found.len() == sizes_of(list).len() && sizes(&report)?.len() == found.len(),
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
