//! The port against a model of the guest's terminal (drivers/tty/n_tty.c, serial_core.c) in virtual time.

use super::super::execute::Executor;
use super::super::fake::{FakeTarget, REPORT};
use super::protocol::{EOT, MAX_REPLY_LINE};
use super::*;

const SCANNED: &str = "kmemleak: 3 new suspected memory leaks\n";

/// One guest with a tty on the port, and the clock.
struct Guest {
    now: Time,
    protocol: Protocol,
    target: Arc<FakeTarget>,
    commands: Executor,
    /// How long a command takes, the guest standing still.
    pause: Duration,
    openers: usize,
    echo: bool,
    canonical: bool,
    /// Drops this many bytes of every 50 it echoes.
    echo_hole: usize,
    echoed: usize,
    /// The driver takes no input.
    stalled: bool,
    /// Sent by the host, not taken by the driver.
    wire: VecDeque<u8>,
    /// The line discipline's buffer.
    buffer: VecDeque<u8>,
    /// All the port ever echoed.
    echo_bytes: usize,
}

impl Guest {
    fn new() -> Self {
        let target = Arc::new(FakeTarget::leaky());
        Self {
            now: Time::ZERO,
            protocol: Protocol::new(SETTLE),
            commands: Executor::for_guest(target.clone()),
            target,
            pause: Duration::ZERO,
            openers: 0,
            echo: true,
            canonical: true,
            echo_hole: 0,
            echoed: 0,
            stalled: false,
            wire: VecDeque::new(),
            buffer: VecDeque::new(),
            echo_bytes: 0,
        }
    }

    fn open(&mut self) {
        self.openers += 1;
        if self.openers == 1 {
            self.wire.clear();
            self.protocol.on_open(self.now);
            self.settle();
        }
    }

    /// The last close loses what was not read.
    fn close(&mut self) {
        self.openers -= 1;
        if self.openers == 0 {
            self.buffer.clear();
            self.protocol.on_close(self.wire.len());
            self.wire.clear();
            self.settle();
        }
    }

    /// `write(2)`, with ONLCR in canonical mode.
    fn write(&mut self, text: &str) {
        let bytes = if self.canonical { text.replace('\n', "\r\n") } else { text.to_owned() };
        self.protocol.on_output(self.now, bytes.as_bytes());
        self.settle();
    }

    /// Carries out what the host wants, and lets echoes come back, until all is quiet.
    fn settle(&mut self) {
        loop {
            let start = self.now;
            let ran = self.target.calls.lock().unwrap().len();
            let (now, pause, wire) = (&mut self.now, self.pause, &mut self.wire);
            let unread = wire.len();
            carry_out(
                &mut self.protocol,
                &self.commands,
                unread,
                || start + pause,
                |bytes| wire.extend(bytes),
            );
            if self.target.calls.lock().unwrap().len() > ran {
                *now = start + pause;
            }
            let echo = self.receive();
            if echo.is_empty() {
                return;
            }
            self.protocol.on_output(self.now, &echo);
        }
    }

    /// The driver takes what is on the wire; returns the echo.
    fn receive(&mut self) -> Vec<u8> {
        let mut echo = Vec::new();
        if self.stalled || self.openers == 0 {
            return echo;
        }
        for byte in std::mem::take(&mut self.wire) {
            match byte {
                _ if !self.echo => {}
                b'\n' if self.canonical => echo.extend(b"\r\n"),
                EOT if self.canonical => {}
                0..0x20 if byte != b'\n' && byte != b'\t' => echo.extend([b'^', byte + 64]),
                _ => echo.push(byte),
            }
            self.buffer.push_back(byte);
        }
        let line = self.buffer.iter().rev().position(|byte| *byte == b'\n').unwrap_or(self.buffer.len());
        assert!(!self.canonical || line < 4095, "a line longer than the tty's buffer");
        self.echo_bytes += echo.len();
        let (hole, mut at) = (self.echo_hole, self.echoed);
        self.echoed += echo.len();
        echo.retain(|_| {
            at += 1;
            // It takes a backlog of kilobytes before the first is lost.
            at < 2000 || at % 50 >= hole
        });
        echo
    }

    fn run(&mut self, ms: u64) {
        for _ in 0..ms {
            self.now += Duration::from_millis(1);
            self.protocol.on_time(self.now);
            self.settle();
        }
    }

    /// One `read(2)` in canonical mode: a line; empty at end of file; None when it would block.
    fn read(&mut self) -> Option<String> {
        let end = self.buffer.iter().position(|byte| *byte == b'\n' || *byte == EOT)?;
        let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
        if line.ends_with(&[EOT]) {
            line.pop();
        }
        Some(String::from_utf8(line).unwrap())
    }

    /// Reads up to the end of file; fails the test when that does not come within 10 s.
    fn read_to_end(&mut self) -> String {
        let mut text = String::new();
        for _ in 0..10_000 {
            match self.read() {
                Some(line) if line.is_empty() => return text,
                Some(line) => text.push_str(&line),
                None => self.run(1),
            }
        }
        panic!("no end of file after {text:?}");
    }

    /// `cat /dev/ttyS1`.
    fn cat(&mut self) -> String {
        self.open();
        let text = self.read_to_end();
        self.run(2);
        self.close();
        self.run(2);
        text
    }

    /// `echo TEXT > /dev/ttyS1`.
    fn echo(&mut self, text: &str) {
        self.open();
        self.run(1);
        self.write(&format!("{text}\n"));
        self.run(3);
        self.close();
        self.run(2);
    }
}

/// What a script in the guest reads after it wrote a line.
pub(in crate::console) fn echo_and_cat(line: &str) -> String {
    let mut guest = Guest::new();
    guest.echo(line);
    guest.cat()
}

#[test]
fn the_contracts_script() {
    for (echo, pause_ms) in [(true, 0), (false, 0), (true, 3000), (false, 3000)] {
        let mut guest = Guest::new();
        (guest.echo, guest.pause) = (echo, Duration::from_millis(pause_ms));
        guest.echo("clear");
        guest.run(5000);
        guest.echo("scan");
        assert_eq!(guest.cat(), format!("{SCANNED}{REPORT}"));
        assert_eq!(guest.target.log(), "clear scan report");
        assert_eq!(guest.echo_bytes > 0, echo);
        guest.run(5000);
        assert_eq!(guest.target.log(), "clear scan report", "the echo was taken for a command");
    }
}

#[test]
fn reading_without_a_command_gives_the_report() {
    let mut guest = Guest::new();
    assert_eq!(guest.cat(), REPORT);
    assert_eq!(guest.cat(), REPORT);
    guest.target.report.lock().unwrap().clear();
    assert_eq!(guest.cat(), "", "an empty report still ends");
}

#[test]
fn a_reply_waits_for_the_next_reader_and_only_once() {
    let mut guest = Guest::new();
    guest.echo("status");
    guest.run(60_000);
    assert_eq!(guest.cat(), "tracer: breakpoint\nobjects: 12\n");
    assert_eq!(guest.cat(), REPORT);
}

#[test]
fn a_later_writer_replaces_what_an_earlier_one_did_not_fetch() {
    let mut guest = Guest::new();
    guest.echo("status");
    guest.echo("stack=off");
    assert_eq!(guest.cat(), "stack scanning off\n");
}

#[test]
fn several_commands_of_one_writer_are_all_answered() {
    let mut guest = Guest::new();
    guest.echo("clear\nstatus\nscan");
    let expected =
        format!("cleared: 2 objects painted gray\ntracer: breakpoint\nobjects: 12\n{SCANNED}{REPORT}");
    assert_eq!(guest.cat(), expected);
}

#[test]
fn a_command_without_newline_counts_when_the_port_closes() {
    let mut guest = Guest::new();
    guest.open();
    guest.write("scan");
    guest.close();
    assert_eq!(guest.cat(), format!("{SCANNED}{REPORT}"));
    guest.open();
    guest.write("rubbish");
    guest.close();
    assert_eq!(guest.cat(), REPORT);
}

#[test]
fn an_error_is_a_reply_too_and_its_echo_no_new_error() {
    let mut guest = Guest::new();
    guest.echo("bogus");
    assert_eq!(guest.cat(), "error: unknown command \"bogus\": try help\n");
    assert_eq!(guest.cat(), REPORT);
}

#[test]
fn a_program_that_keeps_the_port_open_is_answered_at_once() {
    for (echo, canonical) in [(true, true), (false, true), (false, false), (true, false)] {
        let mut guest = Guest::new();
        (guest.echo, guest.canonical) = (echo, canonical);
        guest.open();
        guest.write("status\n");
        assert_eq!(guest.read_to_end(), "tracer: breakpoint\nobjects: 12\n");
        for _ in 0..3 {
            guest.run(500);
            let asked = guest.now;
            guest.write("scan\n");
            guest.run(1);
            assert_eq!(guest.read_to_end(), SCANNED);
            assert!(guest.now - asked <= Duration::from_millis(2));
        }
        guest.write("audit\nbogus\n");
        assert_eq!(
            guest.read_to_end(),
            "audit: tracked 10, missing 1, stale 0\n  missing 0xffff888000001000\n"
        );
        assert_eq!(guest.read_to_end(), "error: unknown command \"bogus\": try help\n");
        guest.run(1000);
        assert_eq!(guest.read(), None, "echo {echo}, canonical {canonical}");
        assert_eq!(guest.target.log(), "status scan scan scan audit");
        guest.close();
    }
}

#[test]
fn a_writer_slower_than_the_settling_time_still_gets_its_reply() {
    for (open_ms, closed_ms) in [(300, 3), (5000, 100)] {
        let mut guest = Guest::new();
        guest.open();
        guest.run(open_ms);
        guest.write("scan\n");
        guest.run(closed_ms);
        guest.close();
        assert_eq!(guest.cat(), format!("{SCANNED}{REPORT}"));
    }
}

#[test]
fn a_reader_that_waits_gets_the_reply_to_another_process() {
    let mut guest = Guest::new();
    guest.open();
    guest.run(20);
    guest.echo("scan");
    assert_eq!(guest.read_to_end(), SCANNED);
}

#[test]
fn what_the_driver_did_not_take_waits_for_the_next_reader() {
    let mut guest = Guest::new();
    guest.echo("scan");
    guest.stalled = true;
    guest.open();
    guest.run(500);
    guest.close();
    guest.stalled = false;
    guest.run(10);
    assert_eq!(guest.cat(), format!("{SCANNED}{REPORT}"));
    assert_eq!(guest.cat(), REPORT);
}

#[test]
fn holes_in_the_echo_are_not_commands() {
    let mut guest = Guest::new();
    *guest.target.report.lock().unwrap() = REPORT.repeat(200);
    guest.echo("scan");
    guest.open();
    guest.echo_hole = 7;
    let text = guest.read_to_end();
    assert_eq!(text.len(), SCANNED.len() + 200 * REPORT.len());
    guest.run(1000);
    assert_eq!(guest.read(), None);
    assert_eq!(guest.target.log(), "scan report");
}

#[test]
fn long_lines_are_folded_to_what_a_terminal_holds() {
    let mut guest = Guest::new();
    *guest.target.report.lock().unwrap() = format!("{}\nshort\n", "x".repeat(3 * MAX_REPLY_LINE - 1));
    let text = guest.cat();
    assert_eq!(text.lines().map(str::len).collect::<Vec<_>>(), [4000, 4000, 3999, 5]);
}

#[test]
fn long_json_stays_json() {
    let mut protocol = Protocol::new(SETTLE);
    let long = serde_json::json!({ "leaks": (0..2000).map(|i| format!("leak \"{i}\"")).collect::<Vec<_>>() });
    protocol.on_open(Time::ZERO);
    protocol.on_report(Time::ZERO, &format!("{long}\n"));
    let Some(Action::Send(bytes)) = protocol.take_actions().pop() else { panic!() };
    let text = String::from_utf8(bytes[..bytes.len() - 1].to_vec()).unwrap();
    assert!(text.lines().all(|line| line.len() <= MAX_REPLY_LINE));
    assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), long);
}

#[test]
fn the_drivers_probing_is_no_opener_and_line_noise_no_command() {
    let mut guest = Guest::new();
    // 8250's autoconfig enables all interrupts for a moment.
    for _ in 0..5 {
        guest.open();
        guest.close();
    }
    guest.run(1000);
    // The kernel's messages with console=ttyS1 come without an opener.
    guest.protocol.on_output(guest.now, b"scan\r\n[    0.0] Linux version\r\n");
    guest.run(1000);
    assert_eq!(guest.target.log(), "");
    guest.open();
    guest.protocol.on_output(guest.now, b"\xff\xfe\0\0garbage\r\n\0\r\n\r\nscan\r\n");
    guest.close();
    guest.settle();
    assert_eq!(guest.cat(), format!("{SCANNED}{REPORT}"));
}

#[test]
fn a_login_prompt_is_not_argued_with() {
    let mut guest = Guest::new();
    guest.open();
    for i in 0..1000 {
        guest.write(&format!("Debian GNU/Linux 12 host ttyS1 {i}\n"));
        guest.run(1);
    }
    guest.run(1000);
    let sent = std::iter::from_fn(|| guest.read()).filter(|line| line.starts_with("error")).count();
    assert!((1..=16).contains(&sent), "{sent}");
    guest.write("scan\n");
    guest.run(300);
    assert_eq!(guest.target.log(), "scan", "a command still works");
}

#[test]
fn an_endless_line_is_skipped() {
    let mut guest = Guest::new();
    guest.open();
    for _ in 0..100 {
        guest.write(&"scan ".repeat(100));
    }
    guest.write("\nstatus\n");
    assert_eq!(guest.read_to_end(), "tracer: breakpoint\nobjects: 12\n");
}

#[test]
fn quit_ends_the_machine() {
    let mut guest = Guest::new();
    guest.echo("quit");
    assert_eq!(guest.target.log(), "quit");
}

#[test]
fn a_flood_does_not_fill_the_hosts_memory() {
    let mut inbox = Inbox::default();
    for _ in 0..1000 {
        inbox.output(Time::ZERO, &[b'x'; 1000]);
    }
    assert!(inbox.bytes <= MAX_WAITING && inbox.events.len() == 2);
    for _ in 0..1_000_000 {
        inbox.event(Time::ZERO, Event::Open);
        inbox.event(Time::ZERO, Event::Close { unread: 0 });
    }
    assert!(inbox.events.len() <= MAX_EVENTS + 1);
    while inbox.pop().is_some() {}
    assert_eq!(inbox.bytes, 0);
}

/// Whatever a guest does with its port: nothing is sent while it is closed, and every reply ends.
#[test]
fn any_order_of_events_is_survived() {
    const LINES: [&str; 8] =
        ["scan\n", "sta", "tus\n", "\r\n", "bogus\n", "json report\n", "\u{fc}\0\n", "^D"];
    let mut state = 7u32;
    let mut guest = Guest::new();
    for _ in 0..20_000 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let choice = (state >> 16) as usize;
        match choice % 8 {
            0 => guest.open(),
            1 if guest.openers > 0 => guest.close(),
            2 | 3 if guest.openers > 0 => guest.write(LINES[choice / 8 % LINES.len()]),
            4 => guest.echo = !guest.echo,
            5 => guest.stalled = !guest.stalled,
            6 => guest.run(1),
            _ => guest.run(250),
        }
        // An echo that lands in a line being typed makes an error, whose reply is due at once too.
        for _ in 0..3 {
            guest.protocol.on_time(guest.now);
            guest.settle();
        }
        assert!(guest.openers > 0 || guest.wire.is_empty());
        while guest.read().is_some() {}
        assert!(guest.stalled || guest.buffer.is_empty(), "a reply without an end");
        assert!(guest.protocol.deadline().is_none_or(|deadline| deadline > guest.now));
    }
}

/// The thread and the clock, once for real.
#[test]
fn the_port_serves_on_its_own_thread() {
    /// Takes a little of what is pushed whenever it is looked at.
    #[derive(Default)]
    struct Wire(Mutex<(Vec<u8>, usize)>);
    impl SerialInput for Wire {
        fn push(&self, bytes: &[u8]) {
            let mut wire = self.0.lock().unwrap();
            wire.0.extend(bytes);
            assert!(wire.0.len() - wire.1 <= MAX_PUSHED);
        }
        fn pending(&self) -> usize {
            let mut wire = self.0.lock().unwrap();
            wire.1 = wire.0.len().min(wire.1 + 50_000);
            wire.0.len() - wire.1
        }
    }
    let (port, wire, target) = (GuestPort::new(), Arc::new(Wire::default()), Arc::new(FakeTarget::leaky()));
    let report = REPORT.repeat(1000);
    target.report.lock().unwrap().clone_from(&report);
    let mut sink = port.sink();
    port.serve(wire.clone(), Arc::new(Executor::new(target)), Duration::from_millis(5)).unwrap();
    sink.open_changed(true, 0);
    sink.output(b"sc");
    sink.output(b"an\r\n");
    assert_eq!(sink.open_changed(false, 0), Unread::Drop);
    sink.open_changed(true, 0);
    let expected = format!("{SCANNED}{report}\x04");
    let start = Instant::now();
    while wire.0.lock().unwrap().0.len() < expected.len() {
        assert!(start.elapsed() < Duration::from_secs(20), "no reply");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(wire.0.lock().unwrap().0 == expected.as_bytes());
}

/// `yes report > /dev/ttyS1`, and a program that asks and never reads.
#[test]
fn replies_that_nobody_reads_do_not_pile_up() {
    let mut guest = Guest::new();
    *guest.target.report.lock().unwrap() = format!("{}\n", "x".repeat(3000)).repeat(100);
    guest.stalled = true;
    guest.open();
    for _ in 0..5 {
        guest.write(&"report\n".repeat(500));
        guest.run(300);
    }
    let ran = guest.target.calls.lock().unwrap().len();
    assert!((10..50).contains(&ran), "{ran}");
    assert!(guest.wire.len() < 16 << 20, "{}", guest.wire.len());
    guest.stalled = false;
    guest.run(1000);
    let mut refusals = 0;
    while let Some(line) = guest.read() {
        refusals += usize::from(line.starts_with("error: too many replies"));
    }
    assert!((1..=5).contains(&refusals), "{refusals}");
    guest.write("status\n");
    guest.run(1000);
    assert!(guest.read_to_end().starts_with("tracer: "), "it goes on");
}

/// `stty -echo` behind the first reply.
#[test]
fn a_mistake_is_answered_after_echo_was_switched_off() {
    let mut guest = Guest::new();
    guest.open();
    guest.write("status\n");
    assert!(guest.read_to_end().starts_with("tracer: "));
    guest.echo = false;
    guest.write("status\n");
    assert!(guest.read_to_end().starts_with("tracer: "));
    guest.run(6000);
    guest.write("bogus\n");
    assert!(guest.read_to_end().starts_with("error: unknown command"));
}
