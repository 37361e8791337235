//! Options of `kleak-vmm run`.

use super::values::{self, DiskSpec, FileSpec, GdbSpec, ModuleSpec};
pub use crate::arch::TrapChoice;
use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches, ValueEnum};
use guest_profiles::hooks::Tracked;
use introspect::report::Order;
use std::path::{Path, PathBuf};

/// How allocations are seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TracerChoice {
    /// The ring where it can be had, else breakpoints.
    Auto,
    /// Trap instructions in the guest's allocator.
    Breakpoint,
    /// Those early in the boot, then stubs that write events to a ring, without an exit.
    Ring,
    /// None: a plain virtual machine.
    Off,
}

/// Whether to run inside a helper Linux under emulation, which has a KVM that works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LabChoice {
    /// Where this host's KVM does not work.
    Auto,
    /// Never: without usable KVM, exit 4.
    Never,
    /// Always, with AMD's virtualisation emulated by QEMU.
    Svm,
    /// Always, with Intel's virtualisation emulated by Bochs: slower, but with breakpoint exits.
    Vmx,
    /// Always, with arm64's virtualisation emulated by QEMU: for arm64 kernels.
    Arm,
}

/// How many levels of page tables the kernel starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PagingChoice {
    /// Five where the kernel and the host's processors have them and `no5lvl` is not on the command line, else four.
    Auto,
    /// Four.
    #[value(name = "4")]
    Four,
    /// Five.
    #[value(name = "5")]
    Five,
}

/// What else sets off a scan and a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ScanTrigger {
    /// The guest's OOM killer runs.
    Oom,
    /// The guest panics.
    Panic,
    /// The guest powers off, or the run ends in another way.
    Exit,
}

/// Order of the groups in a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SortChoice {
    /// The one that keeps most memory from being freed first.
    Retained,
    /// The one that was allocated first.
    Allocation,
}

impl From<SortChoice> for Order {
    fn from(choice: SortChoice) -> Self {
        match choice {
            SortChoice::Retained => Self::Retained,
            SortChoice::Allocation => Self::Allocation,
        }
    }
}

/// Form of a report file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// kmemleak's text.
    Text,
    /// `kleak-report/1`.
    Json,
    /// JUnit XML: the run as one test.
    Junit,
    /// SARIF 2.1.0.
    Sarif,
    /// A page that needs no network.
    Html,
}

/// A file that gets the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportSpec {
    /// The file; `-` is standard output.
    pub path: PathBuf,
    /// Its form.
    pub format: ReportFormat,
}

/// Everything `run` was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct RunOptions {
    /// Guest kernel: bzImage or vmlinux ELF [default: the host's own /boot/vmlinuz]
    #[arg(long, value_name = "PATH", help_heading = "Guest")]
    pub kernel: Option<PathBuf>,

    /// Initramfs, booted with its own init; with --module, --exec or --file, ours is laid over it and ours is the init
    /// [default: ours alone]
    #[arg(long, value_name = "PATH", help_heading = "Guest")]
    pub initrd: Option<PathBuf>,

    /// Load a kernel module, with parameters; repeatable
    #[arg(long = "module", value_name = "FILE.ko[,PARAM=VALUE...]", value_parser = values::module, help_heading = "Guest")]
    pub modules: Vec<ModuleSpec>,

    /// Where modules that the --module ones depend on are looked for
    #[arg(long, value_name = "DIR", help_heading = "Guest")]
    pub module_dir: Option<PathBuf>,

    /// Run a command in the guest once the modules are loaded; a relative path (./test.sh) is copied from the host
    #[arg(long, value_name = "CMD", help_heading = "Guest")]
    pub exec: Option<String>,

    /// Copy a host file into the guest; repeatable
    #[arg(long = "file", value_name = "HOST:GUEST", value_parser = values::file, help_heading = "Guest")]
    pub files: Vec<FileSpec>,

    /// Give the guest a disk: a raw image or a block device of the host, which it writes to unless ro; repeatable. The first
    /// is /dev/vda; drivers are looked for beside the kernel (../lib/modules), in /lib/modules and in --module-dir
    #[arg(long = "disk", value_name = "PATH[,ro]", value_parser = values::disk, help_heading = "Guest")]
    pub disks: Vec<DiskSpec>,

    /// Added to the kernel command line; kleak.console=off keeps the second serial port for the guest's own use
    #[arg(
        long,
        value_name = "STRING",
        default_value = "",
        hide_default_value = true,
        help_heading = "Guest"
    )]
    pub cmdline: String,

    /// Guest memory
    #[arg(long = "mem", value_name = "SIZE", default_value = "512M", value_parser = values::size, help_heading = "Guest")]
    pub mem_bytes: u64,

    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8), help_heading = "Guest")]
    pub cpus: u8,

    /// Randomise the kernel's address [default: as the command line says]
    #[arg(long, value_name = "on|off", value_parser = values::on_off, help_heading = "Guest")]
    pub kaslr: Option<bool>,

    /// Levels of page tables the kernel starts with; auto: as it would choose itself
    #[arg(long, value_enum, value_name = "auto|4|5", default_value_t = PagingChoice::Auto, hide_possible_values = true, help_heading = "Guest")]
    pub paging: PagingChoice,

    /// Structure layouts of a kernel without BTF: what `pahole --btf_encode_detached FILE vmlinux` writes, or a vmlinux with BTF
    #[arg(long, value_name = "FILE", help_heading = "Guest")]
    pub types: Option<PathBuf>,

    /// Guest profile to use instead of the built-in ones
    #[arg(long, value_name = "FILE", help_heading = "Detector")]
    pub profile: Option<PathBuf>,

    /// Known leaks, not to be reported: [[suppress]] tables of function, module and cache, with wildcards; repeatable
    #[arg(long, value_name = "FILE", help_heading = "Detector")]
    pub suppressions: Vec<PathBuf>,

    /// How allocations are seen
    #[arg(long, value_enum, default_value_t = TracerChoice::Auto, help_heading = "Detector")]
    pub tracer: TracerChoice,

    /// What is tracked: slab (and large kmalloc), vmalloc, percpu, pages, ioremap; the rest is read as roots
    #[arg(
        long,
        value_name = "WHAT,...",
        value_delimiter = ',',
        default_value = "slab,vmalloc,percpu",
        value_parser = values::tracked,
        help_heading = "Detector"
    )]
    pub track: Vec<Tracked>,

    /// Trap instruction of the breakpoint tracer
    #[arg(long, value_enum, default_value_t = TrapChoice::Auto, help_heading = "Detector")]
    pub trap: TrapChoice,

    /// Seconds between automatic scans; 0: only on command
    #[arg(long = "scan-period", value_name = "SECS", default_value_t = 600, help_heading = "Detector")]
    pub scan_period_s: u64,

    /// Objects younger than this many milliseconds are not reported
    #[arg(long = "min-age", value_name = "MS", default_value_t = 1000, help_heading = "Detector")]
    pub min_age_ms: u64,

    /// Scan the stacks of tasks
    #[arg(long, value_name = "on|off", default_value = "on", action = ArgAction::Set, value_parser = values::on_off, help_heading = "Detector")]
    pub stack: bool,

    /// Follow only the words that can hold a pointer in objects whose type is known
    #[arg(long, value_name = "on|off", default_value = "on", action = ArgAction::Set, value_parser = values::on_off, help_heading = "Detector")]
    pub typed: bool,

    /// Scan before the run ends
    #[arg(long, value_name = "yes|no", default_value = "yes", action = ArgAction::Set, value_parser = values::yes_no, help_heading = "Detector")]
    pub scan_at_exit: bool,

    /// What else sets off a scan and a report
    #[arg(
        long,
        value_enum,
        value_name = "WHEN,...",
        value_delimiter = ',',
        default_value = "exit,panic",
        help_heading = "Detector"
    )]
    pub scan_on: Vec<ScanTrigger>,

    /// Clear after each scan on --scan-period or oom, so that each report holds only new leaks
    #[arg(long, help_heading = "Detector")]
    pub clear_after_scan: bool,

    /// Say `kmemleak: N new suspected memory leaks` among the guest's console output, too, when a scan on --scan-period
    /// or oom finds some
    #[arg(long, help_heading = "Detector")]
    pub notice_on_console: bool,

    #[allow(missing_docs, reason = "a doc comment would become the help text of the group")]
    #[command(flatten)]
    pub reports: Reports,

    /// Order of the groups in reports
    #[arg(long, value_enum, default_value_t = SortChoice::Retained, help_heading = "Results")]
    pub sort: SortChoice,

    /// Keep the report of each scan on --scan-period or oom in a numbered file of its own
    #[arg(long, value_name = "DIR", help_heading = "Results")]
    pub report_dir: Option<PathBuf>,

    /// Number of the first report in --report-dir [default: behind the last one there]
    #[arg(long, value_name = "N", requires = "report_dir", help_heading = "Results")]
    pub report_number: Option<u32>,

    /// Write every allocation and free to a file, a line of JSON each, up to 64 MiB
    #[arg(long, value_name = "FILE", help_heading = "Results")]
    pub events: Option<PathBuf>,

    /// Save the machine, for kleak-vmm analyze, at the first scan that finds leaks
    #[arg(long, value_name = "FILE", help_heading = "Results")]
    pub snapshot_on_leak: Option<PathBuf>,

    /// Exit 1 when leaks were found
    #[arg(long, help_heading = "Results")]
    pub fail_on_leak: bool,

    /// End the run after this many seconds, with exit 3
    #[arg(long = "timeout", value_name = "SECS", value_parser = values::seconds, help_heading = "Results")]
    pub timeout_s: Option<u64>,

    /// Control socket [default: $XDG_RUNTIME_DIR/kleak-vmm/PID.sock, or below /run/user/UID or /tmp/kleak-vmm-UID]
    #[arg(long, value_name = "SOCK", help_heading = "Host")]
    pub control: Option<PathBuf>,

    /// Wait for gdb at HOST:PORT, :PORT of this host, or the path of a socket; with ,wait the guest starts when gdb says so
    #[arg(long, value_name = "ADDR[,wait]", value_parser = values::gdb, help_heading = "Host")]
    pub gdb: Option<GdbSpec>,

    /// Run inside a helper Linux under emulation
    #[arg(long, value_enum, default_value_t = LabChoice::Auto, help_heading = "Host")]
    pub lab: LabChoice,

    /// Say more; twice: say everything
    #[arg(short, long, action = ArgAction::Count, help_heading = "Host")]
    pub verbose: u8,

    /// Say nothing but errors and results
    #[arg(short, long, conflicts_with = "verbose", help_heading = "Host")]
    pub quiet: bool,
}

impl RunOptions {
    /// The kernel to boot: the one given, or the host's own.
    pub fn kernel_path(&self) -> PathBuf {
        self.kernel.clone().unwrap_or_else(host_kernel)
    }

    /// Whether the guest's init is ours: not where the user's initramfs is all there is.
    pub fn embedded_init(&self) -> bool {
        self.initrd.is_none() || self.exec.is_some() || !self.modules.is_empty() || !self.files.is_empty()
    }

    /// Whether the commands of the guest's second serial port are served (`kleak.console=off` turns them off).
    pub fn guest_port_enabled(&self) -> bool {
        self.cmdline.split_whitespace().rfind(|word| word.starts_with("kleak.console="))
            != Some("kleak.console=off")
    }

    /// Whether the kernel's address is randomised: `--kaslr`, else what the command line says.
    pub fn kaslr_enabled(&self) -> bool {
        self.kaslr.unwrap_or_else(|| !self.cmdline.split_whitespace().any(|word| word == "nokaslr"))
    }

    /// Whether the end of the run is scanned.
    pub fn scans_at_exit(&self) -> bool {
        self.scan_at_exit && self.scan_on.contains(&ScanTrigger::Exit)
    }
}

/// Where distributions keep the running kernel's image.
fn host_kernel() -> PathBuf {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("/boot/vmlinuz-{}", release.trim()).into()
}

/// The `--report FILE` and `--format FORMAT` pairs: a format belongs to the report before it. Without one, the name's ending
/// tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reports(pub Vec<ReportSpec>);

impl Args for Reports {
    fn augment_args(command: clap::Command) -> clap::Command {
        command.next_help_heading("Results").args([
            Arg::new("report")
                .long("report")
                .value_name("FILE")
                .value_parser(clap::value_parser!(PathBuf))
                .action(ArgAction::Append)
                .help("Write the final report to a file, - for standard output; repeatable [default: text on standard output]"),
            Arg::new("format")
                .long("format")
                .value_name("text|json|junit|sarif|html")
                .value_parser(clap::value_parser!(ReportFormat))
                .hide_possible_values(true)
                .action(ArgAction::Append)
                .requires("report")
                .help("Form of the --report before it [default: by its ending: .json, .xml, .sarif, .html, else text]"),
        ])
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Reports {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let paths = indexed::<PathBuf>(matches, "report");
        let formats = indexed::<ReportFormat>(matches, "format");
        let mut reports = Vec::with_capacity(paths.len());
        let mut used = 0;
        for (i, (at, path)) in paths.iter().enumerate() {
            let end = paths.get(i + 1).map_or(usize::MAX, |(next, _)| *next);
            let mut own = formats.iter().filter(|(index, _)| (*at..end).contains(index));
            let format = own.next().map_or_else(|| format_of(path), |(_, format)| *format);
            used += usize::from(formats.iter().any(|(index, _)| (*at..end).contains(index)));
            reports.push(ReportSpec { path: path.clone(), format });
        }
        if used < formats.len() {
            return Err(clap::Error::raw(
                clap::error::ErrorKind::ArgumentConflict,
                "each --format belongs behind a --report of its own",
            ));
        }
        Ok(Self(reports))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

fn indexed<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, id: &str) -> Vec<(usize, T)> {
    let indices = matches.indices_of(id).into_iter().flatten();
    indices.zip(matches.get_many::<T>(id).into_iter().flatten().cloned()).collect()
}

fn format_of(path: &Path) -> ReportFormat {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => ReportFormat::Json,
        Some("xml") => ReportFormat::Junit,
        Some("sarif") => ReportFormat::Sarif,
        Some("html" | "htm") => ReportFormat::Html,
        _ => ReportFormat::Text,
    }
}
