//! The emulator as a process: what it says, how it ends, and that it goes with this process.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use images::lab::{Lab, LabFiles};

use super::{bochs, qemu};

/// What is kept of the console and of the emulator's own messages.
const TAIL_BYTES: usize = 16 << 10;

/// A machine to start.
pub struct Machine<'a> {
    /// The helper's kernel and its modules.
    pub files: &'a LabFiles,
    /// Its initramfs.
    pub initrd: &'a File,
    /// vCPUs of the job.
    pub cpus: u8,
    /// The job's guest wants five levels of page tables.
    pub five_levels: bool,
    /// Memory.
    pub mem_bytes: u64,
    /// Disks, each with true where it is not written to: [`qemu::disk_node`] in the machine.
    pub disks: &'a [(PathBuf, bool)],
}

/// A running emulator; dropping it ends it.
pub struct Emulator {
    name: &'static str,
    child: Child,
    tail: Tail,
}

type Tail = Arc<Mutex<VecDeque<u8>>>;

/// An emulator as it is installed.
pub struct Program {
    /// What people call it.
    pub name: &'static str,
    /// The name of its file.
    pub file: &'static str,
    /// The Debian packages it comes from.
    pub packages: &'static str,
}

/// The emulator of `lab`.
pub const fn program(lab: Lab) -> Program {
    match lab {
        Lab::Svm => qemu::PROGRAM,
        Lab::Vmx => bochs::PROGRAM,
    }
}

/// Where a program is, by `PATH`.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

impl Emulator {
    /// Starts `lab`'s machine; also the host's end of its line.
    pub fn start(lab: Lab, program: &Path, machine: &Machine<'_>) -> Result<(Self, File)> {
        match lab {
            Lab::Svm => qemu::start(program, machine),
            Lab::Vmx => bochs::start(program, machine),
        }
    }

    /// Starts `command`, which keeps the descriptors `inherited`. What it writes to standard error, and to standard output
    /// unless that is set, is kept.
    pub fn spawn(name: &'static str, mut command: Command, inherited: Vec<RawFd>) -> Result<Self> {
        command
            .stderr(Stdio::piped())
            // The terminal's Ctrl-C is for the job, not for its machine.
            .process_group(0);
        // SAFETY: the closure makes system calls only, which are async-signal-safe; the descriptors are open until the
        // child has started.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                for fd in &inherited {
                    if libc::fcntl(*fd, libc::F_SETFD, 0) != 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let outputs: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|out| Box::new(out) as Box<dyn Read + Send>),
            child.stderr.take().map(|err| Box::new(err) as Box<dyn Read + Send>),
        ];
        let emulator = Self { name, child, tail: Tail::default() };
        for output in outputs.into_iter().flatten() {
            let tail = Arc::clone(&emulator.tail);
            std::thread::Builder::new()
                .name("lab-console".to_owned())
                .spawn(move || keep_tail(output, &tail))?;
        }
        Ok(emulator)
    }

    /// What people call it.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// The last lines of the lab's console and of the emulator's messages, control characters left out.
    pub fn tail(&self, lines: usize) -> Vec<String> {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = tail.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let clean = |line: &str| line.chars().filter(|c| !c.is_control()).collect::<String>();
        let all: Vec<_> = text.lines().map(clean).filter(|line| !line.trim().is_empty()).collect();
        all[all.len().saturating_sub(lines)..].to_vec()
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // One that has ended already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn keep_tail(mut output: impl Read, tail: &Mutex<VecDeque<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = output.read(&mut buffer) {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(&buffer[..count]);
        let excess = tail.len().saturating_sub(TAIL_BYTES);
        tail.drain(..excess);
    }
}
