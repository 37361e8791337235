//! The suites under `images/suites` are valid, and `planted` is what the module plants.

use super::suite::{self, Action, KernelSource, Suite};
use images::{cache, kernel, leaky, modules, programs};
use std::path::PathBuf;

fn folder() -> PathBuf {
    cache::workspace().join("images/suites")
}

fn shipped(name: &str) -> Suite {
    suite::read(&folder().join(name)).unwrap()
}

#[test]
fn all_are_valid_and_their_recipes_exist() {
    let mut count = 0;
    for entry in std::fs::read_dir(folder()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let suite = shipped(&name);
        assert_eq!(format!("{}.toml", suite.name), name);
        let paths = suite.tests.iter().flat_map(|test| test.modules.iter().map(|module| &module.path));
        for path in paths {
            let recipe = path.to_str().unwrap().strip_prefix(suite::RECIPE).unwrap();
            assert!(recipe == "kmemleak-test" || modules::OWN.contains(&recipe), "{recipe}");
        }
        for file in suite.tests.iter().flat_map(|test| &test.files) {
            let recipe = file.host.to_str().unwrap().strip_prefix(suite::RECIPE).unwrap();
            assert!(programs::ALL.contains(&recipe), "{recipe}");
        }
        count += 1;
    }
    assert_eq!(count, 4);
}

#[test]
fn the_clean_boot_is_of_all_kernels() {
    let source = |line: &&str| KernelSource::Recipe((*line).to_owned());
    let all: Vec<_> = kernel::LINES.iter().map(source).collect();
    assert_eq!(shipped("boot.toml").kernels.into_iter().map(|kernel| kernel.source).collect::<Vec<_>>(), all);
}

#[test]
fn planted_has_every_case() {
    let suite = shipped("planted.toml");
    assert_eq!((suite.tests[0].name.as_str(), &suite.tests[0].action), ("boot", &Action::Nothing));
    let tests = suite.tests[1..].iter().map(|test| {
        assert_eq!(test.modules[0].params, [format!("case={}", test.name)]);
        (test.name.clone(), test.expected.count, test.expected.functions.clone())
    });
    let cases = leaky::CASES.iter().map(|case| {
        let reported = case.reported_by_default();
        let functions = if reported.is_empty() { Vec::new() } else { vec![case.function()] };
        (case.name.to_owned(), Some(reported.len() as u64), functions)
    });
    assert_eq!(tests.collect::<Vec<_>>(), cases.collect::<Vec<_>>());
}
