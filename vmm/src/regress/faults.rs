//! Everything that can happen to a boot, without one: the process that would be `kleak-vmm run` is this test program, which
//! plays the guest's driver and the detector. What each test does is its command: see [`play`].

mod ended;
#[cfg(target_arch = "x86_64")]
mod foreign;
mod shards;

use super::options::Outputs;
use super::result::{Outcome, State};
use super::*;
use crate::cli::options::LabChoice;
use crate::console::execute::{Commands, Reply};
use crate::console::socket::ControlServer;
use serde_json::json;
use std::io::BufRead;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

/// The arguments of the process that is played.
const ARGUMENTS: &str = "KLEAK_TEST_WORKER";

/// Less than for real guests, but enough for a loaded machine.
const PATIENCE: Patience = Patience { grace: Duration::from_millis(1500), silence: Duration::from_secs(3) };

/// The detector that is played, and the guest's time.
#[derive(Default)]
struct Detector {
    leaks: Mutex<Vec<(String, u64)>>,
    /// Leaks that a stale word hides until those before have been reported.
    hidden: Mutex<Vec<(String, u64)>>,
    no_canary: AtomicBool,
    /// Finds what was allocated before.
    stale_canary: AtomicBool,
    sequence: AtomicU64,
    traps_rearmed: AtomicU64,
    events_dropped: AtomicU64,
    /// Time stands still.
    frozen: AtomicBool,
}

impl Commands for Detector {
    fn answer(&self, line: &str) -> Reply {
        let mut leaks = self.leaks.lock().unwrap();
        let group = |(name, count): &(String, u64)| {
            json!({ "id": name, "count": count, "direct": count, "bytes": 8 * count, "retained_bytes": 8 * count,
                "kind": "slab", "cache": "kmalloc-8", "backtrace": [{ "ip": "0x1", "symbol": name, "offset": 1, "size": 2,
                "module": null }] })
        };
        match line.trim() {
            "json scan" => Reply::json(&json!({ "new_leaks": leaks.len() })),
            "json report" => Reply::json(&json!({ "groups": leaks.iter().map(group).collect::<Vec<_>>() })),
            "json clear" => {
                *leaks = std::mem::take(&mut self.hidden.lock().unwrap());
                Reply::json(&json!({ "cleared": 1 }))
            }
            "json canary" if self.no_canary.load(SeqCst) => Reply::error("the canary flew", true),
            "json canary" => {
                let fresh = u64::from(!self.stale_canary.load(SeqCst));
                let sequence = self.sequence.fetch_add(fresh, SeqCst) + fresh;
                Reply::json(&json!({ "canary": { "found": true, "sequence": sequence } }))
            }
            "json status" => Reply::json(&json!({
                "traps_rearmed": self.traps_rearmed.load(SeqCst),
                "events_dropped": self.events_dropped.load(SeqCst),
                "objects": 7,
                "object_bytes": 700,
            })),
            "json growth" => {
                Reply::json(&json!({ "scans": 5, "growth": [{ "kind": "cache", "name": "dentry",
                "objects": 5, "bytes": 5, "objects_per_hour": 1.0, "bytes_per_hour": 1.5, "confidence": 0.99,
                "freed_by": [], "history": [1, 2, 3, 4, 5] }] }))
            }
            "json quit" => Reply { quit: true, ..Reply::json(&json!({ "quit": true })) },
            other => Reply::error(&format!("not played: {other}"), true),
        }
    }

    fn quit(&self) {
        std::process::exit(0);
    }
}

/// Says a mark and waits for the answer.
fn mark(number: &mut u32, token: &str, what: &str) {
    *number += 1;
    println!("\nkleak-regress: {token} {number} {what} ;");
    let expected = driver::answer(*number);
    let heard = std::io::stdin().lock().lines().map_while(Result::ok).any(|line| line == expected.trim());
    if !heard {
        std::process::exit(9);
    }
}

/// Plays a test; the words behind "done N".
fn play(command: &str, detector: &Detector) -> String {
    let words: Vec<&str> = command.split_whitespace().collect();
    match words[..] {
        ["leak", name, count] => {
            detector.leaks.lock().unwrap().push((name.to_owned(), count.parse().unwrap()));
            "0 ok".to_owned()
        }
        ["leak", first, "then", later] => {
            detector.hidden.lock().unwrap().push((later.to_owned(), 1));
            play(&format!("leak {first} 1"), detector)
        }
        ["say", text, ref rest @ ..] => {
            println!("{text}");
            play(&rest.join(" "), detector)
        }
        ["exit", status] => format!("{status} ok"),
        ["late"] => "137 late:".to_owned(),
        ["noise"] => {
            println!("kleak-regress: \x1b[2J\u{7}\nkleak-regress: other 1 ready ;\n{}", "x".repeat(100_000));
            println!("kleak-regress: done");
            "0 ok".to_owned()
        }
        ["panic"] => {
            eprintln!("kleak-vmm: error: Kernel panic - not syncing: played\nhint: none");
            std::process::exit(3)
        }
        ["off"] => std::process::exit(0),
        ["blind", name, count] => {
            detector.no_canary.store(true, SeqCst);
            play(&format!("leak {name} {count}"), detector)
        }
        ["stale"] => {
            detector.stale_canary.store(true, SeqCst);
            "0 ok".to_owned()
        }
        ["untrapped", name, count] => {
            detector.traps_rearmed.store(2, SeqCst);
            play(&format!("leak {name} {count}"), detector)
        }
        ["dropped"] => {
            detector.events_dropped.store(1, SeqCst);
            "0 ok".to_owned()
        }
        ["slow", seconds] => {
            std::thread::sleep(Duration::from_secs(seconds.parse().unwrap()));
            "0 ok".to_owned()
        }
        ["frozen", "quiet"] => {
            detector.frozen.store(true, SeqCst);
            play("hang", detector)
        }
        ["frozen", "noisy"] => {
            detector.frozen.store(true, SeqCst);
            loop {
                println!("rcu: INFO: rcu_sched detected stalls on CPUs/tasks");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        ["killed"] => {
            // SAFETY: no pointers.
            unsafe { libc::raise(libc::SIGKILL) };
            unreachable!()
        }
        ["hang"] => loop {
            std::thread::sleep(Duration::from_secs(1));
        },
        _ => panic!("not played: {command}"),
    }
}

/// Not a test of its own: the process that [`Case::run`] starts.
#[test]
fn worker_that_is_played() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else { return };
    let option = |name: &str| arguments.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    let file = |guest: &str| {
        let end = format!(":{}/{guest}", driver::FOLDER);
        let host = arguments.lines().find_map(|line| line.strip_prefix("--file=")?.strip_suffix(&end));
        host.map(|host| fs::read_to_string(host).unwrap())
    };
    let script = file("driver").unwrap();
    let token = script.split_whitespace().next().unwrap().strip_prefix("token=").unwrap().to_owned();
    let cmdline = option("--cmdline=");
    let detector = Arc::new(Detector::default());
    detector.no_canary.store(cmdline.contains("no-canary"), SeqCst);
    detector.events_dropped.store(u64::from(cmdline.contains("drops")), SeqCst);
    let mut server = ControlServer::bind(Path::new(option("--control="))).unwrap();
    server.serve(detector.clone()).unwrap();
    let kernel = option("--kernel=").rsplit('/').next().unwrap();
    let (pulse, of) = (token.clone(), Arc::clone(&detector));
    std::thread::spawn(move || {
        while !of.frozen.load(SeqCst) {
            println!("\nkleak-regress: {pulse} 0 alive ;");
            std::thread::sleep(Duration::from_millis(300));
        }
    });
    let mut number = 0;
    match kernel {
        "dead" => {
            eprintln!("kleak-vmm: error: The guest triple faulted");
            std::process::exit(3);
        }
        "no-kvm" => {
            eprintln!("kleak-vmm: error: No usable KVM");
            std::process::exit(4);
        }
        "mute" => std::thread::sleep(Duration::from_secs(600)),
        "boot-leaks" => detector.leaks.lock().unwrap().push(("boot".into(), 2)),
        _ => {}
    }
    mark(&mut number, &token, "ready");
    for test in 0..script.matches("mark done").count() {
        let said = match file(&format!("{test}/test")) {
            Some(command) => play(command.strip_prefix("#!/kleak/bin/sh\n").unwrap().trim(), &detector),
            None => "0 ok".to_owned(),
        };
        mark(&mut number, &token, &format!("done {test} {said}"));
    }
    // The host asks to quit instead.
    std::process::exit(9);
}

/// A suite whose kernels are played.
struct Case {
    folder: PathBuf,
    options: RegressOptions,
}

impl Case {
    fn new(suite: &str) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("kleak-faults-{}-{}", std::process::id(), NEXT.fetch_add(1, SeqCst));
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        for kernel in ["good", "dead", "no-kvm", "mute", "boot-leaks"] {
            fs::write(folder.join(kernel), "kernel").unwrap();
        }
        let myself = std::env::current_exe().unwrap();
        let test = "regress::faults::worker_that_is_played";
        let worker = format!(
            "#!/bin/sh\n{ARGUMENTS}=$(printf '%s\\n' \"$@\") exec {} --exact {test} --nocapture\n",
            myself.display()
        );
        fs::write(folder.join("worker"), worker).unwrap();
        fs::set_permissions(folder.join("worker"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(folder.join("suite.toml"), suite).unwrap();
        let outputs = Outputs { reports: vec![folder.join("results.json")], ..Outputs::default() };
        let options = RegressOptions {
            suite: Some(folder.join("suite.toml")),
            action: None,
            jobs: 2,
            shard: None,
            only: Vec::new(),
            logs: None,
            lab: LabChoice::Never,
            quiet: true,
            outputs,
        };
        Self { folder, options }
    }

    fn finish(&self, live: &Arc<Live>) -> Finished {
        let suite = self.options.suite.as_ref().unwrap();
        run_suite(suite, &self.options, &self.folder.join("worker"), PATIENCE, Arc::clone(live)).unwrap()
    }

    fn run_with(&self, live: &Arc<Live>) -> Results {
        let Finished { results, saved } = self.finish(live);
        saved.unwrap();
        let written = fs::read_to_string(self.folder.join("results.json")).unwrap();
        assert_eq!(serde_json::from_str::<Results>(&written).unwrap(), results);
        assert!(live.is_empty(), "a process is left behind");
        results
    }

    fn run(&self) -> Results {
        self.run_with(&Arc::default())
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Kernels, and tests of these commands, each named after its command.
fn suite(head: &str, kernels: &[&str], commands: &[&str]) -> String {
    let mut text = format!("boot_timeout_s = 20\n{head}\n");
    kernels.iter().for_each(|kernel| text.push_str(&format!("[[kernel]]\npath = \"{kernel}\"\n")));
    for command in commands {
        text.push_str(&format!("[[test]]\nname = \"{command}\"\nrun = \"{command}\"\ntimeout_s = 1\n"));
    }
    text
}

fn outcomes(results: &Results) -> Vec<(&str, Outcome)> {
    results.tests.iter().map(|test| (test.test.as_str(), test.outcome)).collect()
}

#[test]
fn each_fault_is_the_result_of_its_test_alone() {
    let commands =
        ["exit 0", "panic", "leak a 2", "killed", "noise", "hang", "late", "exit 3", "off", "leak b 1"];
    for boot in ["boot = \"shared\"", "boot = \"per-test\""] {
        let results = Case::new(&suite(boot, &["good"], &commands)).run();
        let expected = [
            Outcome::Passed,
            Outcome::Crashed,
            Outcome::Leaked,
            Outcome::Worker,
            Outcome::Passed,
            Outcome::Hung,
            Outcome::TimedOut,
            Outcome::Failed,
            Outcome::Crashed,
            Outcome::Leaked,
        ];
        assert_eq!(outcomes(&results), commands.into_iter().zip(expected).collect::<Vec<_>>(), "{boot}");
        assert!(results.complete && !results.canary_lost());
        assert_eq!(results.exit_code(), ExitCode::Leaks);
        assert_eq!(results.tests[1].message, "Kernel panic - not syncing: played");
        assert!(results.tests[3].message.ends_with("killed by signal 9"), "{}", results.tests[3].message);
        assert_eq!(
            (results.tests[2].groups.len(), results.tests[9].groups.len()),
            (1, 1),
            "leaks of another test"
        );
        assert_eq!(results.tests[7].status, Some(3));
    }
}

#[test]
fn a_kernel_that_does_not_boot_hurts_no_other() {
    let text = suite("", &["dead", "mute", "absent", "good"], &["exit 0", "leak a 1"]);
    let results = Case::new(&text.replace("boot_timeout_s = 20", "boot_timeout_s = 2")).run();
    let of = |kernel: &str| {
        let tests = results.tests.iter().filter(|test| test.kernel == kernel);
        tests.map(|test| (test.outcome, test.message.as_str())).collect::<Vec<_>>()
    };
    assert_eq!(of("dead"), [(Outcome::NotBooted, "The guest triple faulted"); 2]);
    assert_eq!(
        of("mute"),
        [(Outcome::NotBooted, "the guest was not up within 2 s, the suite's boot_timeout_s"); 2]
    );
    assert!(
        of("absent").iter().all(|(o, why)| *o == Outcome::NotBooted && why.contains("Cannot read kernel"))
    );
    assert_eq!(of("good"), [(Outcome::Passed, ""), (Outcome::Leaked, "1 new leak")]);
}

#[test]
fn a_host_that_cannot_is_told_from_a_process_that_died() {
    let results = Case::new(&suite("", &["no-kvm"], &["exit 0", "leak a 1"])).run();
    assert_eq!(outcomes(&results), [("exit 0", Outcome::Host), ("leak a 1", Outcome::Host)]);
    assert_eq!(results.tests[0].message, "No usable KVM");
    assert_eq!(results.exit_code(), ExitCode::Host);
    let results = Case::new(&suite("", &["good"], &["killed"])).run();
    assert_eq!((outcomes(&results)[0].1, results.exit_code()), (Outcome::Worker, ExitCode::Guest));
}

#[test]
fn without_its_canary_no_test_is_believed() {
    let results = Case::new(&suite("", &["good"], &["exit 0", "blind b 2", "leak a 1"])).run();
    let wanted = [("exit 0", Outcome::Passed), ("blind b 2", Outcome::Canary), ("leak a 1", Outcome::Leaked)];
    assert_eq!(outcomes(&results), wanted);
    assert_eq!(results.tests[1].leaks(State::New), 2, "leaks found before the canary was lost");
    assert!(
        results.canary_lost() && results.tests[1].message.contains("the canary flew"),
        "{:?}",
        results.tests[1]
    );
    assert_eq!(results.exit_code(), ExitCode::Guest);
    let text = suite("", &["good"], &["exit 0", "leak a 1"]) + "[[guest]]\ncmdline = \"no-canary\"\n";
    let results = Case::new(&text).run();
    assert_eq!(outcomes(&results), [("exit 0", Outcome::Canary), ("leak a 1", Outcome::Canary)]);
    assert_eq!((results.exit_code(), results.boots.len()), (ExitCode::Guest, 1));
}

#[test]
fn the_canary_of_an_earlier_test_proves_nothing() {
    let results = Case::new(&suite("", &["good"], &["exit 0", "stale", "leak a 1"])).run();
    let wanted = [("exit 0", Outcome::Passed), ("stale", Outcome::Canary), ("leak a 1", Outcome::Leaked)];
    assert_eq!(outcomes(&results), wanted);
    assert!(results.tests[1].message.contains("allocated before this test"), "{}", results.tests[1].message);
    assert_eq!(results.exit_code(), ExitCode::Guest);
}

#[test]
fn a_test_that_was_not_seen_whole_is_not_believed() {
    let mut case = Case::new(&suite(
        "baseline = \"base.json\"",
        &["good"],
        &["exit 0", "untrapped a 2", "dropped", "exit 1"],
    ));
    case.options.outputs.update_baseline = true;
    let results = case.run();
    let outcome = [Outcome::Passed, Outcome::Untracked, Outcome::Untracked, Outcome::Failed];
    assert_eq!(results.tests.iter().map(|test| test.outcome).collect::<Vec<_>>(), outcome);
    for (test, what) in [
        (1, "overwritten traps: 2; leaks that are not believed: 2"),
        (2, "dropped events: 1; leaks that are not believed: 0"),
    ] {
        assert!(results.tests[test].message.contains(what), "{}", results.tests[test].message);
    }
    assert_eq!(
        (results.leaks(State::New), results.boots.len()),
        (0, 3),
        "a registry with gaps serves no later test"
    );
    assert_eq!(results.exit_code(), ExitCode::Guest);
    assert!(!Baseline::read(&case.folder.join("base.json"), false).unwrap().has("a"));
    let text = suite("", &["boot-leaks"], &["exit 0", "leak a 1"]) + "[[guest]]\ncmdline = \"drops\"\n";
    let results = Case::new(&text).run();
    assert!(results.tests.iter().all(|test| test.outcome == Outcome::Untracked), "{:?}", outcomes(&results));
    assert_eq!((results.exit_code(), results.boots[0].unasked_leaks), (ExitCode::Guest, 0));
}

#[test]
fn a_guest_whose_time_stands_still_hangs_and_a_slow_one_does_not() {
    let commands = ["slow 4", "frozen quiet", "frozen noisy", "exit 0"];
    let text = suite("", &["good"], &commands).replace("timeout_s = 1\n", "timeout_s = 3600\n");
    let began = Instant::now();
    let results = Case::new(&text).run();
    let wanted = [Outcome::Passed, Outcome::Hung, Outcome::Hung, Outcome::Passed];
    assert_eq!(outcomes(&results), commands.into_iter().zip(wanted).collect::<Vec<_>>());
    for test in &results.tests[1..3] {
        assert!(test.message.contains("its time stands still"), "{}", test.message);
    }
    let console = &results.tests[2].console;
    assert!(!console.is_empty() && console.iter().all(|line| line.starts_with("rcu: ")), "{console:?}");
    assert!(began.elapsed() < Duration::from_secs(600));
}

#[test]
fn what_the_guest_said_stays_with_a_test_that_did_not_pass() {
    let commands = ["say hello leak a 1", "say passed exit 0", "say missing exit 0"];
    let text = suite("", &["good"], &commands) + "leaks = 1\n";
    let results = Case::new(&text).run();
    let said: Vec<_> = results.tests.iter().map(|test| (test.outcome, test.console.join(" "))).collect();
    let wanted = [(Outcome::Leaked, "hello"), (Outcome::Passed, ""), (Outcome::Missing, "missing")];
    assert_eq!(said, wanted.map(|(outcome, text)| (outcome, text.to_owned())));
}

#[test]
fn a_leak_that_is_hidden_at_first_is_looked_for_again() {
    let of = |keys: &str| {
        let text = suite("", &["good"], &["leak a then b"]) + keys;
        let results = Case::new(&text).run();
        (results.tests[0].outcome, results.tests[0].groups.len())
    };
    assert_eq!(of("functions = [\"a\", \"b\"]\n"), (Outcome::Passed, 2));
    assert_eq!(of("leaks = 2\n"), (Outcome::Passed, 2));
    assert_eq!(of("functions = [\"a\"]\n"), (Outcome::Passed, 1), "nothing is missing");
    assert_eq!(of("functions = [\"a\", \"c\"]\n"), (Outcome::Leaked, 2), "it is not looked for for ever");
}

#[test]
fn a_missing_module_is_its_tests_result() {
    let text = suite("", &["good"], &["exit 0", "leak a 1"]) + "modules = [\"absent.ko\"]\n";
    let results = Case::new(&text).run();
    assert_eq!(outcomes(&results), [("exit 0", Outcome::Passed), ("leak a 1", Outcome::Failed)]);
    assert!(results.tests[1].message.contains("absent.ko"), "{}", results.tests[1].message);
}

#[test]
fn leaks_of_the_boot_are_the_boot_tests() {
    let text = suite("", &["boot-leaks"], &["exit 0"]);
    let results = Case::new(&text).run();
    assert_eq!((results.exit_code(), results.boots[0].unasked_leaks), (ExitCode::Success, 2));
    let mut case = Case::new(&format!("{text}[[test]]\nname = \"boot\"\n"));
    let results = case.run();
    assert_eq!(outcomes(&results), [("exit 0", Outcome::Passed), ("boot", Outcome::Leaked)]);
    assert_eq!(results.boots[0].unasked_leaks, 0);
    case.options.only = vec!["exit".to_owned()];
    assert_eq!(case.run().boots[0].unasked_leaks, 2, "the test that would judge them is left out");
}

#[test]
fn a_baseline_tells_new_from_known_from_fixed() {
    let mut case = Case::new(&suite("baseline = \"base.json\"", &["good"], &["leak a 1", "leak b 2"]));
    let suite_file = case.options.suite.as_ref().unwrap();
    let missing = run_suite(suite_file, &case.options, Path::new("x"), PATIENCE, Arc::default());
    assert_eq!(failure::exit_code(&missing.err().unwrap()), ExitCode::Usage);
    case.options.outputs.update_baseline = true;
    assert_eq!(case.run().exit_code(), ExitCode::Leaks);
    case.options.outputs.update_baseline = false;
    let known = case.run();
    assert_eq!((known.exit_code(), known.leaks(State::Known)), (ExitCode::Success, 3));
    let text = suite("baseline = \"base.json\"", &["good"], &["leak a 1", "leak b 2"])
        .replace("run = \"leak b 2\"", "run = \"leak c 2\"");
    fs::write(case.folder.join("suite.toml"), text).unwrap();
    let changed = case.run();
    assert_eq!((changed.leaks(State::New), changed.leaks(State::Known)), (2, 1));
    assert_eq!(changed.fixed.iter().map(|fixed| fixed.site.as_str()).collect::<Vec<_>>(), ["b"]);
}

#[test]
fn a_baseline_stays_when_no_test_came_to_a_result() {
    let mut case = Case::new(&suite("baseline = \"base.json\"", &["mute"], &["leak a 1"]));
    case.options.outputs.update_baseline = true;
    assert!(case.run().tests.iter().all(|test| test.outcome == Outcome::NotBooted));
    assert!(!case.folder.join("base.json").exists());
}

#[test]
fn a_report_that_cannot_be_written_loses_nothing_else() {
    for (command, code) in
        [("leak a 1", Some(ExitCode::Leaks)), ("blind a 1", Some(ExitCode::Guest)), ("exit 0", None)]
    {
        let mut case = Case::new(&suite("baseline = \"base.json\"", &["good"], &[command]));
        case.options.outputs.reports.insert(0, "/dev/full".into());
        case.options.outputs.update_baseline = true;
        let finished = case.finish(&Arc::default());
        let error = finished.saved.as_ref().unwrap_err();
        assert_eq!(failure::exit_code(error), ExitCode::Usage, "{error:#}");
        assert_eq!(finished.results.tests.len(), 1);
        let written = fs::read_to_string(case.folder.join("results.json")).unwrap();
        assert_eq!(serde_json::from_str::<Results>(&written).unwrap(), finished.results);
        let known = Baseline::read(&case.folder.join("base.json"), false).unwrap();
        assert_eq!(known.has("a"), code.is_some());
        assert_eq!(finished.exit_code(false).ok(), code, "{command}");
    }
}

#[test]
fn what_could_not_be_written_is_refused_before_anything_boots() {
    let mut case = Case::new(&suite("", &["good"], &["exit 0"]));
    let refused = |options: &RegressOptions| {
        let suite = options.suite.as_ref().unwrap();
        let error = run_suite(suite, options, Path::new("x"), PATIENCE, Arc::default()).err().unwrap();
        assert_eq!(failure::exit_code(&error), ExitCode::Usage);
        failure::render(&error)
    };
    case.options.logs = Some(case.folder.join("good/logs"));
    let logs = refused(&case.options);
    assert!(logs.contains("Cannot create ") && logs.contains("\nhint: check --logs\n"), "{logs}");
    case.options.logs = None;
    case.options.outputs.baseline = Some(case.folder.join("absent/base.json"));
    case.options.outputs.update_baseline = true;
    let baseline = refused(&case.options);
    assert!(baseline.contains("Cannot write baseline ") && baseline.contains("\nhint: "), "{baseline}");
    case.options.outputs.baseline = None;
    assert!(refused(&case.options).contains("\nhint: give --baseline FILE, or baseline ="));
    let outputs = Outputs { update_baseline: true, ..Outputs::default() };
    fs::write(
        case.folder.join("results.json"),
        serde_json::to_string(&fixture::results(Vec::new())).unwrap(),
    )
    .unwrap();
    let error = merge(&[case.folder.join("results.json")], &outputs).err().unwrap();
    assert!(failure::render(&error).ends_with("\nhint: give --baseline FILE\n"));
}

#[test]
fn boots_wait_for_memory() {
    let memory = Admission::new(100);
    let first = memory.admit(80);
    std::thread::scope(|scope| {
        let second = scope.spawn(|| drop(memory.admit(30)));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!second.is_finished());
        drop(memory.admit(20));
        drop(first);
        second.join().unwrap();
    });
    // More than there is: alone.
    drop(memory.admit(1000));
    assert_eq!(*memory.used.lock().unwrap(), 0);
}
