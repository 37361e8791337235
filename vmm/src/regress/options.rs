//! Options of `kleak-vmm regress`.

use super::matrix::Shard;
use crate::cli::options::LabChoice;
use clap::ValueEnum;
use std::ffi::OsString;
use std::path::PathBuf;

/// Everything `regress` was asked for.
#[derive(Debug, Clone, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct RegressOptions {
    /// The suite: kernels, guests and tests, in TOML
    #[arg(value_name = "SUITE.toml", required = true)]
    pub suite: Option<PathBuf>,

    #[allow(missing_docs, reason = "a doc comment would become the help text of the command")]
    #[command(subcommand)]
    pub action: Option<RegressAction>,

    /// Boots that run at a time, as memory allows
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = jobs)]
    pub jobs: usize,

    /// Run only this part of the tests, the Ith of N
    #[arg(long, value_name = "I/N")]
    pub shard: Option<Shard>,

    /// Run only tests whose KERNEL/GUEST/TEST contains this; repeatable: contains one of these
    #[arg(long, value_name = "TEXT")]
    pub only: Vec<String>,

    /// Keep what each guest's console and each run said in files of this folder
    #[arg(long, value_name = "DIR")]
    pub logs: Option<PathBuf>,

    /// Run inside a helper Linux under emulation
    #[arg(long, value_enum, default_value_t = LabChoice::Auto)]
    pub lab: LabChoice,

    /// Say nothing but errors and results
    #[arg(short, long)]
    pub quiet: bool,

    #[allow(missing_docs, reason = "a doc comment would become the help text of the group")]
    #[command(flatten)]
    pub outputs: Outputs,
}

/// What else `regress` does.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum RegressAction {
    /// Join the results of shards, and write and judge them as one
    Merge(MergeOptions),
}

/// Options of `regress merge`.
#[derive(Debug, Clone, clap::Args)]
pub struct MergeOptions {
    /// Results that --report FILE.json wrote
    #[arg(required = true, value_name = "FILE.json")]
    pub files: Vec<PathBuf>,

    #[allow(missing_docs, reason = "a doc comment would become the help text of the group")]
    #[command(flatten)]
    pub outputs: Outputs,
}

/// Where results go, and how they are judged.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Outputs {
    /// Write the results to a file after each test: .json, .xml (JUnit), .sarif, .html, else text; repeatable
    #[arg(long = "report", value_name = "FILE")]
    pub reports: Vec<PathBuf>,

    /// Leaks that are known [default: the suite's; for merge, those that the results were judged by]
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,

    /// Make the baseline say what was found
    #[arg(long)]
    pub update_baseline: bool,

    /// Exit as git bisect run wants it: 0 good, 1 leaks that are not meant, 125 anything else
    #[arg(long)]
    pub bisect_exit_codes: bool,
}

impl RegressOptions {
    /// Those of the subcommand, where there is one.
    pub fn outputs(&self) -> &Outputs {
        match &self.action {
            Some(RegressAction::Merge(merge)) => &merge.outputs,
            None => &self.outputs,
        }
    }

    /// What each boot is told.
    pub(super) fn run_options(&self) -> Vec<OsString> {
        let lab = self.lab.to_possible_value();
        lab.map(|lab| format!("--lab={}", lab.get_name()).into()).into_iter().collect()
    }
}

fn jobs(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(jobs @ 1..=256) => Ok(jobs),
        _ => Err("expected a number from 1 to 256".to_owned()),
    }
}
