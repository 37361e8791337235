//! `kleak-vmm regress`: runs the tests of a suite on its kernels and guests and judges what they leak.
//!
//! ```text
//! suite.rs -> matrix.rs -> boots, several at a time (this file)
//!   boot.rs: driver.rs in the guest <-> worker.rs: `kleak-vmm run`, one process a boot, asked by findings.rs
//!     -> judge.rs <- baseline.rs
//!       -> result.rs, collect.rs
//!         -> write/: text, JSON, JUnit, SARIF, HTML, anew after each test
//! ```

mod baseline;
mod boot;
mod collect;
mod driver;
#[cfg(test)]
mod faults;
mod files;
mod findings;
#[cfg(test)]
mod fixture;
mod judge;
mod matrix;
mod merge;
mod options;
mod recipes;
mod result;
#[cfg(test)]
mod shipped_tests;
mod single;
mod suite;
mod worker;
mod write;

pub use options::{RegressAction, RegressOptions};
pub use single::{Form, Looked, of_report};

use crate::cli::{ExitCode, Failure, check, failure, print};
use crate::console::signals;
use crate::doctor::available_memory_bytes;
use crate::lab;
use crate::run::RuleFiles;
use crate::scratch::Scratch;
use anyhow::{Context, Result, anyhow};
use baseline::Baseline;
use boot::{Environment, Patience};
use collect::Collector;
use matrix::Boot;
use options::Outputs;
use result::Results;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use suite::{Action, KernelSource, RECIPE, Suite};
use worker::Live;

/// Memory a boot takes beside its guest's: the process, or the helper system of a lab.
const HEADROOM: u64 = 1 << 30;

/// Runs a suite, or joins the results of its shards.
///
/// # Errors
/// A broken suite, baseline or result file, a file that is not there: exit code 2.
pub fn regress(options: &RegressOptions) -> Result<ExitCode> {
    let bisect = options.outputs().bisect_exit_codes;
    match run(options).and_then(|finished| finished.exit_code(bisect)) {
        Err(error) if bisect => {
            failure::report(&error);
            Ok(ExitCode::Untested)
        }
        other => other,
    }
}

/// Results, and what became of the files that they go to.
struct Finished {
    results: Results,
    saved: Result<()>,
}

impl Finished {
    /// Leaks and a lost canary are worse than a file that could not be written.
    fn exit_code(self, bisect: bool) -> Result<ExitCode> {
        let contract = self.results.exit_code();
        let code = if bisect { self.results.bisect_exit_code() } else { contract };
        match self.saved {
            Err(error) if contract == ExitCode::Leaks || self.results.canary_lost() => {
                failure::report(&error);
                Ok(code)
            }
            saved => saved.map(|()| code),
        }
    }
}

fn run(options: &RegressOptions) -> Result<Finished> {
    let mut finished = match (&options.action, &options.suite) {
        (Some(RegressAction::Merge(options)), _) => merge(&options.files, &options.outputs)?,
        (None, Some(suite)) => {
            let live = Arc::new(Live::default());
            let stop = Arc::clone(&live);
            signals::watch(move |_| stop.stop()).context("Cannot watch for signals")?;
            let program = std::env::current_exe().context("Cannot tell where this program is")?;
            run_suite(suite, options, &program, boot::PATIENCE, live)?
        }
        (None, None) => return Err(Failure::usage("No suite").hint("kleak-vmm regress SUITE.toml").into()),
    };
    finished.saved = print(&write::text(&finished.results)).and(finished.saved);
    Ok(finished)
}

/// Runs the suite with `program` as the one that boots guests.
fn run_suite(
    path: &Path,
    options: &RegressOptions,
    program: &Path,
    patience: Patience,
    live: Arc<Live>,
) -> Result<Finished> {
    let suite = suite::read(path)?;
    check_files(&suite, &options.outputs)?;
    let boots = matrix::boots(&suite, options.shard, &options.only);
    // A shard may well be empty; a name that is none is a mistake.
    let none = |only: &&String| matrix::boots(&suite, None, std::slice::from_ref(*only)).is_empty();
    if let Some(only) = options.only.iter().find(none) {
        let what = format!("No test of {} has {only:?} in its name", path.display());
        return Err(Failure::usage(what).hint("names are KERNEL/GUEST/TEST").into());
    }
    let baseline_path = options.outputs.baseline.clone().or_else(|| suite.baseline.clone());
    let whose = "give --baseline FILE, or baseline = \"FILE\" in the suite";
    let baseline = read_baseline(baseline_path.as_deref(), options.outputs.update_baseline, whose)?;
    if let Some(folder) = &options.logs {
        let failure = || Failure::usage(format!("Cannot create {}", folder.display())).hint("check --logs");
        fs::create_dir_all(folder).with_context(failure)?;
    }
    // Within a repository, what a reader of the results on another machine can find.
    let here = std::env::current_dir().unwrap_or_default();
    let file = path.strip_prefix(".").or_else(|_| path.strip_prefix(here)).unwrap_or(path);
    let new = Results::new(&suite.name, file, options.shard.map(|shard| shard.to_string()));
    let results = Results { order: matrix::ids(&suite), baseline, ..new };
    let tests = boots.iter().map(|boot| boot.tests.len()).sum();
    let collector = Collector::new(results, tests, options.outputs.reports.clone(), options.quiet);
    let scratch = Scratch::new()?;
    collector.begin();
    let environment = Environment {
        suite: &suite,
        program: program.to_owned(),
        options: options.run_options(),
        logs: options.logs.clone(),
        scratch: scratch.path().to_owned(),
        patience,
        live,
    };
    run_boots(&environment, &boots, options, &collector);
    Ok(conclude(collector.finish(), baseline_path.as_deref(), &options.outputs))
}

/// Compares with the baseline, brings it up to date where asked, and writes the results for good.
fn conclude(mut results: Results, path: Option<&Path>, outputs: &Outputs) -> Finished {
    results.compare();
    let mut saved = Ok(());
    if let Some(path) = path.filter(|_| outputs.update_baseline) {
        if results.tests.iter().any(|test| test.outcome.is_verdict() || !test.groups.is_empty()) {
            let mut baseline = results.baseline.clone();
            baseline.update(&results);
            saved = write::whole(path, &baseline.text());
        } else {
            eprintln!("kleak-vmm: warning: {} is not updated: no test came to a result", path.display());
        }
    }
    // One file that cannot be written does not keep the others.
    let written = write::all(&results, &outputs.reports);
    Finished { results, saved: saved.and(written) }
}

/// One that is to be updated can be written, too; `whose` says how it is named.
fn read_baseline(path: Option<&Path>, update: bool, whose: &str) -> Result<Baseline> {
    match path {
        Some(path) => {
            let baseline = Baseline::read(path, update)?;
            if update {
                check::output_file(path, "baseline", "check its path")?;
            }
            Ok(baseline)
        }
        None if update => Err(Failure::usage("--update-baseline needs to know which").hint(whose).into()),
        None => Ok(Baseline::default()),
    }
}

/// What can be known to go wrong is said before anything boots. Kernels and modules are the tests' own matter: one that was
/// not built is the result of its tests.
fn check_files(suite: &Suite, outputs: &Outputs) -> Result<()> {
    let input = |path: &Path, what: &str| check::input_file(path, what, recipes::PATH_HINT).map(drop);
    let fixed = |path: &Path| {
        let text = path.to_string_lossy();
        !text.starts_with(RECIPE) && !text.contains(suite::KERNEL_PLACE)
    };
    let files = suite.guests.iter().flat_map(|guest| &guest.files);
    for file in files.chain(suite.tests.iter().flat_map(|test| &test.files)).filter(|file| fixed(&file.host))
    {
        input(&file.host, "file")?;
    }
    for test in &suite.tests {
        if let Action::Script(path) = &test.action {
            input(path, "script")?;
        }
    }
    for initramfs in suite.guests.iter().filter_map(|guest| guest.initramfs.as_ref()) {
        input(initramfs, "initramfs")?;
    }
    for disk in suite.guests.iter().flat_map(|guest| &guest.disks) {
        input(&disk.path, "disk")?;
    }
    if let Some(profile) = &suite.profile {
        input(profile, "guest profile")?;
    }
    for file in &suite.suppressions {
        input(file, "suppressions")?;
    }
    RuleFiles::read(suite.profile.as_deref(), &suite.suppressions)?;
    for report in &outputs.reports {
        check::output_file(report, "report", "check --report")?;
    }
    if images::initramfs::find_busybox().is_none() {
        return Err(Failure::host("No static busybox on this host, so tests have no shell in the guest")
            .hint("apt-get install busybox-static")
            .into());
    }
    Ok(())
}

/// Runs the boots, `--jobs` at a time and no more than there is memory for.
fn run_boots(environment: &Environment<'_>, boots: &[Boot], options: &RegressOptions, collector: &Collector) {
    let arch = lab::arch_in(options.lab);
    // One after the other: several fetches at a time would only wait for each other.
    let kernels: Vec<_> = (0..environment.suite.kernels.len())
        .map(|index| {
            if !boots.iter().any(|boot| boot.kernel == index) {
                return None;
            }
            // A download may take its time.
            if environment.live.stopped() {
                return Some(Err(anyhow!(boot::NOT_BEGUN)));
            }
            let kernel = &environment.suite.kernels[index];
            if matches!(kernel.source, KernelSource::Recipe(_)) {
                collector.say(&format!("preparing kernel {}", kernel.name));
            }
            Some(recipes::kernel(kernel, arch))
        })
        .collect();
    let memory = Admission::new(available_memory_bytes().unwrap_or(u64::MAX));
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.min(boots.len()) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, SeqCst);
                    let Some(boot) = boots.get(number) else { return };
                    let Some(kernel) = &kernels[boot.kernel] else { continue };
                    let guest = &environment.suite.guests[boot.guest];
                    let _admitted = memory.admit(guest.mem_bytes + HEADROOM);
                    if kernel.is_ok() && !environment.live.stopped() {
                        let (name, tests) = (&environment.suite.kernels[boot.kernel].name, boot.tests.len());
                        let tests = format!("{tests} test{}", if tests == 1 { "" } else { "s" });
                        collector.say(&format!("booting {name}/{} for {tests}", guest.name));
                    }
                    boot::run(environment, boots, number, kernel, collector);
                }
            });
        }
    });
}

/// Joins the results of shards. What is fixed is told by the baseline that they were judged by, or by the one given.
fn merge(files: &[PathBuf], outputs: &Outputs) -> Result<Finished> {
    let mut results = merge::join(files)?;
    let given = read_baseline(outputs.baseline.as_deref(), outputs.update_baseline, "give --baseline FILE")?;
    if outputs.baseline.is_some() {
        results.baseline = given;
    }
    Ok(conclude(results, outputs.baseline.as_deref(), outputs))
}

/// Lets so many boots run at a time as there is memory for, one at least.
struct Admission {
    available: u64,
    used: Mutex<u64>,
    changed: Condvar,
}

struct Admitted<'a>(&'a Admission, u64);

impl Admission {
    fn new(available: u64) -> Self {
        Self { available, used: Mutex::new(0), changed: Condvar::new() }
    }

    fn admit(&self, bytes: u64) -> Admitted<'_> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        while *used > 0 && used.saturating_add(bytes) > self.available {
            used = self.changed.wait(used).unwrap_or_else(PoisonError::into_inner);
        }
        *used = used.saturating_add(bytes);
        Admitted(self, bytes)
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        *self.0.used.lock().unwrap_or_else(PoisonError::into_inner) -= self.1;
        self.0.changed.notify_all();
    }
}
