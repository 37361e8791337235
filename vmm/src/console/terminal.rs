//! The user's terminal: raw while the guest's console is on it, as it was on every way out.
//!
//! The saved modes are a static behind an atomic pointer, because the ways out include signal handlers and the
//! panic hook, where no lock may be taken.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, Ordering::SeqCst};

/// Modes to go back to; null while the terminal is not ours.
static SAVED: AtomicPtr<libc::termios> = AtomicPtr::new(ptr::null_mut());
/// The terminal they belong to.
static TERMINAL: AtomicI32 = AtomicI32::new(-1);
/// Standard output shows the terminal's alternate screen, without a cursor.
static SCREEN: AtomicBool = AtomicBool::new(false);
/// Back from the alternate screen, with a cursor (xterm's control sequences, DECSET 1049 and 25).
const LEAVE_SCREEN: &[u8] = b"\x1b[?1049l\x1b[?25h";
/// A second raw mode would save the first one's modes.
static ACTIVE: AtomicBool = AtomicBool::new(false);

/// Raw mode; dropping it restores the terminal.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes `terminal` raw. None when it is no terminal, when this process runs in the background (touching the
    /// terminal would stop it), or when it is raw already.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn enter(terminal: &impl AsRawFd) -> io::Result<Option<Self>> {
        let fd = terminal.as_raw_fd();
        let Some(modes) = foreground_modes(fd) else { return Ok(None) };
        if ACTIVE.swap(true, SeqCst) {
            return Ok(None);
        }
        // The box is given to the static for good: a signal handler may be reading it at any time.
        SAVED.store(Box::into_raw(Box::new(modes)), SeqCst);
        TERMINAL.store(fd, SeqCst);
        let this = Self(());
        set_modes(fd, &raw_modes(modes))?;
        Ok(Some(this))
    }

    /// The same for a program that draws on the alternate screen: standard output leaves that on every way out, too.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn enter_screen(terminal: &impl AsRawFd) -> io::Result<Option<Self>> {
        let this = Self::enter(terminal)?;
        SCREEN.store(this.is_some(), SeqCst);
        Ok(this)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
        SAVED.store(ptr::null_mut(), SeqCst);
        ACTIVE.store(false, SeqCst);
    }
}

/// Gives the terminal its saved modes; does nothing when they are in force. Safe in signal handlers.
pub fn restore() {
    let saved = SAVED.load(SeqCst);
    if !saved.is_null() {
        // SAFETY: the pointer came from Box::into_raw and is never freed; tcsetattr is async-signal-safe.
        unsafe { libc::tcsetattr(TERMINAL.load(SeqCst), libc::TCSANOW, saved) };
    }
    if SCREEN.swap(false, SeqCst) {
        // SAFETY: the bytes are static; write is async-signal-safe. A terminal that is gone needs nothing.
        unsafe { libc::write(libc::STDOUT_FILENO, LEAVE_SCREEN.as_ptr().cast(), LEAVE_SCREEN.len()) };
    }
}

/// Makes the terminal raw again after the process was stopped and continued: the shell changed it meanwhile.
pub fn reenter() {
    let saved = SAVED.load(SeqCst);
    let fd = TERMINAL.load(SeqCst);
    if !saved.is_null() && foreground_modes(fd).is_some() {
        // SAFETY: as in `restore`.
        let modes = raw_modes(unsafe { *saved });
        // A terminal that is gone by now shows as end of file on the next read.
        let _ = set_modes(fd, &modes);
    }
}

/// Columns of a terminal, 80 where unknown.
pub fn width(terminal: &impl AsRawFd) -> usize {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize, which lives on the stack.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    if result == 0 && size.ws_col > 0 { size.ws_col.into() } else { 80 }
}

/// Modes of a terminal, unless it is our controlling one and we run in the background of it: then touching it would
/// stop the process. One that does not control us (an init's console) has no job control.
fn foreground_modes(fd: RawFd) -> Option<libc::termios> {
    let mut modes = std::mem::MaybeUninit::<libc::termios>::uninit();
    // SAFETY: tcgetattr fills the structure when it returns 0; the other two calls take plain numbers.
    unsafe {
        let is_terminal = libc::tcgetattr(fd, modes.as_mut_ptr()) == 0;
        let group = libc::tcgetpgrp(fd);
        (is_terminal && (group == -1 || group == libc::getpgrp())).then(|| modes.assume_init())
    }
}

fn set_modes(fd: RawFd, modes: &libc::termios) -> io::Result<()> {
    // SAFETY: the reference is valid for the call.
    match unsafe { libc::tcsetattr(fd, libc::TCSANOW, modes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Every key reaches us at once and unseen; output keeps its newline translation, for our own messages.
fn raw_modes(mut modes: libc::termios) -> libc::termios {
    let output = modes.c_oflag;
    // SAFETY: cfmakeraw only changes the structure it is given.
    unsafe { libc::cfmakeraw(&raw mut modes) };
    modes.c_oflag = output;
    modes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::FromRawFd;

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        let null = File::open("/dev/null").unwrap();
        assert!(RawTerminal::enter(&null).unwrap().is_none());
        assert_eq!(width(&null), 80);
        restore();
        reenter();
    }

    #[test]
    fn a_terminal_is_raw_for_a_while_and_then_as_it_was() {
        let (mut master, mut slave) = (-1, -1);
        // SAFETY: openpty writes two descriptors; the other arguments may be null.
        let result = unsafe {
            libc::openpty(&raw mut master, &raw mut slave, ptr::null_mut(), ptr::null(), ptr::null())
        };
        assert_eq!(result, 0);
        // SAFETY: both descriptors are ours and open.
        let (_master, slave) = unsafe { (File::from_raw_fd(master), File::from_raw_fd(slave)) };
        let local_modes = || foreground_modes(slave.as_raw_fd()).unwrap().c_lflag;
        let before = local_modes();
        assert_ne!(before & libc::ICANON, 0);

        let raw = RawTerminal::enter(&slave).unwrap().unwrap();
        assert_eq!(local_modes() & (libc::ICANON | libc::ECHO | libc::ISIG), 0);
        assert!(RawTerminal::enter(&slave).unwrap().is_none(), "only once");
        restore();
        assert_eq!(local_modes(), before);
        reenter();
        assert_eq!(local_modes() & libc::ICANON, 0);
        drop(raw);
        assert_eq!(local_modes(), before);
        reenter();
        assert_eq!(local_modes(), before, "nothing to go back to any more");
    }
}
