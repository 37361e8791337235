//! Files that come from the lab, each whole under its name, or not at all: the job's outputs, which the host knows
//! beforehand, and what commands save. The lab's machine runs a guest that may be hostile, so that commands save to the
//! job's working folder and the temporary one, and below, where no name begins with a dot; nothing but a core is replaced.

use std::collections::HashSet;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::Job;
use super::link::Link;
use super::wire::{FileHead, Frame, Stream};
use crate::files::WholeFile;
use crate::saved;

/// Takes files.
pub struct Files {
    outputs: HashSet<PathBuf>,
    /// Where commands may save to.
    folders: [PathBuf; 2],
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Files {
    /// For this job.
    pub fn new(job: &Job) -> Self {
        let folders = [job.cwd.clone(), std::env::temp_dir()];
        Self { outputs: job.outputs.iter().cloned().collect(), folders, threads: Mutex::default() }
    }

    /// Whether a command may save to `path`.
    fn may_save(&self, path: &Path) -> bool {
        let within = self.folders.iter().find_map(|folder| path.strip_prefix(folder).ok());
        within.is_some_and(|rest| {
            rest.components().all(|part| match part {
                Component::Normal(name) => !name.as_encoded_bytes().starts_with(b"."),
                _ => false,
            })
        })
    }

    /// A file follows.
    ///
    /// Errors of kind `InvalidData` for one that is nothing of the job's.
    pub fn begin(&self, link: &Arc<Link>, stream: Stream, head: &FileHead) -> io::Result<()> {
        let path = PathBuf::from(&head.path);
        let climbs = path.components().any(|part| part == Component::ParentDir);
        let is_output = !climbs && self.outputs.iter().any(|output| path.starts_with(output));
        if !is_output && !head.saved {
            let what = format!("the lab sent {}, which is none of the job's outputs", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let (size, saved, name) = (head.size, head.saved, head.path.clone());
        let back = Arc::clone(link);
        let ended = move |outcome: io::Result<()>| match outcome {
            _ if saved => {
                let what = outcome.err().map_or_else(String::new, |error| error.to_string());
                // A line that is gone shows to its reader.
                let _ = back.send(&Frame::Placed(stream, what));
            }
            Ok(()) => {}
            Err(error) => eprintln!("kleak-vmm: warning: cannot write {name}: {error}"),
        };
        let incoming = match is_output || self.may_save(&path) {
            true if saved => Incoming::core(&path),
            true => Ok(Incoming { file: None, path, core: false }),
            false => Err(io::Error::other(
                "out of the lab, machines are saved to the working folder of `run`, to the temporary one, or below",
            )),
        };
        let thread = match incoming {
            Ok(incoming) => link.receive(stream, incoming, move |incoming, outcome| {
                ended(outcome.and_then(|()| incoming.place(size)));
            })?,
            // Said at once: what is not wanted need not come.
            Err(error) => {
                ended(Err(error));
                link.receive(stream, io::sink(), |_, _| {})?
            }
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
    /// None until bytes come: the name may be that of a pipe, which is opened when somebody reads it.
    file: Option<WholeFile>,
    path: PathBuf,
    /// Only a core is taken.
    core: bool,
}

impl Incoming {
    fn core(path: &Path) -> io::Result<Self> {
        saved::check_place(path)?;
        Ok(Self { file: Some(WholeFile::private(path)?), path: path.to_owned(), core: true })
    }

    fn file(&mut self) -> io::Result<&mut WholeFile> {
        match &mut self.file {
            Some(file) => Ok(file),
            none => {
                if let Some(folder) = self.path.parent() {
                    std::fs::create_dir_all(folder)?;
                }
                Ok(none.insert(WholeFile::create(&self.path)?))
            }
        }
    }

    /// Gives the file its name if it is `size` bytes long; a shorter one was cut off with the lab.
    fn place(mut self, size: u64) -> io::Result<()> {
        match self.file()?.len() {
            len if len == size => self.file.map_or(Ok(()), WholeFile::place),
            len => Err(io::Error::other(format!("{len} of {size} bytes came"))),
        }
    }
}

impl Write for Incoming {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let core = self.core;
        let file = self.file()?;
        if core && file.len() == 0 && !saved::is_core(bytes) {
            return Err(io::Error::other("the lab sent something that is no core"));
        }
        file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().map_or(Ok(()), WholeFile::flush)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use images::lab::Lab;

    /// What the host makes of files whose content is `bytes`.
    fn take(path: &Path, saved: bool, outputs: Vec<PathBuf>, bytes: &[u8]) -> io::Result<()> {
        let link = Link::new(io::sink());
        let job = Job { outputs, cwd: "/nowhere".into(), ..Job::new(Lab::Svm, ["x"]).unwrap() };
        let files = Files::new(&job);
        let head = FileHead { path: path.to_string_lossy().into_owned(), saved, size: bytes.len() as u64 };
        files.begin(&link, Stream(9), &head)?;
        link.received(Frame::Data(Stream(9), bytes.to_vec()))?;
        link.received(Frame::Close(Stream(9)))?;
        files.finish();
        Ok(())
    }

    #[test]
    fn a_pipe_that_nobody_reads_yet_holds_up_nothing() {
        let folder = std::env::temp_dir().join(format!("kleak-pipe-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let pipe = folder.join("pipe");
        let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
        // SAFETY: a C string that lives for the call.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let link = Link::new(io::sink());
        let job = Job { outputs: vec![pipe.clone()], cwd: "/".into(), ..Job::new(Lab::Svm, ["x"]).unwrap() };
        let files = Files::new(&job);
        let head = FileHead { path: pipe.to_string_lossy().into_owned(), saved: false, size: 6 };
        files.begin(&link, Stream(9), &head).unwrap();
        link.received(Frame::Data(Stream(9), b"report".to_vec())).unwrap();
        link.received(Frame::Close(Stream(9))).unwrap();
        assert_eq!(std::fs::read(&pipe).unwrap(), b"report");
        files.finish();
        std::fs::remove_dir_all(folder).unwrap();
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
        for (place, name) in [("../x", "climbs"), (".ssh/x", "hidden")] {
            take(&folder.join(place), true, vec![], &core).unwrap();
            assert!(!folder.join(place).exists(), "{name}");
        }
        take(Path::new("/kleak-elsewhere"), true, vec![], &core).unwrap();
        assert!(!Path::new("/kleak-elsewhere").exists());
        take(&dump, true, vec![], &core).unwrap();
        assert_eq!(std::fs::read(&dump).unwrap(), core);
        take(&text, true, vec![], b"ssh-rsa").unwrap();
        assert!(!text.exists(), "no core");
        take(&output, true, vec![], &core).unwrap();
        assert_eq!(std::fs::read(&output).unwrap(), b"report", "a file that is no core stays");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
