//! What grows although it is referenced: listed; what stays or comes in waves: not.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use tests::{Guest, kernel, long_test, module, no_kernel_complaint, test};

/// Steps of the module, each with a scan.
const STEPS: u64 = 12;
/// What each adds for good.
const GROWN: u64 = 7;

/// The tests.
pub fn trials() -> Vec<Trial> {
    vec![
        test("references_that_pile_up_6.12-cloud", || piles_up("6.12-cloud")),
        long_test("references_that_pile_up_6.1-cloud", || piles_up("6.1-cloud")),
    ]
}

fn piles_up(line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::new(&kernel, 1)?;
    guest.file(&module(&kernel, "growing")?, "/growing.ko").script(&format!(
        "insmod /growing.ko
         echo growth > /dev/ttyS1; echo first: $(cat /dev/ttyS1)
         i=0; while [ $i -lt {STEPS} ]; do
             echo 1 > /sys/module/growing/parameters/step
             echo scan > /dev/ttyS1; cat /dev/ttyS1 > /dev/null; i=$((i+1)); done
         echo json growth > /dev/ttyS1; echo GROWTH; cat /dev/ttyS1; echo; echo END
         rmmod growing"
    ))?;
    let finished = guest.boot(0)?;
    no_kernel_complaint(&finished.stdout)?;
    let stdout = finished.stdout.replace('\r', "");
    let refusal = "first: error: growth compares 5 scans at least, and there were 0";
    ensure!(stdout.contains(refusal), "not {refusal:?}: {}", tests::tail(&stdout, 40));
    let reply = stdout.split_once("GROWTH\n").and_then(|(_, rest)| rest.split_once("END\n"));
    let growth: Value = serde_json::from_str(reply.context("no reply")?.0.trim())?;
    ensure!(growth["scans"] == STEPS, "{growth}");
    let listed = growth["growth"].as_array().context("growth")?;
    let named = |kind: &str, name: &str| {
        let fits = |one: &&Value| {
            one["kind"] == kind && one["name"].as_str().is_some_and(|found| found.starts_with(name))
        };
        listed.iter().find(fits)
    };
    let cache =
        named("cache", "growing-entry").with_context(|| format!("the cache is missing: {growth:#}"))?;
    let site =
        named("site", "growing_lookup+").with_context(|| format!("the site is missing: {growth:#}"))?;
    for one in [cache, site] {
        ensure!(one["objects"] == STEPS * GROWN, "{one}");
        let rate = one["objects_per_hour"].as_f64().context("rate")?;
        ensure!(rate > 0.0 && one["confidence"].as_f64().is_some_and(|c| c > 0.99), "{one}");
    }
    ensure!(site["freed_by"][0]["function"] == "growing_put", "{site}");
    for steady in ["growing_pool", "growing_batch"] {
        ensure!(named("site", steady).is_none(), "{steady} does not grow: {growth:#}");
    }
    Ok(())
}
