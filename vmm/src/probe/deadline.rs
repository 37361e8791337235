//! A deadline for a thread that is inside KVM_RUN: past it, signals interrupt whatever the thread waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// How often the thread is interrupted once its time is up: one signal may fall between the check and KVM_RUN.
const REPEAT: Duration = Duration::from_millis(20);

/// Interrupts the thread that made it after a while, until dropped.
pub struct Deadline {
    passed: Arc<AtomicBool>,
    done: Arc<AtomicBool>,
    watcher: Option<JoinHandle<()>>,
}

impl Deadline {
    /// A deadline for the calling thread, `after` from now.
    pub fn new(after: Duration) -> std::io::Result<Self> {
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        // A number the machine's own vCPU threads do not use.
        let signal = SIGRTMIN() + 7;
        register_signal_handler(signal, nothing)?;
        let (passed, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        // SAFETY: pthread_self always succeeds.
        let target = unsafe { libc::pthread_self() };
        let end = Instant::now() + after;
        let watcher = std::thread::Builder::new().name("probe-deadline".to_owned()).spawn({
            let (passed, done) = (Arc::clone(&passed), Arc::clone(&done));
            move || {
                while !done.load(Ordering::Acquire) {
                    let now = Instant::now();
                    if now < end {
                        std::thread::park_timeout(end - now);
                        continue;
                    }
                    passed.store(true, Ordering::Release);
                    // SAFETY: the target joins this thread before it ends, so its id is good; the handler is in place.
                    unsafe { libc::pthread_kill(target, signal) };
                    std::thread::park_timeout(REPEAT);
                }
            }
        })?;
        Ok(Self { passed, done, watcher: Some(watcher) })
    }

    /// Whether time is up.
    pub fn passed(&self) -> bool {
        self.passed.load(Ordering::Acquire)
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Release);
        if let Some(watcher) = self.watcher.take() {
            watcher.thread().unpark();
            let _ = watcher.join();
        }
    }
}
