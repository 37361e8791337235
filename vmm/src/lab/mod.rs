//! The lab: real KVM on a machine that has none. An emulator plays a machine with virtualisation, a helper Linux boots on
//! it, and in that runs this very binary, with the arguments it was given outside. Console, control socket, reports
//! and exit code are those of the inner run.
//!
//! | lab | emulator | virtualisation | line | payload |
//! | --- | --- | --- | --- | --- |
//! | `svm` | QEMU's TCG (`qemu.rs`) | AMD's SVM | virtio-serial | `-initrd` |
//! | `vmx` | Bochs (`bochs.rs`) | Intel's VMX | a UART | a CD |
//! | `arm` | QEMU's TCG (`qemu.rs`) | arm64's EL2 | virtio-serial | `-initrd` |
//!
//! QEMU is several times faster than Bochs, and has no breakpoint exits on x86-64. `arm` is for arm64 guests; on an x86-64 host
//! another binary runs in it, one for arm64.
//!
//! ```text
//! kleak-vmm run ...      host.rs  ==[ wire.rs over a serial port ]==  agent.rs      kleak-vmm run ... --lab never
//!   terminal, pipes  <->  link.rs                                     link.rs  <->  pseudo terminal, pipes
//!   --control socket <->                                                       <->  control socket
//!   --report files   <--  incoming.rs                                          <--  outputs.rs
//!   snapshot=, core= <--                                                       <--  exports.rs
//!   --kernel, ...    -->  payload.rs (initramfs)
//!   --disk           <->  qemu.rs (drives of the machine)                           /dev/vda, ...
//! ```

mod affinity;
pub mod agent;
mod bochs;
mod decide;
mod emulator;
mod exports;
mod host;
mod idle_vm;
mod incoming;
mod job;
mod job_process;
mod line;
mod link;
mod outputs;
mod payload;
mod qemu;
mod wire;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use images::lab::LabFiles;
use images::module_file::WantedModule;

pub use bochs::is_installed as bochs_is_installed;
pub use decide::{Decision, arch_in, decide, foreign, guest_arch, own_lab};
pub use emulator::{Program, program};
pub use exports::Export;
pub use images::lab::Lab;
pub use job::Job;
pub use qemu::version as qemu_version;

use crate::cli::options::RunOptions;
use crate::cli::{ExitCode, Failure};

/// Set in the lab, to the lab's name; reports carry it.
pub const ENVIRONMENT: &str = "KLEAK_LAB";

/// The lab this process runs in.
pub fn inside() -> Option<String> {
    std::env::var(ENVIRONMENT).ok().filter(|name| !name.is_empty())
}

/// Folder of the lab's files: `$KLEAK_LAB_DIR`, else `kleak-vmm/lab` in `$XDG_CACHE_HOME` or `~/.cache`.
pub fn folder() -> Result<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(folder) = absolute("KLEAK_LAB_DIR") {
        return Ok(folder);
    }
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    cache.map(|cache| cache.join("kleak-vmm/lab")).with_context(|| {
        Failure::host("Cannot tell where the lab's files are to be kept").hint("set HOME or KLEAK_LAB_DIR")
    })
}

/// Whether the files of `lab` are there already.
pub fn is_prepared(lab: Lab) -> bool {
    folder().is_ok_and(|folder| images::lab::prepared(lab, &folder).is_some())
}

/// The helper's command line: quick to boot, quiet, and dead when it panics, which ends the emulator. What is left out
/// serves tracing, BPF and module signatures, and takes 0.8 s of 1.8 under QEMU. It boots on one CPU, the agent starts the
/// others when the kernel has patched itself: see [`idle_vm`].
const KERNEL_ARGUMENTS: &str = "quiet panic=-1 oops=panic mitigations=off nokaslr rootfstype=ramfs preempt=none audit=0 \
    lsm=capability initcall_blacklist=jent_mod_init,load_system_certificate_list,trace_eval_init,init_kprobe_trace,\
    bpf_tcp_ca_kfunc_init,bpf_dummy_struct_ops_init,crypto_algapi_init,crypto_kdf108_init rdinit=/kleak-vmm";

/// The helper's command line in `lab`, on a machine whose time-stamp counter has `counter_khz`, where it has one.
fn kernel_arguments(lab: Lab, counter_khz: Option<u64>) -> String {
    let machine = match lab {
        Lab::Svm | Lab::Vmx => "console=ttyS0 no5lvl tsc=reliable no_timer_check maxcpus=1",
        Lab::Arm => "console=ttyAMA0",
    };
    let counter = counter_khz.map(|khz| format!("tsc_early_khz={khz} ")).unwrap_or_default();
    format!("{counter}{machine} {KERNEL_ARGUMENTS} -- {} {lab}", agent::ARGUMENT)
}

/// What the binary for `lab` is called beside this one, where it is not this one.
fn binary_name(lab: Lab) -> String {
    format!("kleak-vmm-{}", lab.arch())
}

/// The binary to run in `lab`.
///
/// # Errors
/// The lab's machine is of another architecture, and there is no binary for it beside this one.
fn binary(lab: Lab) -> Result<PathBuf> {
    if lab.arch() == std::env::consts::ARCH {
        return Ok("/proc/self/exe".into());
    }
    let own = std::env::current_exe().context(Failure::host("Cannot tell where this program is"))?;
    let beside = own.with_file_name(binary_name(lab));
    if beside.is_file() {
        return Ok(beside);
    }
    let what =
        format!("The lab {lab} needs a kleak-vmm for {}, and there is no {}", lab.arch(), beside.display());
    let hint = match lab {
        Lab::Arm => "cargo xtask build --arm64 makes it; it has its place beside this program",
        Lab::Svm | Lab::Vmx => "it has its place beside this program",
    };
    Err(Failure::host(what).hint(hint).into())
}

/// Whether there is a binary to run in `lab`.
pub fn has_binary(lab: Lab) -> bool {
    binary(lab).is_ok()
}

/// `kleak-vmm run` in `lab`, with the drivers of its disks; `reason` is why it does not run here, where the user did not ask for the lab.
///
/// Errors as [`run`].
pub fn run_command(
    options: &RunOptions,
    drivers: &[WantedModule],
    lab: Lab,
    reason: Option<&str>,
) -> Result<ExitCode> {
    if let Some(reason) = reason.filter(|_| !options.quiet) {
        eprintln!("kleak-vmm: running in the lab, under emulation and about 20 times slower: {reason}");
    }
    let job = Job::of_run(options, drivers, lab)?;
    if let Some(address) = job.debugger.as_ref().filter(|_| !options.quiet) {
        eprintln!("kleak-vmm: for gdb: target remote {address}");
    }
    run(&job)
}

/// Runs `job` in the lab, joined with this process's streams.
///
/// Errors are of exit code 4, or 2 for a control socket that cannot be had.
pub fn run(job: &Job) -> Result<ExitCode> {
    exit_code(start(job, &host::Streams::Own)?.code)
}

/// What a captured run left.
#[derive(Debug)]
pub struct Captured {
    /// Its exit code.
    pub code: i32,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// From the start of the emulator until the lab was up.
    pub start: Duration,
}

/// Runs `job` in the lab, and keeps what it writes to its standard output.
///
/// Errors as [`run`].
pub fn capture(job: &Job) -> Result<Captured> {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let ended = start(job, &host::Streams::Captured(Arc::clone(&kept)))?;
    let stdout = std::mem::take(&mut *kept.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(Captured { code: ended.code, stdout, start: ended.start })
}

fn start(job: &Job, streams: &host::Streams) -> Result<host::Ended> {
    let Program { name, file, packages } = program(job.lab);
    let found = emulator::find(file).with_context(|| {
        Failure::host(format!("The lab {} needs {name}, and there is no {file}", job.lab))
            .hint(format!("apt-get install {packages}"))
    })?;
    job.check_memory()?;
    host::run(job, &prepare(job.lab)?, &found, streams)
}

/// Makes the files of `lab`, unless they are there.
///
/// # Errors
/// Debian's mirror or a tool is missing, with a hint.
pub fn prepare(lab: Lab) -> Result<LabFiles> {
    let folder = folder()?;
    if images::lab::prepared(lab, &folder).is_none() {
        eprintln!("kleak-vmm: preparing the lab {lab} (once): its kernel comes from Debian's mirror");
    }
    images::lab::prepare(lab, &folder).with_context(|| {
        Failure::host("Cannot prepare the lab")
            .hint("it needs apt-get, dpkg and Debian's mirror once; KLEAK_LAB_DIR may name a folder prepared elsewhere")
    })
}

fn exit_code(code: i32) -> Result<ExitCode> {
    let codes = [ExitCode::Success, ExitCode::Leaks, ExitCode::Usage, ExitCode::Guest, ExitCode::Host];
    if let Some(known) = codes.into_iter().find(|known| *known as i32 == code) {
        return Ok(known);
    }
    let what = match code {
        137 => "The run in the lab was killed, most likely for want of memory".to_owned(),
        code @ 129..=192 => format!("The run in the lab ended by signal {}", code - 128),
        code => format!("The run in the lab ended with status {code}"),
    };
    Err(Failure::host(what).hint("give the guest less with --mem, or look at what was printed before").into())
}
