//! A guest as the detector sees it: memory and vCPUs that stand still when they are looked at. Whether threads run them
//! or they were saved long ago makes no difference.

use super::console_log::ConsoleLog;
use super::control::{Control, Outcome};
use super::dirty::DirtyLog;
use super::lock;
use super::memory::{FrozenRam, GuestRam};
use introspect::arch::CpuState;
use introspect::linux::Placement;
use introspect::memory::{MemoryError, Pa};
use introspect::scan::Written;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLockWriteGuard};
use std::time::Duration;

/// Longest wait for a vCPU to stop. Under full emulation one KVM_RUN may take long; on hardware it is microseconds.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(20);
/// See the module.
pub struct Guest {
    ram: GuestRam,
    pub(super) control: Arc<Control>,
    pub(super) console: Arc<ConsoleLog>,
    placement: OnceLock<Placement>,
    /// Serialises pauses.
    pub(super) pausing: Mutex<()>,
    pauses: AtomicU64,
    settle: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// None when nobody runs it.
    dirty: Option<DirtyLog>,
}

impl Guest {
    pub(super) fn new(
        ram: GuestRam,
        control: Arc<Control>,
        console: Arc<ConsoleLog>,
        placement: OnceLock<Placement>,
        dirty: Option<DirtyLog>,
    ) -> Self {
        Self {
            ram,
            control,
            console,
            placement,
            pausing: Mutex::new(()),
            pauses: AtomicU64::new(0),
            settle: OnceLock::new(),
            dirty,
        }
    }

    /// One that was saved: it has ended, and stands as it stood.
    pub fn saved(ram: GuestRam, cpus: Vec<CpuState>, placement: Placement) -> Self {
        Self::new(ram, Arc::new(Control::saved(cpus)), Arc::default(), placement.into(), None)
    }

    /// Guest RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Where the kernel is; None before [`super::Machine::settle`].
    pub fn placement(&self) -> Option<Placement> {
        self.placement.get().copied()
    }

    pub(super) fn place(&self, placement: Placement) {
        self.placement.get_or_init(|| placement);
    }

    /// Number of vCPUs.
    pub fn cpu_count(&self) -> usize {
        self.control.snapshots().len()
    }

    /// What the guest printed on its console.
    pub fn console_log(&self) -> &Arc<ConsoleLog> {
        &self.console
    }

    /// Has `settle` called in every pause, before anybody looks. Only the first one counts.
    pub fn when_paused(&self, settle: impl Fn() + Send + Sync + 'static) {
        let _ = self.settle.set(Box::new(settle));
    }

    /// Stops every vCPU between two instructions, no access to a device pending, until the value is dropped. Pauses of
    /// several threads take turns; a second one on the same thread would wait for ever. A machine that has ended, or
    /// was not started, counts as paused.
    ///
    /// # Errors
    /// A vCPU does not stop, or its registers cannot be read: names it.
    pub fn pause(&self) -> anyhow::Result<Paused<'_>> {
        let turn = lock(&self.pausing);
        self.pauses.fetch_add(1, Relaxed);
        let snapshots = self.control.pause(PAUSE_TIMEOUT).map_err(anyhow::Error::msg)?;
        let resume = ResumeOnDrop(&self.control);
        let states = snapshots.into_iter().enumerate().map(|(cpu, snapshot)| {
            snapshot.state.map_err(|why| anyhow::anyhow!("Cannot read the registers of vCPU {cpu}: {why}"))
        });
        let cpus = states.collect::<anyhow::Result<Vec<_>>>()?;
        if let Some(settle) = self.settle.get() {
            settle();
        }
        let (ram, dirty, frozen) = (&self.ram, self.dirty.as_ref(), self.ram.freeze());
        Ok(Paused { ram, dirty, cpus, frozen, _resume: resume, _turn: turn })
    }

    /// How often it has been paused so far.
    pub fn pauses(&self) -> u64 {
        self.pauses.load(Relaxed)
    }

    /// Pauses the machine until [`Guest::release`]; pauses meanwhile neither wait nor end it. False when it was held
    /// already.
    ///
    /// # Errors
    /// As [`Guest::pause`].
    pub fn hold(&self) -> anyhow::Result<bool> {
        let _paused = self.pause()?;
        Ok(!self.control.hold(true))
    }

    /// Ends a [`Guest::hold`]; false when there was none.
    pub fn release(&self) -> bool {
        let _turn = lock(&self.pausing);
        let held = self.control.hold(false);
        self.control.resume();
        held
    }

    /// True while the machine is held, or a debugger keeps it stopped.
    pub fn held(&self) -> bool {
        self.control.held() || self.debugger_has_stopped()
    }

    /// Ends the machine from outside, at once.
    pub fn stop(&self) {
        self.control.finish(Outcome::HostStop);
    }

    /// How the machine ended, if it did.
    pub fn outcome(&self) -> Option<Outcome> {
        self.control.outcome().map(|outcome| self.with_panic(outcome))
    }

    /// A kernel told to restart after a panic resets, or crashes on the way: the panic is what happened.
    pub(super) fn with_panic(&self, outcome: Outcome) -> Outcome {
        match (outcome, self.console.panicked()) {
            (Outcome::Reset | Outcome::PowerOff | Outcome::Halt | Outcome::TripleFault, Some((line, _))) => {
                Outcome::Panic(line)
            }
            (outcome, _) => outcome,
        }
    }
}

/// A guest that stands still: the proof that its memory and registers may be looked at together.
pub struct Paused<'a> {
    ram: &'a GuestRam,
    dirty: Option<&'a DirtyLog>,
    cpus: Vec<CpuState>,
    // Dropped in this order: writers may go on, then the vCPUs, then the next pause.
    frozen: RwLockWriteGuard<'a, ()>,
    _resume: ResumeOnDrop<'a>,
    _turn: MutexGuard<'a, ()>,
}

impl Paused<'_> {
    /// Every vCPU, by index.
    pub fn cpus(&self) -> &[CpuState] {
        &self.cpus
    }

    /// Guest memory, at rest.
    pub fn memory(&self) -> FrozenRam<'_> {
        FrozenRam::new(self.ram, &self.frozen)
    }

    /// The pages that were written since this was last asked, by whomever. None when that is not known: it is asked for
    /// the first time, which has the host note them from now on; or nobody runs the machine.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn take_written(&mut self) -> anyhow::Result<Option<Written>> {
        self.dirty.map_or(Ok(None), |dirty| dirty.take(self.ram))
    }

    /// Changes guest memory while it is at rest.
    ///
    /// # Errors
    /// No RAM there.
    pub fn write(&mut self, pa: Pa, bytes: &[u8]) -> Result<(), MemoryError> {
        self.ram.store(pa, bytes)
    }
}

struct ResumeOnDrop<'a>(&'a Control);

impl Drop for ResumeOnDrop<'_> {
    fn drop(&mut self) {
        self.0.resume();
    }
}
