//! Files that appear whole under their names, or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Blocks of this size that hold zeros only take no place on the disk: a guest's memory is mostly that.
const BLOCK: usize = 4096;

/// A file on its way, beside the one it is going to replace. What is not placed is removed. A device or a pipe is written to
/// as it is.
pub struct WholeFile {
    path: PathBuf,
    temporary: Option<PathBuf>,
    file: File,
    len: u64,
    /// Nothing is written at the file's end yet: its length is to be set.
    hole: bool,
}

impl WholeFile {
    /// Begins a file at `path`.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn create(path: &Path) -> io::Result<Self> {
        Self::with_mode(path, 0o666)
    }

    /// The same for what only this user may read.
    ///
    /// # Errors
    /// As [`WholeFile::create`].
    pub fn private(path: &Path) -> io::Result<Self> {
        Self::with_mode(path, 0o600)
    }

    fn with_mode(path: &Path, mode: u32) -> io::Result<Self> {
        // A descriptor's name may lead to a file that somebody is writing to.
        let of_system = ["/dev", "/proc"].iter().any(|folder| path.starts_with(folder));
        // What a link leads to is replaced, not the link.
        let path = if of_system {
            path.to_owned()
        } else {
            resolved(&fs::canonicalize(path).unwrap_or(path.into()))
        };
        let there = fs::metadata(&path).ok();
        if there.as_ref().is_some_and(|there| of_system || !there.is_file() && !there.is_dir()) {
            let file = File::options().append(true).open(&path)?;
            return Ok(Self { path, temporary: None, file, len: 0, hole: false });
        }
        let name = path.file_name().ok_or_else(|| io::Error::other("that is no name for a file"))?;
        let mut hidden = OsString::from(".");
        hidden.push(name);
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        hidden.push(format!(".{}-{}.part", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
        let temporary = path.with_file_name(hidden);
        // One that a process of this number left; nothing that is there is written to.
        let _ = fs::remove_file(&temporary);
        let file = File::options().write(true).create_new(true).mode(mode).open(&temporary)?;
        if let Some(there) = there {
            file.set_permissions(there.permissions())?;
        }
        Ok(Self { path, temporary: Some(temporary), file, len: 0, hole: false })
    }

    /// Bytes written so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// The name cannot be had, a folder for one.
    pub fn place(self) -> io::Result<()> {
        let Some(temporary) = &self.temporary else { return Ok(()) };
        if self.hole {
            self.file.set_len(self.len)?;
        }
        fs::rename(temporary, &self.path)
    }
}

impl Write for WholeFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let in_block = BLOCK - (self.len % BLOCK as u64) as usize;
        let block = &bytes[..bytes.len().min(in_block)];
        self.hole = self.temporary.is_some() && block.len() == BLOCK && block.iter().all(|&b| b == 0);
        let count = if self.hole {
            self.file.seek(SeekFrom::Current(BLOCK as i64))?;
            BLOCK
        } else {
            // As much as there is up to the next hole.
            let more = bytes[block.len()..].chunks_exact(BLOCK).take_while(|b| b.iter().any(|&b| b != 0));
            self.file.write(&bytes[..block.len() + more.count() * BLOCK])?
        };
        self.len += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // Gone already where it was placed.
            let _ = fs::remove_file(temporary);
        }
    }
}

/// `path` from the root on, without `..` as far as its folder is there.
pub fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let folder = path.parent().and_then(|folder| fs::canonicalize(folder).ok());
    match (folder, path.file_name()) {
        (Some(folder), Some(name)) => folder.join(name),
        _ => path,
    }
}

/// Writes a text file.
///
/// # Errors
/// As [`WholeFile`].
pub fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let mut file = WholeFile::create(path)?;
    file.write_all(text.as_bytes())?;
    file.place()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("kleak-files-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    proptest! {
        #[test]
        fn holes_read_as_what_was_written(parts in prop::collection::vec((any::<bool>(), 0..9000_usize), 0..8)) {
            let folder = folder("holes");
            let path = folder.join("file");
            let mut file = WholeFile::create(&path).unwrap();
            let mut all = Vec::new();
            for (zero, len) in parts {
                let part: Vec<u8> = (0..len).map(|n| if zero { 0 } else { n as u8 }).collect();
                file.write_all(&part).unwrap();
                all.extend(part);
            }
            prop_assert_eq!(file.len(), all.len() as u64);
            file.place().unwrap();
            prop_assert_eq!(fs::read(&path).unwrap(), all);
            fs::remove_dir_all(folder).unwrap();
        }
    }

    #[test]
    fn zeros_take_no_place_and_what_is_not_placed_leaves_nothing() {
        let folder = folder("place");
        let path = folder.join("file");
        let mut file = WholeFile::create(&path).unwrap();
        file.write_all(&vec![0; 8 << 20]).unwrap();
        file.place().unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert!(metadata.len() == 8 << 20 && metadata.blocks() < 100, "{}", metadata.blocks());
        let mut lost = WholeFile::create(&path).unwrap();
        lost.write_all(b"half").unwrap();
        drop(lost);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        assert_eq!(fs::metadata(&path).unwrap().len(), 8 << 20);
        assert!(write_whole(&folder, "a folder").is_err());
        let link = folder.join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        write_whole(&link, "text").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"text");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        let mut private = WholeFile::private(&folder.join("private")).unwrap();
        private.write_all(b"x").unwrap();
        private.place().unwrap();
        write_whole(&folder.join("private"), "y").unwrap();
        assert_eq!(fs::metadata(folder.join("private")).unwrap().mode() & 0o777, 0o600);
        let written = File::create(folder.join("log")).unwrap();
        let descriptor = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&written));
        write_whole(Path::new(&descriptor), "one").unwrap();
        write_whole(Path::new(&descriptor), "two").unwrap();
        assert_eq!(fs::read(folder.join("log")).unwrap(), b"onetwo", "the very file, at its end");
        write_whole(Path::new("/dev/null"), "text").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        fs::remove_dir_all(folder).unwrap();
    }
}
