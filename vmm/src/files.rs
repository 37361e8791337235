//! Files that appear whole under their names, or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

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
        // What a link leads to is replaced, not the link.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if fs::metadata(&path).is_ok_and(|there| !there.is_file() && !there.is_dir()) {
            let file = File::options().write(true).open(&path)?;
            return Ok(Self { path, temporary: None, file, len: 0, hole: false });
        }
        let name = path.file_name().ok_or_else(|| io::Error::other("that is no name for a file"))?;
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.part", std::process::id()));
        let temporary = path.with_file_name(hidden);
        let file = File::create(&temporary)?;
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
        write_whole(Path::new("/dev/null"), "text").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        fs::remove_dir_all(folder).unwrap();
    }
}
