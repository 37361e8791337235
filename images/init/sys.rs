//! The system calls init needs, as functions with results.

use crate::arch::{number, syscall};
use core::ffi::CStr;
use core::fmt;
use core::ptr::null;

/// An error of the kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

pub const EINTR: Errno = Errno(4);
pub const EBUSY: Errno = Errno(16);
pub const EEXIST: Errno = Errno(17);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            1 => "not permitted",
            2 => "no such file, or a symbol of it is unknown",
            5 => "input/output error",
            8 => "not made for this kernel",
            11 => "still in use",
            12 => "out of memory",
            13 => "permission denied",
            16 => "busy",
            17 => "already loaded",
            19 => "no such device",
            22 => "invalid, perhaps a parameter",
            126 => "a key is missing",
            129 => "refused by a security policy",
            _ => return write!(f, "error {}", self.0),
        };
        write!(f, "{text} (error {})", self.0)
    }
}

type Result<T> = core::result::Result<T, Errno>;

fn check(result: isize) -> Result<usize> {
    usize::try_from(result).map_err(|_| Errno(-result as i32))
}

/// An open file; closed with the value.
pub struct Fd(usize);

pub const O_RDONLY: usize = 0;
pub const O_RDWR: usize = 2;
pub const O_NOCTTY: usize = 0o400;
pub const O_NONBLOCK: usize = 0o4000;
const O_CLOEXEC: usize = 0o2_000_000;
/// Paths are relative to the working directory.
const AT_FDCWD: usize = -100isize as usize;

/// Opens a file; it is closed by `execve`.
pub fn open(path: &CStr, flags: usize) -> Result<Fd> {
    // SAFETY: the path is terminated.
    let result =
        unsafe { syscall(number::OPENAT, [AT_FDCWD, path.as_ptr() as usize, flags | O_CLOEXEC, 0, 0]) };
    check(result).map(Fd)
}

impl Fd {
    /// Reads what is there, at most the buffer's size; 0 at the end.
    pub fn read(&self, buffer: &mut [u8]) -> Result<usize> {
        loop {
            // SAFETY: the buffer is valid for its length.
            let result = check(unsafe {
                syscall(number::READ, [self.0, buffer.as_mut_ptr() as usize, buffer.len(), 0, 0])
            });
            if result != Err(EINTR) {
                return result;
            }
        }
    }

    /// Writes all of it.
    pub fn write_all(&self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            // SAFETY: the bytes are valid for their length.
            let result = check(unsafe {
                syscall(number::WRITE, [self.0, bytes.as_ptr() as usize, bytes.len(), 0, 0])
            });
            match result {
                Err(EINTR) => {}
                other => bytes = &bytes[other?.min(bytes.len())..],
            }
        }
        Ok(())
    }

    /// Waits until there is something to read; false when the time is over.
    pub fn wait_readable(&self, timeout_ms: u64) -> Result<bool> {
        /// `struct pollfd`.
        #[repr(C)]
        struct PollFd {
            fd: i32,
            events: i16,
            revents: i16,
        }
        const POLLIN: i16 = 1;
        let mut poll = PollFd { fd: self.0 as i32, events: POLLIN, revents: 0 };
        let time = timespec(timeout_ms);
        // SAFETY: one pollfd, a timespec, no signal mask.
        let result =
            unsafe { syscall(number::PPOLL, [&raw mut poll as usize, 1, &raw const time as usize, 0, 0]) };
        Ok(check(result)? > 0)
    }

    /// Takes terminal settings that change no byte in either direction, without echo.
    pub fn make_raw(&self) -> Result<()> {
        /// `struct termios` of the kernel (include/uapi/asm-generic/termbits.h).
        #[repr(C)]
        #[derive(Default)]
        struct Termios {
            iflag: u32,
            oflag: u32,
            cflag: u32,
            lflag: u32,
            line: u8,
            control: [u8; 19],
        }
        const CLOCAL: u32 = 0o4000;
        const TCGETS: usize = 0x5401;
        const TCSETS: usize = 0x5402;
        let mut settings = Termios::default();
        // SAFETY: both calls get a struct termios.
        unsafe {
            check(syscall(number::IOCTL, [self.0, TCGETS, &raw mut settings as usize, 0, 0]))?;
            (settings.iflag, settings.oflag, settings.lflag) = (0, 0, 0);
            // There is no modem whose carrier could go away.
            settings.cflag |= CLOCAL;
            check(syscall(number::IOCTL, [self.0, TCSETS, &raw const settings as usize, 0, 0]))?;
        }
        Ok(())
    }

    /// Makes it the controlling terminal of this session (which leads one), and standard input, output and error.
    pub fn take_terminal(&self) -> Result<()> {
        const TIOCSCTTY: usize = 0x540e;
        // SAFETY: no pointers.
        unsafe {
            check(syscall(number::IOCTL, [self.0, TIOCSCTTY, 0, 0, 0]))?;
            for standard in 0..3 {
                check(syscall(number::DUP3, [self.0, standard, 0, 0, 0]))?;
            }
        }
        Ok(())
    }

    /// Loads a kernel module from the file.
    pub fn load_module(&self, parameters: &CStr) -> Result<()> {
        // SAFETY: the parameters are terminated.
        check(unsafe { syscall(number::FINIT_MODULE, [self.0, parameters.as_ptr() as usize, 0, 0, 0]) })
            .map(drop)
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: nobody else has it.
        unsafe { syscall(number::CLOSE, [self.0, 0, 0, 0, 0]) };
    }
}

/// Standard output, the console.
pub struct Stdout;

impl fmt::Write for Stdout {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let fd = core::mem::ManuallyDrop::new(Fd(1));
        fd.write_all(text.as_bytes()).map_err(|_| fmt::Error)
    }
}

/// Unloads a kernel module by name, without waiting for its users.
pub fn unload_module(name: &CStr) -> Result<()> {
    // SAFETY: the name is terminated.
    check(unsafe { syscall(number::DELETE_MODULE, [name.as_ptr() as usize, O_NONBLOCK, 0, 0, 0]) }).map(drop)
}

/// Makes a directory; one that is there will do.
pub fn make_directory(path: &CStr) -> Result<()> {
    // SAFETY: the path is terminated.
    let result = unsafe { syscall(number::MKDIRAT, [AT_FDCWD, path.as_ptr() as usize, 0o755, 0, 0]) };
    match check(result) {
        Err(EEXIST) => Ok(()),
        other => other.map(drop),
    }
}

/// Goes to a directory.
pub fn change_directory(path: &CStr) -> Result<()> {
    // SAFETY: the path is terminated.
    check(unsafe { syscall(number::CHDIR, [path.as_ptr() as usize, 0, 0, 0, 0]) }).map(drop)
}

/// Mounts a file system that has no device.
pub fn mount(kind: &CStr, at: &CStr) -> Result<()> {
    let (kind, at) = (kind.as_ptr() as usize, at.as_ptr() as usize);
    // SAFETY: terminated strings, no data.
    check(unsafe { syscall(number::MOUNT, [kind, at, kind, 0, 0]) }).map(drop)
}

/// Whether this may be executed.
pub fn is_executable(path: &CStr) -> bool {
    const X_OK: usize = 1;
    // SAFETY: the path is terminated.
    unsafe { syscall(number::FACCESSAT, [AT_FDCWD, path.as_ptr() as usize, X_OK, 0, 0]) == 0 }
}

/// This process's id.
pub fn process_id() -> usize {
    // SAFETY: no arguments.
    unsafe { syscall(number::GETPID, [0; 5]) as usize }
}

/// Starts a copy of this process: None in the copy, its id in the original.
pub fn fork() -> Result<Option<usize>> {
    const SIGCHLD: usize = 17;
    // SAFETY: no new stack, no memory shared: as fork(2). There is one thread.
    let id = check(unsafe { syscall(number::CLONE, [SIGCHLD, 0, 0, 0, 0]) })?;
    Ok((id != 0).then_some(id))
}

/// Makes this process the leader of a session of its own.
pub fn new_session() -> Result<()> {
    // SAFETY: no arguments.
    check(unsafe { syscall(number::SETSID, [0; 5]) }).map(drop)
}

/// Becomes another program. `arguments` end with a null pointer.
///
/// # Safety
/// The arguments are terminated strings.
pub unsafe fn execute(path: &CStr, arguments: &[*const u8], environment: &[*const u8]) -> Errno {
    assert!(arguments.last() == Some(&null()) && environment.last() == Some(&null()));
    let (arguments, environment) = (arguments.as_ptr() as usize, environment.as_ptr() as usize);
    // SAFETY: as the caller promised; both lists were seen to end.
    let result = unsafe { syscall(number::EXECVE, [path.as_ptr() as usize, arguments, environment, 0, 0]) };
    Errno(-result as i32)
}

/// Waits for any child to end: its id and wait status (wait(2)).
pub fn wait_any() -> Result<(usize, i32)> {
    loop {
        let mut status = 0i32;
        // SAFETY: a place for the status.
        let result =
            check(unsafe { syscall(number::WAIT4, [usize::MAX, &raw mut status as usize, 0, 0, 0]) });
        match result {
            Err(EINTR) => {}
            other => return other.map(|id| (id, status)),
        }
    }
}

/// Ends every other process but the kernel's.
pub fn kill_all() {
    const SIGKILL: usize = 9;
    // SAFETY: no pointers.
    unsafe { syscall(number::KILL, [usize::MAX, SIGKILL, 0, 0, 0]) };
}

/// `struct timespec`.
#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

fn timespec(ms: u64) -> Timespec {
    Timespec { seconds: (ms / 1000) as i64, nanoseconds: (ms % 1000) as i64 * 1_000_000 }
}

/// Sleeps.
pub fn sleep(ms: u64) {
    let mut time = timespec(ms);
    loop {
        let left = &raw mut time as usize;
        // SAFETY: one timespec, read before it is written.
        let result = check(unsafe { syscall(number::NANOSLEEP, [left, left, 0, 0, 0]) });
        if result != Err(EINTR) {
            return;
        }
    }
}

/// Waits until every CPU has gone through a grace period of RCU, where the kernel can say so.
pub fn wait_for_rcu() {
    /// MEMBARRIER_CMD_GLOBAL: `synchronize_rcu` (kernel/sched/membarrier.c).
    const GLOBAL: usize = 1;
    // SAFETY: no pointers.
    unsafe { syscall(number::MEMBARRIER, [GLOBAL, 0, 0, 0, 0]) };
}

/// Writes back what is cached.
pub fn sync() {
    // SAFETY: no arguments.
    unsafe { syscall(number::SYNC, [0; 5]) };
}

/// Ends this process.
pub fn exit(code: usize) -> ! {
    loop {
        // SAFETY: no pointers.
        unsafe { syscall(number::EXIT, [code, 0, 0, 0, 0]) };
    }
}

/// Switches the machine off.
pub fn power_off() -> ! {
    /// LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF (include/uapi/linux/reboot.h).
    const ARGUMENTS: [usize; 5] = [0xfee1_dead, 672_274_793, 0x4321_fedc, 0, 0];
    sync();
    loop {
        // SAFETY: no pointers.
        unsafe { syscall(number::REBOOT, ARGUMENTS) };
        // Without ACPI the machine halts, or the call fails: nothing is left to do.
        sleep(60_000);
    }
}
