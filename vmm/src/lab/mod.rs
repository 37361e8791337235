//! The lab: real KVM on a machine that has none. QEMU emulates a machine with virtualisation, a helper Linux boots on
//! it, and in that runs this very binary, with the arguments it was given outside. Console, control socket, reports
//! and exit code are those of the inner run.
//!
//! ```text
//! kleak-vmm run ...      host.rs  ==[ wire.rs over virtio-serial ]==  agent.rs      kleak-vmm run ... --lab never
//!   terminal, pipes  <->  link.rs                                     link.rs  <->  pseudo terminal, pipes
//!   --control socket <->                                                       <->  control socket
//!   --report files   <--  incoming.rs                                          <--  outputs.rs
//!   snapshot=, core= <--                                                       <--  exports.rs
//!   --kernel, ...    -->  payload.rs (initramfs)
//!   --disk           <->  qemu.rs (drives of the machine)                           /dev/vda, ...
//! ```

mod affinity;
pub mod agent;
mod decide;
mod exports;
mod host;
mod idle_vm;
mod incoming;
mod job;
mod job_process;
mod link;
mod outputs;
mod payload;
mod qemu;
mod wire;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use images::lab::{SvmLab, prepare_svm, prepared_svm};
use images::module_file::WantedModule;

pub use decide::{Decision, decide};
pub use exports::Export;
pub use job::Job;
pub use qemu::{PROGRAM, version as qemu_version};

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

/// Whether the lab's files are there already.
pub fn is_prepared() -> bool {
    folder().is_ok_and(|folder| prepared_svm(&folder).is_some())
}

/// `kleak-vmm run` in the lab, with the drivers of its disks; `reason` is why it does not run here, where the user did not ask for the lab.
///
/// Errors as [`run`].
pub fn run_command(options: &RunOptions, drivers: &[WantedModule], reason: Option<&str>) -> Result<ExitCode> {
    if let Some(reason) = reason.filter(|_| !options.quiet) {
        eprintln!("kleak-vmm: running in the lab, under emulation and about 20 times slower: {reason}");
    }
    run(&Job::of_run(options, drivers)?)
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
    /// From the start of QEMU until the lab was up.
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
    let program = qemu::find().with_context(|| {
        Failure::host(format!("The lab needs QEMU, and there is no {PROGRAM}"))
            .hint("apt-get install qemu-system-x86")
    })?;
    job.check_memory()?;
    host::run(job, &prepare()?, &program, streams)
}

/// Makes the lab's files, unless they are there.
///
/// # Errors
/// Debian's mirror or a tool is missing, with a hint.
pub fn prepare() -> Result<SvmLab> {
    let folder = folder()?;
    if prepared_svm(&folder).is_none() {
        eprintln!("kleak-vmm: preparing the lab (once): its kernel comes from Debian's mirror");
    }
    prepare_svm(&folder).with_context(|| {
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
