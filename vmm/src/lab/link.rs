//! Streams over the one line between host and lab, each with a window of its own, so that a reader who does not read
//! (a terminal held with Ctrl-S, a stuck control client) holds up nobody else.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::wire::{Frame, Stream};

/// Bytes a sender may have under way in one stream.
pub const WINDOW: u32 = 256 << 10;
/// Bytes in one data frame.
const CHUNK: usize = 32 << 10;
/// Fewer zeros than these are sent as they are.
const LEAST_ZEROS: usize = 512;

/// One side of the line.
pub struct Link {
    out: Mutex<Box<dyn Write + Send>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Bytes that may still be sent, by stream; an absent stream has its full window.
    windows: HashMap<Stream, u32>,
    sinks: HashMap<Stream, Sink>,
    down: bool,
}

/// Where a stream's bytes go.
struct Sink {
    queue: Sender<Vec<u8>>,
    /// Bytes received and not yet credited.
    waiting: Arc<Mutex<u32>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the line to the lab is closed")
}

impl Link {
    /// A line that sends into `out`. Whoever reads the other direction hands frames to [`Link::received`].
    pub fn new(out: impl Write + Send + 'static) -> Arc<Self> {
        Arc::new(Self { out: Mutex::new(Box::new(out)), state: Mutex::default(), changed: Condvar::new() })
    }

    /// Sends a frame that needs no window.
    pub fn send(&self, frame: &Frame) -> io::Result<()> {
        frame.write(&mut *lock(&self.out))
    }

    /// Ends all waiting: the other side is gone.
    pub fn shut(&self) {
        let mut state = lock(&self.state);
        state.down = true;
        state.sinks.clear();
        self.changed.notify_all();
    }

    /// Sends what `input` gives until it ends or fails, and that it ended. Waits for the window.
    ///
    /// Errors are those of the line, and of the input.
    pub fn send_all(&self, stream: Stream, input: &mut impl Read) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        let outcome = loop {
            match input.read(&mut buffer) {
                Ok(0) => break Ok(()),
                Ok(count) => self.send_data(stream, &buffer[..count])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        lock(&self.state).windows.remove(&stream);
        self.send(&Frame::Close(stream))?;
        outcome
    }

    fn send_data(&self, stream: Stream, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut state = lock(&self.state);
            let granted = loop {
                if state.down {
                    return Err(closed());
                }
                let window = state.windows.entry(stream).or_insert(WINDOW);
                if *window > 0 {
                    let granted = bytes.len().min(*window as usize);
                    *window -= granted as u32;
                    break granted;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            let (now, later) = bytes.split_at(granted);
            let zeros = now.len() >= LEAST_ZEROS && now.iter().all(|&byte| byte == 0);
            self.send(&match zeros {
                true => Frame::Zeros(stream, now.len() as u32),
                false => Frame::Data(stream, now.to_vec()),
            })?;
            bytes = later;
        }
        Ok(())
    }

    /// From here on the bytes of `stream` go to `output`, on a thread of their own, which ends with the stream and
    /// then calls `done` with the output and the first error of writing. Bytes behind such an error are dropped.
    pub fn receive<W: Write + Send + 'static>(
        self: &Arc<Self>,
        stream: Stream,
        output: W,
        done: impl FnOnce(W, io::Result<()>) + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let (queue, bytes) = mpsc::channel();
        let waiting = Arc::new(Mutex::new(0));
        let sink = Sink { queue, waiting: Arc::clone(&waiting) };
        let link = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name(format!("lab-stream-{}", stream.0))
            .spawn(move || link.drain(stream, output, &bytes, &waiting, done))?;
        lock(&self.state).sinks.insert(stream, sink);
        Ok(thread)
    }

    fn drain<W: Write>(
        &self,
        stream: Stream,
        mut output: W,
        bytes: &Receiver<Vec<u8>>,
        waiting: &Mutex<u32>,
        done: impl FnOnce(W, io::Result<()>),
    ) {
        let mut outcome = Ok(());
        for chunk in bytes {
            if outcome.is_ok() {
                outcome = output.write_all(&chunk).and_then(|()| output.flush());
            }
            let count = chunk.len() as u32;
            *lock(waiting) -= count;
            // A line that is gone shows to its reader.
            let _ = self.send(&Frame::Credit(stream, count));
        }
        done(output, outcome);
    }

    /// Takes a data, close or credit frame; gives any other back.
    ///
    /// Errors when the other side sends beyond the window.
    pub fn received(&self, frame: Frame) -> io::Result<Option<Frame>> {
        let mut state = lock(&self.state);
        match frame {
            Frame::Zeros(stream, count) => {
                drop(state);
                return self.received(Frame::Data(stream, vec![0; count as usize]));
            }
            Frame::Data(stream, bytes) => {
                // What comes for a stream whose receiver has gone is dropped.
                if let Some(sink) = state.sinks.get(&stream) {
                    let mut waiting = lock(&sink.waiting);
                    *waiting = waiting.saturating_add(bytes.len() as u32);
                    if *waiting > WINDOW {
                        let what = format!("stream {} sent beyond its window", stream.0);
                        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
                    }
                    let _ = sink.queue.send(bytes);
                }
            }
            Frame::Close(stream) => drop(state.sinks.remove(&stream)),
            Frame::Credit(stream, count) => {
                if let Some(window) = state.windows.get_mut(&stream) {
                    *window = window.saturating_add(count).min(WINDOW);
                    self.changed.notify_all();
                }
            }
            other => return Ok(Some(other)),
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Two ends of a line, each read by a thread of its own until the line closes.
    fn pair() -> (Arc<Link>, Arc<Link>) {
        let (left, right) = UnixStream::pair().unwrap();
        let end = |socket: UnixStream| {
            let link = Link::new(socket.try_clone().unwrap());
            let reading = Arc::clone(&link);
            std::thread::spawn(move || {
                let mut socket = socket;
                while let Ok(Some(frame)) = Frame::read(&mut socket) {
                    assert_eq!(reading.received(frame).unwrap(), None);
                }
                reading.shut();
            });
            link
        };
        (end(left), end(right))
    }

    #[test]
    fn carries_more_than_a_window_in_order() {
        let (here, there) = pair();
        let sent: Vec<u8> = (0..WINDOW * 5 + 17)
            .map(|index| if index / WINDOW == 2 { 0 } else { (index / 7) as u8 })
            .collect();
        let (give, take) = mpsc::channel();
        let done =
            move |bytes: Vec<u8>, outcome: io::Result<()>| give.send((bytes, outcome.is_ok())).unwrap();
        there.receive(Stream(5), Vec::new(), done).unwrap();
        here.send_all(Stream(5), &mut &sent[..]).unwrap();
        let (bytes, fine) = take.recv().unwrap();
        assert!(fine && bytes == sent);
    }

    /// A writer that blocks until told.
    struct Gate(Receiver<()>);

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.recv().map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_stream_holds_up_no_other() {
        let (here, there) = pair();
        let (open, gate) = mpsc::channel();
        let stuck = there.receive(Stream(1), Gate(gate), |_, _| {}).unwrap();
        let (give, take) = mpsc::channel();
        there
            .receive(Stream(2), Vec::new(), move |bytes: Vec<u8>, _| give.send(bytes.len()).unwrap())
            .unwrap();
        let big = vec![0; WINDOW as usize * 2];
        let sender = std::thread::spawn({
            let (here, big) = (Arc::clone(&here), big.clone());
            move || here.send_all(Stream(1), &mut &big[..]).is_ok()
        });
        here.send_all(Stream(2), &mut &big[..]).unwrap();
        assert_eq!(take.recv().unwrap(), big.len());
        assert!(!sender.is_finished());
        drop(open);
        stuck.join().unwrap();
        assert!(sender.join().unwrap());
    }

    #[test]
    fn a_closed_line_ends_the_waiting() {
        let (here, there) = pair();
        let (_open, gate) = mpsc::channel();
        there.receive(Stream(1), Gate(gate), |_, _| {}).unwrap();
        let sender = std::thread::spawn({
            let here = Arc::clone(&here);
            move || here.send_all(Stream(1), &mut &vec![0; WINDOW as usize * 2][..])
        });
        here.shut();
        assert!(sender.join().unwrap().is_err());
    }

    #[test]
    fn sending_beyond_the_window_is_an_error() {
        let link = Link::new(Vec::new());
        let (_open, gate) = mpsc::channel();
        link.receive(Stream(1), Gate(gate), |_, _| {}).unwrap();
        let chunk = Frame::Data(Stream(1), vec![0; WINDOW as usize]);
        assert!(link.received(chunk.clone()).unwrap().is_none());
        assert!(link.received(chunk).is_err());
    }
}
