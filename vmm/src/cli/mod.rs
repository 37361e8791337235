//! The command line: parsing, dispatch, exit codes.

mod analyze;
pub mod check;
pub mod ctl;
mod doctor;
pub mod failure;
mod inspect;
pub mod options;
pub mod relay;
mod run;
#[cfg(test)]
mod tests;
mod top;
pub mod values;

pub use analyze::AnalyzeOptions;
pub use failure::{ExitCode, Failure};
pub use options::RunOptions;

use crate::lab::Lab;

use crate::regress::{RegressOptions, regress};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser, Subcommand};
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

/// Finds memory leaks in an unmodified Linux kernel, from outside it.
#[derive(Debug, Parser)]
#[command(name = "kleak-vmm", version, subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

const REGRESS_HELP: &str = "A suite:

  [[kernel]]
  path = \"bzImage\"

  [[test]]
  name = \"mydriver\"
  modules = [\"mydriver.ko\"]
  script = \"exercise.sh\"

docs/regress.md has every key. Exit codes: 0 nothing leaked but what is known or expected; 1 new leaks, or expected ones that are
missing; 2 something is wrong with the suite, the baseline or a report; 3 a test failed, or could not be made; 4 this host cannot.";

#[derive(Debug, Subcommand)]
enum Action {
    /// Boot a kernel, track its heap, scan for leaks; the guest's console is on standard input and output
    #[command(
        after_help = "On the console, Ctrl-a h lists the keys, Ctrl-a c opens the monitor and Ctrl-a x quits."
    )]
    Run(Box<RunOptions>),
    /// Run the tests of a suite on its kernels and guests, and judge what they leak
    #[command(after_help = REGRESS_HELP)]
    Regress(Box<RegressOptions>),
    /// Send one console command to a running virtual machine
    Ctl(CtlOptions),
    /// Show live who holds the guest's memory: sites and caches with bytes, rates and their history
    Top(TopOptions),
    /// Scan a saved snapshot or a vmcore for leaks, without a virtual machine
    Analyze(Box<AnalyzeOptions>),
    /// Show what can be recovered from a kernel image, and which hooks apply
    Inspect(InspectOptions),
    /// Tell whether this host can run it, and how fast; what to do if not
    Doctor(DoctorOptions),
}

/// Options of `kleak-vmm ctl`.
#[derive(Debug, clap::Args)]
pub struct CtlOptions {
    /// Control socket [default: that of the only virtual machine running]
    #[arg(long, value_name = "SOCK")]
    pub control: Option<PathBuf>,
    /// Console command, such as scan, report or help
    #[arg(required = true, trailing_var_arg = true)]
    pub command: Vec<String>,
}

/// Options of `kleak-vmm top`.
#[derive(Debug, clap::Args)]
pub struct TopOptions {
    /// Control socket [default: that of the only virtual machine running]
    #[arg(long, value_name = "SOCK")]
    pub control: Option<PathBuf>,
    /// Seconds between two looks
    #[arg(long = "every", value_name = "SECS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub every_s: u64,
}

/// Options of `kleak-vmm inspect`.
#[derive(Debug, clap::Args)]
pub struct InspectOptions {
    /// Kernel image: bzImage or vmlinux ELF
    #[arg(required_unless_present = "live")]
    pub kernel: Option<PathBuf>,
    /// Instead of an image, the roots of a running virtual machine: what each refers to, and what is not read
    #[arg(long, conflicts_with = "kernel")]
    pub live: bool,
    /// With --live: its control socket [default: that of the only virtual machine running]
    #[arg(long, value_name = "SOCK", requires = "live")]
    pub control: Option<PathBuf>,
    /// Structure layouts of a kernel without BTF, as for run
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub types: Option<PathBuf>,
    /// One line of JSON instead of text
    #[arg(long)]
    pub json: bool,
}

/// Options of `kleak-vmm doctor`.
#[derive(Debug, clap::Args)]
pub struct DoctorOptions {
    /// One line of JSON instead of text
    #[arg(long)]
    pub json: bool,
    /// Prepare the lab first (svm, or =vmx), which needs Debian's mirror once: later runs need no network
    #[arg(long, value_name = "LAB", num_args = 0..=1, require_equals = true, default_missing_value = "svm")]
    pub prepare_lab: Option<Lab>,
}

/// The whole program: parses `args` (with the program's name first), runs the subcommand, prints an error once.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    if crate::lab::agent::is_wanted() {
        crate::lab::agent::main();
    }
    failure::install_panic_hook();
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, args.get(1)),
    };
    dispatch(cli.command).unwrap_or_else(|error| failure::report(&error))
}

/// Prints to standard output; that nobody reads it any more is no error.
///
/// # Errors
/// Any other failure to write, such as a full disk.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::from(error).context(Failure::host("Cannot write to standard output")))
        }
        _ => Ok(()),
    }
}

/// `--help` and `--version` go to standard output; a usage error is said in the house's style. `first` is the argument that may
/// be the subcommand.
fn usage(error: &clap::Error, first: Option<&OsString>) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            print(&error.render().to_string()).map_or(ExitCode::Host, |()| ExitCode::Success)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // The help itself is the hint here.
            let _ = std::io::stderr().write_all(error.render().to_string().as_bytes());
            ExitCode::Usage
        }
        _ => failure::report(&usage_failure(error, first).into()),
    }
}

/// clap's message is a paragraph, then tips and usage: the paragraph is the error, a tip the hint.
fn usage_failure(error: &clap::Error, first: Option<&OsString>) -> Failure {
    let rendered = error.render().to_string();
    let paragraph = rendered.split("\n\n").next().unwrap_or_default();
    let what =
        paragraph.strip_prefix("error: ").unwrap_or(paragraph).lines().map(str::trim).collect::<Vec<_>>();
    let tip = match (error.get(ContextKind::SuggestedArg), error.get(ContextKind::SuggestedSubcommand)) {
        (Some(ContextValue::String(name)), _) | (_, Some(ContextValue::String(name))) => Some(name.clone()),
        (_, Some(ContextValue::Strings(names))) => names.first().cloned(),
        _ => None,
    };
    let known = Cli::command();
    let subcommand = first.and_then(|name| known.find_subcommand(name));
    let hint = match (tip, subcommand) {
        (Some(name), _) => format!("did you mean {name}?"),
        (None, Some(subcommand)) => format!("kleak-vmm {} --help lists what it takes", subcommand.get_name()),
        (None, None) => "kleak-vmm help lists the subcommands".to_owned(),
    };
    Failure::usage(what.join(" ")).hint(hint)
}

fn dispatch(action: Action) -> anyhow::Result<ExitCode> {
    match action {
        Action::Run(options) => run::run(&options),
        Action::Regress(options) => regress(&options),
        Action::Ctl(options) => ctl::ctl(&options),
        Action::Top(options) => top::top(&options),
        Action::Analyze(options) => analyze::analyze(&options),
        Action::Inspect(options) => inspect::inspect(&options),
        Action::Doctor(options) => doctor::doctor(&options),
    }
}
