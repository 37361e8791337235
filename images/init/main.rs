//! The init of the guest: mounts the usual file systems, loads modules, runs a command or gives a shell, unloads the
//! modules, lets the kernel settle, asks the detector for a scan and powers off. What to do is in `/kleak/job`.
//!
//! It needs no libc, and allocates nothing once it runs: the fewer pages and kernel objects a guest has, the
//! easier its leaks are to see. Lines it prints begin with `kleak-init: `; `images::initramfs` has those a host
//! program may rely on.

#![no_std]
#![no_main]

#[cfg_attr(target_arch = "aarch64", path = "aarch64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
mod arch;
mod job;
mod program;
mod sys;

use core::ffi::CStr;
use core::fmt::Write;
use job::Job;

/// Prints a line on the console; that it cannot is nobody's to know.
macro_rules! say {
    ($($argument:tt)*) => {
        let _ = writeln!(sys::Stdout, "kleak-init: {}", format_args!($($argument)*));
    };
}
use say;

/// Longest job: paths and parameters of all modules, and the command.
const MAX_JOB: usize = 64 << 10;
/// The detector's answer takes as long as its scan, and a scan in a lab takes a while.
const SCAN_TIMEOUT_MS: u64 = 300_000;
/// Ends the detector's answer.
const EOT: u8 = 4;

/// Called by the entry code.
extern "C" fn main() -> ! {
    if sys::process_id() != 1 {
        say!("this is the init of a kleak-vmm guest and does nothing else");
        sys::exit(2);
    }
    mount_all();
    let mut buffer = [0; MAX_JOB];
    match read_job(&mut buffer) {
        Ok(job) => run(&job),
        Err(()) => {}
    }
    sys::power_off()
}

fn mount_all() {
    let table = [
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
        (c"devtmpfs", c"/dev"),
        (c"devpts", c"/dev/pts"),
        (c"tmpfs", c"/tmp"),
        (c"tmpfs", c"/run"),
        (c"debugfs", c"/sys/kernel/debug"),
        (c"tracefs", c"/sys/kernel/tracing"),
    ];
    for (kind, at) in table {
        // A kernel without one of them can do without; sysfs makes its own mount points.
        let _ = sys::make_directory(at);
        if let Err(error) = sys::mount(kind, at)
            && error != sys::EBUSY
            && !at.to_bytes().starts_with(b"/sys/")
        {
            say!("cannot mount {}: {error}", text(at));
        }
    }
}

fn read_job(buffer: &mut [u8; MAX_JOB]) -> Result<Job<'_>, ()> {
    let file = sys::open(c"/kleak/job", sys::O_RDONLY).map_err(|error| {
        say!("failed: cannot read /kleak/job: {error}");
    })?;
    let mut size = 0;
    loop {
        match file.read(&mut buffer[size..]) {
            Ok(0) => break,
            Ok(more) => size += more,
            Err(error) => {
                say!("failed: cannot read /kleak/job: {error}");
                return Err(());
            }
        }
    }
    Job::parse(&buffer[..size]).map_err(|error| {
        say!("failed: /kleak/job: {error}");
    })
}

fn run(job: &Job) {
    for module in job.modules() {
        let loaded =
            sys::open(module.path, sys::O_RDONLY).and_then(|file| file.load_module(module.parameters));
        if let Err(error) = loaded {
            say!("failed: cannot load module {}: {error}", text(module.name));
            return;
        }
    }
    if let Some(command) = job.exec {
        program::run_command(command);
    } else if job.shell {
        program::run_shell();
    }
    sys::kill_all();
    program::reap();
    for module in job.modules().rev().filter(|module| !module.kept) {
        if let Err(error) = sys::unload_module(module.name) {
            say!("cannot unload module {}: {error}", text(module.name));
        }
    }
    settle(job.settle_ms);
    if let Some(port) = job.scan
        && let Err(error) = scan(port)
    {
        say!("cannot ask for a scan on {}: {error}", text(port));
    }
}

/// Lets what the kernel defers happen: writes, RCU callbacks, delayed work.
fn settle(ms: u64) {
    sys::sync();
    sys::wait_for_rcu();
    sys::sleep(ms);
    sys::wait_for_rcu();
}

/// Asks for a scan and waits for the end of the answer, so that the machine does not go off in the middle of it.
fn scan(path: &CStr) -> Result<(), sys::Errno> {
    // Without a carrier a terminal may be opened only like this.
    let port = sys::open(path, sys::O_RDWR | sys::O_NOCTTY | sys::O_NONBLOCK)?;
    port.make_raw()?;
    port.write_all(b"scan\n")?;
    let mut answer = [0; 256];
    let mut size = 0;
    let mut said = false;
    while port.wait_readable(SCAN_TIMEOUT_MS)? {
        let more = port.read(&mut answer[size..])?;
        let received = &answer[..size + more];
        let ended = more == 0 || received.contains(&EOT);
        let line = received.iter().position(|byte| b"\r\n\x04".contains(byte));
        if !said && (line.is_some() || ended || received.len() == answer.len()) {
            let line = &received[..line.unwrap_or(received.len())];
            say!("{}", core::str::from_utf8(line).unwrap_or("the scan is done"));
            said = true;
        }
        if ended {
            return Ok(());
        }
        // Only the first line is said.
        size = if said { 0 } else { received.len() };
    }
    say!("the detector does not answer");
    Ok(())
}

/// For messages.
fn text(string: &CStr) -> &str {
    string.to_str().unwrap_or("(not UTF-8)")
}

#[panic_handler]
fn panicked(info: &core::panic::PanicInfo) -> ! {
    say!("failed: {info}");
    sys::power_off()
}
