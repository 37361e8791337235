//! `procrank` against the guest's own smaps_rollup, and the live view of the same guest.

use crate::top;
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use std::collections::HashMap;
use tests::{Guest, RUN_TIMEOUT, kernel, long_test, no_kernel_complaint, test};

/// The tests.
pub fn trials() -> Vec<Trial> {
    vec![
        test("processes_as_smaps_says_6.12-cloud", || processes("6.12-cloud")),
        long_test("processes_as_smaps_says_6.1-cloud", || processes("6.1-cloud")),
    ]
}

/// `procrank` against smaps_rollup, of processes that sleep, read by a shell without starting another process: pages are
/// shared among all that run the same program.
fn processes(line: &str) -> Result<()> {
    let mut guest = Guest::new(&kernel(line)?, 2)?;
    guest.script(
        "sleep 1000 & sleep 1000 & (exec cat /dev/ttyS1 > /dev/null) & sleep 2
         for p in /proc/[0-9]*; do
             [ -r $p/smaps_rollup ] && while read -r line; do echo \"@$p $line\"; done < $p/smaps_rollup
         done 2> /dev/null
         echo LISTED; read -r go",
    )?;
    let mut session = guest.start()?;
    session.wait_for("\nLISTED", RUN_TIMEOUT)?;
    let ours = serde_json::from_str::<Value>(&guest.ctl("json procrank")?)?;
    top::drive(&guest)?;
    top::ends_with_its_terminal(&guest)?;
    let view = top::Pane::of(&guest)?;
    view.wait_for("+0x")?;
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    top::says_that_it_is_gone(&view)?;
    no_kernel_complaint(&finished.stdout)?;
    let mut theirs: HashMap<i64, HashMap<String, i64>> = HashMap::new();
    for line in finished.stdout.lines().filter_map(|line| line.trim().strip_prefix("@/proc/")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [pid, name, kib, "kB"] = words[..] {
            theirs
                .entry(pid.parse()?)
                .or_default()
                .insert(name.trim_end_matches(':').to_owned(), kib.parse()?);
        }
    }
    let mut compared = 0;
    for row in ours["procrank"].as_array().context("procrank")? {
        let number = |name: &str| row[name].as_i64().with_context(|| format!("{name} of {row}"));
        let Some(smaps) = theirs.get(&number("pid")?) else { continue };
        let of = |name: &str| smaps.get(name).copied().unwrap_or_default();
        // The shell that reads works on while it reads.
        let slack = if row["comm"] == "sh" { 64 } else { 0 };
        let private = of("Private_Clean") + of("Private_Dirty");
        for (ours, theirs) in [("rss_kib", of("Rss")), ("pss_kib", of("Pss")), ("uss_kib", private)] {
            let difference = (number(ours)? - theirs).abs();
            // The kernel's sums of shares are cut off at each kind of page.
            let rounding = if ours == "pss_kib" { 2 } else { 0 };
            ensure!(difference <= slack + rounding, "{ours} of {row}: smaps_rollup has {theirs}");
        }
        ensure!(number("vss_kib")? >= number("rss_kib")?, "{row}");
        compared += 1;
    }
    ensure!(compared >= 4, "only {compared} processes: {:#}", ours["procrank"]);
    Ok(())
}
