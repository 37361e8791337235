//! What can be known to go wrong is said before anything starts: unreadable files, wrong kinds of file, not enough
//! memory.

use super::failure::Failure;
use super::options::{Reports, RunOptions, TracerChoice};
use super::values::format_size;
use crate::lab;
use crate::machine::{MAX_DISKS, MEMORY_LIMITS};
use crate::meminfo;
use crate::saved;
use anyhow::Context;
use images::initramfs;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

/// Checks every path of `options` and the memory asked for.
///
/// # Errors
/// A [`Failure`] of exit code 2 that names the option and the path, or of code 4 when the host has too little
/// memory.
pub fn check(options: &RunOptions) -> anyhow::Result<()> {
    check_kernel(options)?;
    if let Some(initrd) = &options.initrd {
        input_file(initrd, "initrd", "check --initrd, or leave it out to boot the embedded initramfs")?;
    }
    for module in &options.modules {
        check_module(&module.path, lab::guest_arch(options), "check --module")?;
    }
    for file in &options.files {
        input_file(&file.host, "file", "check the HOST part of --file HOST:GUEST")?;
    }
    check_disks(options)?;
    if options.gdb.is_some() && options.tracer == TracerChoice::Ring {
        return Err(Failure::usage("gdb's breakpoints and the ring's jumps cannot be in one place")
            .hint("leave --tracer out, or --gdb")
            .into());
    }
    check_command(options)?;
    if let Some(types) = &options.types {
        input_file(types, "types", "check --types")?;
    }
    if let Some(profile) = &options.profile {
        input_file(profile, "guest profile", "check --profile")?;
    }
    for file in &options.suppressions {
        input_file(file, "suppressions", "check --suppressions")?;
    }
    if let Some(dir) = &options.module_dir {
        directory(dir, "module directory", "check --module-dir")?;
    }
    reports(&options.reports)?;
    if let Some(events) = &options.events {
        output_file(events, "events", "check --events")?;
    }
    if let Some(snapshot) = &options.snapshot_on_leak {
        saved::check_place(snapshot).with_context(|| {
            Failure::usage(format!("Cannot save to {}", snapshot.display())).hint("check --snapshot-on-leak")
        })?;
        output_file(snapshot, "saved machine", "check --snapshot-on-leak")?;
    }
    if let Some(dir) = &options.report_dir {
        let failure = || Failure::usage(format!("Cannot create report directory {}", dir.display()));
        std::fs::create_dir_all(dir).with_context(|| failure().hint("check --report-dir"))?;
    }
    check_memory(options.mem_bytes, host_memory_bytes())
}

/// Whether the reports can be written.
///
/// # Errors
/// Names the one that cannot.
pub(super) fn reports(reports: &Reports) -> anyhow::Result<()> {
    let files = reports.0.iter().map(|report| report.path.as_path());
    files
        .filter(|path| *path != Path::new("-"))
        .try_for_each(|path| output_file(path, "report", "check --report"))
}

fn check_kernel(options: &RunOptions) -> anyhow::Result<()> {
    let hint = match options.kernel {
        Some(_) => "check --kernel",
        None => {
            "give a kernel with --kernel; without it the host's own is taken, which only root may read on some systems"
        }
    };
    input_file(&options.kernel_path(), "kernel", hint).map(drop)
}

/// A disk is an image or a block device, and may be written to unless it is only read.
fn check_disks(options: &RunOptions) -> anyhow::Result<()> {
    if options.disks.len() > MAX_DISKS {
        return Err(Failure::usage(format!("A guest has {MAX_DISKS} disks at most"))
            .hint("check --disk")
            .into());
    }
    if let (Some(lab), false) = (lab::foreign(options), options.disks.is_empty()) {
        let what = format!("The lab {lab} has no disks on a host of another architecture");
        return Err(Failure::usage(what)
            .hint("leave --disk out, or bring what is needed with --file")
            .into());
    }
    let without_acpi = options.cmdline.split_whitespace().any(|word| word == "acpi=off");
    if without_acpi && !options.disks.is_empty() && lab::guest_arch(options) == "x86_64" {
        return Err(Failure::usage("A kernel sees no disks with acpi=off")
            .hint("leave --disk out, or acpi=off; acpi=noirq takes no interrupts from ACPI, but disks")
            .into());
    }
    for disk in &options.disks {
        let what = || Failure::usage(format!("Cannot use disk {}", disk.path.display()));
        let there = std::fs::metadata(&disk.path).with_context(|| what().hint("check --disk"))?;
        if !there.is_file() && !there.file_type().is_block_device() {
            let error = what().hint("give a raw image, such as mkfs.ext4 makes of a file, or a block device");
            return Err(anyhow::anyhow!("It is neither a file nor a block device").context(error));
        }
        let opened = File::options().read(true).write(!disk.read_only).open(&disk.path);
        opened.with_context(|| what().hint("PATH,ro only reads it"))?;
    }
    Ok(())
}

/// A command that is a file of this host (`./test.sh`) must be one that can be executed; the guest would say so only
/// after the boot.
fn check_command(options: &RunOptions) -> anyhow::Result<()> {
    let Some(command) = options.exec.as_deref().and_then(initramfs::relative_command) else { return Ok(()) };
    if options.files.iter().any(|file| file.guest == command.guest) {
        return Ok(());
    }
    let path = &command.host;
    let hint = "check --exec; a relative path is a file of this host, an absolute one the guest's";
    input_file(path, "command", hint)?;
    let mode = std::fs::metadata(path).map(|metadata| metadata.permissions().mode());
    if mode.is_ok_and(|mode| mode & 0o111 == 0) {
        let what = format!("Cannot execute {}: Its mode does not allow it", path.display());
        return Err(Failure::usage(what).hint(format!("chmod +x {}", path.display())).into());
    }
    Ok(())
}

/// A module is a relocatable ELF file for the guest's machine; whether it fits the kernel is seen later.
///
/// # Errors
/// It is not; `hint` is for one that cannot be read.
pub(crate) fn check_module(path: &Path, arch: &str, hint: &str) -> anyhow::Result<()> {
    const ET_REL: u16 = 1;
    let head = input_file(path, "module", hint)?;
    let failure = |what: &str| {
        let text = format!("Module {} is not a kernel module: {what}", path.display());
        Failure::usage(text).hint("build it against the headers of the guest's kernel, and give the .ko file")
    };
    // Packed with gzip, xz or zstd, as distributions do: what is in it shows when it is read.
    if [&b"\x1f\x8b"[..], b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"].iter().any(|magic| head.starts_with(magic)) {
        return Ok(());
    }
    if !head.starts_with(b"\x7fELF") {
        return Err(failure("no ELF file").into());
    }
    // e_type and e_machine of the ELF header (System V ABI, "ELF Header").
    let field = |at: usize| head.get(at..at + 2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match (field(16), field(18)) {
        (Some(ET_REL), Some(machine)) if machine == module_machine(arch) => Ok(()),
        (Some(ET_REL), Some(other)) => {
            Err(failure(&format!("built for another machine (ELF machine {other})")).into())
        }
        (Some(_), Some(_)) => Err(failure("an ELF file, but not a relocatable one").into()),
        _ => Err(failure("truncated").into()),
    }
}

/// `e_machine` of modules for an architecture (System V ABI, "ELF Header", and its supplement for arm64).
fn module_machine(arch: &str) -> u16 {
    match arch {
        "aarch64" => 183,
        _ => 62,
    }
}

/// Opens a file for reading, as it will be later; returns its first bytes (up to 64).
pub(crate) fn input_file(path: &Path, what: &str, hint: &str) -> anyhow::Result<Vec<u8>> {
    let failure = || Failure::usage(format!("Cannot read {what} {}", path.display())).hint(hint);
    let metadata = std::fs::metadata(path).with_context(failure)?;
    if metadata.is_dir() {
        return Err(anyhow::anyhow!("It is a directory").context(failure()));
    }
    let mut head = Vec::new();
    let file = File::open(path).with_context(failure)?;
    // Only a regular file can be looked at without consuming it.
    if metadata.is_file() {
        file.take(64).read_to_end(&mut head).with_context(failure)?;
        if head.is_empty() {
            return Err(anyhow::anyhow!("It is empty").context(failure()));
        }
    }
    Ok(head)
}

fn directory(path: &Path, what: &str, hint: &str) -> anyhow::Result<()> {
    let failure = || Failure::usage(format!("Cannot read {what} {}", path.display())).hint(hint);
    std::fs::read_dir(path).map(drop).with_context(failure)
}

/// Reports are written at the end of the run; that one cannot be is better said at the start. The file is not
/// created yet, so that a run that fails leaves none behind.
pub(crate) fn output_file(path: &Path, what: &str, hint: &str) -> anyhow::Result<()> {
    let failure = || Failure::usage(format!("Cannot write {what} {}", path.display())).hint(hint);
    if path.is_dir() {
        return Err(anyhow::anyhow!("It is a directory").context(failure()));
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let existing = if path.exists() { path } else { parent };
    writable(existing).with_context(failure)
}

/// Whether `path` exists and may be written to by this process.
fn writable(path: &Path) -> std::io::Result<()> {
    let c_path = std::ffi::CString::new(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()))?;
    // SAFETY: the argument is a NUL-terminated string that outlives the call.
    match unsafe { libc::access(c_path.as_ptr(), libc::W_OK) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn check_memory(asked: u64, host: Option<u64>) -> anyhow::Result<()> {
    let (least, most) = MEMORY_LIMITS;
    if !asked.is_multiple_of(4096) {
        let what = format!("--mem {asked} is no multiple of the page size");
        return Err(Failure::usage(what).hint("sizes take K, M or G, such as --mem 512M").into());
    }
    if !(least..=most).contains(&asked) {
        let what = format!(
            "--mem {} is not within {} and {}",
            format_size(asked),
            format_size(least),
            format_size(most)
        );
        return Err(Failure::usage(what).hint("sizes take K, M or G, such as --mem 512M").into());
    }
    match host {
        Some(host) if asked > host => {
            let what = format!(
                "Not enough memory: the guest is to have {}, the host has {}M",
                format_size(asked),
                host >> 20
            );
            Err(Failure::host(what).hint("give the guest less with --mem").into())
        }
        _ => Ok(()),
    }
}

/// Memory and swap of the host together, from /proc/meminfo (proc(5)); None where it cannot be read.
fn host_memory_bytes() -> Option<u64> {
    parse_meminfo(&meminfo::read()?)
}

fn parse_meminfo(text: &str) -> Option<u64> {
    Some(meminfo::field(text, "MemTotal:")? + meminfo::field(text, "SwapTotal:").unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::super::failure::{ExitCode, exit_code, render};
    use super::*;
    use clap::Parser;
    use std::env::consts::ARCH;
    use std::path::PathBuf;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: RunOptions,
    }

    /// A directory that goes away with the test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("kleak-check-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn file(&self, name: &str, bytes: &[u8]) -> String {
            let path = self.0.join(name);
            std::fs::write(&path, bytes).unwrap();
            path.display().to_string()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn checked(args: &[&str]) -> anyhow::Result<()> {
        check(&Line::try_parse_from(std::iter::once(&"run").chain(args)).unwrap().run)
    }

    fn refusal(args: &[&str]) -> String {
        let error = checked(args).unwrap_err();
        assert_eq!(exit_code(&error), ExitCode::Usage, "{error:#}");
        let text = render(&error);
        assert_eq!(text.lines().count(), 2, "{text}");
        text
    }

    #[test]
    fn missing_and_wrong_files_are_named() {
        let scratch = Scratch::new("files");
        let kernel = scratch.file("bzImage", b"MZ kernel");
        let empty = scratch.file("empty", b"");
        let dir = scratch.0.display().to_string();
        let missing = format!("{dir}/missing");
        assert!(checked(&["--kernel", &kernel]).is_ok());
        assert!(refusal(&["--kernel", &missing]).contains("Cannot read kernel /"));
        assert!(refusal(&["--kernel", &dir]).contains("It is a directory"));
        assert!(refusal(&["--kernel", &empty]).contains("It is empty"));
        assert!(refusal(&["--kernel", &kernel, "--initrd", &missing]).contains("Cannot read initrd"));
        assert!(
            refusal(&["--kernel", &kernel, "--file", &format!("{missing}:/x")]).contains("Cannot read file")
        );
        assert!(refusal(&["--kernel", &kernel, "--profile", &missing]).contains("guest profile"));
        assert!(refusal(&["--kernel", &kernel, "--types", &missing]).contains("Cannot read types"));
        assert!(refusal(&["--kernel", &kernel, "--module-dir", &missing]).contains("module directory"));
        assert!(refusal(&["--kernel", &kernel, "--report", &dir]).contains("Cannot write report"));
        assert!(
            refusal(&["--kernel", &kernel, "--report", &format!("{missing}/r")])
                .contains("Cannot write report")
        );
        assert!(refusal(&["--kernel", &kernel, "--report-dir", &kernel]).contains("report directory"));
        assert!(refusal(&["--kernel", &kernel, "--events", &dir]).contains("Cannot write events"));
        assert!(checked(&["--kernel", &kernel, "--initrd", &kernel, "--exec", "x"]).is_ok());
        assert!(checked(&["--kernel", &kernel, "--report", "-", "--report", &missing]).is_ok());
        assert!(!Path::new(&missing).exists(), "checking must create nothing");
    }

    #[test]
    fn disks_are_refused_without_acpi() {
        let scratch = Scratch::new("disks");
        let file = scratch.file("file", b"MZ kernel");
        let args = ["--kernel", &file, "--cmdline", "quiet acpi=off", "--disk", &file];
        assert!(refusal(&args).contains("sees no disks with acpi=off\nhint: leave --disk out"));
        assert!(checked(&args[..4]).is_ok());
        assert!(checked(&["--kernel", &file, "--cmdline", "acpi=noirq", "--disk", &file]).is_ok());
    }

    #[test]
    fn a_command_of_this_host_can_be_executed() {
        let scratch = Scratch::new("command");
        let kernel = scratch.file("bzImage", b"MZ kernel");
        let script = scratch.file("test.sh", b"#!/bin/sh\n");
        // Tests run in the package's folder; from there the path is relative.
        let here = std::env::current_dir().unwrap();
        let up = "../".repeat(here.components().count() - 1);
        let relative = format!("{up}{}", script.trim_start_matches('/'));
        let text = refusal(&["--kernel", &kernel, "--exec", &format!("{relative} an argument")]);
        assert!(text.contains("hint: chmod +x "), "{text}");
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(checked(&["--kernel", &kernel, "--exec", &relative]).is_ok());
        assert!(refusal(&["--kernel", &kernel, "--exec", "./missing x"]).contains("Cannot read command"));
        let given = format!("{script}:/kleak/work/missing");
        assert!(checked(&["--kernel", &kernel, "--exec", "./missing x", "--file", &given]).is_ok());
        for guests in ["/bin/missing", "missing", "X=a/b missing", "$HOME/missing", "./a;./b", "cd /tmp"] {
            assert!(checked(&["--kernel", &kernel, "--exec", guests]).is_ok(), "{guests}");
        }
    }

    #[test]
    fn a_module_is_a_relocatable_elf_for_this_machine() {
        let scratch = Scratch::new("modules");
        let kernel = scratch.file("bzImage", b"MZ kernel");
        let mut elf = vec![0u8; 64];
        elf[..4].copy_from_slice(b"\x7fELF");
        elf[16] = 1;
        elf[18] = module_machine(ARCH) as u8;
        let with = |name: &str, change: fn(&mut Vec<u8>)| {
            let mut bytes = elf.clone();
            change(&mut bytes);
            scratch.file(name, &bytes)
        };
        let good = with("good.ko", |_| ());
        assert!(checked(&["--kernel", &kernel, "--module", &format!("{good},x=1")]).is_ok());
        let table = [
            (with("arm.ko", |b| b[18] = 40), "ELF machine 40"),
            (with("exe.ko", |b| b[16] = 2), "not a relocatable one"),
            (with("short.ko", |b| b.truncate(17)), "truncated"),
            (scratch.file("text.ko", b"#!/bin/sh\n"), "no ELF file"),
        ];
        for (path, what) in table {
            let text = refusal(&["--kernel", &kernel, "--module", &path]);
            assert!(text.contains(what), "{text}");
        }
    }

    #[test]
    fn memory() {
        assert!(check_memory(128 << 20, Some(1 << 30)).is_ok());
        assert!(check_memory(2 << 30, None).is_ok());
        for wrong in [512, 64 << 20, (128 << 20) + 1, 16 << 30] {
            assert_eq!(exit_code(&check_memory(wrong, None).unwrap_err()), ExitCode::Usage, "{wrong}");
        }
        let error = check_memory(2 << 30, Some(1 << 30)).unwrap_err();
        assert_eq!(exit_code(&error), ExitCode::Host);
        assert!(render(&error).contains("the guest is to have 2G, the host has 1024M"));
        assert_eq!(parse_meminfo("MemTotal:  1024 kB\nMemFree: 1 kB\nSwapTotal: 1 kB\n"), Some(1025 << 10));
        assert_eq!(parse_meminfo("nonsense"), None);
    }
}
