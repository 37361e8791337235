//! The initramfs for guests that bring none: our own static init (`images/init`), a busybox where the host has one,
//! and whatever the user wants in it. It can be laid over one that the guest brings, which then loses only its `/init`.
//!
//! Init says on the console how things went, in lines that a host program may rely on: [`EXEC_EXITED`] with the
//! exit status behind it, [`FAILED`] with the reason behind it. Either way the machine powers off at the end.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::command::run;
use crate::cpio::{CpioWriter, DeviceKind};

#[cfg(test)]
#[path = "../init/job.rs"]
mod job;

/// The command of `exec` ended; its exit status follows, 128 and the signal's number if a signal ended it.
pub const EXEC_EXITED: &str = "kleak-init: exec exited with ";
/// What was asked for could not be done, for the reason that follows.
pub const FAILED: &str = "kleak-init: failed: ";
/// Commands start in this folder of the guest; files that a command names relatively are put here.
pub const WORK_FOLDER: &str = "/kleak/work";

/// Busybox's tools are here for init, whatever the guest's own folders have.
const TOOLS_FOLDER: &str = "/kleak/bin";
/// Archives of an initramfs begin at multiples of 4; this is one with room to spare.
const ARCHIVE_ALIGNMENT: usize = 512;

/// Most modules init takes, dependencies included.
const MAX_MODULES: usize = 64;
/// Longest job init takes, in bytes.
const MAX_JOB: usize = 64 << 10;

/// The init program, a static ELF executable for this architecture.
pub fn guest_init() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/kleak-init"))
}

/// A kernel module to be in the initramfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestModule {
    /// What the kernel will call it.
    pub name: String,
    /// The uncompressed `.ko`.
    pub content: Vec<u8>,
    /// Parameters as `insmod` takes them, separated by spaces.
    pub parameters: String,
    /// Never unloaded: a driver of the machine.
    pub kept: bool,
}

/// A file to be in the initramfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFile {
    /// Where it is.
    pub host: PathBuf,
    /// Where it is to be; absolute.
    pub guest: PathBuf,
}

/// What is to be in the initramfs, and what init is to do: load `modules`, run `exec` or give a shell, unload the
/// modules, settle, ask for a scan, power off.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InitramfsSpec {
    /// What it is laid over: an initramfs of any form that the kernel takes. The kernel unpacks archives that follow each other
    /// one over the other (Documentation/driver-api/early-userspace/buffer-format.rst).
    pub base: Option<Vec<u8>>,
    /// A static busybox, for a shell and the usual tools; see [`find_busybox`]. Over a `base` it keeps to [`TOOLS_FOLDER`].
    pub busybox: Option<PathBuf>,
    /// Files to copy.
    pub files: Vec<GuestFile>,
    /// In the order of loading.
    pub modules: Vec<GuestModule>,
    /// Command to run, by the shell where there is one. If its first word is a relative path (`./test.sh`) of a file
    /// on the host, the file is copied too.
    pub exec: Option<String>,
    /// Give a shell on the console if there is no command.
    pub interactive: bool,
    /// How long to wait before the scan, in milliseconds of guest time.
    pub settle_ms: u64,
    /// The guest's terminal on which the detector listens (`/dev/ttyS1`); None asks for no scan.
    pub scan_port: Option<String>,
}

/// Builds the initramfs: an uncompressed cpio archive, behind the one it is laid over.
///
/// # Errors
/// A file cannot be read, or a path or a string is nothing init can take; the error names it.
pub fn build(spec: &InitramfsSpec) -> Result<Vec<u8>> {
    let own = own_archive(spec)?;
    let Some(base) = &spec.base else { return Ok(own) };
    let mut both = base.clone();
    both.resize(both.len().next_multiple_of(ARCHIVE_ALIGNMENT), 0);
    both.extend_from_slice(&own);
    Ok(both)
}

fn own_archive(spec: &InitramfsSpec) -> Result<Vec<u8>> {
    let mut archive = CpioWriter::new(Vec::new());
    for folder in ["dev", "proc", "sys", "run", "tmp", WORK_FOLDER] {
        archive.folder(folder, 0o755)?;
    }
    // The kernel opens it for init before anything is mounted (Documentation/admin-guide/devices.txt: 5, 1).
    archive.device("dev/console", 0o600, DeviceKind::Character, 5, 1)?;
    archive.file("init", 0o755, guest_init())?;
    if let Some(busybox) = &spec.busybox {
        add_busybox(&mut archive, busybox, spec.base.is_none())
            .with_context(|| format!("Cannot use the busybox {}", busybox.display()))?;
    }
    for (index, module) in spec.modules.iter().enumerate() {
        archive.file(&module_path(index, module), 0o644, &module.content)?;
    }
    for file in spec.files.iter().chain(&own_command_file(spec)) {
        add_file(&mut archive, file)
            .with_context(|| format!("Cannot put {} into the initramfs", file.host.display()))?;
    }
    archive.file("kleak/job", 0o644, &encode_job(spec)?)?;
    Ok(archive.finish()?)
}

/// A busybox on this host that runs without shared libraries.
pub fn find_busybox() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/bin", "/usr/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(usual)
        .map(|folder| folder.join("busybox"))
        .find(|path| is_static(path))
}

/// Whether the file is an ELF executable that asks for no interpreter (System V ABI, "Program Header").
fn is_static(path: &Path) -> bool {
    const PT_INTERP: u32 = 3;
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(4096).read_to_end(&mut head));
    if read.is_err() || !head.starts_with(b"\x7fELF\x02\x01") {
        return false;
    }
    let half = |at: usize| Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?));
    // e_phoff, e_phentsize, e_phnum of a 64-bit header.
    let (Some(offset), Some(size), Some(count)) = (word(32), half(54), half(56)) else { return false };
    let mut kinds = (0..usize::from(count)).map(|index| word(offset as usize + index * usize::from(size)));
    count > 0 && kinds.all(|kind| kind.is_some_and(|kind| kind != PT_INTERP))
}

/// The program and its shell in [`TOOLS_FOLDER`]; in the usual folders, where these are ours, all of its tools.
fn add_busybox(archive: &mut CpioWriter<Vec<u8>>, path: &Path, everywhere: bool) -> Result<()> {
    let content = fs::read(path)?;
    let program = format!("{TOOLS_FOLDER}/busybox");
    archive.file(&program, 0o755, &content)?;
    archive.symlink(&format!("{TOOLS_FOLDER}/sh"), &program)?;
    if !everywhere {
        return Ok(());
    }
    let list = run(Command::new(path).arg("--list-full"))?;
    for applet in String::from_utf8_lossy(&list).lines() {
        // Init is ours.
        if !matches!(applet, "sbin/init" | "linuxrc" | "") {
            archive.symlink(applet, &program)?;
        }
    }
    Ok(())
}

fn add_file(archive: &mut CpioWriter<Vec<u8>>, file: &GuestFile) -> Result<()> {
    let guest = file.guest.to_str().context("its name in the guest is not UTF-8")?;
    let source = File::open(&file.host)?;
    let metadata = source.metadata()?;
    ensure!(metadata.is_file(), "it is not a regular file");
    archive.file_from(guest, metadata.permissions().mode() & 0o777, metadata.len(), source)?;
    Ok(())
}

/// The file on the host that the first word of `command` names relatively (`./test.sh`), to be at the same place below
/// [`WORK_FOLDER`], where commands start. Absolute paths and bare names are the guest's own.
pub fn command_file(command: &str) -> Option<GuestFile> {
    let word = Path::new(command.split_whitespace().next()?);
    (is_relative(word) && word.is_file()).then(|| command_in_guest(word))
}

/// As [`command_file`], whether there is such a file or not. None for a word that the shell would make another of.
pub fn relative_command(command: &str) -> Option<GuestFile> {
    let word = command.split_whitespace().next()?;
    let plain = word.chars().all(|c| c.is_alphanumeric() || "./_-+,:@%".contains(c));
    (plain && is_relative(Path::new(word))).then(|| command_in_guest(Path::new(word)))
}

/// Whether the word is a path and not a bare name.
fn is_relative(word: &Path) -> bool {
    word.is_relative() && word.components().count() > 1
}

fn command_in_guest(word: &Path) -> GuestFile {
    GuestFile { host: word.to_owned(), guest: resolve(Path::new(WORK_FOLDER), word) }
}

/// The command's file, unless the user puts another one in its place.
fn own_command_file(spec: &InitramfsSpec) -> Option<GuestFile> {
    let own = command_file(spec.exec.as_ref()?)?;
    let given = spec.files.iter().any(|file| resolve(Path::new("/"), &file.guest) == own.guest);
    (!given).then_some(own)
}

/// Where `path` leads from `folder`, without looking at any file system.
fn resolve(folder: &Path, path: &Path) -> PathBuf {
    let mut place = folder.to_owned();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                place.pop();
            }
            Component::Normal(name) => place.push(name),
            Component::RootDir => place = PathBuf::from("/"),
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    place
}

/// Numbered, as two modules may have files of the same name.
fn module_path(index: usize, module: &GuestModule) -> String {
    format!("/kleak/modules/{index}/{}.ko", module.name)
}

/// The job in init's format, which `init/job.rs` describes.
fn encode_job(spec: &InitramfsSpec) -> Result<Vec<u8>> {
    ensure!(spec.modules.len() <= MAX_MODULES, "More than {MAX_MODULES} modules with their dependencies");
    let mut words: Vec<String> = Vec::new();
    for (index, module) in spec.modules.iter().enumerate() {
        let path = module_path(index, module);
        let word = if module.kept { "driver" } else { "module" };
        words.extend([word.into(), path, module.name.clone(), module.parameters.clone()]);
    }
    if let Some(command) = &spec.exec {
        words.extend(["exec".into(), command.clone()]);
    }
    if spec.interactive {
        words.push("shell".into());
    }
    words.extend(["settle".into(), spec.settle_ms.to_string()]);
    if let Some(port) = &spec.scan_port {
        words.extend(["scan".into(), port.clone()]);
    }
    let mut job = Vec::new();
    for word in words {
        if word.contains('\0') {
            bail!("A NUL character in {word:?}");
        }
        job.extend_from_slice(word.as_bytes());
        job.push(0);
    }
    ensure!(job.len() <= MAX_JOB, "Commands and module parameters longer than {MAX_JOB} bytes");
    Ok(job)
}

/// Writes the initramfs of `spec` to a file.
///
/// # Errors
/// Those of [`build`], and no place to write to.
pub fn write(spec: &InitramfsSpec, path: &Path) -> Result<()> {
    let content = build(spec)?;
    fs::write(path, content).with_context(|| format!("Cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, parameters: &str) -> GuestModule {
        GuestModule {
            name: name.into(),
            content: b"ELF".to_vec(),
            parameters: parameters.into(),
            kept: name == "virtio_blk",
        }
    }

    #[test]
    fn init_reads_what_the_builder_writes() {
        let spec = InitramfsSpec {
            modules: vec![module("virtio_blk", ""), module("leaky", "case=list,cycle x=\"a b\"")],
            exec: Some("echo one; echo 'two words'".into()),
            interactive: true,
            settle_ms: 2500,
            scan_port: Some("/dev/ttyS1".into()),
            ..InitramfsSpec::default()
        };
        let bytes = encode_job(&spec).unwrap();
        let job = job::Job::parse(&bytes).unwrap();
        let text = |string: &std::ffi::CStr| string.to_str().unwrap().to_owned();
        let modules: Vec<_> =
            job.modules().map(|m| (text(m.path), text(m.name), text(m.parameters), m.kept)).collect();
        let expected = |path: &str, name: &str, parameters: &str, kept| {
            (path.into(), name.into(), parameters.into(), kept)
        };
        assert_eq!(
            modules,
            [
                expected("/kleak/modules/0/virtio_blk.ko", "virtio_blk", "", true),
                expected("/kleak/modules/1/leaky.ko", "leaky", "case=list,cycle x=\"a b\"", false)
            ]
        );
        assert_eq!(job.exec.map(text).as_ref(), spec.exec.as_ref());
        assert_eq!((job.shell, job.settle_ms), (true, 2500));
        assert_eq!(job.scan.map(text).as_ref(), spec.scan_port.as_ref());
    }

    #[test]
    fn it_can_be_laid_over_another() {
        let bin = |archive: &[u8]| {
            let names = String::from_utf8_lossy(archive).into_owned();
            (names.contains("kleak/bin/sh\0"), names.contains("bin/mount\0"))
        };
        let alone = InitramfsSpec { busybox: find_busybox(), ..InitramfsSpec::default() };
        assert!(alone.busybox.is_some(), "busybox-static is needed, as for boots");
        assert_eq!(bin(&build(&alone).unwrap()), (true, true));
        let over = build(&InitramfsSpec { base: Some(b"theirs".to_vec()), ..alone }).unwrap();
        assert!(over.starts_with(b"theirs\0\0"));
        assert!(over[ARCHIVE_ALIGNMENT..].starts_with(b"070701"), "an archive begins there");
        assert_eq!(bin(&over), (true, false), "their tools stay theirs");
    }

    #[test]
    fn init_refuses_damaged_jobs() {
        let spec = InitramfsSpec { modules: vec![module("leaky", "x=1")], ..InitramfsSpec::default() };
        let bytes = encode_job(&spec).unwrap();
        let whole = [0, bytes.len(), bytes.len() - "settle N ".len()];
        for end in 0..=bytes.len() {
            assert_eq!(job::Job::parse(&bytes[..end]).is_ok(), whole.contains(&end), "{end}");
        }
        assert_eq!(job::Job::parse(b"unload\0").unwrap_err(), "unknown record");
        assert_eq!(job::Job::parse(b"settle\0soon\0").unwrap_err(), "settle is no number");
    }

    #[test]
    fn limits_are_inits() {
        assert_eq!(MAX_MODULES, job::MAX_MODULES);
        let many =
            |count| InitramfsSpec { modules: vec![module("m", ""); count], ..InitramfsSpec::default() };
        assert!(job::Job::parse(&encode_job(&many(MAX_MODULES)).unwrap()).is_ok());
        assert!(encode_job(&many(MAX_MODULES + 1)).is_err());
        let nul = InitramfsSpec { exec: Some("a\0b".into()), ..InitramfsSpec::default() };
        assert!(encode_job(&nul).is_err());
    }

    #[test]
    fn relative_commands_bring_their_file() {
        let guest = |exec: &str| command_file(exec).map(|file| file.guest);
        // Tests run in the package's folder.
        assert_eq!(guest("./src/lib.rs --flag"), Some("/kleak/work/src/lib.rs".into()));
        assert_eq!(guest("src/lib.rs"), Some("/kleak/work/src/lib.rs".into()));
        assert_eq!(guest("./Cargo.toml"), Some("/kleak/work/Cargo.toml".into()));
        assert_eq!(guest("../Cargo.toml"), Some("/kleak/Cargo.toml".into()));
        for own in ["Cargo.toml", "/bin/sh", "./missing", "src", ""] {
            assert_eq!(guest(own), None, "{own}");
        }
        let mut spec = InitramfsSpec { exec: Some("./src/lib.rs".into()), ..InitramfsSpec::default() };
        assert!(own_command_file(&spec).is_some());
        spec.files.push(GuestFile { host: "x".into(), guest: "/kleak/work/src/lib.rs".into() });
        assert_eq!(own_command_file(&spec), None);
    }

    #[test]
    fn the_init_is_a_small_static_program() {
        let init = guest_init();
        assert!(init.starts_with(b"\x7fELF"));
        assert!(init.len() < 100_000, "{}", init.len());
        let path = std::env::temp_dir().join(format!("kleak-init-{}", std::process::id()));
        fs::write(&path, init).unwrap();
        assert!(is_static(&path));
        assert!(!is_static(&std::env::current_exe().unwrap()), "tests are linked dynamically");
        assert!(!is_static(Path::new("/dev/null")));
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn missing_files_are_named() {
        let files = vec![GuestFile { host: "/missing/file".into(), guest: "/file".into() }];
        let error = build(&InitramfsSpec { files, ..InitramfsSpec::default() }).unwrap_err();
        assert!(format!("{error:#}").contains("/missing/file"), "{error:#}");
    }
}
