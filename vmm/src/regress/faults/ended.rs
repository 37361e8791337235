//! Runs that are ended before their time, as by SIGINT.

use super::*;

impl Case {
    /// Ends the run a moment after this is so; what it came to. Panics where it is not so for long.
    fn ended_when(&self, is_so: impl Fn() -> bool + Sync) -> Results {
        let live: Arc<Live> = Arc::default();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let deadline = Instant::now() + Duration::from_secs(15);
                while !is_so() && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(20));
                }
                let so = is_so();
                std::thread::sleep(Duration::from_millis(300));
                live.stop();
                assert!(so);
            });
            self.run_with(&live)
        })
    }

    /// Whether results that are not complete are there.
    fn has_begun(&self) -> bool {
        fs::read_to_string(self.folder.join("results.json"))
            .is_ok_and(|text| text.contains("\"complete\": false"))
    }
}

#[test]
fn ending_it_keeps_what_is_there() {
    for boot in ["boot = \"per-test\"", "boot = \"shared\""] {
        let commands = ["exit 0", "say busy hang", "leak a 1", "exit 1"];
        let mut case =
            Case::new(&suite(boot, &["good"], &commands).replace("timeout_s = 1\n", "timeout_s = 60\n"));
        case.options.jobs = 1;
        let logs = case.folder.join("logs");
        case.options.logs = Some(logs.clone());
        let says_busy =
            |log: fs::DirEntry| fs::read_to_string(log.path()).is_ok_and(|text| text.contains("busy"));
        let results = case.ended_when(|| fs::read_dir(&logs).is_ok_and(|logs| logs.flatten().any(says_busy)));
        let (passed, interrupted) = (Outcome::Passed, Outcome::Interrupted);
        let wanted = commands.into_iter().zip([passed, interrupted, interrupted, interrupted]);
        assert_eq!(outcomes(&results), wanted.collect::<Vec<_>>(), "{boot}");
        assert_eq!(results.exit_code(), ExitCode::Guest);
        let [_, running, rest @ ..] = &results.tests[..] else { unreachable!() };
        assert_eq!(
            (running.message.as_str(), running.console.join(" ").as_str()),
            ("the run was ended", "busy")
        );
        assert!(running.millis >= 300, "{}", running.millis);
        for test in rest {
            assert_eq!(test.message, "the run was ended before it");
            assert!(
                test.console.is_empty() && test.millis < running.millis,
                "what the test before it did: {test:?}"
            );
        }
    }
}

#[test]
fn what_was_ended_is_incomplete_wherever_that_is_said() {
    let mut case = Case::new(&suite("boot = \"per-test\"", &["good"], &["exit 0", "hang"]));
    let whole = case.folder.join("whole.json");
    case.options.only = vec!["exit 0".to_owned()];
    assert!(case.run().complete);
    fs::rename(case.folder.join("results.json"), &whole).unwrap();
    case.options.only = vec!["hang".to_owned()];
    let ended = case.ended_when(|| case.has_begun());
    assert_eq!((ended.tests.len(), ended.complete), (1, false));
    let files = [whole, case.folder.join("results.json")];
    for files in [files.clone(), [files[1].clone(), files[0].clone()]] {
        let joined = merge(&files, &Outputs::default()).unwrap().results;
        assert_eq!((joined.tests.len(), joined.complete), (2, false));
        assert_eq!(joined.exit_code(), ExitCode::Guest);
        let said = [write::text(&joined), write::html(&joined)];
        assert!(said.iter().all(|text| text.contains("suite (incomplete): 2 tests: ")), "{said:?}");
        assert_eq!(write::sarif(&joined)["runs"][0]["invocations"][0]["executionSuccessful"], false);
    }
}

#[test]
fn what_an_earlier_run_left_is_no_result() {
    let case = Case::new(&suite("", &["good"], &["exit 0"]));
    assert_eq!(case.run().exit_code(), ExitCode::Success);
    fs::write(case.folder.join("suite.toml"), suite("", &["mute"], &["exit 0"])).unwrap();
    // Not only when the first test has ended.
    case.ended_when(|| case.has_begun());
}
