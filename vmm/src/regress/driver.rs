//! The guest's side of a boot: a shell script that runs the tests one by one, and what it says on the console.
//!
//! It says a line, waits for the host to do its part (scan, report, clear, canary) and goes on at the host's word:
//!
//! ```text
//! guest, console                            host, console and control socket
//!   plants the canary, settles
//! kleak-regress: TOKEN 1 ready ;            scan, report, clear, canary; go 1
//!   set-up, modules, test, a fresh canary, settle
//! kleak-regress: TOKEN 2 done 0 0 ok ;      scan, report, clear, canary; go 2
//!   ...                                     ...; quit
//! ```
//!
//! A kernel message may tear a line apart, so it is said again until the answer comes. TOKEN is of this boot alone: what a test
//! prints is no mark, not even the log of another run. Beside all that a process says every [`PULSE`] that it is alive, and needs
//! nothing but the guest's timer, scheduler and console for it: a guest from which that does not come hangs, however much it
//! prints.

use super::suite::{Action, Test};
use crate::detector::CANARY;
use std::fmt::Write;
use std::time::Duration;

/// Begins each line.
const MARK: &str = "kleak-regress:";
/// How often the guest says that it is alive.
pub const PULSE: Duration = Duration::from_secs(10);
/// Folder of the driver and its files in the guest.
pub const FOLDER: &str = "/kleak/regress";

/// What a line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// Counts from 1; a line that is said again has the same. 0 of one that wants no answer.
    pub number: u32,
    /// What it is about.
    pub what: What,
}

/// See [`Mark`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// Time goes on in the guest.
    Alive,
    /// The guest is up and has settled.
    Ready,
    /// A test has ended and the guest has settled.
    Done {
        /// The test's place in the boot.
        test: usize,
        /// Exit status of its command.
        status: i32,
        /// What went wrong.
        trouble: Option<Trouble>,
    },
}

/// Why a test did not run as it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// It did not end in time.
    Late,
    /// Its set-up failed, with this status.
    Setup,
    /// A module could not be loaded, or was loaded already, with parameters or state of another's.
    Load(String),
    /// A module could not be unloaded.
    Unload(String),
}

/// Reads a line of the console; None for all but whole marks of this boot.
pub fn parse(line: &str, token: &str) -> Option<Mark> {
    let (_, rest) = line.split_once(MARK)?;
    let mut words = rest.trim_end().strip_suffix(" ;")?.split_whitespace();
    if words.next()? != token {
        return None;
    }
    let number = words.next()?.parse().ok()?;
    let what = match words.next()? {
        "alive" => What::Alive,
        "ready" => What::Ready,
        "done" => What::Done {
            test: words.next()?.parse().ok()?,
            status: words.next()?.parse().ok()?,
            trouble: match words.next()?.split_once(':') {
                None => None,
                Some(("late", _)) => Some(Trouble::Late),
                Some(("setup", _)) => Some(Trouble::Setup),
                Some(("load", name)) => Some(Trouble::Load(name.to_owned())),
                Some(("unload", name)) => Some(Trouble::Unload(name.to_owned())),
                Some(_) => return None,
            },
        },
        _ => return None,
    };
    words.next().is_none().then_some(Mark { number, what })
}

/// What the host answers.
pub fn answer(number: u32) -> String {
    format!("go {number}\n")
}

/// A test for the script.
pub struct Step<'a> {
    /// It.
    pub test: &'a Test,
    /// Names and parameters of its modules, in the order of loading; the files are `FOLDER/STEP/INDEX.ko`.
    pub modules: Vec<(String, String)>,
    /// How long the guest settles behind it, milliseconds.
    pub settle_ms: u64,
}

/// A module that could not be unloaded is `stuck`: a later test that names it would run on what an earlier one left of it.
/// One that was there before is as good, but takes no parameters any more.
///
/// The shell's own `read`, from a FIFO into which nobody writes, waits without a process or an allocation that would get among
/// those of the tests.
const PROLOGUE: &str = r#"
set -f
n=0
say() { echo; echo "kleak-regress: $token $n $* ;"; }
mark() {
    n=$((n + 1))
    while :; do
        say "$@"
        while read -r -t 15 answer; do [ "$answer" = "go $n" ] && return; done
        sleep 1
    done
}
settle() {
    umount /kleak/canary 2> /dev/null
    mount -t ramfs $canary /kleak/canary
    sync
    sleep "$1"
}
stuck=
load() {
    [ "$bad" = ok ] || return
    case " $stuck " in *" $2 "*) bad=load:$2; return ;; esac
    if [ -d "/sys/module/$2" ]; then
        [ -z "$3" ] || bad=load:$2
    elif insmod "$1" $3; then
        loaded="$2 $loaded"
    else
        bad=load:$2
    fi
}
unload() {
    for name in $loaded; do
        rmmod "$name" && continue
        stuck="$stuck $name"
        [ "$bad" != ok ] || bad=unload:$name
    done
}
stop() { kill -KILL "-$1" "$1" 2> /dev/null; }
late=/tmp/.kleak-regress-late
attempt() {
    rm -f $late
    setsid "$1" < /dev/null &
    pid=$!
    setsid sh -c "sleep $2; : > $late; kill -KILL -$pid" < /dev/null &
    dog=$!
    wait $pid
    status=$?
    stop $dog
    wait $dog 2> /dev/null
    [ ! -e $late ] || bad=late:
}
mkdir -p /kleak/canary
cd /kleak/work
quiet=/tmp/.kleak-regress-quiet
mkfifo $quiet
while :; do
    read -r -t $pulse word
    say alive
done 0<> $quiet &
alive=$!
"#;

/// The script. It is to be run by `sh`.
pub fn script(token: &str, boot_settle_ms: u64, steps: &[Step<'_>]) -> String {
    let mut text = format!(
        "token={token} canary={CANARY} pulse={}{PROLOGUE}settle {}\nmark ready\n",
        PULSE.as_secs(),
        seconds(boot_settle_ms)
    );
    for (index, step) in steps.iter().enumerate() {
        let folder = format!("{FOLDER}/{index}");
        text.push_str("bad=ok status=0 loaded= set_up=\n");
        for (module, (name, parameters)) in step.modules.iter().enumerate() {
            let _ = writeln!(text, "load {folder}/{module}.ko {} {}", quote(name), quote(parameters));
        }
        let limit = step.test.timeout_s;
        if step.test.setup.is_some() {
            let _ = writeln!(
                text,
                "if [ $bad = ok ]; then attempt {folder}/setup {limit}; set_up=$pid; [ $bad$status = ok0 ] || bad=setup:; fi"
            );
        }
        if step.test.action != Action::Nothing {
            // Any other status than the one wanted ends the repetition.
            let (repeat, wanted) = (step.test.repeat, step.test.status);
            let _ = writeln!(
                text,
                "i=0; while [ $bad = ok ] && [ $i -lt {repeat} ]; do attempt {folder}/test {limit}; stop $pid; i=$((i + 1)); \
                 [ $status = {wanted} ] || break; done"
            );
        }
        let _ =
            writeln!(text, "[ -z \"$set_up\" ] || stop $set_up\nunload\nsettle {}", seconds(step.settle_ms));
        let _ = writeln!(text, "mark done {index} $status $bad");
    }
    text.push_str("kill $alive\n");
    text
}

/// Whole seconds, up.
fn seconds(ms: u64) -> u64 {
    ms.div_ceil(1000)
}

/// A word for the shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::super::fixture::suite;
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};

    #[test]
    fn only_whole_marks_of_this_boot_count() {
        let mark = |number, what| Some(Mark { number, what });
        let done = |status, trouble| What::Done { test: 3, status, trouble };
        let table = [
            ("kleak-regress: t 1 ready ;", mark(1, What::Ready)),
            ("[   12.3] usb: kleak-regress: t 1 ready ;\r", mark(1, What::Ready)),
            ("kleak-regress: t 0 alive ;", mark(0, What::Alive)),
            ("kleak-regress: t 2 done 3 137 late: ;", mark(2, done(137, Some(Trouble::Late)))),
            ("kleak-regress: t 2 done 3 0 ok ;", mark(2, done(0, None))),
            ("kleak-regress: t 2 done 3 1 load:a_b ;", mark(2, done(1, Some(Trouble::Load("a_b".into()))))),
            ("kleak-regress: u 1 ready ;", None),
            ("kleak-regress: t 1 rea", None),
            ("kleak-regress: t 1 ready", None),
            ("kleak-regress: t 1 ready more ;", None),
            ("kleak-regress: t 2 done 3 0 other: ;", None),
            ("kleak-regress: t x ready ;", None),
            ("ready ;", None),
        ];
        for (line, expected) in table {
            assert_eq!(parse(line, "t"), expected, "{line}");
        }
    }

    #[test]
    fn parameters_reach_insmod_as_they_are() {
        assert_eq!(quote("a=1 b='x y'"), r"'a=1 b='\''x y'\'''");
        assert_eq!((seconds(0), seconds(1), seconds(2000), seconds(2001)), (0, 1, 2, 3));
    }

    /// The script in this host's shell, with its tools replaced: every path through it, without a boot.
    #[test]
    fn the_script_does_as_it_is_told() {
        let suite = suite(
            r#"
            [[kernel]]
            path = "k"
            [[test]]
            name = "twice"
            run = "x"
            repeat = 2
            [[test]]
            name = "status"
            run = "x"
            repeat = 9
            [[test]]
            name = "late"
            run = "x"
            timeout_s = 1
            [[test]]
            name = "setup"
            setup = "x"
            run = "x"
            [[test]]
            name = "nothing"
            [[test]]
            name = "module"
            run = "x"
            [[test]]
            name = "stays"
            run = "x"
            [[test]]
            name = "stale"
            run = "x"
            [[test]]
            name = "there"
            run = "x"
            [[test]]
            name = "there with parameters"
            run = "x"
            "#,
        );
        let folder = std::env::temp_dir().join(format!("kleak-driver-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        let program = |path: &str, text: &str| {
            use std::os::unix::fs::PermissionsExt;
            let path = folder.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        program("0/test", "echo RAN; sleep 60 &");
        program("1/test", "echo STATUS; exit 5");
        program("2/test", "sleep 60");
        program("3/setup", "exit 1");
        program("3/test", "echo NEVER");
        program("5/test", "echo NEVER");
        program("6/test", "echo ONCE");
        program("7/test", "echo NEVER");
        program("8/test", "echo ONCE");
        program("9/test", "echo NEVER");
        std::fs::create_dir_all(folder.join("modules/there")).unwrap();
        let step = |index: usize| Step {
            test: &suite.tests[index],
            modules: match index {
                5 => vec![("absent".into(), "a=1".into())],
                6 | 7 => vec![("stays".into(), String::new())],
                8 => vec![("there".into(), String::new())],
                9 => vec![("there".into(), "a=1".into())],
                _ => Vec::new(),
            },
            settle_ms: 0,
        };
        let steps: Vec<_> = (0..10).map(step).collect();
        let modules = folder.join("modules");
        let text = script("t", 0, &steps)
            .replace(" pulse=10", " pulse=1")
            .replace("/tmp/.kleak-regress", folder.to_str().unwrap())
            .replace(FOLDER, folder.to_str().unwrap())
            .replace("/sys/module", modules.to_str().unwrap());
        let fakes = "insmod() { echo INSMOD $@; case $1 in */5/*) return 1 ;; esac; }\nrmmod() { return 1; }\nmount() { echo MOUNT $@; }\numount() { echo UMOUNT $@; }\nmkdir() { :; }\ncd() { :; }\n";
        let mut shell = Command::new("busybox")
            .args(["sh", "-c", &format!("{fakes}{text}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("busybox is needed, as for boots");
        let mut input = shell.stdin.take().unwrap();
        let mut said = Vec::new();
        for line in BufReader::new(shell.stdout.take().unwrap()).lines().map_while(Result::ok) {
            if let Some(mark) = parse(&line, "t").filter(|mark| mark.what != What::Alive) {
                input.write_all(answer(mark.number).as_bytes()).unwrap();
            }
            said.push(line);
        }
        assert!(shell.wait().unwrap().success());
        std::fs::remove_dir_all(&folder).unwrap();
        let (alive, marks): (Vec<_>, Vec<_>) = said
            .iter()
            .filter_map(|line| parse(line, "t"))
            .map(|mark| mark.what)
            .partition(|what| *what == What::Alive);
        assert!(!alive.is_empty(), "a second and more, and no sign of life: {said:?}");
        let done = |test, status, trouble| What::Done { test, status, trouble };
        assert_eq!(
            marks,
            [
                What::Ready,
                done(0, 0, None),
                done(1, 5, None),
                done(2, 137, Some(Trouble::Late)),
                done(3, 1, Some(Trouble::Setup)),
                done(4, 0, None),
                done(5, 0, Some(Trouble::Load("absent".into()))),
                done(6, 0, Some(Trouble::Unload("stays".into()))),
                done(7, 0, Some(Trouble::Load("stays".into()))),
                done(8, 0, None),
                done(9, 0, Some(Trouble::Load("there".into())))
            ]
        );
        let count = |word: &str| said.iter().filter(|line| line.contains(word)).count();
        assert_eq!((count("RAN"), count("STATUS"), count("NEVER")), (2, 1, 0), "{said:?}");
        assert_eq!(count("ONCE"), 2, "{said:?}");
        assert!(
            said.iter().any(|line| line.starts_with("INSMOD ") && line.ends_with("/5/0.ko a=1")),
            "{said:?}"
        );
        // Each test has a fresh one, and the one before is gone.
        let fresh = format!("MOUNT -t ramfs {CANARY} /kleak/canary");
        assert_eq!(
            [fresh.as_str(), "UMOUNT /kleak/canary"]
                .map(|call| said.iter().filter(|line| *line == call).count()),
            [11, 11],
            "{said:?}"
        );
    }
}
