//! The virtual machine: memory, vCPU threads, pause and resume.
//!
//! ```text
//! Machine::new: RAM, kernel and tables in it, interrupt chips, vCPUs
//!   -> start: one thread per vCPU
//!   -> pause -> Paused: registers and frozen memory -> drop: all run again
//!   -> wait -> Outcome
//! ```

mod console_log;
mod control;
mod debugger;
mod dirty;
mod error;
mod guest;
mod memory;
mod private;
mod recent;
mod vcpu;

#[cfg(test)]
mod tests;

pub use console_log::ConsoleLog;
pub use control::Outcome;
pub use debugger::{Order, Stop, Why};
pub use error::HostError;
pub(crate) use error::kvm_error;
pub use guest::{Guest, Paused};
pub use memory::{FrozenRam, GuestRam, Mappings, WriteError};
pub use private::PrivatePages;

pub use crate::arch::TrapInstruction;
use crate::arch::{self, Platform};
use crate::boot::{self, Loaded};
use crate::devices::{Disk, SerialPort, SerialSink};
use anyhow::{Context, bail, ensure};
use console_log::Watched;
use control::{Control, Snapshot, kick_signal};
use dirty::DirtyLog;
use introspect::arch::Registers;
use introspect::image::KernelImage;
use introspect::kernel::Kernel;
use introspect::linux::Placement;
use introspect::memory::{Pa, RamRange, Va};
use kvm_ioctls::{Kvm, VmFd};
use std::fmt::Write;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vcpu::Vcpu;

/// What the tracer says of a vCPU exit that may be one of its traps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrapOutcome {
    /// One of ours; `registers` now hold where the guest goes on, which must not be the trap itself.
    Resume,
    /// One of ours that must wait: to be asked again, with the same registers.
    Again,
    /// Not ours: a port write is ignored, a breakpoint goes back into the guest.
    Foreign,
}

/// Sees every exit that may be a trap, on the vCPU's own thread, before anything else does.
///
/// It must not take a lock that some thread holds while it calls [`Machine::pause`].
pub trait TrapHandler: Send + Sync {
    /// True when a trap is planted at `ip`. Asked for each candidate address of an exit: cheap.
    fn is_site(&self, ip: Va) -> bool;

    /// The instruction pointer in `registers` is the address of the trap itself, whatever the hypervisor left in it.
    fn trap(&self, cpu: usize, registers: &mut Registers) -> TrapOutcome;
}

/// Traps that the guest will run into.
#[derive(Clone)]
pub struct Traps {
    /// What the sites hold.
    pub instruction: TrapInstruction,
    /// Who handles them.
    pub handler: Arc<dyn TrapHandler>,
}

/// Whether the kernel starts with five levels of page tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FiveLevels {
    /// With four.
    Never,
    /// Where the processors have them.
    WherePossible,
    /// A host without them cannot run the machine.
    Always,
}

/// Least and most guest memory, bytes.
pub const MEMORY_LIMITS: (u64, u64) = (128 << 20, 8 << 30);
/// Most vCPUs.
pub const MAX_CPUS: usize = 8;
/// Most disks.
pub const MAX_DISKS: usize = 8;

/// What a machine is made of.
#[derive(Clone)]
pub struct Config<'a> {
    /// The unpacked kernel.
    pub image: &'a KernelImage,
    /// Initramfs, as the kernel takes it (packed or not).
    pub initrd: Option<Vec<u8>>,
    /// Kernel command line.
    pub cmdline: String,
    /// RAM in bytes, within [`MEMORY_LIMITS`]; rounded down to whole pages.
    pub mem_bytes: u64,
    /// vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: usize,
    /// Move the kernel to a random address, and have it randomise its memory map too. Needs the image's relocations.
    pub kaslr: bool,
    /// Makes the random address repeatable.
    pub kaslr_seed: Option<u64>,
    /// Levels of the kernel's page tables; it must have been built for five where they are asked for.
    pub five_levels: FiveLevels,
    /// Images of disks, [`MAX_DISKS`] at most, each with true where the guest may not write.
    pub disks: Vec<(PathBuf, bool)>,
}

impl<'a> Config<'a> {
    /// `image` with 512 MiB, one vCPU, no initramfs, an empty command line, at the address it is linked for.
    pub fn new(image: &'a KernelImage) -> Self {
        Self {
            image,
            initrd: None,
            cmdline: String::new(),
            mem_bytes: 512 << 20,
            cpus: 1,
            kaslr: false,
            kaslr_seed: None,
            five_levels: FiveLevels::Never,
            disks: Vec::new(),
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        let (least, most) = MEMORY_LIMITS;
        ensure!(
            (least..=most).contains(&self.mem_bytes),
            "Guest memory is {} MiB, it must be {} to {} MiB",
            self.mem_bytes >> 20,
            least >> 20,
            most >> 20
        );
        ensure!(
            self.disks.len() <= MAX_DISKS,
            "The guest has {} disks, at most {MAX_DISKS}",
            self.disks.len()
        );
        ensure!(
            (1..=MAX_CPUS).contains(&self.cpus),
            "The guest has {} vCPUs, it must have 1 to {MAX_CPUS}",
            { self.cpus }
        );
        Ok(())
    }
}

/// What devices are made of.
pub struct Devices<'a> {
    /// Sees what the guest prints.
    pub console: Arc<ConsoleLog>,
    /// Guest memory, for devices that transfer to it by themselves.
    pub ram: &'a GuestRam,
    /// Disks.
    pub disks: Vec<Disk>,
}

/// A virtual machine. All methods may be called from any thread.
pub struct Machine {
    guest: Arc<Guest>,
    platform: Arc<Platform>,
    loaded: Loaded,
    cmdline: String,
    waiting: Mutex<Vec<Vcpu>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Slots that are the guest's RAM; those behind are private.
    ram_slots: usize,
    private: Mutex<Vec<Arc<PrivatePages>>>,
    gigabyte_pages: bool,
    vm: Arc<VmFd>,
}

/// A kernel that has panicked gets this long to finish its console output.
const PANIC_GRACE: Duration = Duration::from_secs(10);
/// Console lines in [`Machine::diagnosis`].
const DIAGNOSIS_LINES: usize = 40;

impl Machine {
    /// Builds a machine with the kernel in its memory and the boot CPU at the kernel's entry.
    ///
    /// # Errors
    /// A [`HostError`] for what the host cannot do; else what is wrong with the configuration.
    pub fn new(config: Config<'_>) -> anyhow::Result<Self> {
        config.check()?;
        let disks = config.disks.iter().map(|(path, read_only)| {
            Disk::open(path, *read_only).with_context(|| format!("Cannot open disk {}", path.display()))
        });
        let disks = disks.collect::<anyhow::Result<_>>()?;
        let kvm = open_kvm()?;
        arch::check_capabilities(&kvm)?;
        let ram = GuestRam::new(arch::layout::ram(config.mem_bytes & !0xfff))?;
        let levels = arch::page_table_levels(&kvm, config.five_levels)?;
        let loaded = boot::load(&ram, &config, levels)?;
        let vm = create_vm(&kvm)?;
        for (slot, (range, host)) in ram.mappings().enumerate() {
            // SAFETY: the mapping outlives the machine, which keeps `ram`.
            unsafe { map(&vm, slot, range, host, 0)? };
        }
        let console = Arc::new(ConsoleLog::default());
        let vm = Arc::new(vm);
        let (platform, fds) = arch::assemble(
            &kvm,
            &vm,
            &config,
            &loaded,
            Devices { console: console.clone(), ram: &ram, disks },
        )?;
        let platform = Arc::new(platform);
        let control = Arc::new(Control::new(config.cpus));
        let vcpus = fds.into_iter().enumerate().map(|(index, fd)| Vcpu {
            index,
            fd,
            platform: platform.clone(),
            control: control.clone(),
            traps: None,
            debugger: vcpu::Debugger::default(),
        });
        let machine = Self {
            waiting: Mutex::new(vcpus.collect()),
            ram_slots: ram.mappings().count(),
            private: Mutex::default(),
            gigabyte_pages: arch::has_gigabyte_pages(&kvm),
            guest: Arc::new(Guest::new(
                ram,
                control,
                console,
                OnceLock::new(),
                Some(DirtyLog::new(vm.clone())),
            )),
            platform,
            loaded,
            cmdline: config.cmdline,
            threads: Mutex::default(),
            vm,
        };
        machine.connect_serial(0, Box::new(crate::devices::NullSink));
        Ok(machine)
    }

    /// The guest, for who looks at it and does not run it.
    pub fn guest(&self) -> &Arc<Guest> {
        &self.guest
    }

    /// Puts memory that is no RAM of the guest's at `pa`.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn add_private(&self, pa: Pa, pages: &Arc<PrivatePages>) -> anyhow::Result<()> {
        let mut private = lock(&self.private);
        let range = RamRange { start: pa, len: pages.len() as u64 };
        // SAFETY: the mapping outlives the machine, which keeps it.
        unsafe { map(&self.vm, self.ram_slots + private.len(), range, pages.host(), 0)? };
        private.push(Arc::clone(pages));
        Ok(())
    }

    /// The guest's processors have pages of one GiB.
    pub fn has_gigabyte_pages(&self) -> bool {
        self.gigabyte_pages
    }

    /// Serial port 0 (the console) or 1.
    pub fn serial(&self, port: usize) -> &Arc<SerialPort> {
        &self.platform.serial[port]
    }

    /// Sends the output of serial port 0 or 1 to `sink`.
    pub fn connect_serial(&self, port: usize, sink: Box<dyn SerialSink>) {
        let sink =
            if port == 0 { Box::new(Watched::new(self.guest.console.clone(), sink)) as Box<_> } else { sink };
        self.serial(port).connect(sink);
    }

    /// Prints a line among the guest's console output: to whoever sees that, and into the log of it. The guest does not
    /// know.
    pub fn announce(&self, line: &str) {
        let gap = if self.guest.console.is_within_line() { "\r\n" } else { "" };
        self.serial(0).show(format!("{gap}{line}\r\n").as_bytes());
    }

    /// Says where the kernel runs. One that moves itself has gone so far that it knows, on its boot CPU alone, and has
    /// allocated nothing yet. Before [`Machine::start`].
    ///
    /// # Errors
    /// The kernel does not get that far, or the machine was started before.
    pub fn settle(&self, kernel: &Kernel) -> anyhow::Result<Placement> {
        if let Some(placement) = self.guest.placement() {
            return Ok(placement);
        }
        let mut vcpus = lock(&self.waiting);
        let boot = vcpus.first_mut().context("The machine was started before")?;
        let placement = boot::settle(&mut boot.fd, &self.platform, self.guest.ram(), &self.loaded, kernel)?;
        self.guest.place(placement);
        Ok(placement)
    }

    /// Lets the guest run. With `traps`, exits of that instruction go to the handler; breakpoints are asked of KVM
    /// before the first instruction runs.
    ///
    /// # Errors
    /// When it was started before, or the host gives no threads or no guest debugging.
    pub fn start(&self, traps: Option<Traps>) -> anyhow::Result<()> {
        let mut vcpus = std::mem::take(&mut *lock(&self.waiting));
        ensure!(!vcpus.is_empty(), "The machine was started before");
        install_kick_handler()?;
        let debugged = self.guest.control.debugged_by();
        for vcpu in &mut vcpus {
            vcpu.debugger.traps = debugged;
            if let Some(instruction) = traps.as_ref().map(|traps| traps.instruction).or(debugged) {
                arch::enable_traps(&mut vcpu.fd, instruction)?;
            }
            vcpu.traps = traps.as_ref().map(|traps| traps.handler.clone());
        }
        for vcpu in vcpus {
            let index = vcpu.index;
            self.guest.control.starting(index);
            let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(move || vcpu.run());
            match thread {
                Ok(thread) => lock(&self.threads).push(thread),
                Err(error) => {
                    let why = format!("Cannot start the thread of vCPU {index}: {error}");
                    self.guest.control.never_started(index);
                    self.guest.control.finish(Outcome::Error(why.clone()));
                    bail!(why);
                }
            }
        }
        Ok(())
    }

    /// Waits until the machine has ended; None when `timeout` passes first (None waits for ever).
    pub fn wait(&self, timeout: Option<Duration>) -> Option<Outcome> {
        const POLL: Duration = Duration::from_millis(500);
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let left = deadline.map_or(POLL, |d| d.saturating_duration_since(Instant::now()).min(POLL));
            if let Some(outcome) = self.guest.control.wait(left) {
                return Some(self.guest.with_panic(outcome));
            }
            if let Some((line, since)) = self.guest.console.panicked()
                && since.elapsed() > PANIC_GRACE
            {
                self.guest.control.finish(Outcome::Panic(line));
            }
            if deadline.is_some_and(|d| Instant::now() >= d) {
                return None;
            }
        }
    }

    /// What one wants to know of a guest that failed: last console lines, where each vCPU was, its last exits, the
    /// command line. Complete once the machine has ended or was paused. `symbolise` names a code address.
    pub fn diagnosis(&self, symbolise: &dyn Fn(Va) -> Option<String>) -> String {
        let mut text = String::new();
        let mut line = |args: std::fmt::Arguments<'_>| {
            let _ = text.write_fmt(args);
            text.push('\n');
        };
        if let Some(outcome) = self.outcome() {
            line(format_args!("{outcome}"));
        }
        line(format_args!("command line: {}", self.cmdline));
        for (cpu, snapshot) in self.guest.control.snapshots().into_iter().enumerate() {
            line(format_args!("vCPU {cpu}: {}", place(&snapshot, symbolise)));
            if !snapshot.exits.is_empty() {
                line(format_args!("  last exits: {}", snapshot.exits.join(", ")));
            }
        }
        let tail = self.guest.console.tail(DIAGNOSIS_LINES);
        line(format_args!("console, last {} lines:", tail.len()));
        for entry in tail {
            line(format_args!("  {entry}"));
        }
        text
    }
}

/// A machine is a guest that runs.
impl Deref for Machine {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
        for thread in lock(&self.threads).drain(..) {
            // A vCPU thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

/// Where a vCPU stands.
fn place(snapshot: &Snapshot, symbolise: &dyn Fn(Va) -> Option<String>) -> String {
    match &snapshot.state {
        Err(why) => format!("registers unreadable ({why})"),
        Ok(state) if !state.online => "not online".to_owned(),
        Ok(state) if arch::is_reset(state) => {
            "reset by KVM when it shut down, registers lost (AMD hosts do that)".to_owned()
        }
        Ok(state) => {
            let ip = state.registers.ip();
            let mode = if state.user_mode { "user" } else { "kernel" };
            let symbol = if state.user_mode { None } else { symbolise(ip) };
            let symbol = symbol.map(|s| format!(" {s}")).unwrap_or_default();
            format!("ip {ip}{symbol}, sp {}, {mode} mode, page tables {}", state.registers.sp(), state.root)
        }
    }
}

fn open_kvm() -> Result<Kvm, HostError> {
    Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => HostError::NoKvm,
        libc::EACCES | libc::EPERM => HostError::Permission,
        _ => kvm_error("Cannot open /dev/kvm")(error),
    })
}

/// Gives the guest `range`, which is mapped at `host` here; or what it has with other flags.
///
/// # Safety
/// That mapping must live as long as the machine.
unsafe fn map(vm: &VmFd, slot: usize, range: RamRange, host: u64, flags: u32) -> Result<(), HostError> {
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot: slot as u32,
        guest_phys_addr: range.start.0,
        memory_size: range.len,
        userspace_addr: host,
        flags,
    };
    // SAFETY: by the contract of this function.
    unsafe { vm.set_user_memory_region(region) }.map_err(kvm_error("Cannot give the guest its memory"))
}

/// KVM_CREATE_VM fails with EINTR when a signal arrives meanwhile, which a terminal's resize is enough for.
fn create_vm(kvm: &Kvm) -> Result<VmFd, HostError> {
    const ATTEMPTS: usize = 5;
    for _ in 1..ATTEMPTS {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(kvm_error("Cannot create a virtual machine")),
        }
    }
    kvm.create_vm().map_err(kvm_error("Cannot create a virtual machine"))
}

fn install_kick_handler() -> anyhow::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    vmm_sys_util::signal::register_signal_handler(kick_signal(), nothing)
        .context("Cannot install the handler of the signal that stops vCPUs")
}

/// The data behind these locks has no invariant that a panicking holder could have broken.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
