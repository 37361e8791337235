//! QEMU as the lab's machine: emulated in software, with AMD's SVM.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

use crate::arch::counter_khz;

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// What kept of the console and of QEMU's own messages.
const TAIL_BYTES: usize = 16 << 10;
/// A firmware that does nothing but start a kernel, half a second faster than the default.
const FIRMWARE: &str = "/usr/share/qemu/qboot.rom";
/// The CPU: everything QEMU can, but no five-level page tables, which make each walk longer, and no XSAVE, which makes
/// each exit from a guest a tenth longer.
const CPU: &str = "max,la57=off,-xsave";
/// The helper Linux: quick to boot, quiet, and dead when it panics, which ends QEMU. What is left out serves tracing,
/// BPF and module signatures, and takes 0.8 s of 1.8. It boots on one CPU, the agent starts the others when the kernel
/// has patched itself: see [`super::idle_vm`].
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nokaslr tsc=reliable \
    no_timer_check maxcpus=1 rootfstype=ramfs preempt=none audit=0 lsm=capability initcall_blacklist=jent_mod_init,\
    load_system_certificate_list,trace_eval_init,init_kprobe_trace,bpf_tcp_ca_kfunc_init,bpf_dummy_struct_ops_init,\
    crypto_algapi_init,crypto_kdf108_init rdinit=/kleak-vmm -- lab-agent";

/// A machine to start.
pub struct Machine<'a> {
    /// The helper's kernel, a vmlinux.
    pub kernel: &'a Path,
    /// Its initramfs.
    pub initrd: &'a File,
    /// CPUs.
    pub cpus: u8,
    /// Memory.
    pub mem_bytes: u64,
    /// Disks, each with true where it is not written to: [`disk_node`] in the machine.
    pub disks: &'a [(PathBuf, bool)],
}

/// The device node of a disk in the machine.
pub fn disk_node(index: usize) -> String {
    // There are 8 at most.
    format!("/dev/vd{}", char::from(b'a' + index as u8))
}

/// A running QEMU; dropping it ends it.
pub struct Qemu {
    child: Child,
    tail: Arc<Mutex<VecDeque<u8>>>,
}

/// Where QEMU is, by `PATH`.
pub fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(PROGRAM)).find(|file| file.is_file())
}

/// First line of what QEMU says of its version.
pub fn version() -> Option<String> {
    let output = Command::new(find()?).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(str::to_owned)
}

impl Qemu {
    /// Starts the machine; also the host's end of its serial port.
    pub fn start(program: &Path, machine: &Machine<'_>) -> Result<(Self, UnixStream)> {
        let (here, there) = UnixStream::pair().context("making the lab's line")?;
        let mut command = Command::new(program);
        command
            .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", CPU])
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
            .args(["-smp", &machine.cpus.to_string()])
            .args(["-m", &format!("{}M", machine.mem_bytes.div_ceil(1 << 20))])
            .arg("-kernel")
            .arg(machine.kernel)
            .args(["-initrd", &format!("/proc/self/fd/{}", machine.initrd.as_raw_fd())])
            // It would measure that wrongly on a loaded machine.
            .args(["-append", &format!("tsc_early_khz={} {COMMAND_LINE}", counter_khz())])
            .args(["-device", "virtio-serial-pci"])
            .args(["-chardev", &format!("socket,id=line,fd={}", there.as_raw_fd())])
            .args(["-device", "virtserialport,chardev=line,name=kleak"])
            .args(machine.disks.iter().enumerate().flat_map(|(index, disk)| drive(index, disk)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // The terminal's Ctrl-C is for the job, not for its machine.
            .process_group(0);
        if Path::new(FIRMWARE).exists() {
            command.args(["-bios", FIRMWARE]);
        }
        let inherited = [machine.initrd.as_raw_fd(), there.as_raw_fd()];
        // SAFETY: the closure makes system calls only, which are async-signal-safe; both descriptors are open until
        // the child has started.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                for fd in inherited {
                    if libc::fcntl(fd, libc::F_SETFD, 0) != 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let mut child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let outputs: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|out| Box::new(out) as Box<dyn Read + Send>),
            child.stderr.take().map(|err| Box::new(err) as Box<dyn Read + Send>),
        ];
        let qemu = Self { child, tail };
        for output in outputs.into_iter().flatten() {
            let tail = Arc::clone(&qemu.tail);
            std::thread::Builder::new()
                .name("lab-console".to_owned())
                .spawn(move || keep_tail(output, &tail))?;
        }
        Ok((qemu, here))
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// The last lines of the lab's console and of QEMU's messages, control characters left out.
    pub fn tail(&self, lines: usize) -> Vec<String> {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = tail.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let clean = |line: &str| line.chars().filter(|c| !c.is_control()).collect::<String>();
        let all: Vec<_> = text.lines().map(clean).filter(|line| !line.trim().is_empty()).collect();
        all[all.len().saturating_sub(lines)..].to_vec()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // One that has ended already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The options for a disk. QEMU wants commas in names twice.
fn drive(index: usize, (path, read_only): &(PathBuf, bool)) -> [OsString; 4] {
    let mut drive = OsString::from("file=");
    let name = path.as_os_str().as_bytes();
    drive.push(OsStr::from_bytes(&name.split(|&b| b == b',').collect::<Vec<_>>().join(&b",,"[..])));
    let access = if *read_only { "on" } else { "off" };
    drive.push(format!(",format=raw,if=none,id=disk{index},readonly={access}"));
    ["-drive".into(), drive, "-device".into(), format!("virtio-blk-pci,drive=disk{index}").into()]
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
