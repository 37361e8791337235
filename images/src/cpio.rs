//! The initramfs archive format: cpio "newc", as the kernel's Documentation/driver-api/early-userspace/buffer-format.rst
//! defines it. Archives may follow one another in one initrd; later entries replace earlier ones of the same name.

use std::collections::HashSet;
use std::io::{self, Read, Write};

/// File type bits of `st_mode` (POSIX `<sys/stat.h>`).
mod file_type {
    pub const CHARACTER: u32 = 0o020_000;
    pub const DIRECTORY: u32 = 0o040_000;
    pub const BLOCK: u32 = 0o060_000;
    pub const REGULAR: u32 = 0o100_000;
    pub const SYMLINK: u32 = 0o120_000;
}

/// Kind of a device node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A terminal, `/dev/kvm`, ...
    Character,
    /// A disk.
    Block,
}

/// Writes a newc archive to `W`. Owner, group and times are 0, so that equal input gives equal bytes. Paths are
/// relative to the root, with or without a leading slash; missing parent folders are made (mode 755).
pub struct CpioWriter<W: Write> {
    out: W,
    written: u64,
    inode: u32,
    folders: HashSet<String>,
}

/// What a header says beside name and inode.
#[derive(Default)]
struct Entry {
    mode: u32,
    size: u32,
    major: u32,
    minor: u32,
}

impl<W: Write> CpioWriter<W> {
    /// An archive at the writer's present position, which must be a multiple of 4 within the initrd.
    pub fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0, folders: HashSet::new() }
    }

    /// A folder; one that is already there is left as it is.
    pub fn folder(&mut self, path: &str, mode: u32) -> io::Result<()> {
        let path = clean(path)?;
        self.parents(path)?;
        if !self.folders.insert(path.to_owned()) {
            return Ok(());
        }
        self.header(path, &Entry { mode: file_type::DIRECTORY | mode, ..Entry::default() })
    }

    /// A file with `content`.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.file_from(path, mode, content.len() as u64, content)
    }

    /// A file of `size` bytes read from `content`. Errors when the source ends early, or at 4 GiB, more than the
    /// format can say.
    pub fn file_from(&mut self, path: &str, mode: u32, size: u64, content: impl Read) -> io::Result<()> {
        let path = clean(path)?;
        let size = u32::try_from(size)
            .map_err(|_| io::Error::other(format!("{path}: {size} bytes are too many for an initramfs")))?;
        self.parents(path)?;
        self.header(path, &Entry { mode: file_type::REGULAR | mode, size, ..Entry::default() })?;
        let copied = io::copy(&mut content.take(size.into()), &mut self.out)?;
        self.written += copied;
        if copied != u64::from(size) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{path}: {copied} bytes where {size} were announced"),
            ));
        }
        self.pad()
    }

    /// A symbolic link at `path` to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        let path = clean(path)?;
        self.parents(path)?;
        let size = u32::try_from(target.len()).map_err(io::Error::other)?;
        self.header(path, &Entry { mode: file_type::SYMLINK | 0o777, size, ..Entry::default() })?;
        self.put(target.as_bytes())?;
        self.pad()
    }

    /// A device node.
    pub fn device(
        &mut self,
        path: &str,
        mode: u32,
        kind: DeviceKind,
        major: u32,
        minor: u32,
    ) -> io::Result<()> {
        let path = clean(path)?;
        self.parents(path)?;
        let kind = match kind {
            DeviceKind::Character => file_type::CHARACTER,
            DeviceKind::Block => file_type::BLOCK,
        };
        self.header(path, &Entry { mode: kind | mode, size: 0, major, minor })
    }

    /// Ends the archive, on a multiple of 4, so that another may follow; the writer.
    pub fn finish(mut self) -> io::Result<W> {
        self.header("TRAILER!!!", &Entry::default())?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        for (end, _) in path.match_indices('/') {
            self.folder(&path[..end], 0o755)?;
        }
        Ok(())
    }

    fn header(&mut self, name: &str, entry: &Entry) -> io::Result<()> {
        self.inode += 1;
        let links = if entry.mode & 0o170_000 == file_type::DIRECTORY { 2 } else { 1 };
        // ino, mode, uid, gid, nlink, mtime, filesize, maj, min, rmaj, rmin, namesize, chksum
        let fields = [
            self.inode,
            entry.mode,
            0,
            0,
            links,
            0,
            entry.size,
            0,
            0,
            entry.major,
            entry.minor,
            name.len() as u32 + 1,
            0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 3][..missing as usize])
    }
}

/// A path as the format wants it; errors on one that the kernel would place somewhere else or refuse.
fn clean(path: &str) -> io::Result<&str> {
    let path = path.trim_matches('/');
    let sound = !path.is_empty()
        && path.len() < 4096
        && !path.contains('\0')
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if sound { Ok(path) } else { Err(io::Error::other(format!("`{path}` is no path for an initramfs"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode and content of every entry, read by the format's own words.
    fn list(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let total = archive.len();
        loop {
            assert_eq!(&archive[..6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&archive[6 + index * 8..14 + index * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(archive[110..110 + name_size - 1].to_vec()).unwrap();
            assert_eq!(archive[110 + name_size - 1], 0);
            let content = (110 + name_size).next_multiple_of(4);
            let next = (content + size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!((archive.len(), total % 4), (next, 0));
                return entries;
            }
            entries.push((name, mode, archive[content..content + size].to_vec()));
            archive = &archive[next..];
        }
    }

    #[test]
    fn writes_what_the_format_says() {
        let mut cpio = CpioWriter::new(Vec::new());
        cpio.file("/bin/sh", 0o755, b"hello").unwrap();
        cpio.file("bin/empty", 0o600, b"").unwrap();
        cpio.symlink("sbin/init", "/bin/sh").unwrap();
        cpio.device("dev/console", 0o600, DeviceKind::Character, 5, 1).unwrap();
        cpio.folder("bin", 0o700).unwrap();
        let entries = list(&cpio.finish().unwrap());
        let seen: Vec<_> = entries.iter().map(|(name, mode, _)| (name.as_str(), *mode)).collect();
        assert_eq!(
            seen,
            [
                ("bin", 0o040_755),
                ("bin/sh", 0o100_755),
                ("bin/empty", 0o100_600),
                ("sbin", 0o040_755),
                ("sbin/init", 0o120_777),
                ("dev", 0o040_755),
                ("dev/console", 0o020_600),
            ]
        );
        assert_eq!(entries[1].2, b"hello");
        assert_eq!(entries[4].2, b"/bin/sh");
    }

    #[test]
    fn refuses_odd_paths_and_short_sources() {
        let mut cpio = CpioWriter::new(Vec::new());
        for path in ["", "/", "a//b", "../a", "a/./b", "a\0"] {
            assert!(cpio.file(path, 0o644, b"").is_err(), "{path:?}");
        }
        assert!(cpio.file_from("a", 0o644, 10, &b"short"[..]).is_err());
        assert!(cpio.file_from("b", 0o644, 1 << 32, io::empty()).is_err());
    }
}
