//! The host's side of a lab run: starts the machine, joins the job's streams, files, signals and control socket with
//! the user's, and says what went wrong when the lab fails.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use images::lab::{Lab, LabFiles};

use super::Job;
use super::emulator::{Emulator, Machine};
use super::incoming::Files;
use super::link::Link;
use super::payload::{self, Content};
use super::wire::{Frame, JobSpec, Stream, VERSION};
use crate::cli::Failure;
use crate::console::signals;
use crate::console::socket::ControlServer;
use crate::console::terminal::RawTerminal;

/// How often the terminal's size and the emulator's health are looked at.
const TICK: Duration = Duration::from_millis(250);
/// How often a machine is started, when it fails before the job has begun.
const STARTS: u32 = 3;
/// Lines of the lab's console shown when it fails.
const TAIL_LINES: usize = 30;

/// Where the job's streams go on the host.
pub enum Streams {
    /// This process's own.
    Own,
    /// Standard output is kept and given back; standard input is empty, messages go to ours.
    Captured(Arc<Mutex<Vec<u8>>>),
}

/// How a run ended.
pub struct Ended {
    /// The job's exit code, or 128 + a signal.
    pub code: i32,
    /// From the start of the emulator until the lab was up.
    pub start: Duration,
}

/// A lab that has said nothing for this long hangs.
const fn silence(lab: Lab) -> Duration {
    match lab {
        Lab::Svm => Duration::from_secs(90),
        // Boots for a minute, two on a loaded host.
        Lab::Vmx => Duration::from_secs(400),
    }
}

/// What the run's loop hears of.
enum Event {
    Frame(Frame),
    /// The line has ended, with an error or without.
    Ended(Option<io::Error>),
    Signal(i32),
}

/// Runs `job` on a machine whose files are `lab`. A machine that dies while it boots is started again: nothing of the job
/// has run yet, and emulators have bugs of their own that a kernel with several CPUs meets now and then.
///
/// Errors are of exit code 4: the lab did not come up, died or hung.
pub fn run(job: &Job, lab: &LabFiles, program: &Path, streams: &Streams) -> Result<Ended> {
    let mut control = job.control.as_deref().map(ControlServer::bind).transpose()?;
    let route = Route::default();
    watch_signals(streams, &route)?;
    let mut starts = 0;
    loop {
        starts += 1;
        let (mut session, inbox) = Session::open(job, lab, program, streams, control.take(), &route)?;
        let outcome = session.serve(&inbox);
        if outcome.is_err() {
            // What has begun will not end any more.
            session.link.shut();
        }
        session.files.finish();
        match outcome {
            Err(error) if !session.started && !error.is::<Failure>() && starts < STARTS => {
                eprintln!(
                    "kleak-vmm: the lab's machine failed while it booted ({error:#}); starting it again"
                );
                control = session.control.take();
            }
            outcome => return session.end(outcome),
        }
    }
}

/// Where signals go: to the machine of the moment.
type Route = Arc<Mutex<Option<Sender<Event>>>>;

/// Signals that ask to end go to the job; a second one ends this process, and with it the emulator.
fn watch_signals(streams: &Streams, route: &Route) -> Result<()> {
    if matches!(streams, Streams::Captured(_)) {
        return Ok(());
    }
    let route = Arc::clone(route);
    let send = move |number| {
        if let Some(events) = &*route.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = events.send(Event::Signal(number));
        }
    };
    signals::watch(send).context("Cannot watch for signals")
}

struct Session<'a> {
    job: &'a Job,
    emulator: Emulator,
    link: Arc<Link>,
    files: Arc<Files>,
    streams: &'a Streams,
    control: Option<ControlServer>,
    began: Instant,
    /// The agent is up and has the job.
    started: bool,
    start: Duration,
    sinks: Vec<JoinHandle<()>>,
    raw: Option<RawTerminal>,
    window: Option<(u16, u16)>,
}

impl<'a> Session<'a> {
    /// Starts the machine.
    fn open(
        job: &'a Job,
        lab: &LabFiles,
        program: &Path,
        streams: &'a Streams,
        control: Option<ControlServer>,
        route: &Route,
    ) -> Result<(Self, Receiver<Event>)> {
        let parents = job.outputs.iter().chain(&job.control).filter_map(|path| path.parent());
        let folders =
            parents.chain([job.cwd.as_path()]).map(Path::to_owned).chain(job.folders.iter().cloned());
        let content = Content { inputs: job.inputs.clone(), folders: folders.collect() };
        let initrd = payload::build(&lab.modules, &content)
            .context(Failure::host("Cannot pack the files of the lab"))?;
        let mem_bytes = job.lab_memory(initrd.size);
        let machine = Machine {
            files: lab,
            initrd: &initrd.file,
            cpus: job.cpus,
            five_levels: job.five_levels,
            mem_bytes,
            disks: &job.disks,
        };
        let (events, inbox) = mpsc::channel();
        *route.lock().unwrap_or_else(PoisonError::into_inner) = Some(events.clone());
        let began = Instant::now();
        let (emulator, line) = Emulator::start(job.lab, program, &machine).map_err(|error| {
            if error.is::<Failure>() { error } else { error.context(Failure::host("Cannot start the lab")) }
        })?;
        let link = Link::new(line.try_clone().context("cloning the lab's line")?);
        let files = Arc::new(Files::new(job));
        let reader = Reader { link: Arc::clone(&link), files: Arc::clone(&files), events };
        std::thread::Builder::new().name("lab-line".to_owned()).spawn(move || reader.serve(line))?;
        let session = Self {
            job,
            emulator,
            link,
            files,
            streams,
            control,
            began,
            started: false,
            start: Duration::ZERO,
            sinks: Vec::new(),
            raw: None,
            window: None,
        };
        Ok((session, inbox))
    }

    /// Until the job ends: its exit code.
    fn serve(&mut self, inbox: &Receiver<Event>) -> Result<i32> {
        let mut heard = Instant::now();
        loop {
            match inbox.recv_timeout(TICK) {
                Ok(Event::Frame(frame)) => {
                    heard = Instant::now();
                    match frame {
                        Frame::Hello(VERSION) if !self.started => {
                            self.started = true;
                            self.start = self.began.elapsed();
                            self.start()?;
                        }
                        Frame::Exit(code) => return Ok(code),
                        Frame::Trouble(text) => anyhow::bail!("its agent says: {text}"),
                        Frame::Alive => {}
                        other => anyhow::bail!("its agent says {other:?}, out of place"),
                    }
                }
                Ok(Event::Signal(number)) if self.started => self.link.send(&Frame::Signal(number))?,
                Ok(Event::Signal(number)) => {
                    let what = format!("Ended by signal {number} before the lab was up");
                    return Err(Failure::host(what).into());
                }
                Ok(Event::Ended(error)) => {
                    // An emulator closes the line a moment before it ends.
                    std::thread::sleep(TICK);
                    let error = error.map_or_else(String::new, |error| format!(" ({error})"));
                    match self.emulator.ended() {
                        Some(status) => anyhow::bail!("{} ended, {status}{error}", self.emulator.name()),
                        None => anyhow::bail!("its line closed{error}"),
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.follow_window()?,
                Err(RecvTimeoutError::Disconnected) => anyhow::bail!("its reader ended"),
            }
            let silence = silence(self.job.lab);
            if heard.elapsed() > silence {
                anyhow::bail!("it has said nothing for {} s", silence.as_secs());
            }
        }
    }

    /// The agent is up: gives it the job and joins the streams.
    fn start(&mut self) -> Result<()> {
        let own = matches!(self.streams, Streams::Own);
        let tty = match own {
            true => [io::stdin().is_terminal(), io::stdout().is_terminal(), io::stderr().is_terminal()],
            false => [false; 3],
        };
        let (stdout, stderr): (Box<dyn Write + Send>, Box<dyn Write + Send>) = match self.streams {
            Streams::Own => (Box::new(io::stdout()), Box::new(io::stderr())),
            Streams::Captured(kept) => (Box::new(Kept(Arc::clone(kept))), Box::new(io::stderr())),
        };
        for (stream, output) in [(Stream::STDOUT, stdout), (Stream::STDERR, stderr)] {
            self.sinks.push(self.link.receive(stream, output, |_, _| {})?);
        }
        self.link.send(&Frame::Job(self.job.spec(tty)?))?;
        if tty[0] {
            self.raw = RawTerminal::enter(&io::stdin()).context("Cannot make the terminal raw")?;
            self.follow_window()?;
        }
        if own {
            let link = Arc::clone(&self.link);
            std::thread::Builder::new()
                .name("lab-stdin".to_owned())
                .spawn(move || drop(link.send_all(Stream::STDIN, &mut io::stdin())))?;
        } else {
            self.link.send(&Frame::Close(Stream::STDIN))?;
        }
        if let Some(control) = &mut self.control {
            let link = Arc::clone(&self.link);
            let next = AtomicU32::new(Stream::FIRST_CONTROL.0);
            control.serve_streams(move |client| {
                let stream = Stream(next.fetch_add(1, Ordering::Relaxed));
                // A client whose connection cannot be joined sees it close.
                let _ = join_client(&link, stream, client);
            })?;
        }
        Ok(())
    }

    /// Tells the lab the terminal's size where it has changed.
    fn follow_window(&mut self) -> Result<()> {
        if self.raw.is_none() {
            return Ok(());
        }
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCGWINSZ writes one winsize, which lives on the stack.
        let result = unsafe { libc::ioctl(io::stdin().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
        let now = Some((size.ws_row, size.ws_col));
        if result == 0 && now != self.window {
            self.window = now;
            self.link.send(&Frame::Resize(size.ws_row, size.ws_col))?;
        }
        Ok(())
    }

    /// Ends the machine; turns a failure into one that shows the end of the lab's console.
    fn end(mut self, outcome: Result<i32>) -> Result<Ended> {
        if outcome.is_ok() {
            // What the job wrote last is on its way to our streams.
            self.link.shut();
            self.sinks.drain(..).for_each(|sink| drop(sink.join()));
        }
        drop(self.raw.take());
        let start = self.start;
        outcome.map(|code| Ended { code, start }).map_err(|error| {
            if error.is::<Failure>() {
                return error;
            }
            for line in self.emulator.tail(TAIL_LINES) {
                eprintln!("lab: {line}");
            }
            error.context(
                Failure::host("The lab failed")
                    .hint("run it again; if it fails again, kleak-vmm doctor says more about this host"),
            )
        })
    }
}

fn join_client(link: &Arc<Link>, stream: Stream, client: UnixStream) -> io::Result<()> {
    let mut source = client.try_clone()?;
    link.receive(stream, client, |client, _| drop(client.shutdown(std::net::Shutdown::Write)))?;
    link.send(&Frame::Control(stream))?;
    link.send_all(stream, &mut source)
}

/// Standard output kept in memory.
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes the lab's frames as they come.
struct Reader {
    link: Arc<Link>,
    files: Arc<Files>,
    events: Sender<Event>,
}

impl Reader {
    fn serve(self, mut line: File) {
        let error = loop {
            let outcome = match Frame::read(&mut line) {
                Ok(Some(frame)) => self.link.received(frame),
                Ok(None) => break None,
                Err(error) => Err(error),
            };
            let outcome = match outcome {
                Ok(Some(Frame::File(stream, head))) => self.files.begin(&self.link, stream, &head),
                Ok(Some(frame)) => {
                    let _ = self.events.send(Event::Frame(frame));
                    Ok(())
                }
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                break Some(error);
            }
        };
        let _ = self.events.send(Event::Ended(error));
        self.link.shut();
    }
}

impl Job {
    fn spec(&self, tty: [bool; 3]) -> Result<JobSpec> {
        let text = |path: &Path| {
            path.to_str().map(str::to_owned).with_context(|| format!("{} is not UTF-8", path.display()))
        };
        Ok(JobSpec {
            argv: self.argv.clone(),
            env: self.env.clone(),
            cwd: text(&self.cwd)?,
            tty,
            outputs: self.outputs.iter().map(|path| text(path)).collect::<Result<_>>()?,
            control: self.control.as_deref().map(text).transpose()?,
        })
    }
}
