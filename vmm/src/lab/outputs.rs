//! Files the job writes, sent to the host when they have changed and come to rest, and all of them at the end.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::link::Link;
use super::wire::{FileHead, Frame, Stream};

/// Files of an output folder looked at, at most, and how deep they are.
const MAX_FILES: usize = 20_000;
const MAX_DEPTH: usize = 4;

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl From<&Metadata> for Stamp {
    fn from(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Seen {
    sent: Option<Stamp>,
    last: Option<Stamp>,
}

/// The outputs of a job.
pub struct Outputs {
    places: Vec<PathBuf>,
    seen: HashMap<PathBuf, Seen>,
    next: u32,
}

impl Outputs {
    /// Files and folders; what is there now is not news.
    pub fn new(places: impl IntoIterator<Item = PathBuf>) -> Self {
        let mut this =
            Self { places: places.into_iter().collect(), seen: HashMap::new(), next: Stream::FIRST_FILE.0 };
        for (path, stamp) in this.list() {
            this.seen.insert(path, Seen { sent: Some(stamp), last: Some(stamp) });
        }
        this
    }

    /// Sends files that have changed since they were sent, and not since the last look.
    pub fn poll(&mut self, link: &Arc<Link>) -> io::Result<()> {
        for path in self.changed(false) {
            self.send(&path, link)?;
        }
        Ok(())
    }

    /// Sends all files that have changed since they were sent.
    pub fn finish(&mut self, link: &Arc<Link>) -> io::Result<()> {
        for path in self.changed(true) {
            self.send(&path, link)?;
        }
        Ok(())
    }

    /// Files to be sent, `restless` ones too if so wanted.
    fn changed(&mut self, restless: bool) -> Vec<PathBuf> {
        let mut changed = Vec::new();
        for (path, stamp) in self.list() {
            let seen = self.seen.entry(path.clone()).or_default();
            let rests = seen.last.replace(stamp) == Some(stamp);
            if seen.sent != Some(stamp) && (rests || restless) {
                seen.sent = Some(stamp);
                changed.push(path);
            }
        }
        changed
    }

    fn list(&self) -> Vec<(PathBuf, Stamp)> {
        let mut found = Vec::new();
        for place in &self.places {
            list(place, MAX_DEPTH, &mut found);
        }
        found
    }

    fn send(&mut self, path: &Path, link: &Arc<Link>) -> io::Result<()> {
        // One that went away meanwhile is no output.
        let Ok(file) = File::open(path) else { return Ok(()) };
        let size = file.metadata()?.len();
        let stream = Stream(self.next);
        self.next = self.next.checked_add(1).unwrap_or(Stream::FIRST_FILE.0);
        let path = path.to_string_lossy().into_owned();
        link.send(&Frame::File(stream, FileHead { path, saved: false, size }))?;
        link.send_all(stream, &mut file.take(size))
    }
}

fn list(place: &Path, depth: usize, found: &mut Vec<(PathBuf, Stamp)>) {
    let Ok(metadata) = fs::symlink_metadata(place) else { return };
    if metadata.is_file() && found.len() < MAX_FILES {
        found.push((place.to_owned(), Stamp::from(&metadata)));
    } else if metadata.is_dir() && depth > 0 {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            list(&entry.path(), depth - 1, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sends_what_is_new_once_it_rests() {
        let folder = std::env::temp_dir().join(format!("kleak-outputs-{}", std::process::id()));
        let (report, numbered) = (folder.join("report"), folder.join("dir"));
        fs::create_dir_all(&numbered).unwrap();
        fs::write(numbered.join("old"), b"was there").unwrap();
        let mut outputs = Outputs::new([report.clone(), numbered.clone()]);
        assert!(outputs.changed(true).is_empty());
        fs::write(&report, b"one").unwrap();
        assert!(outputs.changed(false).is_empty(), "it may still be written");
        assert_eq!(outputs.changed(false), std::slice::from_ref(&report));
        assert!(outputs.changed(false).is_empty() && outputs.changed(true).is_empty());
        fs::write(numbered.join("1"), b"two").unwrap();
        assert_eq!(outputs.changed(true), [numbered.join("1")]);
        fs::write(folder.join("replacement"), b"two").unwrap();
        fs::rename(folder.join("replacement"), &report).unwrap();
        assert_eq!(outputs.changed(true), [report]);
        fs::remove_dir_all(folder).unwrap();
    }
}
