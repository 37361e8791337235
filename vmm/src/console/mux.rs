//! Standard input and output, shared by the guest's console and the monitor.
//!
//! On a terminal, Ctrl-a introduces the keys of [`HELP`], as in QEMU. Otherwise every byte of standard input goes to
//! the guest, and its end is no end of the run. While the monitor is open the guest's output is held back, so that
//! it does not write over the line being typed.
//!
//! ```text
//! stdin -> input thread -> Keys -> guest's port | editor -> commands
//! guest's port (vCPU threads) -> Screen (bounded) -> output thread -> stdout
//! ```

use super::command::complete;
use super::editor::{Edit, LineEditor};
use super::execute::Commands;
use super::terminal::{self, RawTerminal};
use crate::devices::{SerialInput, SerialSink};
use anyhow::Context;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What Ctrl-a h prints.
pub const HELP: &str = "
Ctrl-a h  this help
Ctrl-a c  monitor, and back to the console
Ctrl-a x  end the virtual machine
Ctrl-a a  send Ctrl-a
";
/// What opening the monitor prints.
const WELCOME: &str = "\r\nMonitor: help lists the commands, Ctrl-a c goes back to the console.\r\n";
const PROMPT: &str = "(kleak) ";
/// Console output that waits for a slow reader or an open monitor; beyond it output is lost, and said to be.
const MAX_WAITING: usize = 4 << 20;
/// Input the guest has not taken yet; beyond it standard input is not read.
const MAX_INPUT: usize = 64 << 10;

/// Console output on its way out.
#[derive(Default)]
struct Waiting {
    /// From the guest; held while `monitor`.
    guest: VecDeque<u8>,
    /// Ours: replies, help, the editor's.
    own: VecDeque<u8>,
    /// Bytes of the guest dropped since the last word of it.
    lost: usize,
    /// The monitor is open.
    monitor: bool,
    /// The output thread is writing.
    busy: bool,
    /// No more output will come.
    closed: bool,
}

impl Waiting {
    /// The next bytes to write.
    fn take(&mut self) -> Vec<u8> {
        let mut next: Vec<u8> = self.own.drain(..).collect();
        if !self.monitor {
            next.extend(self.guest.drain(..));
            if self.lost > 0 {
                next.extend(
                    format!("\r\n[kleak-vmm: {} bytes of console output lost]\r\n", self.lost).bytes(),
                );
                self.lost = 0;
            }
        }
        next
    }
}

/// The output half, shared with the vCPU threads.
#[derive(Default)]
struct Screen {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

impl Screen {
    /// Nothing under this lock can panic halfway, so a poisoned one is as good as new.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn guest(&self, bytes: &[u8]) {
        let mut waiting = self.lock();
        let room = MAX_WAITING.saturating_sub(waiting.guest.len());
        waiting.lost += bytes.len().saturating_sub(room);
        waiting.guest.extend(bytes.iter().take(room));
        self.changed.notify_all();
    }

    fn own(&self, bytes: &[u8]) {
        self.lock().own.extend(bytes);
        self.changed.notify_all();
    }

    fn set_monitor(&self, open: bool) {
        self.lock().monitor = open;
        self.changed.notify_all();
    }

    /// Writes until closed. A reader that went away is no error: the run goes on without it.
    fn write_out(&self, mut out: impl Write) {
        let mut gone = false;
        loop {
            let mut waiting = self.lock();
            let mut next = waiting.take();
            while next.is_empty() && !waiting.closed {
                waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
                next = waiting.take();
            }
            if next.is_empty() {
                return;
            }
            waiting.busy = true;
            drop(waiting);
            gone = gone || out.write_all(&next).and_then(|()| out.flush()).is_err();
            self.lock().busy = false;
            self.changed.notify_all();
        }
    }

    /// Lets everything out that waits, for at most `patience`.
    fn drain(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let mut waiting = self.lock();
        waiting.monitor = false;
        waiting.closed = true;
        self.changed.notify_all();
        while waiting.busy || !waiting.guest.is_empty() || !waiting.own.is_empty() {
            let Some(left) = until.checked_duration_since(Instant::now()) else { return };
            waiting = self.changed.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// What a byte from the terminal means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    /// For whoever has the terminal.
    Pass(u8),
    Toggle,
    Quit,
    Help,
    Nothing,
}

/// Finds Ctrl-a keys in the terminal's bytes.
#[derive(Debug, Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    fn feed(&mut self, byte: u8) -> Key {
        const CTRL_A: u8 = 1;
        if !std::mem::take(&mut self.escaped) {
            self.escaped = byte == CTRL_A;
            return if self.escaped { Key::Nothing } else { Key::Pass(byte) };
        }
        match byte {
            b'a' | CTRL_A => Key::Pass(CTRL_A),
            b'c' => Key::Toggle,
            b'x' => Key::Quit,
            b'h' | b'?' => Key::Help,
            _ => Key::Nothing,
        }
    }
}

/// See the module. Dropping it prints what is left and restores the terminal.
pub struct ConsoleMux {
    screen: Arc<Screen>,
    input: Option<InputThread>,
    output: Option<JoinHandle<()>>,
    // Dropped last, when no thread can write any more.
    raw: Option<RawTerminal>,
}

struct InputThread {
    thread: JoinHandle<()>,
    stop: EventFd,
}

impl ConsoleMux {
    /// Takes standard output; console output is printed from now on.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn new() -> anyhow::Result<Self> {
        let screen = Arc::new(Screen::default());
        let shared = Arc::clone(&screen);
        let write = move || shared.write_out(io::stdout());
        let output = std::thread::Builder::new().name("console output".into()).spawn(write);
        let output = Some(output.context("Cannot start the console")?);
        Ok(Self { screen, input: None, output, raw: None })
    }

    /// What stands behind the guest's first serial port.
    pub fn sink(&self) -> Box<dyn SerialSink> {
        Box::new(ConsoleSink(Arc::clone(&self.screen)))
    }

    /// Takes standard input: for the guest's `port`, and for the monitor, whose commands go to `commands`. A
    /// terminal becomes raw until the mux is dropped.
    ///
    /// # Errors
    /// The terminal cannot be made raw, or no thread is to be had.
    pub fn start_input(
        &mut self,
        port: Arc<dyn SerialInput>,
        commands: Arc<dyn Commands>,
    ) -> anyhow::Result<()> {
        let stdin = io::stdin();
        self.raw = RawTerminal::enter(&stdin).context("Cannot set up the terminal")?;
        let interactive = self.raw.is_some();
        // SAFETY: isatty takes a plain number.
        if !interactive && unsafe { libc::isatty(stdin.as_raw_fd()) } == 1 {
            // A terminal that this process runs in the background of: reading it would stop the process.
            return Ok(());
        }
        let stop = EventFd::new(EFD_NONBLOCK).context("Cannot start the console")?;
        let wake = stop.try_clone().context("Cannot start the console")?;
        let mut session = Session::new(Arc::clone(&self.screen), port, commands, interactive);
        let read = move || session.run(&stdin, &wake);
        let thread = std::thread::Builder::new().name("console input".into()).spawn(read);
        self.input = Some(InputThread { thread: thread.context("Cannot start the console")?, stop });
        Ok(())
    }

    /// Whether a user sits at a terminal.
    pub fn is_interactive(&self) -> bool {
        self.raw.is_some()
    }
}

impl Drop for ConsoleMux {
    fn drop(&mut self) {
        if let Some(input) = self.input.take() {
            // The thread may be carrying out the very command that ends the run; it is not waited for.
            let _ = input.stop.write(1);
            drop(input.thread);
        }
        self.screen.drain(Duration::from_secs(2));
        // A reader that takes nothing any more must not keep the process.
        drop(self.output.take());
    }
}

struct ConsoleSink(Arc<Screen>);

impl SerialSink for ConsoleSink {
    fn output(&mut self, bytes: &[u8]) {
        self.0.guest(bytes);
    }
}

/// The input thread's state.
struct Session {
    screen: Arc<Screen>,
    port: Arc<dyn SerialInput>,
    commands: Arc<dyn Commands>,
    interactive: bool,
    keys: Keys,
    editor: LineEditor,
    monitor: bool,
}

impl Session {
    fn new(
        screen: Arc<Screen>,
        port: Arc<dyn SerialInput>,
        commands: Arc<dyn Commands>,
        interactive: bool,
    ) -> Self {
        let editor = LineEditor::new(PROMPT, complete);
        Self { screen, port, commands, interactive, keys: Keys::default(), editor, monitor: false }
    }

    /// Reads until standard input ends or `stop` is written to.
    fn run(&mut self, stdin: &(impl AsFd + AsRawFd), stop: &EventFd) {
        // Not through `io::stdin()`'s own buffer: `poll` does not know of what waits there.
        let Ok(input) = stdin.as_fd().try_clone_to_owned() else { return };
        let mut input = File::from(input);
        let mut buffer = [0; 4096];
        loop {
            // The guest sets the pace of a long input.
            let full = self.port.pending() >= MAX_INPUT;
            let ready = if full { wait(None, stop, 20) } else { wait(Some(stdin.as_raw_fd()), stop, -1) };
            match ready {
                Ready::Stop => return,
                Ready::Nothing => continue,
                Ready::Input => {}
            }
            match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => self.take(&buffer[..n], stdin),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn take(&mut self, bytes: &[u8], stdin: &impl AsRawFd) {
        if !self.interactive {
            self.port.push(bytes);
            return;
        }
        for &byte in bytes {
            match self.keys.feed(byte) {
                Key::Pass(byte) if self.monitor => self.edit(byte),
                Key::Pass(byte) => self.port.push(&[byte]),
                Key::Toggle if self.monitor => {
                    self.screen.own(b"\r\n");
                    self.leave();
                }
                Key::Toggle => self.enter(terminal::width(stdin)),
                Key::Quit => self.commands.quit(),
                Key::Help => self.help(terminal::width(stdin)),
                Key::Nothing => {}
            }
        }
    }

    fn enter(&mut self, width: usize) {
        self.monitor = true;
        self.screen.set_monitor(true);
        self.screen.own(WELCOME.as_bytes());
        self.prompt(width);
    }

    fn leave(&mut self) {
        self.monitor = false;
        self.screen.set_monitor(false);
    }

    fn prompt(&mut self, width: usize) {
        self.editor.start(width);
        self.screen.own(&self.editor.take_output());
    }

    fn help(&mut self, width: usize) {
        self.screen.own(HELP.as_bytes());
        if self.monitor {
            self.prompt(width);
        }
    }

    /// A key for the monitor.
    fn edit(&mut self, byte: u8) {
        let edit = self.editor.feed(byte);
        self.screen.own(&self.editor.take_output());
        match edit {
            Some(Edit::Line(line)) => {
                let reply = self.commands.answer(&line);
                self.screen.own(reply.body.as_bytes());
                if reply.quit {
                    self.leave();
                    self.commands.quit();
                } else {
                    self.prompt(terminal::width(&io::stdin()));
                }
            }
            Some(Edit::Leave) => self.leave(),
            None => {}
        }
    }
}

enum Ready {
    Input,
    Stop,
    Nothing,
}

/// Waits for input, the order to stop, or `timeout_ms` (-1: for ever).
fn wait(input: Option<RawFd>, stop: &EventFd, timeout_ms: i32) -> Ready {
    // A negative descriptor is skipped (poll(2)).
    let mut fds = [
        libc::pollfd { fd: stop.as_raw_fd(), events: libc::POLLIN, revents: 0 },
        libc::pollfd { fd: input.unwrap_or(-1), events: libc::POLLIN, revents: 0 },
    ];
    // SAFETY: the array lives for the call and its length is given.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms) };
    match (ready, fds[0].revents, fds[1].revents) {
        (1.., 0, _) => Ready::Input,
        (1.., _, _) => Ready::Stop,
        _ => Ready::Nothing,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::execute::Executor;
    use super::super::fake::FakeTarget;
    use super::*;

    #[derive(Default)]
    struct FakePort(Mutex<Vec<u8>>);

    impl SerialInput for FakePort {
        fn push(&self, bytes: &[u8]) {
            self.0.lock().unwrap().extend(bytes);
        }
        fn pending(&self) -> usize {
            0
        }
    }

    struct Rig {
        session: Session,
        screen: Arc<Screen>,
        port: Arc<FakePort>,
        target: Arc<FakeTarget>,
    }

    fn rig(interactive: bool) -> Rig {
        let (screen, port, target) =
            (Arc::new(Screen::default()), Arc::new(FakePort::default()), Arc::new(FakeTarget::leaky()));
        let commands = Arc::new(Executor::new(target.clone()));
        let session = Session::new(screen.clone(), port.clone(), commands, interactive);
        Rig { session, screen, port, target }
    }

    /// What the monitor prints below a line typed into it.
    pub(in crate::console) fn typed_in_the_monitor(commands: Arc<Executor>, line: &str) -> String {
        let screen = Arc::new(Screen::default());
        let mut session = Session::new(screen.clone(), Arc::new(FakePort::default()), commands, true);
        let mut type_in = |bytes: &[u8]| {
            session.take(bytes, &io::stdin());
            String::from_utf8(screen.lock().take()).unwrap()
        };
        type_in(b"\x01c");
        type_in(line.as_bytes());
        let below = type_in(b"\r");
        let reply = below.split_once('\n').map_or("", |(_, reply)| reply);
        reply.split(PROMPT).next().unwrap_or_default().trim_end_matches('\r').to_owned()
    }

    impl Rig {
        fn type_in(&mut self, bytes: &[u8]) -> String {
            self.session.take(bytes, &io::stdin());
            String::from_utf8(self.screen.lock().take()).unwrap()
        }

        fn guest_got(&self) -> Vec<u8> {
            std::mem::take(&mut *self.port.0.lock().unwrap())
        }
    }

    /// Who writes much at once and waits for an answer, the pipe open.
    #[test]
    fn nothing_stays_behind_in_a_buffer() {
        let Rig { mut session, port, .. } = rig(false);
        let (input, mut output) = io::pipe().unwrap();
        let stop = EventFd::new(EFD_NONBLOCK).unwrap();
        let stopped = stop.try_clone().unwrap();
        let thread = std::thread::spawn(move || session.run(&input, &stopped));
        output.write_all(&[b'x'; 8000]).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while port.0.lock().unwrap().len() < 8000 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        stop.write(1).unwrap();
        thread.join().unwrap();
        assert_eq!(port.0.lock().unwrap().len(), 8000);
    }

    #[test]
    fn a_pipe_is_passed_on_byte_for_byte() {
        let mut rig = rig(false);
        rig.type_in(b"ls\n\x01cx\x01x\0\xff");
        assert_eq!(rig.guest_got(), b"ls\n\x01cx\x01x\0\xff");
        assert_eq!(rig.target.log(), "");
    }

    #[test]
    fn keys_of_the_terminal() {
        let mut rig = rig(true);
        rig.type_in(b"ls\r\x03\x01a\x01\x01\x01z");
        assert_eq!(rig.guest_got(), b"ls\r\x03\x01\x01");
        assert!(rig.type_in(b"\x01h").contains("Ctrl-a x  end"));
        rig.type_in(b"\x01x");
        assert_eq!(rig.target.log(), "quit");
    }

    #[test]
    fn the_monitor_takes_commands_and_holds_the_guest_back() {
        let mut rig = rig(true);
        rig.screen.guest(b"before ");
        let screen = rig.type_in(b"\x01c");
        assert!(screen.contains("(kleak) ") && !screen.contains("before"), "{screen:?}");
        rig.screen.guest(b"during");
        let screen = rig.type_in(b"sc\tbogus\x17scan\r");
        assert!(screen.contains("kmemleak: 3 new suspected memory leaks\n") && !screen.contains("during"));
        assert!(rig.guest_got().is_empty());
        assert_eq!(rig.type_in(b"\x01c"), "\r\nbefore during");
        rig.type_in(b"x");
        assert_eq!(rig.guest_got(), b"x");
        assert_eq!(rig.target.log(), "scan");
    }

    #[test]
    fn the_monitor_is_left_by_ctrl_d_and_by_quit() {
        let mut rig = rig(true);
        rig.type_in(b"\x01c\x04");
        rig.type_in(b"x");
        assert_eq!(rig.guest_got(), b"x");
        assert!(rig.type_in(b"\x01cquit\r").contains("powering off\n"));
        assert_eq!(rig.target.log(), "quit");
    }

    #[test]
    fn a_flood_behind_an_open_monitor_is_bounded_and_said() {
        let screen = Screen::default();
        screen.set_monitor(true);
        for _ in 0..5 {
            screen.guest(&vec![b'x'; 1 << 20]);
        }
        screen.set_monitor(false);
        let text = String::from_utf8(screen.lock().take()).unwrap();
        assert!(text.ends_with("x\r\n[kleak-vmm: 1048576 bytes of console output lost]\r\n"));
        assert_eq!(
            text.len(),
            MAX_WAITING + "\r\n[kleak-vmm: 1048576 bytes of console output lost]\r\n".len()
        );
    }

    #[test]
    fn output_is_drained_at_the_end_and_a_broken_pipe_is_survived() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let screen = Arc::new(Screen::default());
        screen.guest(b"last words");
        let shared = screen.clone();
        let writer = std::thread::spawn(move || shared.write_out(Broken));
        screen.drain(Duration::from_secs(5));
        writer.join().unwrap();

        let screen = Screen::default();
        screen.guest(b"nobody writes");
        let start = Instant::now();
        screen.drain(Duration::from_millis(20));
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
