//! Programs in the guest: the command of `--exec`, the shell on the console.

use crate::{say, sys};
use core::ffi::CStr;
use core::fmt::Write;
use core::ptr::null;

/// Arguments of a command run without a shell.
const MAX_ARGUMENTS: usize = 64;
/// Length of a command run without a shell.
const MAX_COMMAND: usize = 4096;
/// Shells, the first there is: `images::initramfs` puts busybox's at the first place, an initramfs that ours is laid over may
/// have one at the second.
const SHELLS: [&CStr; 2] = [c"/kleak/bin/sh", c"/bin/sh"];
/// Where commands start; `images::initramfs` puts what they name relatively here.
const WORK: &CStr = c"/kleak/work";

const ENVIRONMENT: [*const u8; 4] = [
    c"PATH=/bin:/sbin:/usr/bin:/usr/sbin".as_ptr().cast(),
    c"HOME=/".as_ptr().cast(),
    c"TERM=linux".as_ptr().cast(),
    null(),
];

/// Runs a command to its end and says how it ended.
pub fn run_command(command: &CStr) {
    match spawn(|| execute_command(command)) {
        Ok(status) => {
            // wait(2): the low seven bits are the signal; a shell would say 128 + signal, too.
            let code = if status & 0x7f == 0 { status >> 8 & 0xff } else { 128 + (status & 0x7f) };
            say!("exec exited with {code}");
        }
        Err(error) => {
            say!("failed: cannot start {}: {error}", crate::text(command));
        }
    }
}

/// Gives a shell on the console, with job control, until it ends.
pub fn run_shell() {
    let path = shell().unwrap_or(SHELLS[0]);
    let shell = || {
        if let Err(error) = take_console() {
            say!("the shell has no terminal of its own: {error}");
        }
        // SAFETY: terminated strings.
        unsafe { sys::execute(path, &[c"sh".as_ptr().cast(), null()], &ENVIRONMENT) }
    };
    if let Err(error) = spawn(shell) {
        say!("failed: cannot start {}: {error}", crate::text(path));
    }
}

fn shell() -> Option<&'static CStr> {
    SHELLS.into_iter().find(|path| sys::is_executable(path))
}

/// Waits for all processes there are to wait for.
pub fn reap() {
    while sys::wait_any().is_ok() {}
}

/// Runs `become_program` in a child, which returns only when it fails; the wait status of the child.
fn spawn(become_program: impl FnOnce() -> sys::Errno) -> Result<i32, sys::Errno> {
    let Some(child) = sys::fork()? else {
        let _ = sys::change_directory(WORK);
        let error = become_program();
        say!("cannot execute: {error}");
        sys::exit(127);
    };
    loop {
        let (id, status) = sys::wait_any()?;
        if id == child {
            return Ok(status);
        }
    }
}

fn execute_command(command: &CStr) -> sys::Errno {
    if let Some(shell) = shell() {
        let arguments = [c"sh", c"-c", command].map(|argument| argument.as_ptr().cast());
        let [sh, c, command] = arguments;
        // SAFETY: terminated strings.
        return unsafe { sys::execute(shell, &[sh, c, command, null()], &ENVIRONMENT) };
    }
    let mut words = [0; MAX_COMMAND];
    let mut arguments = [null(); MAX_ARGUMENTS];
    let bytes = command.to_bytes_with_nul();
    let Some(words) = words.get_mut(..bytes.len()) else { return TOO_LONG };
    words.copy_from_slice(bytes);
    let mut count = 0;
    let mut inside = false;
    for at in 0..words.len() {
        if words[at].is_ascii_whitespace() || words[at] == 0 {
            words[at] = 0;
            inside = false;
        } else if !inside {
            // The last place stays null.
            if count == MAX_ARGUMENTS - 1 {
                return TOO_LONG;
            }
            arguments[count] = words[at..].as_ptr();
            count += 1;
            inside = true;
        }
    }
    // SAFETY: every word ends with the NUL behind it, the last one with the command's own.
    unsafe {
        let program = if count == 0 { c"" } else { CStr::from_ptr(arguments[0].cast()) };
        sys::execute(program, &arguments, &ENVIRONMENT)
    }
}

/// E2BIG
const TOO_LONG: sys::Errno = sys::Errno(7);

/// Makes the console's terminal this process's own. `/dev/console` itself can control no session.
fn take_console() -> Result<(), sys::Errno> {
    let mut path = [0; 64];
    let terminal = console_terminal(&mut path).unwrap_or(c"/dev/ttyS0");
    sys::new_session()?;
    sys::open(terminal, sys::O_RDWR)?.take_terminal()
}

/// The terminal behind `/dev/console`: the last name in `/sys/class/tty/console/active`.
fn console_terminal(path: &mut [u8; 64]) -> Option<&CStr> {
    const FOLDER: &[u8] = b"/dev/";
    let mut names = [0; 56];
    let size = sys::open(c"/sys/class/tty/console/active", sys::O_RDONLY).ok()?.read(&mut names).ok()?;
    let names = names[..size].trim_ascii();
    let name = names.rsplit(|byte| *byte == b' ').next().filter(|name| !name.is_empty())?;
    path[..FOLDER.len()].copy_from_slice(FOLDER);
    path[FOLDER.len()..FOLDER.len() + name.len()].copy_from_slice(name);
    CStr::from_bytes_until_nul(path).ok()
}
