//! `kleak-vmm run`: puts machine, tracer, detector and console together and sees the guest through to its end.

mod guest;
pub mod reports;
mod rules;
mod watch;

pub use guest::{SETTLE_MS, SETTLE_WITH_MODULES_MS, check_fit, recover, types_file};
pub use rules::RuleFiles;
pub use watch::next_number;

use crate::boot;
use crate::cli::options::{PagingChoice, RunOptions, TracerChoice};
use crate::cli::{ExitCode, Failure, check};
use crate::console::guest_port::SETTLE;
use crate::console::socket::{self, ControlServer};
use crate::console::{ConsoleMux, Executor, GuestPort};
use crate::detector::{Detector, HostFacts, Parts, ScanOptions};
use crate::gdb::{self, Listener};
use crate::lab::{self, Decision};
use crate::machine::{Config, FiveLevels, Machine, TrapInstruction, Traps};
use crate::probe::{self, Depth, Probe};
use crate::tracer::{EventLog, Recorder, breakpoint::Breakpoints, ring::HAS_RING, ring::Ring};
use anyhow::{Context, Result};
use introspect::hooks::{Plan, plan};
use introspect::kernel::Kernel;
use introspect::linux::Linux;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Boots the guest and watches it until it ends.
///
/// # Errors
/// Bad input, a host that cannot, a guest that failed: a [`Failure`] with the contract's exit code.
pub fn run(options: &RunOptions) -> Result<ExitCode> {
    check::check(options)?;
    if let Some(lab) = lab::foreign(options) {
        return lab::run_command(options, &[], lab, None);
    }
    // Before anything is decided or prepared: what the user gave is what goes wrong most often.
    let image = guest::image(options)?;
    let types = types_file(options.types.as_deref())?;
    let drivers = guest::drivers(options, &image)?;
    let initrd = guest::initrd(options, image.release(), &drivers)?;
    let rule_files = RuleFiles::read(options.profile.as_deref(), &options.suppressions)?;
    let probe = match lab::decide(options.lab, || probe::probe(Path::new("/dev/kvm"), Depth::Needed))? {
        Decision::Here(probe) => probe,
        Decision::Lab(lab, reason) => {
            return lab::run_command(options, &drivers, lab, reason.as_deref());
        }
    };
    let kernel = Arc::new(guest::recover(image, types)?);
    let control = bind_control(options)?;
    let debuggers = options.gdb.as_ref().map(|gdb| Listener::bind(&gdb.address)).transpose()?;

    let config = Config {
        initrd: Some(initrd),
        cmdline: guest::cmdline(options),
        mem_bytes: options.mem_bytes,
        cpus: usize::from(options.cpus),
        // A kernel that cannot be moved stays where it is, unless the user insists.
        kaslr: options.kaslr.unwrap_or(options.kaslr_enabled() && boot::can_randomise(&kernel.image)),
        five_levels: five_levels(options, &kernel)?,
        disks: options.disks.iter().map(|disk| (disk.path.clone(), disk.read_only)).collect(),
        ..Config::new(&kernel.image)
    };
    let machine = Arc::new(Machine::new(config)?);
    let placement = machine.settle(&kernel).context("Cannot tell where the kernel is")?;
    let linux = Linux::new(Arc::clone(&kernel), placement);
    let linux = Arc::new(linux.context("Cannot find the kernel's data structures")?);
    let instruction = instruction(options, &probe)?;
    let Tracked { detector, planted, traps } = track(options, &machine, &linux, instruction, rule_files)?;
    let session = Session::new(options, Arc::clone(&machine), detector)?;
    let (listener, _socket) = debuggers.unzip();
    if let Some(listener) = listener {
        let parts = gdb::Parts {
            guest: Arc::clone(machine.guest()),
            linux,
            traps: planted,
            instruction,
            hardware: lab::inside().as_deref() != Some("svm")
                && probe::has_debug_registers(Path::new("/dev/kvm")),
            commands: session.commands.clone(),
        };
        session.wait_for_debugger(options, parts, listener)?;
    }
    session.see_through(options, traps, control)
}

fn bind_control(options: &RunOptions) -> Result<ControlServer> {
    let path = options.control.clone().map_or_else(socket::default_path, Ok)?;
    ControlServer::bind(&path)
}

/// What traps are made of.
fn instruction(options: &RunOptions, probe: &Probe) -> Result<TrapInstruction> {
    match options.tracer {
        // None will be planted: a host without a trap that works may still boot.
        TracerChoice::Off if options.gdb.is_none() => Ok(TrapInstruction::ALL[0]),
        _ => choose_trap(options, probe),
    }
}

/// The detector and its traps.
struct Tracked {
    detector: Arc<Detector>,
    planted: Arc<Breakpoints>,
    /// For the machine; None with `--tracer off`.
    traps: Option<Traps>,
}

/// Levels of page tables as the user wants them, or as the kernel's own decompressor would choose them, which does not run
/// here (arch/x86/boot/compressed/pgtable_64.c).
fn five_levels(options: &RunOptions, kernel: &Kernel) -> Result<FiveLevels> {
    let unwanted = || options.cmdline.split_whitespace().any(|word| word == "no5lvl");
    match options.paging {
        PagingChoice::Five if !kernel.takes_five_levels() => {
            Err(Failure::usage("The kernel was built without five levels of page tables")
                .hint("leave --paging 5 out, or build it with CONFIG_X86_5LEVEL")
                .into())
        }
        PagingChoice::Five => Ok(FiveLevels::Always),
        PagingChoice::Auto if kernel.takes_five_levels() && !unwanted() => Ok(FiveLevels::WherePossible),
        PagingChoice::Auto | PagingChoice::Four => Ok(FiveLevels::Never),
    }
}

/// Plants the traps and puts the detector behind them.
fn track(
    options: &RunOptions,
    machine: &Arc<Machine>,
    linux: &Arc<Linux>,
    instruction: TrapInstruction,
    rule_files: RuleFiles,
) -> Result<Tracked> {
    let recorder = Recorder::new(Arc::clone(linux), machine.ram().clone())?;
    let recorder = Arc::new(recorder.with_log(event_log(options)?));
    say_placement(options, machine, instruction);
    let plan = match options.tracer {
        TracerChoice::Off => Plan::default(),
        TracerChoice::Auto | TracerChoice::Breakpoint | TracerChoice::Ring => {
            plan(&linux.kernel, &guest_profiles::hooks::builtin(), &options.track, instruction.len())
        }
    };
    for gap in plan.gaps.iter().filter(|_| !options.quiet) {
        eprintln!("kleak-vmm: warning: Not tracked on this kernel: {}: {}", gap.cover, gap.why);
    }
    say_plan(options, &plan);
    let ram = machine.ram().clone();
    let traps = Breakpoints::plant(Arc::clone(&recorder), Arc::clone(linux), ram, &plan, instruction)?;
    let traps = Arc::new(traps);
    if wants_ring(options) {
        let ring = Ring::new(machine, linux, Arc::clone(&recorder), &plan, instruction);
        use_ring(options, machine, &traps, ring)?;
    }
    let tracing = options.tracer != TracerChoice::Off;
    recorder.enable(tracing);
    let host = HostFacts {
        kvm: kvm_name(),
        tracer: match (tracing, traps.ring()) {
            (false, _) => "off",
            (true, None) => "breakpoint",
            (true, Some(_)) => "ring",
        }
        .to_owned(),
        trap: instruction.name().to_owned(),
        lab: lab::inside(),
    };
    let parts = Parts {
        guest: Arc::clone(machine.guest()),
        linux: Arc::clone(linux),
        recorder,
        traps: Arc::clone(&traps),
        plan,
        tracked: options.track.clone(),
        rules: rule_files.rules()?,
        rule_files,
        host,
    };
    let scan = ScanOptions {
        min_age_ms: options.min_age_ms,
        stack: options.stack,
        typed: options.typed,
        order: options.sort.into(),
    };
    let detector = Arc::new(Detector::new(parts, scan, options.scan_period_s));
    if let Some(path) = &options.snapshot_on_leak {
        detector.save_at_first_leak(path.clone());
    }
    let planted = Arc::clone(&traps);
    Ok(Tracked { detector, planted, traps: tracing.then(|| Traps { instruction, handler: traps }) })
}

fn event_log(options: &RunOptions) -> Result<Option<EventLog>> {
    let create = |path: &Path| {
        let failure = || Failure::usage(format!("Cannot write events {}", path.display()));
        EventLog::create(path).with_context(|| failure().hint("check --events"))
    };
    options.events.as_deref().map(create).transpose()
}

fn wants_ring(options: &RunOptions) -> bool {
    match options.tracer {
        TracerChoice::Off | TracerChoice::Breakpoint => false,
        // A breakpoint of gdb's stops where a trap is, and nowhere in a jump.
        TracerChoice::Auto => options.gdb.is_none() && HAS_RING,
        TracerChoice::Ring => true,
    }
}

/// Has the tracer use the ring, if there is one, and the machine read it in every pause.
fn use_ring(options: &RunOptions, machine: &Machine, traps: &Breakpoints, ring: Result<Ring>) -> Result<()> {
    match ring {
        Ok(ring) => {
            let ring = Arc::new(ring);
            let read = Arc::clone(&ring);
            machine.when_paused(move || read.drain());
            traps.use_ring(ring);
        }
        Err(why) if options.tracer == TracerChoice::Auto => {
            if !options.quiet {
                eprintln!("kleak-vmm: tracing by traps only: {why:#}");
            }
        }
        Err(why) => {
            let failure = Failure::host(format!("Cannot trace by a ring: {why:#}"));
            return Err(failure.hint("--tracer breakpoint needs none").into());
        }
    }
    Ok(())
}

/// With -v: where the kernel is and how it is trapped.
fn say_placement(options: &RunOptions, machine: &Machine, instruction: TrapInstruction) {
    if let (true, Some(placement)) = (options.verbose > 0, machine.placement()) {
        let place = boot::describe(placement);
        eprintln!("kleak-vmm: the kernel is {place}; traps by {}", instruction.name());
    }
}

/// With -v the functions that are trapped; twice: every place.
fn say_plan(options: &RunOptions, plan: &Plan) {
    match options.verbose {
        0 => {}
        1 => {
            let mut names: Vec<&str> = plan.traps.iter().map(|trap| trap.function.as_str()).collect();
            names.dedup();
            eprintln!("kleak-vmm: {} traps in {}", plan.traps.len(), names.join(", "));
        }
        _ => {
            for trap in &plan.traps {
                let point = if trap.entry { "entry" } else { "return" };
                eprintln!("kleak-vmm: {:?} at the {point} of {}, {}", trap.role, trap.function, trap.site.va);
            }
        }
    }
}

fn choose_trap(options: &RunOptions, probe: &Probe) -> Result<TrapInstruction> {
    let none = |why| Failure::host(format!("Cannot trap the guest: {why}")).hint("try --trap auto");
    Ok(probe.choose(options.trap).map_err(none)?)
}

/// The vendor module behind /dev/kvm.
fn kvm_name() -> String {
    let vendors = ["kvm_intel", "kvm_amd", "kvm_pvm"];
    let loaded = vendors.into_iter().find(|name| Path::new("/sys/module").join(name).exists());
    loaded.unwrap_or("kvm").replace('_', "-")
}

/// A machine with its console, before it starts.
struct Session {
    machine: Arc<Machine>,
    detector: Arc<Detector>,
    console: ConsoleMux,
    _guest_port: Option<GuestPort>,
    commands: Arc<Executor>,
}

impl Session {
    fn new(options: &RunOptions, machine: Arc<Machine>, detector: Arc<Detector>) -> Result<Self> {
        let console = ConsoleMux::new()?;
        machine.connect_serial(0, console.sink());
        let commands = Arc::new(Executor::new(detector.clone()));
        let guest_port = if options.guest_port_enabled() {
            let port = GuestPort::new();
            machine.connect_serial(1, port.sink());
            // Under full emulation a shell takes longer from its echo to its close.
            let settle = if lab::inside().is_some() { SETTLE * 3 } else { SETTLE };
            let asked = Arc::new(Executor::for_guest(detector.clone()));
            port.serve(machine.serial(1).clone(), asked, settle)?;
            Some(port)
        } else {
            None
        };
        Ok(Self { machine, detector, console, _guest_port: guest_port, commands })
    }

    /// Lets debuggers in, and with `,wait` nothing run before one says so.
    fn wait_for_debugger(&self, options: &RunOptions, parts: gdb::Parts, listener: Listener) -> Result<()> {
        let wait = options.gdb.as_ref().is_some_and(|gdb| gdb.wait);
        self.machine.allow_debugger(parts.instruction);
        if wait {
            self.machine.debugger_stops()?;
        }
        if let Some(gdb) = options.gdb.as_ref().filter(|_| !options.quiet && lab::inside().is_none()) {
            eprintln!("kleak-vmm: for gdb: target remote {}", gdb.address);
        }
        gdb::serve(parts, listener)
    }

    fn see_through(
        mut self,
        options: &RunOptions,
        traps: Option<Traps>,
        mut control: ControlServer,
    ) -> Result<ExitCode> {
        let machine = Arc::clone(&self.machine);
        crate::console::signals::watch(move |_| machine.stop()).context("Cannot watch for signals")?;
        control.serve(self.commands.clone())?;
        self.machine.start(traps)?;
        if options.tracer != TracerChoice::Off {
            let detector = Arc::clone(&self.detector);
            let thread = std::thread::Builder::new().name("traps".to_owned());
            thread
                .spawn(move || detector.guard_traps())
                .context("Cannot start the thread that guards traps")?;
        }
        if self.detector.parts().traps.ring().is_some() {
            let detector = Arc::clone(&self.detector);
            let verbose = options.verbose > 0;
            let thread = std::thread::Builder::new().name("ring".to_owned());
            thread
                .spawn(move || detector.serve_ring(verbose))
                .context("Cannot start the thread that reads the ring")?;
        }
        self.console.start_input(self.machine.serial(0).clone(), self.commands.clone())?;
        let timeout = options.timeout_s.map(Duration::from_secs);
        let outcome = watch::until_end(&self.machine, &self.detector, options, timeout);
        self.detector.parts().recorder.flush_log();
        // The terminal is the user's again before anything is said.
        drop(self.console);
        drop(control);
        let ended = watch::Ended { machine: &self.machine, detector: &self.detector, options };
        ended.conclude(outcome)
    }
}
