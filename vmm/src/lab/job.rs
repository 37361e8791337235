//! What is to run in the lab.

use std::path::PathBuf;

use anyhow::{Context, Result};
use images::lab::Lab;
use images::module_file::{self, WantedModule};

use super::ENVIRONMENT;
use super::payload::is_hidden;
use super::qemu::disk_node;
use crate::cli::Failure;
use crate::cli::options::{LabChoice, PagingChoice, RunOptions};
use crate::cli::relay::PathUse;
use crate::cli::values::ModuleSpec;
use crate::console::socket;
use crate::files::resolved;

/// What the helper Linux needs beside the guest's memory.
const HEADROOM: u64 = 1 << 30;
/// Variables that go along, by the beginnings of their names.
const VARIABLES: [&str; 8] = ["PATH", "TERM", "LANG", "LC_", "COLUMNS", "LINES", "RUST_BACKTRACE", "KLEAK_"];

/// A command of this program to run in the lab, and the files it needs. Every path means the same inside and outside.
#[derive(Debug, Clone)]
pub struct Job {
    /// Where.
    pub lab: Lab,
    /// Arguments, the program's name first.
    pub argv: Vec<String>,
    /// Environment, all of it.
    pub env: Vec<(String, String)>,
    /// Working directory, absolute.
    pub cwd: PathBuf,
    /// Files and folders it reads, absolute.
    pub inputs: Vec<PathBuf>,
    /// Folders that must be there, if only empty; absolute.
    pub folders: Vec<PathBuf>,
    /// Files and folders it writes, absolute.
    pub outputs: Vec<PathBuf>,
    /// Disks of its guest, absolute, and true where they are not written to.
    pub disks: Vec<(PathBuf, bool)>,
    /// Its control socket, absolute.
    pub control: Option<PathBuf>,
    /// Memory of its guest, in bytes.
    pub guest_mem_bytes: u64,
    /// vCPUs of its guest.
    pub cpus: u8,
    /// Its guest wants five levels of page tables.
    pub five_levels: bool,
}

impl Job {
    /// A command without files.
    ///
    /// # Errors
    /// There is no working directory.
    pub fn new(lab: Lab, argv: impl IntoIterator<Item = impl Into<String>>) -> Result<Self> {
        let kept = |name: &str| VARIABLES.iter().any(|beginning| name.starts_with(beginning));
        let mut env: Vec<_> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| kept(name) && name != ENVIRONMENT)
            .collect();
        env.push((ENVIRONMENT.to_owned(), lab.to_string()));
        Ok(Self {
            lab,
            argv: argv.into_iter().map(Into::into).collect(),
            env,
            cwd: std::env::current_dir().context(Failure::host("Cannot tell the working directory"))?,
            inputs: Vec::new(),
            folders: Vec::new(),
            outputs: Vec::new(),
            disks: Vec::new(),
            control: None,
            guest_mem_bytes: 0,
            cpus: 1,
            five_levels: false,
        })
    }

    /// `kleak-vmm run` with these options, and the drivers of its disks, in `lab`.
    ///
    /// # Errors
    /// A path that is not UTF-8, or no folder for the control socket.
    pub fn of_run(options: &RunOptions, drivers: &[WantedModule], lab: Lab) -> Result<Self> {
        let mut options = options.clone();
        options.lab = LabChoice::Never;
        options.kernel = Some(options.kernel_path());
        options.control = Some(match options.control.take() {
            Some(path) => path,
            None => socket::default_path()?,
        });
        let mut job = Self::new(lab, ["kleak-vmm", "run"])?;
        job.control = options.control.as_ref().map(|path| job.cwd.join(path));
        job.guest_mem_bytes = options.mem_bytes;
        job.cpus = options.cpus;
        job.five_levels = options.paging == PagingChoice::Five;
        let args = options.to_args(|path, usage| {
            let absolute = job.cwd.join(path);
            let mut inside = path.to_owned();
            match usage {
                // The control socket is made on both sides.
                _ if Some(&absolute) == job.control.as_ref() => {}
                // Of that folder only what is needed goes along.
                PathUse::Input if Some(path) == options.module_dir.as_deref() => job.folders.push(absolute),
                PathUse::Input => job.inputs.push(absolute),
                // Where the lab has it; names below its /dev mean nothing there.
                PathUse::Disk(read_only) => {
                    inside = disk_node(job.disks.len()).into();
                    job.disks.push((absolute, read_only));
                }
                PathUse::Output if is_hidden(&absolute) => {}
                PathUse::Output => job.outputs.push(resolved(&absolute)),
            }
            inside
        });
        for arg in args {
            let text = arg.into_string().map_err(|arg| {
                Failure::usage(format!(
                    "The lab takes no argument that is not UTF-8: {}",
                    arg.to_string_lossy()
                ))
            })?;
            job.argv.push(text);
        }
        job.inputs.extend(needed_modules(&options, drivers).into_iter().map(|path| job.cwd.join(path)));
        let script = options.exec.as_deref().and_then(images::initramfs::command_file);
        job.inputs.extend(script.map(|file| job.cwd.join(file.host)));
        job.inputs.extend(images::initramfs::find_busybox());
        Ok(job)
    }

    /// Memory of the lab's machine: the guest's, the helper's, and the files twice, once packed and once unpacked.
    pub(super) fn lab_memory(&self, initrd_bytes: u64) -> u64 {
        self.guest_mem_bytes + HEADROOM + 2 * initrd_bytes
    }

    /// Whether the host has the memory. The emulator takes it as it is used, so that less than all may do.
    ///
    /// # Errors
    /// There is less than the guest alone needs.
    pub(super) fn check_memory(&self) -> Result<()> {
        let needed = self.guest_mem_bytes + HEADROOM / 2;
        match crate::doctor::available_memory_bytes() {
            Some(available) if available < needed => {
                let mib = |bytes: u64| bytes >> 20;
                let what =
                    format!("The lab needs {} MiB, this host has {} free", mib(needed), mib(available));
                Err(Failure::host(what).hint("give the guest less with --mem").into())
            }
            _ => Ok(()),
        }
    }
}

/// Files of the modules that the given ones need. None when they cannot be told, which the inner run says in its words.
fn needed_modules(options: &RunOptions, drivers: &[WantedModule]) -> Vec<PathBuf> {
    let wanted = |spec: &ModuleSpec| WantedModule { path: spec.path.clone(), parameters: String::new() };
    let wanted: Vec<_> = options.modules.iter().map(wanted).collect();
    let found = |wanted| module_file::resolve(wanted, options.module_dir.as_deref()).unwrap_or_default();
    found(&wanted).into_iter().chain(found(drivers)).map(|(file, _)| file.path).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: RunOptions,
    }

    #[test]
    fn takes_files_along_and_brings_reports_back() {
        let line = "run --kernel k --initrd /i --file h:/g --report r.json --report /dev/stderr --report - \
                    --report-dir rd --module-dir md --control c.sock --mem 256M --cpus 2 --disk d,ro --disk e --lab vmx";
        let options = Line::try_parse_from(line.split_whitespace()).unwrap().run;
        let job = Job::of_run(&options, &[], Lab::Vmx).unwrap();
        let here = std::env::current_dir().unwrap();
        for input in [here.join("k"), "/i".into(), here.join("h")] {
            assert!(job.inputs.contains(&input), "{input:?}");
        }
        assert_eq!(job.folders, [here.join("md")]);
        assert_eq!(job.outputs, [here.join("rd"), here.join("r.json")]);
        assert_eq!(job.disks, [(here.join("d"), true), (here.join("e"), false)]);
        assert_eq!(job.control, Some(here.join("c.sock")));
        assert!(
            ["--disk=/dev/vda,ro", "--disk=/dev/vdb"].iter().all(|arg| job.argv.iter().any(|a| a == arg))
        );
        assert_eq!((job.guest_mem_bytes, job.cpus), (256 << 20, 2));
        assert!(job.argv.contains(&"--kernel=k".to_owned()) && job.argv.contains(&"--lab=never".to_owned()));
        assert!(job.env.contains(&("KLEAK_LAB".to_owned(), "vmx".to_owned())));
        assert_eq!(job.lab_memory(0), (256 << 20) + (1 << 30));
    }
}
