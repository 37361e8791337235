//! `kleak-vmm regress` on real guests, and what it makes of them.

mod bisect;
mod boots;
mod canary;
mod forms;
mod killed;
mod slurm;

use anyhow::{Context, Result, ensure};
use images::cache;
use serde_json::Value;
use std::path::Path;
use std::process::ExitCode;
use tests::{Finished, RUN_TIMEOUT, Scratch, Session, long_test, test, with_packages};

fn main() -> ExitCode {
    let mut trials = vec![test("a_shipped_suite_and_leaks_of_the_tests_that_made_them", boots::attribution)];
    let forms = test("results_are_valid_junit_and_sarif", forms::valid);
    trials.push(with_packages(forms, &["libxml2-utils", "python3-jsonschema"]));
    trials.push(test("documented_commands_are_taken", forms::documented));
    trials.push(with_packages(long_test("a_browser_shows_the_page", forms::page), &["chromium"]));
    trials.push(long_test("a_guest_that_dies_takes_one_test_with_it", boots::faults));
    trials.push(long_test("what_is_killed_or_full_hurts_one_test", killed::killed));
    trials.push(long_test("what_is_ended_keeps_its_results", killed::ended));
    trials.push(long_test("an_initramfs_of_the_guests_own", boots::initramfs));
    trials.push(long_test("each_boot_has_disks_of_its_own", boots::disks));
    trials.push(long_test("groups_are_the_same_over_boots_and_cpus", boots::stable_groups));
    trials.push(long_test("the_canary_is_found_and_its_reference_put_back", canary::found));
    trials.push(long_test("an_untraced_canary_is_not_found", canary::untraced));
    trials.push(long_test("bisect_finds_the_commit_that_leaks", bisect::bisect));
    let slurm = long_test("a_slurm_job_array_runs_the_shards", slurm::job_array);
    trials.push(with_packages(slurm, &["slurm-wlm"]));
    for suite in ["planted", "kmemleak-test", "io_uring", "boot"] {
        trials.push(long_test(format!("suite_{suite}"), move || shipped(suite)));
    }
    tests::main(trials)
}

/// A folder with a suite, and its results.
struct Case(Scratch);

impl Case {
    fn new(suite: &str) -> Result<Self> {
        let scratch = Scratch::new()?;
        scratch.file("suite.toml", suite)?;
        Ok(Self(scratch))
    }

    fn arguments(&self, more: &[&str]) -> Vec<String> {
        let path = |name: &str| self.0.path(name).display().to_string();
        let mut line = vec!["regress".to_owned(), path("suite.toml")];
        for name in ["results.json", "results.xml", "results.sarif", "results.html"] {
            line.extend(["--report".to_owned(), path(name)]);
        }
        line.extend(["--logs".to_owned(), path("logs")]);
        line.extend(more.iter().map(|&word| word.to_owned()));
        line
    }

    fn regress(&self, code: i32, more: &[&str]) -> Result<(Finished, Value)> {
        let mut session = Session::start(self.arguments(more))?;
        // Longer than a boot: several of them.
        let deadline = std::time::Instant::now() + RUN_TIMEOUT * 6;
        while session.is_running()? && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        let finished = session.finish()?;
        finished.expect_code(code)?;
        let text = std::fs::read_to_string(self.0.path("results.json")).context("results")?;
        Ok((finished, serde_json::from_str(&text)?))
    }
}

/// Kernel, guest and the test that the boot itself leaks nothing.
fn head(kernel: &Path, cpus: u32) -> String {
    format!(
        "settle_ms = 2000\nboot_timeout_s = 240\n[[kernel]]\nname = \"k\"\npath = \"{}\"\n[[guest]]\nname = \"g\"\n\
         cpus = {cpus}\ncmdline = \"loglevel=5 watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=120\"\n\
         [[test]]\nname = \"boot\"\n",
        kernel.display()
    )
}

fn planted(module: &Path, name: &str, expected: &str) -> String {
    format!("[[test]]\nname = \"{name}\"\nmodules = [\"{},case={name}\"]\n{expected}\n", module.display())
}

/// Outcome and number of leaks of each test.
fn outcomes(results: &Value) -> Result<Vec<(&str, &str, u64)>> {
    let tests = results["tests"].as_array().context("tests")?;
    tests.iter().map(outcome).collect()
}

fn outcome(test: &Value) -> Result<(&str, &str, u64)> {
    let groups = test["groups"].as_array().context("groups")?;
    let leaks = groups.iter().filter_map(|group| group["count"].as_u64()).sum();
    Ok((test["test"].as_str().context("test")?, test["outcome"].as_str().context("outcome")?, leaks))
}

fn canaries(results: &Value) -> Vec<&Value> {
    results["boots"].as_array().into_iter().flatten().map(|boot| &boot["canary"]).collect()
}

/// The text of a suite of `images/suites`.
fn shipped_text(name: &str) -> Result<String> {
    let path = cache::workspace().join(format!("images/suites/{name}.toml"));
    std::fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))
}

/// A suite of `images/suites`, as it is.
fn shipped(name: &str) -> Result<()> {
    let case = Case::new(&shipped_text(name)?)?;
    let (finished, results) = case.regress(0, &[])?;
    let tests = outcomes(&results)?;
    ensure!(tests.iter().all(|(_, outcome, _)| *outcome == "passed"), "{}", finished.stdout);
    print!("{}", finished.stdout);
    Ok(())
}
