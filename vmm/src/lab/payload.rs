//! The lab's initramfs: its kernel modules, this very binary, and the job's files, each at the path it has on the host,
//! so that arguments, messages and reports read the same inside and outside.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, Write};
use std::os::fd::FromRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use images::cpio::{CpioWriter, DeviceKind};

/// Where this binary is in the lab.
pub const BINARY: &str = "/kleak-vmm";
/// Folders of the lab that its own file systems hide.
const HIDDEN: [&str; 3] = ["/dev", "/proc", "/sys"];
/// Entries of a folder given to the lab, at most, and how deep.
const MAX_ENTRIES: usize = 20_000;
const MAX_DEPTH: usize = 16;

/// What goes in beside the lab's own.
#[derive(Debug, Clone, Default)]
pub struct Content {
    /// Files and folders of the host.
    pub inputs: Vec<PathBuf>,
    /// Folders that must be there, if only empty.
    pub folders: Vec<PathBuf>,
}

/// An initramfs in memory.
pub struct Initrd {
    /// Anonymous.
    pub file: File,
    /// Bytes.
    pub size: u64,
}

/// Whether a path means the lab's own `/dev`, `/proc` or `/sys` when used in it, and so no file of the host.
pub fn is_hidden(path: &Path) -> bool {
    HIDDEN.iter().any(|hidden| path.starts_with(hidden))
}

/// The path without `.` and `..`, which must be absolute, and all folders on the way, those of `a` in `a/../b` too.
fn walk(path: &Path) -> Result<(String, Vec<String>)> {
    let mut parts: Vec<&str> = Vec::new();
    let mut folders = Vec::new();
    let joined = |parts: &[&str]| format!("/{}", parts.join("/"));
    for component in path.components() {
        match component {
            Component::Normal(name) => {
                folders.push(joined(&parts));
                parts.push(name.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?);
            }
            Component::ParentDir => {
                folders.push(joined(&parts));
                parts.pop();
            }
            Component::RootDir | Component::CurDir => {}
            Component::Prefix(_) => bail!("{} has a prefix", path.display()),
        }
    }
    folders.retain(|folder| folder != "/");
    Ok((joined(&parts), folders))
}

/// Builds the initramfs: `modules` (an archive), then `binary` and everything else.
pub fn build(modules: &Path, binary: &Path, content: &Content) -> Result<Initrd> {
    let mut file = anonymous_file(c"kleak-lab-initrd")?;
    let mut source = File::open(modules).with_context(|| format!("opening {}", modules.display()))?;
    let copied =
        io::copy(&mut source, &mut file).with_context(|| format!("reading {}", modules.display()))?;
    ensure!(copied % 4 == 0, "{} is no whole archive", modules.display());
    let mut builder =
        Builder { cpio: CpioWriter::new(BufWriter::with_capacity(1 << 20, file)), seen: BTreeSet::new() };
    builder.base()?;
    builder.binary(binary)?;
    for folder in &content.folders {
        let path = builder.folders_above(folder)?;
        if path != "/" {
            builder.cpio.folder(&path, 0o755)?;
        }
    }
    for input in &content.inputs {
        builder.input(input).with_context(|| format!("taking {} into the lab", input.display()))?;
    }
    let mut file = builder.cpio.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    let size = file.stream_position()?;
    Ok(Initrd { file, size })
}

/// A file in memory, for the emulator to open through `/proc/self/fd`; `name` is for those who look.
pub fn anonymous_file(name: &CStr) -> io::Result<File> {
    // SAFETY: the name is a C string; the descriptor is ours alone.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { File::from_raw_fd(fd) })
}

struct Builder<W: Write> {
    cpio: CpioWriter<W>,
    seen: BTreeSet<String>,
}

impl<W: Write> Builder<W> {
    /// Mount points, and the console the kernel gives its first process.
    fn base(&mut self) -> Result<()> {
        for folder in ["/proc", "/sys", "/dev", "/run", "/tmp"] {
            self.cpio.folder(folder, if folder == "/tmp" { 0o1777 } else { 0o755 })?;
        }
        // Major 5, minor 1 (Linux, Documentation/admin-guide/devices.txt).
        Ok(self.cpio.device("/dev/console", 0o600, DeviceKind::Character, 5, 1)?)
    }

    /// The binary without what only debuggers read, and the libraries that this one runs with where it is not static.
    fn binary(&mut self, path: &Path) -> Result<()> {
        let binary = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let elf = Elf::parse(&binary).with_context(|| path.display().to_string())?;
        self.cpio.file(BINARY, 0o755, &elf.loadable())?;
        let Some(interpreter) = elf.interpreter else { return Ok(()) };
        let bytes = fs::read(&interpreter).with_context(|| format!("reading {interpreter}"))?;
        self.put(&interpreter, 0o755, &bytes)?;
        for library in
            mapped_libraries(&fs::read_to_string("/proc/self/maps").context("reading /proc/self/maps")?)
        {
            let bytes = fs::read(&library).with_context(|| format!("reading {library}"))?;
            // A folder the dynamic linker always looks into (ld.so(8)).
            let name = Path::new(&library).file_name().and_then(|name| name.to_str()).unwrap_or_default();
            self.put(&format!("/lib/{name}"), 0o755, &bytes)?;
        }
        Ok(())
    }

    fn put(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        if self.seen.insert(path.to_owned()) { self.cpio.file(path, mode, content) } else { Ok(()) }
    }

    /// Makes the folders on the way to `path`; the path in the lab.
    fn folders_above(&mut self, path: &Path) -> Result<String> {
        let (path, folders) = walk(path)?;
        for folder in folders {
            self.cpio.folder(&folder, 0o755)?;
        }
        Ok(path)
    }

    fn input(&mut self, host: &Path) -> Result<()> {
        ensure!(!is_hidden(host), "a device or a pipe cannot go along; give a regular file");
        let inner = self.folders_above(host)?;
        let mut left = MAX_ENTRIES;
        self.tree(host, &inner, MAX_DEPTH, &mut left)
    }

    fn tree(&mut self, host: &Path, inner: &str, depth: usize, left: &mut usize) -> Result<()> {
        *left = left.checked_sub(1).with_context(|| format!("more than {MAX_ENTRIES} files"))?;
        let metadata = fs::metadata(host).with_context(|| format!("reading {}", host.display()))?;
        let mode = metadata.permissions().mode() & 0o777;
        if metadata.is_file() {
            if !self.seen.insert(inner.to_owned()) {
                return Ok(());
            }
            let file = File::open(host).with_context(|| format!("opening {}", host.display()))?;
            return Ok(self.cpio.file_from(inner, mode, metadata.len(), file)?);
        }
        ensure!(metadata.is_dir(), "{} is neither a file nor a folder", host.display());
        ensure!(depth > 0, "{} is too deep", host.display());
        self.cpio.folder(inner, mode)?;
        for entry in fs::read_dir(host).with_context(|| format!("reading {}", host.display()))? {
            let entry = entry?;
            // Within a folder, what is no file (sockets, dangling links) is not meant.
            let sound =
                fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_file() || metadata.is_dir());
            if let (true, Some(name)) = (sound, entry.file_name().to_str()) {
                self.tree(&entry.path(), &format!("{inner}/{name}"), depth - 1, left)?;
            }
        }
        Ok(())
    }
}

/// Paths of the shared libraries in a `/proc/PID/maps` (proc(5)).
fn mapped_libraries(maps: &str) -> BTreeSet<String> {
    let paths = maps.lines().filter_map(|line| line.find('/').map(|start| &line[start..]));
    let is_library = |path: &&str| {
        let name = path.rsplit('/').next().unwrap_or_default();
        name.ends_with(".so") || name.contains(".so.")
    };
    paths.filter(is_library).map(str::to_owned).collect()
}

/// What is needed of an ELF executable (System V ABI, chapters 4 and 5; 64 bit, little endian).
struct Elf<'a> {
    bytes: &'a [u8],
    /// End of the last byte that a segment uses.
    end: usize,
    /// The dynamic linker, where there is one.
    interpreter: Option<String>,
}

impl<'a> Elf<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        const PT_INTERP: u64 = 3;
        ensure!(bytes.get(..6) == Some(b"\x7fELF\x02\x01"), "no 64-bit ELF executable");
        let field = |at: usize, size: usize| -> Result<u64> {
            let slice = bytes.get(at..at.saturating_add(size)).context("a truncated ELF executable")?;
            Ok(slice.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
        };
        let (table, entry, count) = (field(32, 8)? as usize, field(54, 2)? as usize, field(56, 2)? as usize);
        let mut end = table.saturating_add(entry * count);
        let mut interpreter = None;
        for index in 0..count {
            let at = table.saturating_add(index * entry);
            let (offset, size) =
                (field(at.saturating_add(8), 8)? as usize, field(at.saturating_add(32), 8)? as usize);
            end = end.max(offset.saturating_add(size));
            if field(at, 4)? == PT_INTERP {
                let path =
                    bytes.get(offset..offset.saturating_add(size)).context("a truncated ELF executable")?;
                let path = std::str::from_utf8(path).context("a dynamic linker's path that is not UTF-8")?;
                interpreter = Some(path.trim_end_matches('\0').to_owned());
            }
        }
        ensure!(end <= bytes.len(), "a truncated ELF executable");
        Ok(Self { bytes, end, interpreter })
    }

    /// The executable cut behind its last segment, and without a section table: symbols and debug information are
    /// most of an unstripped one.
    fn loadable(&self) -> Vec<u8> {
        let mut bytes = self.bytes[..self.end].to_vec();
        // e_shoff; e_shentsize, e_shnum and e_shstrndx.
        bytes[40..48].fill(0);
        bytes[58..64].fill(0);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walks_paths_as_the_kernel_would() {
        let walked = |path: &str| walk(Path::new(path)).unwrap();
        let folders = |list: &[&str]| list.iter().map(|part| (*part).to_owned()).collect::<Vec<_>>();
        assert_eq!(walked("/a/b/c"), ("/a/b/c".to_owned(), folders(&["/a", "/a/b"])));
        assert_eq!(walked("/a/../b/./c"), ("/b/c".to_owned(), folders(&["/a", "/b"])));
        assert_eq!(walked("/../x"), ("/x".to_owned(), folders(&[])));
        assert!(is_hidden(Path::new("/dev/fd/3")) && !is_hidden(Path::new("/devel/x")));
    }

    #[test]
    fn finds_libraries_in_maps() {
        let maps = "7f00-7f01 r-xp 0 fe:01 1 /usr/lib/x86_64-linux-gnu/libc.so.6\n\
                    7f01-7f02 r--p 0 fe:01 1 /usr/lib/x86_64-linux-gnu/libc.so.6\n\
                    5500-5600 r-xp 0 fe:01 2 /usr/bin/so.it\n\
                    7ffd-7ffe rw-p 0 00:00 0 [stack]\n";
        assert_eq!(
            mapped_libraries(maps).into_iter().collect::<Vec<_>>(),
            ["/usr/lib/x86_64-linux-gnu/libc.so.6"]
        );
    }

    #[test]
    fn trims_this_test_itself() {
        let bytes = fs::read("/proc/self/exe").unwrap();
        let elf = Elf::parse(&bytes).unwrap();
        let trimmed = elf.loadable();
        assert!(trimmed.len() < bytes.len());
        assert_eq!(Elf::parse(&trimmed).unwrap().end, trimmed.len());
        for cut in [0, 5, 40, 63, 100, trimmed.len() - 1] {
            assert!(Elf::parse(&trimmed[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn builds_an_archive() {
        let folder = std::env::temp_dir().join(format!("kleak-payload-{}", std::process::id()));
        fs::create_dir_all(folder.join("sub")).unwrap();
        fs::write(folder.join("sub/file"), b"content").unwrap();
        std::os::unix::fs::symlink("nowhere", folder.join("dangling")).unwrap();
        fs::write(folder.join("modules"), b"").unwrap();
        let binary = Path::new("/proc/self/exe");
        let content = Content {
            inputs: vec![folder.clone(), folder.join("sub/../sub/file")],
            folders: vec![folder.join("out"), "/".into()],
        };
        let initrd = build(&folder.join("modules"), binary, &content).unwrap();
        assert!(initrd.size > 1000);
        let missing = Content { inputs: vec![folder.join("missing")], ..content.clone() };
        assert!(build(&folder.join("modules"), binary, &missing).is_err());
        let device = Content { inputs: vec!["/dev/null".into()], ..content };
        assert!(build(&folder.join("modules"), binary, &device).is_err());
        fs::remove_dir_all(folder).unwrap();
    }
}
