//! Shards of a suite, and what becomes of them when they are joined.

use super::super::options::{MergeOptions, RegressAction};
use super::*;

#[test]
fn an_empty_shard_has_passed() {
    let mut case = Case::new(&suite("", &["good"], &["exit 0"]));
    let text = suite::read(case.options.suite.as_ref().unwrap()).unwrap();
    let shard = |index| matrix::Shard { index, count: 2 };
    let full = (1..=2).find(|&index| !matrix::boots(&text, Some(shard(index)), &[]).is_empty()).unwrap();
    let files = [full, 3 - full].map(|index| {
        case.options.shard = Some(shard(index));
        case.options.only = vec!["exit".to_owned()];
        let part = case.run();
        assert_eq!((part.tests.is_empty(), part.complete), (index != full, true));
        assert_eq!(part.exit_code(), ExitCode::Success);
        let file = case.folder.join(format!("{index}.json"));
        fs::rename(case.folder.join("results.json"), &file).unwrap();
        file
    });
    assert_eq!(merge(&files, &Outputs::default()).unwrap().exit_code(false).unwrap(), ExitCode::Success);
    case.options.only = vec!["exit".to_owned(), "absent".to_owned()];
    let suite = case.options.suite.as_ref().unwrap();
    let error = run_suite(suite, &case.options, Path::new("x"), PATIENCE, Arc::default()).err().unwrap();
    assert_eq!(failure::exit_code(&error), ExitCode::Usage);
}

#[test]
fn merged_shards_are_the_whole() {
    let commands = ["exit 0", "leak a 1", "exit 3", "leak b 1", "noise"];
    let mut case = Case::new(&suite("baseline = \"base.json\"", &["good", "boot-leaks"], &commands));
    let ids = |test: &str| ["good", "boot-leaks"].map(|kernel| format!("{kernel}/default/{test}"));
    let gone = [ids("exit 0"), ids("leak a 1"), ids("noise")].concat();
    let leaks = json!([{ "id": "gone", "site": "gone_probe", "tests": gone },
        { "id": "unsure", "site": "unsure_probe", "tests": ids("exit 3") }]);
    let known = json!({ "schema": "kleak-baseline/1", "leaks": leaks });
    fs::write(case.folder.join("base.json"), known.to_string()).unwrap();
    let whole = case.run();
    assert_eq!(whole.fixed.iter().map(|fixed| fixed.id.as_str()).collect::<Vec<_>>(), ["gone"]);
    let files: Vec<PathBuf> = (1..=2).map(|index| case.folder.join(format!("{index}.json"))).collect();
    for (index, file) in files.iter().enumerate() {
        case.options.shard = Some(matrix::Shard { index: index as u32 + 1, count: 2 });
        let part = case.run();
        let of = |kernel: &str| part.tests.iter().filter(|test| test.kernel == kernel).count();
        assert!((1..5).contains(&of("good")) && (1..5).contains(&of("boot-leaks")), "{:?}", outcomes(&part));
        assert!(part.fixed.is_empty(), "the other shard may still have it");
        fs::rename(case.folder.join("results.json"), file).unwrap();
    }
    let joined = merge(&files, &Outputs::default()).unwrap().results;
    assert_eq!(outcomes(&joined), outcomes(&whole));
    assert_eq!((joined.shard.clone(), joined.complete, &joined.fixed), (None, true, &whole.fixed));
    assert_eq!(write::junit(&joined).unwrap().matches("<testsuite ").count(), 2);
    let backwards = merge(&[files[1].clone(), files[0].clone()], &Outputs::default()).unwrap().results;
    assert_eq!(backwards.tests, joined.tests);
    let empty = case.folder.join("empty.json");
    fs::write(&empty, json!({ "schema": "kleak-baseline/1", "leaks": [] }).to_string()).unwrap();
    let outputs = Outputs { baseline: Some(empty), ..Outputs::default() };
    assert_eq!(merge(&files, &outputs).unwrap().results.fixed, [], "the baseline given goes before");
    let half = merge(&files[..1], &Outputs::default()).unwrap().results;
    assert!(
        !half.complete && half.fixed.is_empty() && half.exit_code() != ExitCode::Success,
        "a shard is missing"
    );
    let other = case.folder.join("other.json");
    let results = Results { tests: Vec::new(), suite: "other".into(), ..joined };
    fs::write(&other, serde_json::to_string(&results).unwrap()).unwrap();
    let path = |name: &str| case.folder.join(name);
    for wrong in [
        vec![files[0].clone(); 2],
        vec![files[0].clone(), other],
        vec![path("suite.toml")],
        vec![path("absent")],
    ] {
        let error = merge(&wrong, &Outputs::default()).err().unwrap();
        assert_eq!(failure::exit_code(&error), ExitCode::Usage);
    }
    let action = Some(RegressAction::Merge(MergeOptions {
        files: vec![case.folder.join("absent")],
        outputs: Outputs { bisect_exit_codes: true, ..Outputs::default() },
    }));
    assert_eq!(
        regress(&RegressOptions { action, suite: None, ..case.options.clone() }).unwrap(),
        ExitCode::Untested
    );
}
