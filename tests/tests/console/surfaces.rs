//! Every command that `help` lists, on a real guest: monitor, control socket and `ctl` give the same reply at the same pause,
//! and the guest's own port one of the same kind.

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use std::path::PathBuf;
use tests::{Client, Guest, RUN_TIMEOUT, Session, kernel, long_test, module};

/// What the monitor prints before each line.
const PROMPT: &str = "(kleak) ";
/// A command and the last line of its reply: what follows a reply in the monitor.
const NEXT: &str = "help quit";
const SAID_NEXT: &str = "At once, as if the power were cut";
/// Words of a reply that say what kind it is of; behind them may be what the guest does at that moment.
const KIND: usize = 2;
/// Scans that `growth` compares.
const SCANS: usize = 5;
/// Saving the machine on each surface takes minutes in the lab.
const TIMEOUT_S: u64 = 1500;
/// Minimum age of what the guest leaks, seconds, and some.
const AGE_S: u32 = 2;

/// The tests: long ones, since the same is asked of all surfaces without a guest each time (`surfaces_tests` of the console).
pub fn trials() -> Vec<Trial> {
    vec![
        long_test("every_command_on_every_surface_6.12-cloud", || every_command("6.12-cloud")),
        long_test("every_command_on_every_surface_6.1-cloud", || every_command("6.1-cloud")),
    ]
}

/// A command as it is typed.
struct Line {
    text: String,
    /// What brings about what it needs, each time before.
    before: Option<&'static str>,
    /// Its numbers differ from one time to the next: the time, what a scan took, what was there to be cleared.
    varies: bool,
}

/// A line for each line of `help`; an error for a command that has none here.
fn lines(help: &str, object: &str) -> Result<Vec<Line>> {
    let usages = help.lines().filter_map(|line| line.split("  ").next());
    usages.filter_map(|usage| line(usage, object).transpose()).collect()
}

fn line(usage: &str, object: &str) -> Result<Option<Line>> {
    let name = usage.split_inclusive('=').next().and_then(|name| name.split(' ').next()).unwrap_or_default();
    let text = match name {
        "scan=" => "scan=off".to_owned(),
        "stack=" | "typed=" => format!("{name}on"),
        "dump=" | "path=" | "not_leak=" | "ignore=" | "no_scan=" => format!("{name}{object}"),
        "alloc_calls=" | "refs=" => format!("{name}dentry"),
        "snapshot=" | "core=" => format!("{name}{}", saved().display()),
        "top" => "top caches".to_owned(),
        "kmem" => "kmem -s dentry".to_owned(),
        "bt" => "bt 1".to_owned(),
        "json" => "json help scan".to_owned(),
        "slabinfo" | "vmallocinfo" | "meminfo" | "buddyinfo" | "vmstat" | "scan" | "report" | "clear"
        | "off" | "on" | "roots" | "possible" | "canary" | "status" | "audit" | "growth" | "mark" | "ps"
        | "procrank" | "regs" | "pause" | "resume" | "help" => name.to_owned(),
        // The last one of all.
        "quit" => return Ok(None),
        _ => bail!("{usage:?} is in help and not tested here"),
    };
    let before = match name {
        "off" => Some("on"),
        "on" => Some("off"),
        "pause" => Some("resume"),
        "resume" => Some("pause"),
        _ => Some("pause"),
    };
    let varies = ["status", "scan", "clear", "canary", "snapshot=", "core="].contains(&name);
    Ok(Some(Line { text, before, varies }))
}

/// Where machines are saved, one after the other.
fn saved() -> PathBuf {
    std::env::temp_dir().join(format!("kleak-surfaces-{}.core", std::process::id()))
}

fn every_command(line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::new(&kernel, 1)?;
    guest.timeout(TIMEOUT_S).file(&module(&kernel, "leaky")?, "/leaky.ko").script(&format!(
        "mkdir /canary; mount -t ramfs kleak-canary-of-this-guest /canary
         insmod /leaky.ko case=hidden,tree; rmmod leaky; sleep {AGE_S}; echo READY
         while read -r line; do
             echo \"$line\" > /dev/ttyS1; cat /dev/ttyS1 > /reply; echo; echo \"== $line\"; head -n 1 /reply; echo ==
         done"
    ))?;
    let mut session = guest.start_on_terminal()?;
    session.wait_for("\nREADY", RUN_TIMEOUT)?;
    let mut client = Client::of(&guest)?;
    for _ in 0..SCANS {
        client.ask("scan")?;
    }
    client.ask("mark")?;
    client.ask("pause")?;
    let report = client.ask("report")?;
    let object = report.rsplit_once("unreferenced object ").and_then(|(_, rest)| rest.split(' ').next());
    let all = lines(&client.ask("help")?, object.with_context(|| format!("no object: {report}"))?)?;
    ensure!(all.len() > 30, "only {} commands", all.len());
    // First what only asks, then what changes what is known.
    let changes = |line: &Line| {
        let name = line.text.split('=').next().unwrap_or_default();
        ["clear", "off", "on", "not_leak", "ignore", "no_scan"].contains(&name)
    };
    let (changing, asking): (Vec<Line>, Vec<Line>) = all.into_iter().partition(changes);
    for lines in [asking, changing] {
        on_every_surface(&guest, &mut client, &mut session, &lines)?;
    }
    let _ = std::fs::remove_file(saved());
    ensure!(guest.ctl("quit")? == "powering off\n", "quit");
    session.finish()?.expect_code(0)?;
    Ok(())
}

/// Asks for each line: first three surfaces at one pause, then the guest itself, which has to run for that.
fn on_every_surface(guest: &Guest, client: &mut Client, session: &mut Session, lines: &[Line]) -> Result<()> {
    session.type_bytes(b"\x01c")?;
    let mut replies = Vec::new();
    for line in lines {
        replies.push(same_at_one_pause(guest, client, session, line)?);
    }
    session.type_bytes(b"\x01c")?;
    client.ask("resume")?;
    for (line, reply) in lines.iter().zip(&replies) {
        match line.text.split_inclusive('=').next().unwrap_or_default() {
            // Nobody in the guest could go on after these.
            "pause" | "resume" => {}
            // The guest may have nothing written on the host.
            name @ ("snapshot=" | "core=") => {
                let refusal = format!("error: {name} writes a file on the host");
                of_the_same_kind(session, &line.text, &refusal)?;
            }
            _ => of_the_same_kind(session, &line.text, reply)?,
        }
    }
    Ok(())
}

/// On the socket, with `ctl` and in the monitor.
fn same_at_one_pause(
    guest: &Guest,
    client: &mut Client,
    session: &mut Session,
    line: &Line,
) -> Result<String> {
    let plain = |text: &str| if line.varies { without_numbers(text) } else { text.to_owned() };
    let prepare = |client: &mut Client| line.before.map_or(Ok(String::new()), |command| client.ask(command));
    prepare(client)?;
    let reply = client.ask(&line.text)?;
    ensure!(!reply.is_empty() && !reply.starts_with("error"), "{}: {reply}", line.text);
    prepare(client)?;
    let by_ctl = guest.ctl(&line.text)?;
    ensure!(plain(&by_ctl) == plain(&reply), "ctl {}: {by_ctl}\nsocket: {reply}", line.text);
    prepare(client)?;
    let typed = in_the_monitor(session, &line.text)?;
    ensure!(plain(&typed) == plain(&reply), "{} in the monitor: {typed}\nsocket: {reply}", line.text);
    if !line.text.starts_with("json ") {
        prepare(client)?;
        let json = guest.json(&line.text)?;
        ensure!(
            json.is_object() && json.get("error").is_none_or(Value::is_null),
            "json {}: {json}",
            line.text
        );
    }
    Ok(reply)
}

/// The reply to a line in the open monitor.
fn in_the_monitor(session: &mut Session, line: &str) -> Result<String> {
    let before = session.shown().matches(SAID_NEXT).count();
    session.type_bytes(format!("{line}\r{NEXT}\r").as_bytes())?;
    session.wait_for_times(SAID_NEXT, before + 1, RUN_TIMEOUT)?;
    let shown = session.shown().replace('\r', "");
    let replies: Vec<&str> = shown.split(PROMPT).filter_map(|part| Some(part.split_once('\n')?.1)).collect();
    let reply = replies.len().checked_sub(2).and_then(|at| replies.get(at)).context("no reply")?;
    Ok((*reply).to_owned())
}

/// On the guest's own port while it runs: what the first line is about.
fn of_the_same_kind(session: &mut Session, line: &str, reply: &str) -> Result<()> {
    session.type_bytes(format!("{line}\r").as_bytes())?;
    let mark = format!("\n== {line}\n");
    let found = session.wait_for_shown(RUN_TIMEOUT, |shown| {
        let shown = shown.replace('\r', "");
        let (_, rest) = shown.split_once(&mark)?;
        Some(rest.split_once("==\n")?.0.to_owned())
    })?;
    let kind = |text: &str| {
        let first = without_numbers(text.lines().next().unwrap_or_default());
        first.split_whitespace().take(KIND).collect::<Vec<_>>().join(" ")
    };
    ensure!(kind(&found) == kind(reply), "{line} on the guest's port: {found}\nelsewhere: {reply}");
    Ok(())
}

/// `text` with each number, and each hexadecimal one, as a `#`.
fn without_numbers(text: &str) -> String {
    let mut out = String::new();
    for word in text.split_inclusive(|c: char| !c.is_ascii_hexdigit() && c != 'x') {
        let number = word.trim_end_matches(|c: char| !c.is_ascii_hexdigit());
        let is_number = number.starts_with(|c: char| c.is_ascii_digit());
        out.push_str(&if is_number { word.replacen(number, "#", 1) } else { word.to_owned() });
    }
    out
}
