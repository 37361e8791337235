//! The view on a screen of 80 columns and 24 lines, against a machine that answers what it is told to.

use super::draw;
use super::live::{Action, Live, SAMPLES, Sort, View};
use super::poller::{Ask, Poller, Update};
use crate::console::client::Client;
use crate::console::{Commands, Reply, socket};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use serde_json::{Value, json};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);

/// Counts polls: each finds a KiB more at one site. `gone` ends the connection.
#[derive(Default)]
struct Machine {
    asked: Mutex<Vec<String>>,
    failing: Mutex<bool>,
}

impl Commands for Machine {
    fn answer(&self, line: &str) -> Reply {
        let line = line.trim();
        let polls = {
            let mut asked = self.asked.lock().unwrap();
            asked.push(line.to_owned());
            asked.iter().filter(|asked| asked.starts_with("json top")).count() as u64
        };
        if *self.failing.lock().unwrap() {
            return Reply::error(
                "The guest's list is damaged at 0xffff888000001000",
                line.starts_with("json"),
            );
        }
        match line {
            "json status" => Reply::json(&json!({
                "guest": "6.1.0-56-cloud-amd64", "state": "running", "paused": false, "uptime_s": 12, "objects": 345,
                "object_bytes": 3 << 20, "scans": 2, "unreferenced": 6, "last_scan_pause_ms": 78,
                "events_dropped": 0, "tracking": true,
            })),
            "json top sites" => Reply::json(&json!({ "sites": [
                { "bytes": 2 << 20, "objects": 2, "site": "module_alloc+0x59/0xc0" },
                { "bytes": 1024 * polls, "objects": 40 + polls, "site": "evil\u{1b}[2J+0x10/0x20 [leaky]" },
            ] })),
            "json top caches" => Reply::json(&json!({ "caches": [
                { "bytes": 4096, "objects": 7, "cache": "dentry" },
            ] })),
            "scan" => Reply::text("kmemleak: 3 new suspected memory leaks"),
            "clear" => Reply::text("cleared: 3 objects painted gray"),
            line => panic!("{line}"),
        }
    }

    fn quit(&self) {}
}

struct Test {
    machine: Arc<Machine>,
    poller: Poller,
    live: Live,
    server: UnixStream,
    now: Duration,
}

impl Test {
    fn new() -> Self {
        let (client, server) = UnixStream::pair().unwrap();
        let machine = Arc::new(Machine::default());
        let (commands, stream) = (machine.clone(), server.try_clone().unwrap());
        std::thread::spawn(move || socket::serve_stream(&stream, &stream, commands.as_ref()));
        let client = Client::new(client.try_clone().unwrap(), client);
        let poller = Poller::start(client, Duration::from_millis(5)).unwrap();
        Self { machine, poller, live: Live::default(), server, now: Duration::ZERO }
    }

    /// Takes in updates, one a second, until one fits.
    fn until(&mut self, fits: impl Fn(&Live) -> bool) {
        while !fits(&self.live) {
            let update = self.poller.wait(PATIENCE).expect("an update");
            self.now += Duration::from_secs(1);
            self.live.apply(update, self.now);
        }
    }

    fn press(&mut self, code: KeyCode) -> Action {
        let action = self.live.key(KeyEvent::new(code, KeyModifiers::NONE));
        if let Action::Ask(ask) = action {
            self.poller.ask(ask);
        }
        action
    }

    fn screen(&self, columns: u16, lines: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(columns, lines)).unwrap();
        terminal.draw(|frame| draw::draw(frame, &self.live)).unwrap();
        let buffer = terminal.backend().buffer();
        let cells: Vec<&str> = buffer.content().iter().map(|cell| cell.symbol()).collect();
        cells.chunks(columns.into()).map(|line| line.concat().trim_end().to_owned()).collect()
    }
}

#[test]
fn sites_are_shown_with_rates_and_sparklines() {
    let mut test = Test::new();
    assert_eq!(test.screen(80, 24)[0], "kleak-vmm: asking ...");
    test.until(|live| live.rows().iter().any(|row| row.history.len() == 3));
    let screen = test.screen(80, 24);
    let expected = [
        "6.1.0-56-cloud-amd64, running, up 12 s; 345 objects, 3.0 MiB",
        "6 unreferenced; 2 scans, the last paused the guest for 78 ms",
        "",
        "    bytes  objects        rate history          sites",
        "  2.0 MiB        2       0 B/s \u{2581}\u{2581}\u{2581}              module_alloc+0x59/0xc0",
        "  3.0 KiB       43  +1.0 KiB/s \u{2581}\u{2585}\u{2588}              evil\\u{1b}[2J+0x10/0x20 [leaky]",
    ];
    assert_eq!(screen[..6], expected, "{screen:#?}");
    assert_eq!(screen[23], "Tab caches | o sort: bytes | s scan | c clear | q quit");
    assert!(screen[6..23].iter().all(String::is_empty));
    test.until(|live| live.rows().iter().all(|row| row.history.len() == SAMPLES));
    assert!(test.screen(80, 24).iter().all(|line| line.chars().count() <= 80));
    assert_eq!(test.screen(80, 6)[4].trim(), "and 2 more");
    // Too small for all, but no panic.
    for (columns, lines) in [(1, 1), (20, 3), (300, 100)] {
        test.screen(columns, lines);
    }
}

#[test]
fn keys_sort_switch_scan_and_clear() {
    let mut test = Test::new();
    test.until(|live| live.rows().len() == 2);
    assert!(test.live.rows()[0].name.starts_with("module_alloc"));
    assert_eq!(test.press(KeyCode::Char('o')), Action::Nothing);
    assert_eq!(test.live.sort, Sort::Objects);
    assert!(test.live.rows()[0].name.starts_with("evil"));
    test.press(KeyCode::Char('o'));
    test.press(KeyCode::Char('o'));
    assert_eq!(test.live.sort, Sort::Bytes);

    assert_eq!(test.press(KeyCode::Tab), Action::Ask(Ask::Show(View::Caches)));
    assert!(test.live.rows().is_empty());
    test.until(|live| !live.rows().is_empty());
    let screen = test.screen(80, 24);
    assert!(screen[3].ends_with("caches") && screen[4].ends_with("dentry"), "{screen:#?}");
    assert!(screen[23].starts_with("Tab sites"), "{screen:#?}");

    assert_eq!(test.press(KeyCode::Char('s')), Action::Ask(Ask::Scan));
    assert_eq!(test.screen(80, 24)[2], "scanning ...");
    test.until(|live| live.message.starts_with("kmemleak"));
    assert_eq!(test.screen(80, 24)[2], "kmemleak: 3 new suspected memory leaks");
    test.press(KeyCode::Char('c'));
    test.until(|live| live.message.starts_with("cleared"));
    assert_eq!(test.press(KeyCode::Char('x')), Action::Nothing);
    for key in [KeyCode::Char('q'), KeyCode::Esc] {
        assert_eq!(test.press(key), Action::Quit);
    }
    let ctrl_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(test.live.key(ctrl_c), Action::Quit);
    // The table that is not shown is not asked for: its names cost a pause.
    let asked = test.machine.asked.lock().unwrap();
    let switch = asked.iter().position(|line| line == "json top caches").unwrap();
    assert!(!asked[switch..].contains(&"json top sites".to_owned()) && !asked[..switch].is_empty());
}

#[test]
fn a_command_that_fails_is_said_and_the_view_goes_on() {
    let mut test = Test::new();
    test.until(|live| !live.rows().is_empty());
    *test.machine.failing.lock().unwrap() = true;
    test.until(|live| live.message.contains("damaged at 0xffff888000001000"));
    *test.machine.failing.lock().unwrap() = false;
    test.press(KeyCode::Char('s'));
    test.until(|live| live.message.starts_with("kmemleak"));
}

#[test]
fn a_lost_connection_is_said_once() {
    let mut test = Test::new();
    test.until(|live| !live.rows().is_empty());
    test.server.shutdown(std::net::Shutdown::Both).unwrap();
    let lost = loop {
        match test.poller.wait(PATIENCE).expect("an update") {
            Update::Lost(error) => break error,
            _ => continue,
        }
    };
    assert_eq!(lost.lines().count(), 1, "{lost}");
    assert!(test.poller.wait(Duration::from_millis(200)).is_none());
}

#[test]
fn replies_without_what_is_expected_break_nothing() {
    let mut live = Live::default();
    for reply in
        [json!(null), json!({}), json!({ "sites": 3 }), json!({ "sites": [1, {}, { "bytes": "x" }] })]
    {
        let update = Update::Table { view: View::Sites, status: reply.clone(), table: reply };
        live.apply(update, Duration::ZERO);
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
        terminal.draw(|frame| draw::draw(frame, &live)).unwrap();
    }
    live.apply(
        Update::Table {
            view: View::Sites,
            status: Value::Null,
            table: json!({ "sites": [{ "bytes": i64::MIN, "site": "a" }, { "bytes": i64::MAX, "site": "b" }] }),
        },
        Duration::ZERO,
    );
    assert_eq!(live.rows()[0].name, "b");
}
