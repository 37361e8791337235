//! The lab's first process: sets the helper Linux up, runs the job, carries its streams, files and signals.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use images::lab::Lab;

use super::affinity::{off_first_cpu, start_other_cpus};
use super::exports::Exports;
use super::idle_vm::IdleVm;
use super::job_process::{JobProcess, spawn};
use super::line::{self, LineReader};
use super::link::Link;
use super::outputs::Outputs;
use super::payload::BINARY;
use super::wire::{Frame, JobSpec, Stream, VERSION};

/// The argument that makes this binary the agent, where it is process 1.
pub const ARGUMENT: &str = "lab-agent";
/// Where the job waits for debuggers.
pub const DEBUGGER_SOCKET: &str = "/run/kleak-gdb.sock";
/// Folder of the kernel modules, to be loaded in the order of their names.
const MODULES: &str = "/lib/kleak";
/// Parameters: no nested guests and no interrupt virtualisation, which serve nobody here, and no polling for work, which
/// takes the emulator's time from other CPUs.
const MODULE_PARAMETERS: &[(&str, &str)] = &[
    ("kvm.ko", "halt_poll_ns=0"),
    ("kvm_amd.ko", "nested=0 avic=0"),
    ("kvm_intel.ko", "nested=0 enable_apicv=0"),
];
/// Between signs of life.
const ALIVE_PERIOD: Duration = Duration::from_secs(5);
/// How often outputs are looked at.
const OUTPUT_PERIOD: Duration = Duration::from_millis(500);
/// A job's control socket appears once its machine is set up, which a host with other work keeps waiting.
const CONTROL_PATIENCE: Duration = Duration::from_secs(120);
/// What a job leaves in its pipes when it ends is read within that time; a process it left behind may keep them open.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);
/// The host ends the machine when it has heard how the job ended.
const FAREWELL: Duration = Duration::from_secs(20);

/// Whether this process is to be the agent.
pub fn is_wanted() -> bool {
    std::process::id() == 1 && std::env::args_os().nth(1).is_some_and(|argument| argument == ARGUMENT)
}

/// The agent's life; it ends with the machine.
pub fn main() -> ! {
    if let Err(error) = live() {
        // The kernel's console, which the host keeps the end of.
        eprintln!("lab agent: {error:#}");
    }
    // SAFETY: plain system calls; the first process may power the machine off.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    std::process::exit(1)
}

fn live() -> Result<()> {
    let lab: Lab = std::env::args().nth(2).unwrap_or_default().parse()?;
    mount_all()?;
    load_modules()?;
    let port = line::open(lab)?;
    let link = Link::new(port.try_clone().context("cloning the port")?);
    link.send(&Frame::Hello(VERSION))?;
    let mut input = LineReader(port);
    let job = match Frame::read(&mut input)? {
        Some(Frame::Job(job)) => job,
        other => bail!("expected a job, got {other:?}"),
    };
    let outcome = run(lab, &link, input, &job);
    match outcome {
        Ok(code) => link.send(&Frame::Exit(code))?,
        Err(error) => link.send(&Frame::Trouble(format!("{error:#}")))?,
    }
    std::thread::sleep(FAREWELL);
    Ok(())
}

/// Runs the job; its exit code, or 128 + the signal that ended it.
fn run(lab: Lab, link: &Arc<Link>, input: LineReader, spec: &JobSpec) -> Result<i32> {
    let mut outputs = Outputs::new(spec.outputs.iter().map(PathBuf::from));
    let exports = Exports::serve(link).context("listening for what the job saves")?;
    // A job that will say what is wrong with KVM is better than none.
    let _idle_vm = (lab == Lab::Svm).then(|| IdleVm::new().ok());
    let start = || spawn(spec, Path::new(BINARY));
    let JobProcess { child, streams, terminal } = match lab {
        Lab::Svm => {
            start_other_cpus().context("starting the other CPUs")?;
            off_first_cpu(start).context("choosing the job's CPUs")??
        }
        // `vmx` has one; what keeps `svm`'s jobs off it is none of arm64's.
        Lab::Vmx | Lab::Arm => start()?,
    };
    if let Some(stdin) = streams.stdin {
        link.receive(Stream::STDIN, stdin, |_, _| {})?;
    }
    let (ended, ends) = mpsc::channel();
    let mut open = 0;
    for (stream, mut source) in streams.outputs {
        let (link, ended) = (Arc::clone(link), ended.clone());
        let pump = move || {
            // A terminal whose last user has gone reads as an error.
            let _ = link.send_all(stream, &mut source);
            let _ = ended.send(());
        };
        std::thread::Builder::new().name("output".to_owned()).spawn(pump)?;
        open += 1;
    }
    let control = spec.control.clone().map(PathBuf::from);
    let pid = child.id();
    let commands = Commands { link: Arc::clone(link), terminal, control, pid, exports };
    std::thread::Builder::new().name("line".to_owned()).spawn(move || commands.serve(input))?;
    let code = wait(child, link, &mut outputs)?;
    drain(&ends, open);
    outputs.finish(link)?;
    Ok(code)
}

/// Waits for the job, tells the host now and then that all is well, and sends outputs as they change.
fn wait(mut child: Child, link: &Arc<Link>, outputs: &mut Outputs) -> Result<i32> {
    use std::os::unix::process::ExitStatusExt;

    let exited: Arc<OnceLock<i32>> = Arc::default();
    let main_thread = std::thread::current();
    let waiter = {
        let exited = Arc::clone(&exited);
        move || {
            let status = child.wait();
            let code = status.map_or(255, |status| {
                status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
            });
            let _ = exited.set(code);
            main_thread.unpark();
        }
    };
    std::thread::Builder::new().name("wait".to_owned()).spawn(waiter)?;
    let mut alive = Instant::now();
    loop {
        if let Some(code) = exited.get() {
            return Ok(*code);
        }
        std::thread::park_timeout(OUTPUT_PERIOD);
        if alive.elapsed() >= ALIVE_PERIOD {
            link.send(&Frame::Alive)?;
            alive = Instant::now();
        }
        outputs.poll(link)?;
    }
}

fn drain(ends: &Receiver<()>, open: usize) {
    let end = Instant::now() + DRAIN_PATIENCE;
    for _ in 0..open {
        if ends.recv_timeout(end.saturating_duration_since(Instant::now())).is_err() {
            return;
        }
    }
}

/// What the host wants while the job runs.
struct Commands {
    link: Arc<Link>,
    terminal: Option<File>,
    control: Option<PathBuf>,
    pid: u32,
    exports: Arc<Exports>,
}

impl Commands {
    fn serve(self, mut input: LineReader) {
        loop {
            let outcome = match Frame::read(&mut input) {
                Ok(Some(frame)) => self.link.received(frame),
                // The host's end has gone, and with it the reason to be here.
                Ok(None) => return self.link.shut(),
                Err(error) => Err(error),
            };
            match outcome {
                Ok(None) => {}
                Ok(Some(Frame::Signal(number))) => {
                    // SAFETY: a plain system call; a job that has ended stays a zombie or is gone, never another.
                    unsafe { libc::kill(self.pid as libc::pid_t, number) };
                }
                Ok(Some(Frame::Resize(rows, columns))) => self.resize(rows, columns),
                Ok(Some(Frame::Control(stream))) => self.connect(stream, self.control.clone()),
                Ok(Some(Frame::Debugger(stream))) => self.connect(stream, Some(DEBUGGER_SOCKET.into())),
                Ok(Some(Frame::Placed(stream, what))) => self.exports.placed(stream, what),
                Ok(Some(other)) => eprintln!("lab agent: {other:?} out of place"),
                Err(error) => {
                    eprintln!("lab agent: {error}");
                    return self.link.shut();
                }
            }
        }
    }

    fn resize(&self, rows: u16, columns: u16) {
        if let Some(terminal) = &self.terminal {
            let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            // SAFETY: TIOCSWINSZ reads one winsize, which lives on the stack.
            unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        }
    }

    /// Joins a stream with a socket of the job's; what comes before the socket exists waits in a pair of sockets.
    fn connect(&self, stream: Stream, path: Option<PathBuf>) {
        let joined = (|| {
            let path = path.context("the job has no such socket")?;
            let (near, far) = UnixStream::pair()?;
            let mut source = near.try_clone()?;
            let hang_up = |near: UnixStream, _| {
                let _ = near.shutdown(std::net::Shutdown::Write);
            };
            self.link.receive(stream, near, hang_up)?;
            let link = Arc::clone(&self.link);
            std::thread::Builder::new().name("control".to_owned()).spawn(move || {
                let _ = link.send_all(stream, &mut source);
            })?;
            std::thread::Builder::new().name("control".to_owned()).spawn(move || join_socket(far, &path))?;
            anyhow::Ok(())
        })();
        if joined.is_err() {
            let _ = self.link.send(&Frame::Close(stream));
        }
    }
}

/// Copies both ways between `far` and the socket at `path` until both have ended.
fn join_socket(far: UnixStream, path: &Path) {
    let start = Instant::now();
    let socket = loop {
        match UnixStream::connect(path) {
            Ok(socket) => break socket,
            Err(_) if start.elapsed() < CONTROL_PATIENCE => std::thread::sleep(Duration::from_millis(50)),
            Err(_) => return,
        }
    };
    let copy = |mut from: &UnixStream, mut to: &UnixStream| {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Write);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| copy(&far, &socket));
        copy(&socket, &far);
    });
}

fn mount_all() -> Result<()> {
    let mounts = [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("devpts", "/dev/pts"),
        ("tmpfs", "/dev/shm"),
    ];
    for (kind, place) in mounts {
        fs::create_dir_all(place).with_context(|| format!("creating {place}"))?;
        let (c_kind, c_place) = (CString::new(kind)?, CString::new(place)?);
        // SAFETY: all three are C strings that live for the call; there are no options.
        let result =
            unsafe { libc::mount(c_kind.as_ptr(), c_place.as_ptr(), c_kind.as_ptr(), 0, std::ptr::null()) };
        ensure!(result == 0, "mounting {kind} on {place}: {}", io::Error::last_os_error());
    }
    // Names that devtmpfs leaves to user space.
    for (link, target) in [("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        let link = format!("/dev/{link}");
        std::os::unix::fs::symlink(format!("/proc/self/{target}"), &link)
            .with_context(|| format!("making {link}"))?;
    }
    Ok(())
}

fn load_modules() -> Result<()> {
    let mut files: Vec<_> = fs::read_dir(MODULES)
        .with_context(|| format!("reading {MODULES}"))?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    for path in files {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let parameters = MODULE_PARAMETERS.iter().find(|(module, _)| name.ends_with(&format!("-{module}")));
        let parameters = CString::new(parameters.map_or("", |(_, parameters)| parameters))?;
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        // SAFETY: the descriptor and the C string live for the call.
        let result =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
        ensure!(result == 0, "loading {}: {}", path.display(), io::Error::last_os_error());
    }
    Ok(())
}
