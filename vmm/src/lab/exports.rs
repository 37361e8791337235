//! What the job saves on command, sent to the host as it is made: the lab has no place for a second copy of its guest's
//! memory.
//!
//! The job connects to a socket, sends a line with path and size (a [`FileHead`]), the bytes, and hears in one line what
//! became of them; an empty one is good news.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use super::link::Link;
use super::wire::{FileHead, Frame, Stream};

const SOCKET: &str = "/run/kleak-files.sock";
/// Bytes that go to the agent at once.
const BUFFER: usize = 256 << 10;

/// The agent's side.
pub struct Exports {
    link: Arc<Link>,
    next: AtomicU32,
    waiting: Mutex<HashMap<Stream, Sender<String>>>,
}

impl Exports {
    /// Listens.
    pub fn serve(link: &Arc<Link>) -> io::Result<Arc<Self>> {
        let next = AtomicU32::new(Stream::FIRST_EXPORT.0);
        let this = Arc::new(Self { link: Arc::clone(link), next, waiting: Mutex::default() });
        // One of a job before, in a machine that has had several.
        let _ = fs::remove_file(SOCKET);
        let listener = UnixListener::bind(SOCKET)?;
        let exports = Arc::clone(&this);
        std::thread::Builder::new().name("exports".to_owned()).spawn(move || {
            for client in listener.incoming().flatten() {
                let exports = Arc::clone(&exports);
                std::thread::spawn(move || exports.carry(client));
            }
        })?;
        Ok(this)
    }

    /// The host has said what became of a file.
    pub fn placed(&self, stream: Stream, what: String) {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&stream);
        if let Some(waiting) = waiting {
            let _ = waiting.send(what);
        }
    }

    fn carry(&self, client: UnixStream) {
        let what = self.send(&client).unwrap_or_else(|error| error.to_string());
        let _ = (&client).write_all(format!("{what}\n").as_bytes());
    }

    fn send(&self, client: &UnixStream) -> io::Result<String> {
        let mut input = BufReader::with_capacity(BUFFER, client);
        let mut line = String::new();
        input.read_line(&mut line)?;
        let head: FileHead = serde_json::from_str(&line)?;
        let stream = Stream(self.next.fetch_add(1, Ordering::Relaxed));
        let (placed, becomes) = mpsc::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(stream, placed);
        let size = head.size;
        self.link.send(&Frame::File(stream, head))?;
        let mut wanted = Wanted { input: input.take(size), becomes: &becomes, refusal: None };
        self.link.send_all(stream, &mut wanted)?;
        wanted.refusal.map_or_else(|| becomes.recv().map_err(io::Error::other), Ok)
    }
}

/// What is read until the host says that it takes no more.
struct Wanted<'a, R> {
    input: R,
    becomes: &'a Receiver<String>,
    refusal: Option<String>,
}

impl<R: Read> Read for Wanted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.becomes.try_recv() {
            Ok(refusal) => {
                self.refusal = Some(refusal);
                Ok(0)
            }
            Err(_) => self.input.read(buffer),
        }
    }
}

/// A file that this process, which runs in the lab, makes on the host.
pub struct Export(BufWriter<UnixStream>);

impl Export {
    /// Begins a file of `size` bytes; `path` is absolute.
    pub fn create(path: &Path, size: u64) -> io::Result<Self> {
        let path = path.to_str().ok_or_else(|| io::Error::other("the name is not UTF-8"))?.to_owned();
        let mut line = serde_json::to_string(&FileHead { path, saved: true, size })?;
        line.push('\n');
        let mut out = BufWriter::with_capacity(BUFFER, UnixStream::connect(SOCKET)?);
        out.write_all(line.as_bytes())?;
        Ok(Self(out))
    }

    /// Waits until it is in its place.
    pub fn place(self) -> io::Result<()> {
        // A file that the host does not want is not taken to its end: what it says comes all the same.
        let stream = self.0.into_inner().unwrap_or_else(|error| error.into_inner().into_parts().0);
        let _ = stream.shutdown(Shutdown::Write);
        let mut what = String::new();
        BufReader::new(stream).read_line(&mut what)?;
        match what.strip_suffix('\n') {
            Some("") => Ok(()),
            Some(what) => Err(io::Error::other(what.to_owned())),
            None => Err(io::Error::other("the lab ended meanwhile")),
        }
    }
}

impl Write for Export {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_refuses_is_not_sent() {
        let exports = Exports {
            link: Link::new(io::sink()),
            next: AtomicU32::new(Stream::FIRST_EXPORT.0),
            waiting: Mutex::default(),
        };
        let (job, agent) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let carrying = scope.spawn(|| exports.carry(agent));
            // Much more than the window that nobody here opens.
            let head = FileHead { path: "/x".to_owned(), saved: true, size: 1 << 30 };
            let mut export = Export(BufWriter::new(job));
            export.write_all(format!("{}\n", serde_json::to_string(&head).unwrap()).as_bytes()).unwrap();
            export.flush().unwrap();
            while exports.waiting.lock().unwrap().is_empty() {
                std::thread::yield_now();
            }
            exports.placed(Stream::FIRST_EXPORT, "not there".to_owned());
            let failed = (0..1 << 10).find_map(|_| export.write_all(&[1; 1 << 20]).err());
            assert!(failed.is_some(), "all of it was taken");
            assert_eq!(export.place().unwrap_err().to_string(), "not there");
            carrying.join().unwrap();
        });
    }
}
