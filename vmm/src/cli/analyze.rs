//! `kleak-vmm analyze`: what `run` finds, and every console command, in a machine that was saved.

use super::options::{Reports, SortChoice};
use super::values;
use super::{ExitCode, Failure, check, ctl};
use crate::console::{Request, Target, execute};
use crate::regress::Looked;
use crate::run::{self, RuleFiles, reports};
use crate::saved::{Opening, open};
use anyhow::{Context, Result};
use clap::ArgAction;
use guest_profiles::hooks::Tracked;
use std::path::PathBuf;

/// Options of `kleak-vmm analyze`.
#[derive(Debug, clap::Args)]
pub struct AnalyzeOptions {
    /// What `snapshot=FILE` or `run --snapshot-on-leak` saved, or an ELF vmcore of kdump, libvirt or QEMU
    pub file: PathBuf,
    /// Kernel image: bzImage or vmlinux ELF [default: the snapshot's own; a vmcore has none]
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Structure layouts of a kernel without BTF, as for run [default: the snapshot's own]
    #[arg(long, value_name = "FILE")]
    pub types: Option<PathBuf>,
    /// Print the reply to a console command instead of the report; repeatable
    #[arg(long = "command", short = 'c', value_name = "COMMAND")]
    pub commands: Vec<String>,
    /// Annotations and suppressions beside the built-in ones [default: the saved run's]
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Known leaks, not to be reported; repeatable [default: the saved run's]
    #[arg(long, value_name = "FILE")]
    pub suppressions: Vec<PathBuf>,
    /// What to look for in a vmcore; a snapshot has what was tracked
    #[arg(long, value_name = "WHAT,...", value_delimiter = ',', default_value = "slab,vmalloc,percpu", value_parser = values::tracked)]
    pub track: Vec<Tracked>,
    /// Do not report objects younger than this [default: the saved run's; 0 for a vmcore]
    #[arg(long = "min-age", value_name = "MS")]
    pub min_age_ms: Option<u64>,
    /// Take the stacks of tasks for roots [default: the saved run's; on for a vmcore]
    #[arg(long, value_name = "on|off", action = ArgAction::Set, value_parser = values::on_off)]
    pub stack: Option<bool>,
    /// Follow only the words that can hold a pointer in objects whose type is known [default: the saved run's; on for a vmcore]
    #[arg(long, value_name = "on|off", action = ArgAction::Set, value_parser = values::on_off)]
    pub typed: Option<bool>,
    #[allow(missing_docs, reason = "a doc comment would become the help text of the group")]
    #[command(flatten)]
    pub reports: Reports,
    /// Order of the groups in reports
    #[arg(long, value_enum, default_value_t = SortChoice::Retained)]
    pub sort: SortChoice,
    /// Exit 1 when leaks were found
    #[arg(long)]
    pub fail_on_leak: bool,
    /// Say nothing but errors and results
    #[arg(short, long)]
    pub quiet: bool,
}

/// Scans the saved machine, and prints the report or the replies.
///
/// # Errors
/// A file that is none of those, or damaged, or not of this kernel; a command that is refused.
pub fn analyze(options: &AnalyzeOptions) -> Result<ExitCode> {
    check::input_file(&options.file, "saved machine", "give what snapshot=FILE saved, or an ELF vmcore")?;
    if let Some(kernel) = &options.kernel {
        check::input_file(kernel, "kernel", "check --kernel")?;
    }
    for line in &options.commands {
        let command =
            Request::parse(line).command.map_err(|what| Failure::usage(what).hint("-c help lists them"))?;
        if command.is_for_running() {
            let what = format!("{line} is for a machine that runs: a saved one stays as it is");
            return Err(Failure::usage(what).hint("send it with kleak-vmm ctl").into());
        }
    }
    check::reports(&options.reports)?;
    let rule_files = RuleFiles::read(options.profile.as_deref(), &options.suppressions)?;
    let opening = Opening {
        kernel: options.kernel.clone(),
        types: run::types_file(options.types.as_deref())?,
        rule_files,
        order: options.sort.into(),
        track: options.track.clone(),
        min_age_ms: options.min_age_ms,
        stack: options.stack,
        typed: options.typed,
    };
    let opened = open(&options.file, &opening).map_err(|error| {
        // What the kernel for it is to be, or what else can be done, the error knows best.
        let hint = error.downcast_ref::<Failure>().and_then(Failure::what_to_do).map(str::to_owned);
        let hint =
            hint.unwrap_or_else(|| "docs/console.md, `snapshot=FILE`, says what can be analyzed".to_owned());
        error.context(Failure::usage(format!("Cannot analyze {}", options.file.display())).hint(hint))
    })?;
    if !opened.tracked && !options.quiet {
        eprintln!(
            "kleak-vmm: nobody tracked this machine: objects are what its allocators list, without backtraces, so that \
             annotations by backtrace excuse none of them"
        );
    }
    let detector = opened.detector;
    detector
        .scan()
        .context(Failure::usage("The scan failed").hint("the machine may have been saved too early"))?;
    if options.commands.is_empty() || !options.reports.0.is_empty() {
        let test = options.file.display().to_string();
        let looked = Looked { by: "analyze", test: &test, file: &options.file, failure: None };
        reports::write(&detector, &options.reports, options.quiet, &looked)?;
    }
    for line in &options.commands {
        if ctl::said(&execute(detector.as_ref(), &Request::parse(line)))? != ExitCode::Success {
            return Ok(ExitCode::Usage);
        }
    }
    let leaks = detector.unreferenced();
    Ok(if leaks > 0 && options.fail_on_leak { ExitCode::Leaks } else { ExitCode::Success })
}
