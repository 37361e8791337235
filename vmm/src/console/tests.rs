//! Parser and executor: every command in text and JSON, every refusal.

use super::command::{COMMANDS, complete, help};
use super::fake::{FakeTarget, REPORT};
use super::*;
use introspect::memory::Va;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

fn answer(line: &str) -> Reply {
    Executor::new(Arc::new(FakeTarget::leaky())).answer(line)
}

#[test]
fn every_form_of_a_command_parses() {
    let table = [
        ("scan", Command::Scan),
        ("  report\t", Command::Report),
        ("clear\r", Command::Clear),
        ("off", Command::Off),
        ("on", Command::On),
        ("stack=on", Command::Stack(true)),
        ("typed=off", Command::Typed(false)),
        ("stack = off", Command::Stack(false)),
        ("scan=on", Command::PeriodicScan(true)),
        ("scan=off", Command::PeriodicScan(false)),
        ("scan=0", Command::ScanPeriod(0)),
        ("scan=90", Command::ScanPeriod(90)),
        ("dump=0xffff888003a8e000", Command::Dump(Va(0xffff_8880_03a8_e000))),
        ("dump=FFFF888003A8E010", Command::Dump(Va(0xffff_8880_03a8_e010))),
        ("path=ffff888003a8e010", Command::Path(Va(0xffff_8880_03a8_e010))),
        ("roots", Command::Roots),
        ("possible", Command::Possible),
        ("canary", Command::Canary),
        ("status", Command::Status),
        ("audit", Command::Audit),
        ("top", Command::Top(TopBy::Sites)),
        ("top sites", Command::Top(TopBy::Sites)),
        ("top  caches", Command::Top(TopBy::Caches)),
        ("alloc_calls=kmalloc-64", Command::AllocCalls("kmalloc-64".into())),
        ("alloc_calls = dentry", Command::AllocCalls("dentry".into())),
        ("growth", Command::Growth),
        ("not_leak=0xffff888000001000", Command::Annotate(Annotation::NotLeak, Va(0xffff_8880_0000_1000))),
        ("ignore = ffff888000001000", Command::Annotate(Annotation::Ignore, Va(0xffff_8880_0000_1000))),
        ("no_scan=0xffff888000001000", Command::Annotate(Annotation::NoScan, Va(0xffff_8880_0000_1000))),
        ("slabinfo", Command::Accounting(Account::Slabinfo, When::Now)),
        ("slabinfo  diff", Command::Accounting(Account::Slabinfo, When::SinceMark)),
        ("vmallocinfo", Command::Accounting(Account::Vmallocinfo, When::Now)),
        ("meminfo diff", Command::Accounting(Account::Meminfo, When::SinceMark)),
        ("buddyinfo", Command::Accounting(Account::Buddyinfo, When::Now)),
        ("vmstat diff", Command::Accounting(Account::Vmstat, When::SinceMark)),
        ("kmem", Command::Accounting(Account::Kmem, When::Now)),
        ("kmem -i", Command::Accounting(Account::Kmem, When::Now)),
        ("kmem diff", Command::Accounting(Account::Kmem, When::SinceMark)),
        ("kmem  -s", Command::Accounting(Account::KmemSlabs, When::Now)),
        ("kmem -s  diff", Command::Accounting(Account::KmemSlabs, When::SinceMark)),
        ("kmem -s dentry", Command::KmemCache("dentry".into(), When::Now)),
        ("kmem -s dentry diff", Command::KmemCache("dentry".into(), When::SinceMark)),
        ("refs=0xffff888003a8e000", Command::Refs(Va(0xffff_8880_03a8_e000))),
        ("refs=ffff888003a8e010", Command::Refs(Va(0xffff_8880_03a8_e010))),
        ("refs = dentry", Command::RefsOf("dentry".into())),
        ("mark", Command::Mark),
        ("procrank", Command::Procrank),
        ("ps", Command::Ps),
        ("bt", Command::Backtrace(None)),
        ("bt 17", Command::Backtrace(Some(17))),
        ("regs", Command::Regs),
        ("pause", Command::Pause),
        ("resume", Command::Resume),
        ("help", Command::Help(None)),
        ("quit", Command::Quit),
    ];
    for (line, command) in table {
        assert_eq!(Request::parse(line), Request { command: Ok(command.clone()), json: false }, "{line:?}");
        let json = Request::parse(&format!(" json  {line}"));
        assert_eq!(json, Request { command: Ok(command), json: true }, "{line:?}");
    }
}

#[test]
fn a_refusal_is_one_line_that_names_what_was_expected() {
    let table = [
        ("foo", "error: unknown command \"foo\": try help\n"),
        ("SCAN", "error: unknown command \"SCAN\", did you mean scan: try help\n"),
        ("", "error: empty command: try help\n"),
        ("json", "{\"error\":\"json takes a command: try help\"}\n"),
        ("json foo", "{\"error\":\"unknown command \\\"foo\\\": try help\"}\n"),
        ("scan now", "error: scan takes no argument, but was given \"now\"\n"),
        ("clear=1", "error: clear takes no value\n"),
        ("foo=1", "error: unknown command \"foo\": try help\n"),
        ("stack", "error: stack takes a value: stack=on or stack=off\n"),
        ("stack=maybe", "error: stack= takes on or off, not \"maybe\"\n"),
        ("typed=maybe", "error: typed= takes on or off, not \"maybe\"\n"),
        ("scan=", "error: scan= takes on, off or a number of seconds, not \"\"\n"),
        ("scan=-1", "error: scan= takes on, off or a number of seconds, not \"-1\"\n"),
        ("scan=+1", "error: scan= takes on, off or a number of seconds, not \"+1\"\n"),
        (
            "scan=99999999999999999999",
            "error: scan= takes on, off or a number of seconds, not \"99999999999999999999\"\n",
        ),
        ("dump", "error: dump takes an address: dump=ADDR\n"),
        ("dump=", "error: dump= takes a hexadecimal address of up to 16 digits, not \"\"\n"),
        ("dump=0x", "error: dump= takes a hexadecimal address of up to 16 digits, not \"0x\"\n"),
        ("dump=+12", "error: dump= takes a hexadecimal address of up to 16 digits, not \"+12\"\n"),
        (
            "dump=11112222333344445",
            "error: dump= takes a hexadecimal address of up to 16 digits, not \"11112222333344445\"\n",
        ),
        ("path", "error: path takes an address: path=ADDR\n"),
        ("path=x", "error: path= takes a hexadecimal address of up to 16 digits, not \"x\"\n"),
        ("roots=1", "error: roots takes no value\n"),
        ("top foo", "error: top takes sites or caches, not \"foo\"\n"),
        ("slabinfo foo", "error: slabinfo takes nothing or diff, not \"foo\"\n"),
        ("vmstat mark", "error: vmstat takes nothing or diff, not \"mark\"\n"),
        ("kmem foo", "error: kmem takes -i, or -s and a slab cache, and diff, not \"foo\"\n"),
        ("kmem -s a b", "error: kmem takes -i, or -s and a slab cache, and diff, not \"-s a b\"\n"),
        ("refs", "error: refs takes an address or a slab cache: refs=ADDR or refs=CACHE\n"),
        ("refs=", "error: refs= takes an address or the name of a slab cache\n"),
        ("refs=a b", "error: refs= takes the name of one slab cache, not \"a b\"\n"),
        ("slabinfo=1", "error: slabinfo takes no value\n"),
        ("alloc_calls", "error: alloc_calls takes a slab cache: alloc_calls=CACHE\n"),
        ("alloc_calls=a b", "error: alloc_calls= takes the name of one slab cache, not \"a b\"\n"),
        ("alloc_calls=", "error: alloc_calls= takes the name of a slab cache\n"),
        ("bt init", "error: bt takes a process id, not \"init\"\n"),
        ("bt 4294967296", "error: bt takes a process id, not \"4294967296\"\n"),
        ("pause 1", "error: pause takes no argument, but was given \"1\"\n"),
        ("help foo", "error: unknown command \"foo\": try help\n"),
        ("f\x1bo", "error: unknown command \"f\\u{1b}o\": try help\n"),
    ];
    for (line, expected) in table {
        let reply = answer(line);
        assert_eq!(reply.body, expected, "{line:?}");
        assert!(reply.failed && !reply.quit, "{line:?}");
    }
}

#[test]
fn replies_in_text() {
    let table = [
        ("scan", "kmemleak: 3 new suspected memory leaks\n"),
        ("report", REPORT),
        ("clear", "cleared: 2 objects painted gray\n"),
        ("off", "tracking off\n"),
        ("on", "tracking on: 7 objects seeded\n"),
        ("stack=off", "stack scanning off\n"),
        ("typed=on", "typed scanning on\n"),
        ("scan=on", "automatic scans every 600 s\n"),
        ("scan=off", "automatic scans off\n"),
        ("scan=5", "automatic scans every 5 s\n"),
        ("scan=0", "automatic scans off\n"),
        ("dump=10", "object 0x10 (size 64)\n  comm \"evil.[2J.\"\n"),
        ("path=10", "unreachable: not referenced, lost\n  -> 0x10 (size 64): slab\n"),
        ("roots", "name  bytes\ndata      8\n"),
        ("possible", "objects  site\n"),
        ("canary", "canary: found\n"),
        ("status", "tracer: breakpoint\nobjects: 12\n"),
        ("audit", "audit: tracked 10, missing 1, stale 0\n  missing 0xffff888000001000\n"),
        ("slabinfo", "# Slabinfo Now\n"),
        ("slabinfo diff", "# Slabinfo SinceMark\n"),
        ("vmallocinfo diff", "# Vmallocinfo SinceMark\n"),
        ("meminfo", "# Meminfo Now\n"),
        ("buddyinfo", "# Buddyinfo Now\n"),
        ("vmstat diff", "# Vmstat SinceMark\n"),
        ("alloc_calls=dentry", "dentry\n"),
        ("kmem", "# Kmem Now\n"),
        ("kmem -s diff", "# KmemSlabs SinceMark\n"),
        ("kmem -s dentry", "CACHE dentry Now\n"),
        ("refs=0x10", "object 0x10: count 2\n"),
        ("refs=dentry", "count  found  dentry\n"),
        ("bt 3", "pid Some(3)\n"),
        ("pause", "paused: resume lets the guest go on\n"),
        ("resume", "running already\n"),
        ("mark", "marked: diff compares with now\n"),
        (
            "help off",
            "off: stop tracking allocations\nForgets what was tracked and what was found. Unlike kmemleak's this can be undone, with on.\nThe machine is paused for a moment.\n",
        ),
        ("quit", "powering off\n"),
    ];
    for (line, expected) in table {
        let reply = answer(line);
        assert_eq!(reply.body, expected, "{line:?}");
        assert!(!reply.failed, "{line:?}");
        assert_eq!(reply.quit, line == "quit");
    }
}

#[test]
fn replies_in_json_are_one_line() {
    let table = [
        ("json scan", r#"{"new_leaks":3}"#),
        ("json report", r#"{"leaks":[],"schema":"kleak-report/1"}"#),
        ("json clear", r#"{"cleared":2}"#),
        ("json off", r#"{"tracking":false}"#),
        ("json on", r#"{"seeded":7,"tracking":true}"#),
        ("json stack=on", r#"{"stack":true}"#),
        ("json typed=off", r#"{"typed":false}"#),
        ("json scan=off", r#"{"scan_period":0}"#),
        ("json scan=7", r#"{"scan_period":7}"#),
        ("json status", r#"{"objects":12,"tracer":"breakpoint"}"#),
        ("json dump=10", r#"{"dump":{"size":64}}"#),
        ("json path=10", r#"{"path":{"state":"lost"}}"#),
        ("json roots", r#"{"roots":[]}"#),
        ("json possible", r#"{"possible":[]}"#),
        ("json canary", r#"{"canary":{"found":true}}"#),
        ("json top", r#"{"top":[]}"#),
        ("json alloc_calls=dentry", r#"{"alloc_calls":[]}"#),
        ("json slabinfo diff", r#"{"slabinfo":[]}"#),
        ("json vmallocinfo", r#"{"vmallocinfo":[]}"#),
        ("json meminfo diff", r#"{"meminfo":[]}"#),
        ("json buddyinfo diff", r#"{"buddyinfo":[]}"#),
        ("json vmstat", r#"{"vmstat":[]}"#),
        ("json kmem", r#"{"kmem":[]}"#),
        ("json kmem -s a", r#"{"kmem -s":[]}"#),
        ("json refs=a", r#"{"refs":[]}"#),
        ("json bt", r#"{"bt":[]}"#),
        ("json pause", r#"{"changed":true,"paused":true}"#),
        ("json resume", r#"{"changed":false,"paused":false}"#),
        ("json mark", r#"{"marked":true}"#),
        ("json quit", r#"{"quit":true}"#),
    ];
    for (line, expected) in table {
        assert_eq!(answer(line).body, format!("{expected}\n"), "{line:?}");
    }
    for entry in COMMANDS.iter().filter(|entry| entry.name != "json") {
        let line = format!("json {}", entry.usage.split(' ').next().unwrap().replace("ADDR", "10"));
        assert_eq!(answer(&line).body.lines().count(), 1, "{line}");
    }
}

#[test]
fn a_report_without_leaks_is_empty_as_kmemleaks_file_is() {
    assert_eq!(Executor::new(Arc::new(FakeTarget::default())).answer("report").body, "");
}

#[test]
fn a_failing_target_is_an_error_reply_in_the_form_asked_for() {
    let target = Arc::new(FakeTarget::default());
    target.broken.store(true, SeqCst);
    let executor = Executor::new(target);
    let text = executor.answer("scan");
    assert_eq!((text.body.as_str(), text.failed), ("error: The guest is gone\n", true));
    assert_eq!(executor.answer("json audit").body, "{\"error\":\"The guest is gone\"}\n");
}

#[test]
fn quit_waits_for_the_surface() {
    let target = Arc::new(FakeTarget::default());
    let executor = Executor::new(target.clone());
    assert!(executor.answer("quit").quit);
    assert_eq!(target.log(), "");
    executor.quit();
    assert_eq!(target.log(), "quit");
}

#[test]
fn completion_offers_each_spelling() {
    assert_eq!(complete("st"), ["stack=off", "stack=on", "status"]);
    assert_eq!(complete("scan"), ["scan", "scan=", "scan=off", "scan=on"]);
    assert_eq!(complete("json cl"), ["json clear"]);
    assert_eq!(complete("help r"), ["help refs", "help regs", "help report", "help resume", "help roots"]);
    for completion in complete("help ") {
        assert!(!answer(&completion).failed, "{completion}");
    }
    assert_eq!(complete("json j"), Vec::<String>::new());
    assert!(complete("x").is_empty());
    assert!(complete("").len() > COMMANDS.len());
}

#[test]
fn help_names_every_command_and_each_has_its_own_help() {
    let list = help(None);
    for entry in COMMANDS {
        assert!(list.contains(entry.usage), "{}", entry.usage);
        assert!(!answer(&format!("help {}", entry.name)).failed, "{}", entry.name);
    }
}

/// The guest's terminal echoes replies back to us; none of their lines may be taken for a command.
#[test]
fn no_line_of_a_reply_is_a_command() {
    let lines: Vec<String> = COMMANDS
        .iter()
        .flat_map(|entry| {
            [
                entry.name.to_owned(),
                format!("{} diff", entry.name),
                format!("help {}", entry.name),
                format!("json {}", entry.name),
            ]
        })
        .chain(["stack=on", "scan=off", "scan=9", "dump=1", "path=1", "foo", ""].map(str::to_owned))
        .collect();
    for line in lines {
        for reply_line in answer(&line).body.lines() {
            assert!(Request::parse(reply_line).command.is_err(), "{line:?} is answered with {reply_line:?}");
        }
    }
}
