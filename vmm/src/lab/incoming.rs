//! Files that come from the lab, each whole under its name, or not at all: the job's outputs, which the host knows
//! beforehand, and what commands save. Those may go anywhere, as they may where the job runs on the host itself; the lab's
//! machine runs a guest that may be hostile, so that nothing but a core is taken for one, and nothing but a core replaced.

use std::collections::HashSet;
use std::io::{self, Write};
use std::path::{Component, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::link::Link;
use super::wire::{FileHead, Frame, Stream};
use crate::files::WholeFile;
use crate::saved;

/// Takes files.
pub struct Files {
    outputs: HashSet<PathBuf>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Files {
    /// For a job with these outputs.
    pub fn new(outputs: impl Iterator<Item = PathBuf>) -> Self {
        Self { outputs: outputs.collect(), threads: Mutex::default() }
    }

    /// A file follows.
    ///
    /// Errors of kind `InvalidData` for one that is nothing of the job's.
    pub fn begin(&self, link: &Arc<Link>, stream: Stream, head: &FileHead) -> io::Result<()> {
        let path = PathBuf::from(&head.path);
        let climbs = path.components().any(|part| part == Component::ParentDir);
        let is_output = self.outputs.iter().any(|output| path.starts_with(output));
        if climbs || !path.is_absolute() || !(is_output || head.saved) {
            let what = format!("the lab sent {}, which is none of the job's outputs", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let (size, saved) = (head.size, head.saved);
        let back = Arc::clone(link);
        let ended = move |outcome: io::Result<()>| match outcome {
            _ if saved => {
                let what = outcome.err().map_or_else(String::new, |error| error.to_string());
                // A line that is gone shows to its reader.
                let _ = back.send(&Frame::Placed(stream, what));
            }
            Ok(()) => {}
            Err(error) => eprintln!("kleak-vmm: warning: cannot write {}: {error}", path.display()),
        };
        let thread = match Incoming::create(&PathBuf::from(&head.path), saved) {
            Ok(incoming) => link.receive(stream, incoming, move |incoming, outcome| {
                ended(outcome.and_then(|()| incoming.place(size)));
            })?,
            Err(error) => link.receive(stream, io::sink(), move |_, _| ended(Err(error)))?,
        };
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// Waits for what has begun.
    pub fn finish(&self) {
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        threads.into_iter().for_each(|thread| drop(thread.join()));
    }
}

/// A file on its way.
struct Incoming {
    file: WholeFile,
    /// Only a core is taken.
    core: bool,
}

impl Incoming {
    fn create(path: &std::path::Path, core: bool) -> io::Result<Self> {
        if core {
            saved::check_place(path)?;
        } else if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        Ok(Self { file: WholeFile::create(path)?, core })
    }

    /// Gives the file its name if it is `size` bytes long; a shorter one was cut off with the lab.
    fn place(self, size: u64) -> io::Result<()> {
        match self.file.len() {
            len if len == size => self.file.place(),
            len => Err(io::Error::other(format!("{len} of {size} bytes came"))),
        }
    }
}

impl Write for Incoming {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.core && self.file.len() == 0 && !saved::is_core(bytes) {
            return Err(io::Error::other("the lab sent something that is no core"));
        }
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the host makes of files whose content is `bytes`.
    fn take(path: &std::path::Path, saved: bool, outputs: Vec<PathBuf>, bytes: &[u8]) -> io::Result<()> {
        let link = Link::new(io::sink());
        let files = Files::new(outputs.into_iter());
        let head = FileHead { path: path.to_string_lossy().into_owned(), saved, size: bytes.len() as u64 };
        files.begin(&link, Stream(9), &head)?;
        link.received(Frame::Data(Stream(9), bytes.to_vec()))?;
        link.received(Frame::Close(Stream(9)))?;
        files.finish();
        Ok(())
    }

    #[test]
    fn outputs_and_cores_are_taken_and_nothing_else() {
        let folder = std::env::temp_dir().join(format!("kleak-incoming-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let core = saved::tests::core_header();
        let (output, dump, text) = (folder.join("report"), folder.join("dump"), folder.join("text"));
        take(&output, false, vec![output.clone()], b"report").unwrap();
        assert_eq!(std::fs::read(&output).unwrap(), b"report");
        assert!(take(&text, false, vec![output.clone()], b"x").is_err(), "no output");
        assert!(take(&folder.join("../x"), true, vec![], &core).is_err(), "climbs");
        take(&dump, true, vec![], &core).unwrap();
        assert_eq!(std::fs::read(&dump).unwrap(), core);
        take(&text, true, vec![], b"ssh-rsa").unwrap();
        assert!(!text.exists(), "no core");
        take(&output, true, vec![], &core).unwrap();
        assert_eq!(std::fs::read(&output).unwrap(), b"report", "a file that is no core stays");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
