//! vCPU threads as a state machine, driven from outside: run, pause, stop.
//!
//! ```text
//! Ready -> Running <-> Paused
//!             |          |
//!             +-> Stopped <
//! ```
//!
//! A wish is set first, then every running vCPU is kicked: its `immediate_exit` makes the next KVM_RUN return at once,
//! a signal ends the present one. The thread clears the flag and *then* looks at the wish, so no kick is lost.
//! KVM completes a pending I/O access before it honours `immediate_exit`, so a vCPU that parks has none.

use super::debugger::Debugging;
use crate::arch::DebugRegisters;
use introspect::arch::CpuState;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off.
    PowerOff,
    /// The guest's kernel stands still for good, without switching the machine off.
    Halt,
    /// The guest restarted itself.
    Reset,
    /// The kernel panicked: the console line that says so.
    Panic(String),
    /// A vCPU shut down: an exception inside the handling of a double fault.
    TripleFault,
    /// [`super::Machine::stop`].
    HostStop,
    /// KVM gave up: what it said.
    Error(String),
    /// It was saved to a file, and this is what the file holds.
    Saved,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => write!(f, "The guest powered off"),
            Self::Halt => write!(f, "The guest halted"),
            Self::Reset => write!(f, "The guest reset the machine"),
            Self::Panic(line) => write!(f, "The guest kernel panicked: {line}"),
            Self::TripleFault => write!(f, "The guest crashed with a triple fault"),
            Self::HostStop => write!(f, "The machine was stopped by the host"),
            Self::Error(why) => write!(f, "The machine failed: {why}"),
            Self::Saved => write!(f, "The machine was saved"),
        }
    }
}

/// What a vCPU thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Its thread does not run yet.
    Ready,
    /// In the guest, or handling an exit.
    Running,
    /// Parked.
    Paused,
    /// Its thread has ended.
    Stopped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Run,
    Pause,
    Stop,
}

/// What [`Control::checkpoint`] tells a vCPU thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Enter the guest.
    Enter,
    /// Enter the guest after a pause.
    Resume,
    /// End the thread.
    End,
}

/// A vCPU as it stood when it parked or ended.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    /// Registers; the text says why they could not be read.
    pub state: Result<CpuState, String>,
    /// All of them, where a debugger may come; None before the vCPU has parked.
    pub debug: Option<Result<Box<DebugRegisters>, String>>,
    /// What the last exits were, newest last.
    pub exits: Vec<String>,
}

impl Snapshot {
    fn of(state: CpuState) -> Self {
        Self { state: Ok(state), debug: None, exits: Vec::new() }
    }
}

/// Makes a vCPU leave the guest.
pub(super) struct Kicker {
    /// `immediate_exit` in the vCPU's `struct kvm_run`.
    immediate_exit: NonNull<AtomicU8>,
    thread: libc::pthread_t,
}

// SAFETY: the pointer is used under the control's lock only, while the vCPU's thread keeps the mapping alive.
unsafe impl Send for Kicker {}

impl Kicker {
    /// For the calling thread, whose vCPU's `immediate_exit` is at `immediate_exit`.
    ///
    /// # Safety
    /// `immediate_exit` must stay valid until [`Control::ended`] is called for this vCPU.
    pub unsafe fn new(immediate_exit: NonNull<AtomicU8>) -> Self {
        // SAFETY: always succeeds.
        Self { immediate_exit, thread: unsafe { libc::pthread_self() } }
    }

    fn kick(&self) {
        // SAFETY: valid by the contract of `new`.
        unsafe { self.immediate_exit.as_ref() }.store(1, SeqCst);
        // SAFETY: the thread has not ended: it removes its kicker first.
        unsafe { libc::pthread_kill(self.thread, kick_signal()) };
    }
}

/// The signal that ends a KVM_RUN; its handler does nothing.
pub(super) fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

struct Slot {
    phase: Phase,
    kicker: Option<Kicker>,
    snapshot: Snapshot,
}

pub(super) struct State {
    wish: Wish,
    /// A pause lasts until it is released, whoever else resumes.
    held: bool,
    pub outcome: Option<Outcome>,
    pub debugging: Debugging,
    slots: Vec<Slot>,
}

impl State {
    fn new(wish: Wish, outcome: Option<Outcome>, slots: Vec<Slot>) -> Self {
        Self { wish, held: false, outcome, debugging: Debugging::new(slots.len()), slots }
    }

    /// How a vCPU stood when it last parked.
    pub fn snapshot(&self, cpu: usize) -> Option<&Snapshot> {
        self.slots.get(cpu).map(|slot| &slot.snapshot)
    }

    /// Has every vCPU park.
    pub fn want_pause(&mut self) {
        if self.wish == Wish::Run {
            self.wish = Wish::Pause;
            kick_running(self);
        }
    }

    /// Whether this vCPU is to stand still.
    fn parks(&self, cpu: usize) -> bool {
        self.wish == Wish::Pause || self.wish == Wish::Run && self.debugging.parks(cpu)
    }
}

/// See the module.
pub(super) struct Control {
    state: Mutex<State>,
    pub changed: Condvar,
}

impl Control {
    /// For `cpus` vCPUs whose threads do not run yet.
    pub fn new(cpus: usize) -> Self {
        let slot = |index| Slot {
            phase: Phase::Ready,
            kicker: None,
            snapshot: Snapshot::of(CpuState { index, ..Default::default() }),
        };
        let state = State::new(Wish::Run, None, (0..cpus).map(slot).collect());
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// For vCPUs that stand as they were saved and never run.
    pub fn saved(cpus: Vec<CpuState>) -> Self {
        let slot = |state| Slot { phase: Phase::Stopped, kicker: None, snapshot: Snapshot::of(state) };
        let slots = cpus.into_iter().map(slot).collect();
        let state = State::new(Wish::Stop, Some(Outcome::Saved), slots);
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// A vCPU thread has started. From here to [`Control::ended`] it counts as running.
    pub fn started(&self, cpu: usize, kicker: Kicker) {
        let mut state = self.lock();
        state.slots[cpu].kicker = Some(kicker);
    }

    /// The thread of `cpu` is about to be started: a pause waits for it from now on.
    pub fn starting(&self, cpu: usize) {
        self.lock().slots[cpu].phase = Phase::Running;
    }

    /// The thread of `cpu` could not be started after all.
    pub fn never_started(&self, cpu: usize) {
        self.lock().slots[cpu].phase = Phase::Stopped;
    }

    /// Called by a vCPU thread before it enters the guest and after each kick, `immediate_exit` cleared. Parks while
    /// the machine is paused.
    pub fn checkpoint(&self, cpu: usize, snapshot: impl FnOnce() -> Snapshot) -> Verdict {
        let mut state = self.lock();
        if !state.parks(cpu) {
            return if state.wish == Wish::Stop { Verdict::End } else { Verdict::Enter };
        }
        let slot = &mut state.slots[cpu];
        slot.snapshot = snapshot();
        slot.phase = Phase::Paused;
        self.changed.notify_all();
        while state.parks(cpu) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.slots[cpu].phase = Phase::Running;
        if state.wish == Wish::Stop { Verdict::End } else { Verdict::Resume }
    }

    /// Last call of a vCPU thread.
    pub fn ended(&self, cpu: usize, snapshot: Snapshot) {
        let mut state = self.lock();
        let slot = &mut state.slots[cpu];
        slot.kicker = None;
        slot.phase = Phase::Stopped;
        slot.snapshot = snapshot;
        self.changed.notify_all();
    }

    /// Ends the machine; the first outcome stays.
    pub fn finish(&self, outcome: Outcome) {
        let mut state = self.lock();
        state.outcome.get_or_insert(outcome);
        state.wish = Wish::Stop;
        // Nothing is left to hold.
        state.held = false;
        state.debugging.stopped = false;
        kick_running(&state);
        self.changed.notify_all();
    }

    /// Parks every vCPU; they stay until [`Control::resume`]. Only one pause may be open at a time.
    ///
    /// # Errors
    /// Names the vCPUs that did not answer within `timeout`; the others run again.
    pub fn pause(&self, timeout: Duration) -> Result<Vec<Snapshot>, String> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        state.want_pause();
        while state.slots.iter().any(|slot| slot.phase == Phase::Running) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let late: Vec<String> = (0..state.slots.len())
                    .filter(|&cpu| state.slots[cpu].phase == Phase::Running)
                    .map(|cpu| cpu.to_string())
                    .collect();
                drop(state);
                self.resume();
                return Err(format!("vCPU {} did not stop within {timeout:?}", late.join(", ")));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state.slots.iter().map(|slot| slot.snapshot.clone()).collect())
    }

    /// Ends a pause.
    pub fn resume(&self) {
        let mut state = self.lock();
        if state.wish == Wish::Pause && !state.held && !state.debugging.stopped {
            state.wish = Wish::Run;
        }
        self.changed.notify_all();
    }

    /// Makes a pause that is open outlast [`Control::resume`], or no longer so; what it was before. A machine that has
    /// ended is not held.
    pub fn hold(&self, on: bool) -> bool {
        let mut state = self.lock();
        let on = on && state.outcome.is_none();
        std::mem::replace(&mut state.held, on)
    }

    /// True between [`Control::hold`] and its end.
    pub fn held(&self) -> bool {
        self.lock().held
    }

    /// How the machine ended, if it did.
    pub fn outcome(&self) -> Option<Outcome> {
        self.lock().outcome.clone()
    }

    /// Waits until the machine has ended and every vCPU thread with it; None when `timeout` passes first.
    pub fn wait(&self, timeout: Duration) -> Option<Outcome> {
        let running = |state: &mut State| {
            state.outcome.is_none() || state.slots.iter().any(|slot| slot.phase == Phase::Running)
        };
        let state = self.lock();
        let (state, result) =
            self.changed.wait_timeout_while(state, timeout, running).unwrap_or_else(PoisonError::into_inner);
        if result.timed_out() { None } else { state.outcome.clone() }
    }

    /// The vCPUs as they stood when they last parked.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.lock().slots.iter().map(|slot| slot.snapshot.clone()).collect()
    }

    /// Every change of the state is complete before anything that could panic.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn kick_running(state: &State) {
    for slot in state.slots.iter().filter(|slot| slot.phase == Phase::Running) {
        if let Some(kicker) = &slot.kicker {
            kicker.kick();
        }
    }
}
