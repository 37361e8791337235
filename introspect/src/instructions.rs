//! Hot loops by the number of their instructions, which other work on the machine does not change: a test starts itself
//! again under valgrind, with some items and with three times as many.

use std::env;
use std::process::Command;

/// Tells the test that was started again how many items to work on.
const ITEMS: &str = "KLEAK_ITEMS";

/// Instructions for each item of `work`, called by the test of this name; None without valgrind, which is said, and when
/// this is the test that was started again.
///
/// # Panics
/// Valgrind is missing though `KLEAK_REQUIRE` is set, or does not say how many.
pub fn per_item(test: &str, items: u64, work: impl Fn(u64)) -> Option<f64> {
    if let Some(items) = env::var(ITEMS).ok().and_then(|items| items.parse().ok()) {
        work(items);
        return None;
    }
    let count = |items: u64| {
        let mut valgrind = Command::new("valgrind");
        valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
        let this = env::current_exe().expect("the name of the test program");
        let output =
            valgrind.arg(this).args([test, "--exact"]).env(ITEMS, items.to_string()).output().ok()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{text}");
        let ran = String::from_utf8_lossy(&output.stdout).contains("1 passed");
        assert!(ran, "there is no test {test}");
        let collected = text.lines().find_map(|line| line.split_once("Collected : "));
        Some(
            collected
                .and_then(|(_, number)| number.trim().parse::<u64>().ok())
                .expect("a number of instructions"),
        )
    };
    let Some(few) = count(items) else {
        assert!(env::var_os("KLEAK_REQUIRE").is_none(), "valgrind is not there");
        eprintln!("skipped: {test}: needs valgrind; `cargo xtask test` installs it");
        return None;
    };
    Some((count(3 * items)? - few) as f64 / (2 * items) as f64)
}
