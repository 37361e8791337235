//! A 16550A serial port: vm-superio's registers, with an input queue on the host side.
//!
//! Input waits in the queue until the guest's driver listens (receive interrupt enabled), so that a reply sent while
//! nobody has the port open is read by the next one who opens it.

use super::{NullSink, SerialInput, SerialSink, Unread};
use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::EventFd;

/// Input bytes that wait for the guest at most; what comes on top is dropped.
pub const INPUT_LIMIT: usize = 1 << 20;

// Register offsets and bits: 16550 data sheet; names as in the kernel's uapi/linux/serial_reg.h.
const RX: u8 = 0;
const IER: u8 = 1;
const FCR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const IER_RDI: u8 = 0x01;
/// Every interrupt there is.
const IER_ALL: u8 = 0x0f;
const FCR_CLEAR_RCVR: u8 = 0x02;
const LCR_DLAB: u8 = 0x80;
const MCR_DTR: u8 = 0x01;
const MCR_OUT2: u8 = 0x08;
const MCR_LOOP: u8 = 0x10;
const LSR_DR: u8 = 0x01;
const FIFO: usize = 64;

/// A serial port. Input and sinks may come from any thread.
pub struct SerialPort {
    /// Taken before `registers`, so that output keeps its order and the sink may push input.
    sink: Mutex<Box<dyn SerialSink>>,
    registers: Mutex<Registers>,
}

/// Raises the port's interrupt: an edge, as ISA interrupts are.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Registers {
    uart: Serial<Line, NoEvents, Vec<u8>>,
    queue: VecDeque<u8>,
    ier: u8,
    lcr: u8,
    mcr: u8,
    open: bool,
    /// The sink decides about unread input: the guest gets none meanwhile.
    held: bool,
}

/// What a write to a register led to.
#[derive(Default)]
struct Written {
    output: Vec<u8>,
    /// The port's new state when it was opened or closed.
    opened: Option<bool>,
    /// Input bytes not taken, counted when the port was opened or closed.
    unread: usize,
}

impl SerialPort {
    /// A port whose interrupt is `interrupt`; its output goes nowhere until [`SerialPort::connect`].
    pub fn new(interrupt: EventFd) -> Self {
        let registers = Registers {
            uart: Serial::new(Line(interrupt), Vec::new()),
            queue: VecDeque::new(),
            ier: 0,
            lcr: 0,
            mcr: 0,
            open: false,
            held: false,
        };
        Self { sink: Mutex::new(Box::new(NullSink)), registers: Mutex::new(registers) }
    }

    /// Sends the guest's output to `sink` from now on.
    pub fn connect(&self, sink: Box<dyn SerialSink>) {
        *lock(&self.sink) = sink;
    }

    /// Passes bytes on as if the guest had sent them.
    pub fn show(&self, bytes: &[u8]) {
        lock(&self.sink).output(bytes);
    }

    /// True while the guest's driver has the port open.
    pub fn is_open(&self) -> bool {
        lock(&self.registers).open
    }

    /// The guest reads register `offset`.
    pub fn read(&self, offset: u8) -> u8 {
        let mut registers = lock(&self.registers);
        let value = registers.uart.read(offset);
        registers.feed();
        value
    }

    /// The guest writes register `offset`.
    pub fn write(&self, offset: u8, value: u8) {
        let mut sink = lock(&self.sink);
        let written = lock(&self.registers).write(offset, value);
        if !written.output.is_empty() {
            sink.output(&written.output);
        }
        let Some(open) = written.opened else { return };
        // The registers are not locked here: the sink may push input, which then is no unread input.
        let unread = sink.open_changed(open, written.unread);
        let mut registers = lock(&self.registers);
        if unread == Unread::Drop {
            registers.drop_input(written.unread);
        }
        registers.held = false;
        registers.feed();
    }
}

impl SerialInput for SerialPort {
    fn push(&self, bytes: &[u8]) {
        let mut registers = lock(&self.registers);
        let room = INPUT_LIMIT.saturating_sub(registers.queue.len());
        registers.queue.extend(&bytes[..bytes.len().min(room)]);
        registers.feed();
    }

    fn pending(&self) -> usize {
        lock(&self.registers).pending()
    }
}

impl Registers {
    fn write(&mut self, offset: u8, value: u8) -> Written {
        let latch = self.lcr & LCR_DLAB != 0;
        match offset {
            IER if !latch => self.ier = value,
            FCR if value & FCR_CLEAR_RCVR != 0 && !latch => self.drop_fifo(FIFO),
            LCR => self.lcr = value,
            MCR => self.mcr = value,
            _ => {}
        }
        // It fails only when the interrupt's event counter is full: then the interrupt is pending anyway.
        let _ = self.uart.write(offset, value);
        let opened = self.open_changed();
        self.held |= opened.is_some();
        self.feed();
        Written { output: std::mem::take(self.uart.writer_mut()), opened, unread: self.pending() }
    }

    /// Input that the guest's driver has not taken: in the FIFO and in the queue.
    fn pending(&self) -> usize {
        FIFO - self.uart.fifo_capacity() + self.queue.len()
    }

    /// Drops the oldest `count` bytes of input.
    fn drop_input(&mut self, count: usize) {
        let in_fifo = (FIFO - self.uart.fifo_capacity()).min(count);
        self.drop_fifo(in_fifo);
        self.queue.drain(..(count - in_fifo).min(self.queue.len()));
    }

    /// Takes at most `count` bytes out of the FIFO. (vm-superio ignores the FIFO control register, by which a driver that
    /// opens the port clears it.)
    fn drop_fifo(&mut self, count: usize) {
        // With the divisor latch open the data register is another one.
        let _ = self.uart.write(LCR, self.lcr & !LCR_DLAB);
        for _ in 0..count {
            if self.uart.read(LSR) & LSR_DR == 0 {
                break;
            }
            self.uart.read(RX);
        }
        let _ = self.uart.write(LCR, self.lcr);
    }

    /// Refills an empty FIFO from the queue: one interrupt per FIFO, not one per byte.
    fn feed(&mut self) {
        let listening = self.open && self.ier & IER_RDI != 0 && self.mcr & MCR_LOOP == 0;
        if !listening || self.held || self.queue.is_empty() || self.uart.fifo_capacity() < FIFO {
            return;
        }
        let chunk: Vec<u8> = self.queue.drain(..self.queue.len().min(FIFO)).collect();
        // The FIFO has room for the chunk; for a failing interrupt see `write`.
        let _ = self.uart.enqueue_raw_bytes(&chunk);
    }

    /// Linux's 8250 driver clears the interrupt enables around every console message, so they alone say nothing:
    /// closing also drops OUT2 (always) and DTR (with HUPCL). To probe a port it sets all enables for a moment, and then
    /// clears the FIFO.
    fn open_changed(&mut self) -> Option<bool> {
        let listening = self.ier & IER_RDI != 0;
        let open = match self.open {
            false => listening && self.ier != IER_ALL && self.mcr & MCR_DTR != 0,
            true => listening || self.mcr & (MCR_DTR | MCR_OUT2) == MCR_DTR | MCR_OUT2,
        };
        (open != self.open).then(|| {
            self.open = open;
            open
        })
    }
}

/// The data behind a lock has no invariant that a panicking holder could have broken.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, mpsc};

    #[derive(Debug, PartialEq, Eq)]
    enum Event {
        Output(Vec<u8>),
        Open(bool, usize),
    }

    struct Recorder(mpsc::Sender<Event>, Unread);

    impl SerialSink for Recorder {
        fn output(&mut self, bytes: &[u8]) {
            let _ = self.0.send(Event::Output(bytes.to_vec()));
        }
        fn open_changed(&mut self, open: bool, unread: usize) -> Unread {
            let _ = self.0.send(Event::Open(open, unread));
            self.1
        }
    }

    fn port() -> (Arc<SerialPort>, EventFd, mpsc::Receiver<Event>) {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let port = Arc::new(SerialPort::new(interrupt.try_clone().unwrap()));
        let (send, events) = mpsc::channel();
        port.connect(Box::new(Recorder(send, Unread::Keep)));
        (port, interrupt, events)
    }

    fn open(port: &SerialPort) {
        port.write(MCR, MCR_DTR | MCR_OUT2);
        port.write(IER, IER_RDI);
    }

    fn drain(port: &SerialPort) -> Vec<u8> {
        let mut bytes = Vec::new();
        while port.read(LSR) & LSR_DR != 0 {
            bytes.push(port.read(RX));
        }
        bytes
    }

    #[test]
    fn output_reaches_the_sink_in_order() {
        let (port, _, events) = port();
        for byte in b"hi" {
            port.write(RX, *byte);
        }
        let sent: Vec<Event> = events.try_iter().collect();
        assert_eq!(sent, [Event::Output(b"h".to_vec()), Event::Output(b"i".to_vec())]);
        port.show(b"ho");
        assert_eq!(events.try_iter().collect::<Vec<_>>(), [Event::Output(b"ho".to_vec())]);
    }

    #[test]
    fn input_waits_until_the_driver_listens() {
        let (port, interrupt, _events) = port();
        port.push(b"early");
        assert_eq!(port.read(LSR) & LSR_DR, 0);
        assert!(interrupt.read().is_err(), "no interrupt before the driver asked for it");
        open(&port);
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(drain(&port), b"early");
    }

    #[test]
    fn a_probe_takes_no_input() {
        let (port, _, events) = port();
        port.push(b"early");
        port.write(MCR, MCR_DTR | MCR_OUT2);
        port.write(IER, IER_ALL);
        port.write(IER, 0);
        port.write(FCR, FCR_CLEAR_RCVR);
        assert_eq!((port.pending(), events.try_iter().count()), (5, 0));
    }

    #[test]
    fn long_input_arrives_whole_and_in_order() {
        let (port, interrupt, _events) = port();
        open(&port);
        let input: Vec<u8> = (0..1000u32).map(|k| k as u8).collect();
        port.push(&input);
        assert_eq!(drain(&port), input);
        assert!(interrupt.read().unwrap() >= 1);
    }

    #[test]
    fn input_beyond_the_limit_is_dropped() {
        let (port, _, _events) = port();
        port.push(&vec![0; INPUT_LIMIT + 9]);
        port.push(b"x");
        assert_eq!(port.pending(), INPUT_LIMIT);
    }

    #[test]
    fn a_sink_may_drop_what_the_last_opener_left() {
        let (port, _, _) = port();
        let (send, events) = mpsc::channel();
        port.connect(Box::new(Recorder(send, Unread::Drop)));
        open(&port);
        port.push(&[b'a'; 100]);
        assert_eq!(port.read(RX), b'a');
        port.write(IER, 0);
        port.write(MCR, 0);
        assert_eq!(port.pending(), 0);
        port.push(b"early");
        open(&port);
        assert_eq!(drain(&port), b"");
        let expected = [Event::Open(true, 0), Event::Open(false, 99), Event::Open(true, 5)];
        assert_eq!(events.try_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn open_and_close_are_seen_and_console_messages_are_not() {
        let (port, _, events) = port();
        open(&port);
        // A console message: enables off, text, enables back.
        port.write(IER, 0);
        port.write(IER, IER_RDI);
        assert!(port.is_open());
        // HUPCL drops DTR first, then the driver shuts the port down.
        port.write(MCR, MCR_OUT2);
        port.write(IER, 0);
        port.write(MCR, 0);
        assert_eq!(events.try_iter().collect::<Vec<_>>(), [Event::Open(true, 0), Event::Open(false, 0)]);
    }

    #[test]
    fn a_close_without_hupcl_is_seen() {
        let (port, _, _events) = port();
        open(&port);
        port.write(IER, 0);
        port.write(MCR, MCR_DTR);
        assert!(!port.is_open());
    }

    #[test]
    fn clearing_the_fifo_drops_what_was_in_it_only() {
        let (port, _, _events) = port();
        open(&port);
        port.push(&[b'a'; 100]);
        port.write(IER, 0);
        port.write(FCR, FCR_CLEAR_RCVR);
        port.write(IER, IER_RDI);
        assert_eq!(drain(&port).len(), 100 - FIFO);
    }

    #[test]
    fn a_sink_may_push_input() {
        struct Echo(Arc<SerialPort>);
        impl SerialSink for Echo {
            fn output(&mut self, bytes: &[u8]) {
                self.0.push(bytes);
            }
        }
        let (port, _, _events) = port();
        port.connect(Box::new(Echo(port.clone())));
        open(&port);
        port.write(RX, b'e');
        assert_eq!(drain(&port), b"e");
    }
}
