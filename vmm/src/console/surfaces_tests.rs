//! Every command of `help`, in every spelling, on every surface: the same reply. And none is missing in the documents.

use super::client::Client;
use super::command::COMMANDS;
use super::fake::{FakeTarget, REPORT};
use super::{Command, ControlServer, Executor, Request, guest_port, mux};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// What a usage line's words for values stand for.
const VALUES: [(&str, &str); 6] = [
    ("ADDR", "0xffff888003a8e000"),
    ("CACHE", "dentry"),
    ("SECS", "9"),
    ("PID", "3"),
    ("FILE", "/tmp/saved"),
    ("COMMAND", "scan"),
];

/// Every spelling that a usage line describes: with and without each part in brackets, one of the words between bars.
fn spellings(usage: &str) -> Vec<String> {
    let spelled = match usage.split_once('=') {
        Some((name, values)) => values.split('|').map(|value| format!("{name}={value}")).collect(),
        None => expand(usage),
    };
    let filled = |line: String| {
        let line = VALUES.iter().fold(line, |line, (word, value)| line.replace(word, value));
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    spelled.into_iter().map(filled).collect()
}

fn expand(text: &str) -> Vec<String> {
    let Some((before, rest)) = text.split_once('[') else { return vec![text.to_owned()] };
    let mut depth = 1;
    let closes = |c: char| {
        depth += i32::from(c == '[') - i32::from(c == ']');
        depth == 0
    };
    let end = rest.find(closes).expect("a bracket that closes");
    let mut choices = vec![String::new()];
    choices.extend(rest[..end].split('|').flat_map(expand));
    let behind = expand(&rest[end + 1..]);
    choices.iter().flat_map(|choice| behind.iter().map(move |b| format!("{before}{choice}{b}"))).collect()
}

/// Every spelling of every command, as text and as JSON.
fn all_lines() -> Vec<String> {
    let plain: Vec<String> = COMMANDS.iter().flat_map(|entry| spellings(entry.usage)).collect();
    let json = plain.iter().filter(|line| !line.starts_with("json ")).map(|line| format!("json {line}"));
    plain.iter().cloned().chain(json).collect()
}

#[test]
fn a_usage_line_stands_for_its_spellings() {
    let of = |usage| spellings(usage).join(", ");
    assert_eq!(of("scan=on|off|SECS"), "scan=on, scan=off, scan=9");
    assert_eq!(of("top [sites|caches]"), "top, top sites, top caches");
    let all =
        "kmem, kmem diff, kmem -i, kmem -i diff, kmem -s, kmem -s diff, kmem -s dentry, kmem -s dentry diff";
    assert_eq!(of("kmem [-i|-s [CACHE]] [diff]"), all);
    for line in all_lines() {
        assert!(Request::parse(&line).command.is_ok(), "{line:?} is in a usage line and no command");
    }
    for entry in COMMANDS {
        assert!(spellings(entry.usage).iter().all(|line| line.starts_with(entry.name)), "{}", entry.name);
    }
}

fn executor() -> Arc<Executor> {
    Arc::new(Executor::new(Arc::new(FakeTarget::leaky())))
}

/// A socket with a machine behind it, in a folder that goes away.
struct Served {
    dir: std::path::PathBuf,
    _server: ControlServer,
}

impl Served {
    fn new() -> Self {
        let dir = std::env::temp_dir().join(format!("kleak-surfaces-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let mut server = ControlServer::bind(&dir.join("vm.sock")).unwrap();
        server.serve(executor()).unwrap();
        Self { dir, _server: server }
    }

    /// As a program that knows nothing but the protocol.
    fn bare(&self, line: &str) -> String {
        let mut stream = UnixStream::connect(self.dir.join("vm.sock")).unwrap();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        reply.trim_end_matches("\x04\n").to_owned()
    }

    /// As `ctl` does.
    fn ctl(&self, line: &str) -> String {
        Client::connect(&self.dir.join("vm.sock")).unwrap().request(line).unwrap().body
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[test]
fn every_command_has_the_same_reply_on_every_surface() {
    let served = Served::new();
    let refused = ["bogus", "dump=", "json top x"].map(str::to_owned);
    for line in all_lines().into_iter().chain(refused) {
        let reply = served.bare(&line);
        assert!(!reply.is_empty(), "{line}");
        assert_eq!(served.ctl(&line), reply, "ctl {line}");
        assert_eq!(mux::tests::typed_in_the_monitor(executor(), &line), reply, "{line} in the monitor");
        let Request { command, json } = Request::parse(&line);
        if let Ok(Command::Save(how, _)) = command {
            let refused = guest_port::tests::echo_and_cat(&line);
            let error = format!("{}= writes a file on the host", how.name());
            assert!(
                refused.contains(&error) && refused.contains("error"),
                "{line} on the guest's port: {refused}"
            );
            continue;
        }
        let scans = command == Ok(Command::Scan) && !json;
        // Reading the port after a scan gives what was found, too, as reading kmemleak's file does.
        let expected = if scans { format!("{reply}{REPORT}") } else { reply };
        assert_eq!(guest_port::tests::echo_and_cat(&line), expected, "{line} on the guest's port");
    }
}

/// Each command has a heading in docs/console.md, with something that it printed below, and is in README's table.
#[test]
fn every_command_is_documented_with_what_it_prints() {
    let guide = include_str!("../../../docs/console.md");
    let heading = |line: &str| line.strip_prefix("### `")?.strip_suffix('`').map(str::to_owned);
    let mut headings: Vec<String> = guide.lines().filter_map(heading).collect();
    headings.sort_unstable();
    let mut usages: Vec<&str> = COMMANDS.iter().map(|entry| entry.usage).collect();
    usages.sort_unstable();
    assert_eq!(headings, usages);
    for part in guide.split("\n### `").skip(1) {
        let part = part.split("\n## ").next().unwrap_or_default();
        assert!(part.matches("\n```\n").count() >= 2, "no output: {part}");
    }
    let table: String = include_str!("../../../README.md").lines().filter(|l| l.starts_with("| `")).collect();
    for entry in COMMANDS {
        assert!(table.contains(&format!("`{}", entry.name)), "{} is not in README.md", entry.name);
    }
}
