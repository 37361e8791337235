//! Signals that end the process, turned into a call on an ordinary thread.

use super::terminal;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};

/// Signals that ask the process to end.
const ENDING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
/// Signals that end it at once; the terminal is restored on the way.
const FATAL: [libc::c_int; 5] = [libc::SIGABRT, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE];

/// Write end of the pipe that carries signal numbers out of the handler.
static PIPE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn forward(signal: libc::c_int) {
    // A signal number fits a byte (signal(7)).
    let byte = signal as u8;
    // SAFETY: write is async-signal-safe; the descriptor stays open for the life of the process. errno is the
    // interrupted code's and must survive.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(PIPE.load(SeqCst), (&raw const byte).cast(), 1);
        *libc::__errno_location() = errno;
    }
}

extern "C" fn restore_and_die(signal: libc::c_int) {
    terminal::restore();
    // SAFETY: both calls are async-signal-safe. With the default action back, the signal ends the process when
    // the handler returns.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// Calls `on_end` with the number of the first of SIGINT, SIGTERM, SIGHUP, SIGQUIT that comes, on a thread of its
/// own. A second one ends the process at once with status 128 + signal. Signals that the caller of the program had
/// ignored (`nohup`) stay ignored. To be called once per process.
///
/// # Errors
/// No pipe or thread to be had.
pub fn watch(on_end: impl FnOnce(i32) + Send + 'static) -> io::Result<()> {
    let mut ends = [-1; 2];
    // SAFETY: pipe2 writes two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the read end is ours alone.
    let read_end = unsafe { OwnedFd::from_raw_fd(ends[0]) };
    PIPE.store(ends[1], SeqCst);
    std::thread::Builder::new().name("signals".into()).spawn(move || serve(&read_end, on_end))?;
    for signal in ENDING.into_iter().chain([libc::SIGCONT]) {
        install(signal, forward, libc::SA_RESTART);
    }
    for signal in FATAL {
        install(signal, restore_and_die, libc::SA_RESETHAND | libc::SA_ONSTACK);
    }
    Ok(())
}

fn install(signal: libc::c_int, handler: extern "C" fn(libc::c_int), flags: libc::c_int) {
    // SAFETY: the structures are initialised (all-zero is a valid sigaction) and live for the calls; the handlers
    // do only what a signal handler may.
    unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut old);
        if old.sa_sigaction == libc::SIG_IGN {
            return;
        }
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = handler as *const () as usize;
        new.sa_flags = flags;
        libc::sigaction(signal, &raw const new, std::ptr::null_mut());
    }
}

fn serve(pipe: &OwnedFd, on_end: impl FnOnce(i32)) {
    let mut on_end = Some(on_end);
    loop {
        let mut byte = 0u8;
        // SAFETY: reads at most one byte into a local.
        let read = unsafe { libc::read(pipe.as_raw_fd(), (&raw mut byte).cast(), 1) };
        let signal = i32::from(byte);
        match (read, signal) {
            (1, libc::SIGCONT) => terminal::reenter(),
            (1, _) => match on_end.take() {
                Some(call) => call(signal),
                None => {
                    terminal::restore();
                    std::process::exit(128 + signal);
                }
            },
            _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}
