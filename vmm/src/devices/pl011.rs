//! A PL011 serial port (Arm DDI 0183, PrimeCell UART, r1p5), with an input queue on the host side.
//!
//! Input waits in the queue until the guest's driver listens (receive interrupt enabled), so that a reply sent while
//! nobody has the port open is read by the next one who opens it.

use super::{NullSink, SerialInput, SerialSink, Unread};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Input bytes that wait for the guest at most; what comes on top is dropped.
pub const INPUT_LIMIT: usize = 1 << 20;
/// Bytes of registers.
pub const REGISTERS: u64 = 0x1000;

// Register offsets and bits: DDI 0183, table 3-1 and 3.3.
const DR: u64 = 0x00;
const FR: u64 = 0x18;
const IBRD: u64 = 0x24;
const FBRD: u64 = 0x28;
const LCR_H: u64 = 0x2c;
const CR: u64 = 0x30;
const IFLS: u64 = 0x34;
const IMSC: u64 = 0x38;
const RIS: u64 = 0x3c;
const MIS: u64 = 0x40;
const ICR: u64 = 0x44;
/// Peripheral and PrimeCell identification, four bytes each: part 0x011 by Arm, revision 3, and the class.
const IDENTIFICATION: u64 = 0xfe0;
const IDENTITY: [u32; 8] = [0x11, 0x10, 0x34, 0x00, 0x0d, 0xf0, 0x05, 0xb1];
const FR_CTS_DSR_DCD: u32 = 0x7;
const FR_RXFE: u32 = 1 << 4;
const FR_RXFF: u32 = 1 << 6;
const FR_TXFE: u32 = 1 << 7;
const CR_UARTEN: u32 = 1;
const CR_TXE: u32 = 1 << 8;
const CR_RXE: u32 = 1 << 9;
const INT_RX: u32 = 1 << 4;
const INT_TX: u32 = 1 << 5;
const INT_RX_TIMEOUT: u32 = 1 << 6;
/// Bytes of the receive FIFO of that revision.
const FIFO: usize = 32;

/// Sets the level of the port's interrupt.
pub type Line = Box<dyn Fn(bool) + Send + Sync>;

/// A serial port. Input and sinks may come from any thread.
pub struct SerialPort {
    /// Taken before `registers`, so that output keeps its order and the sink may push input.
    sink: Mutex<Box<dyn SerialSink>>,
    registers: Mutex<Registers>,
}

struct Registers {
    line: Line,
    level: bool,
    fifo: VecDeque<u8>,
    queue: VecDeque<u8>,
    control: u32,
    line_control: u32,
    divisor: [u32; 2],
    fifo_levels: u32,
    mask: u32,
    /// All that was written has been sent, which the driver has not acknowledged.
    sent: bool,
    open: bool,
    /// The sink decides about unread input: the guest gets none meanwhile.
    held: bool,
}

impl SerialPort {
    /// A port whose interrupt is `line`; its output goes nowhere until [`SerialPort::connect`].
    pub fn new(line: Line) -> Self {
        let registers = Registers {
            line,
            level: false,
            fifo: VecDeque::new(),
            queue: VecDeque::new(),
            control: CR_TXE | CR_RXE,
            line_control: 0,
            divisor: [0; 2],
            fifo_levels: 0x12,
            mask: 0,
            sent: false,
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

    /// The guest reads the register at `offset`.
    pub fn read(&self, offset: u64) -> u32 {
        let mut registers = lock(&self.registers);
        let value = registers.read(offset);
        registers.feed();
        value
    }

    /// The guest writes the register at `offset`.
    pub fn write(&self, offset: u64, value: u32) {
        let mut sink = lock(&self.sink);
        let (opened, unread) = {
            let mut registers = lock(&self.registers);
            registers.write(offset, value);
            let opened = registers.open_changed();
            registers.held |= opened.is_some();
            registers.feed();
            (opened, registers.pending())
        };
        if offset == DR {
            sink.output(&[value as u8]);
        }
        let Some(open) = opened else { return };
        // The registers are not locked here: the sink may push input, which then is no unread input.
        let kept = sink.open_changed(open, unread);
        let mut registers = lock(&self.registers);
        if kept == Unread::Drop {
            registers.drop_input(unread);
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
    fn read(&mut self, offset: u64) -> u32 {
        match offset {
            DR => self.fifo.pop_front().map_or(0, u32::from),
            // What is written is sent at once.
            FR => {
                let empty = if self.fifo.is_empty() { FR_RXFE } else { 0 };
                let full = if self.fifo.len() >= FIFO { FR_RXFF } else { 0 };
                FR_CTS_DSR_DCD | FR_TXFE | empty | full
            }
            IBRD => self.divisor[0],
            FBRD => self.divisor[1],
            LCR_H => self.line_control,
            CR => self.control,
            IFLS => self.fifo_levels,
            IMSC => self.mask,
            RIS => self.raw(),
            MIS => self.raw() & self.mask,
            IDENTIFICATION.. => *IDENTITY.get(((offset - IDENTIFICATION) / 4) as usize).unwrap_or(&0),
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, value: u32) {
        match offset {
            DR => self.sent = true,
            IBRD => self.divisor[0] = value,
            FBRD => self.divisor[1] = value,
            LCR_H => self.line_control = value,
            CR => self.control = value,
            IFLS => self.fifo_levels = value,
            IMSC => self.mask = value,
            ICR if value & INT_TX != 0 => self.sent = false,
            _ => {}
        }
    }

    /// Interrupts before the mask. Input asks for as long as there is some: it is never left below a trigger level.
    fn raw(&self) -> u32 {
        let received = if self.fifo.is_empty() { 0 } else { INT_RX | INT_RX_TIMEOUT };
        received | if self.sent { INT_TX } else { 0 }
    }

    /// Input that the guest's driver has not taken: in the FIFO and in the queue.
    fn pending(&self) -> usize {
        self.fifo.len() + self.queue.len()
    }

    /// Drops the oldest `count` bytes of input.
    fn drop_input(&mut self, count: usize) {
        let in_fifo = count.min(self.fifo.len());
        self.fifo.drain(..in_fifo);
        self.queue.drain(..(count - in_fifo).min(self.queue.len()));
    }

    /// Refills an empty FIFO from the queue, and sets the interrupt to what it should be.
    fn feed(&mut self) {
        let listening = self.open && self.mask & INT_RX != 0 && !self.held;
        if listening && self.fifo.is_empty() {
            self.fifo.extend(self.queue.drain(..self.queue.len().min(FIFO)));
        }
        let level = self.raw() & self.mask != 0;
        if level != self.level {
            self.level = level;
            (self.line)(level);
        }
    }

    /// Linux's driver unmasks receiving for a moment while it probes, before the receiver is on; it masks it to throttle,
    /// while the receiver stays on; and it switches the receiver off for a moment to change the line's settings, unmasked.
    fn open_changed(&mut self) -> Option<bool> {
        const RECEIVING: u32 = CR_UARTEN | CR_RXE;
        let unmasked = self.mask & INT_RX != 0;
        let open = match self.open {
            false => unmasked && self.control & RECEIVING == RECEIVING,
            true => unmasked || self.control & CR_RXE != 0,
        };
        (open != self.open).then(|| {
            self.open = open;
            // The next driver drains the FIFO before it listens.
            while let (false, Some(byte)) = (open, self.fifo.pop_back()) {
                self.queue.push_front(byte);
            }
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
    use std::sync::atomic::{AtomicBool, Ordering};
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

    fn port(unread: Unread) -> (Arc<SerialPort>, Arc<AtomicBool>, mpsc::Receiver<Event>) {
        let level = Arc::new(AtomicBool::new(false));
        let line = level.clone();
        let port = Arc::new(SerialPort::new(Box::new(move |on| line.store(on, Ordering::SeqCst))));
        let (send, events) = mpsc::channel();
        port.connect(Box::new(Recorder(send, unread)));
        (port, level, events)
    }

    /// As Linux's driver does it: probe, switch on, drain, unmask.
    fn open(port: &SerialPort) {
        port.write(IMSC, INT_RX | INT_RX_TIMEOUT);
        port.write(IMSC, 0);
        port.write(CR, CR_UARTEN | CR_TXE | CR_RXE);
        while port.read(FR) & FR_RXFE == 0 {
            port.read(DR);
        }
        port.write(IMSC, INT_RX | INT_RX_TIMEOUT);
    }

    fn close(port: &SerialPort) {
        port.write(IMSC, 0);
        port.write(ICR, 0xffff);
        port.write(CR, CR_UARTEN | CR_TXE);
    }

    fn drain(port: &SerialPort) -> Vec<u8> {
        let mut bytes = Vec::new();
        while port.read(FR) & FR_RXFE == 0 {
            bytes.push(port.read(DR) as u8);
        }
        bytes
    }

    #[test]
    fn input_waits_until_the_driver_listens_and_interrupts_until_it_is_taken() {
        let (port, level, _events) = port(Unread::Keep);
        port.push(b"early");
        assert!(port.read(FR) & FR_RXFE != 0 && !level.load(Ordering::SeqCst));
        open(&port);
        assert!(level.load(Ordering::SeqCst) && port.read(MIS) & INT_RX != 0);
        assert_eq!(drain(&port), b"early");
        assert!(!level.load(Ordering::SeqCst));
        let input: Vec<u8> = (0..1000u32).map(|k| k as u8).collect();
        port.push(&input);
        assert_eq!(drain(&port), input);
    }

    #[test]
    fn output_reaches_the_sink_and_interrupts_where_it_is_asked_for() {
        let (port, level, events) = port(Unread::Keep);
        port.write(DR, b'h'.into());
        assert!(!level.load(Ordering::SeqCst));
        port.write(IMSC, INT_TX);
        assert!(level.load(Ordering::SeqCst));
        port.write(ICR, INT_TX);
        assert!(!level.load(Ordering::SeqCst));
        assert_eq!(events.try_iter().collect::<Vec<_>>(), [Event::Output(b"h".to_vec())]);
    }

    #[test]
    fn open_and_close_are_seen_and_throttling_and_new_settings_are_not() {
        let (port, _, events) = port(Unread::Keep);
        open(&port);
        port.write(IMSC, 0);
        assert!(port.is_open(), "throttled");
        port.push(b"more");
        assert_eq!(drain(&port), b"", "throttled");
        port.write(IMSC, INT_RX);
        assert_eq!(drain(&port), b"more");
        port.write(CR, 0);
        port.write(CR, CR_UARTEN | CR_TXE | CR_RXE);
        close(&port);
        open(&port);
        let expected = [Event::Open(true, 0), Event::Open(false, 0), Event::Open(true, 0)];
        assert_eq!(events.try_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_sink_may_drop_what_the_last_opener_left() {
        let (port, _, events) = port(Unread::Drop);
        open(&port);
        port.push(&[b'a'; 100]);
        port.read(DR);
        close(&port);
        assert_eq!(port.pending(), 0);
        port.push(b"early");
        open(&port);
        assert_eq!(drain(&port), b"");
        let expected = [Event::Open(true, 0), Event::Open(false, 99), Event::Open(true, 5)];
        assert_eq!(events.try_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn input_beyond_the_limit_is_dropped() {
        let (port, _, _events) = port(Unread::Keep);
        port.push(&vec![0; INPUT_LIMIT + 9]);
        port.push(b"x");
        assert_eq!(port.pending(), INPUT_LIMIT);
    }

    #[test]
    fn it_says_what_it_is() {
        let (port, _, _events) = port(Unread::Keep);
        let identity: Vec<u32> = (0..8).map(|k| port.read(IDENTIFICATION + 4 * k)).collect();
        assert_eq!(identity, IDENTITY);
    }
}
