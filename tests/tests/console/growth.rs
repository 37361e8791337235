//! What grows although it is referenced: listed; what stays or comes in waves: not.

use anyhow::{Context, Result, ensure};
use guest_profiles::annotations::builtin;
use libtest_mimic::Trial;
use serde_json::Value;
use std::collections::HashMap;
use tests::{Client, Guest, RUN_TIMEOUT, kernel, long_test, module, no_kernel_complaint, test};

/// Steps of the module, each with a scan.
const STEPS: u64 = 12;
/// What each adds for good.
const GROWN: u64 = 7;
/// References to a directory entry that the module takes and forgets.
const FORGOTTEN: i64 = 8;
/// Words that may look like references to it: old ones in memory that is in use again.
const STALE: i64 = 1;
/// Entries that may be listed beside it: those that the kernel holds otherwise.
const OTHERS: usize = 4;

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
        "# No message of the kernel's may stand in the middle of a reply; they come at the end.
         echo 1 > /proc/sys/kernel/printk
         insmod /growing.ko
         echo growth > /dev/ttyS1; echo first: $(cat /dev/ttyS1)
         i=0; while [ $i -lt {STEPS} ]; do
             echo 1 > /sys/module/growing/parameters/step
             echo scan > /dev/ttyS1; cat /dev/ttyS1 > /dev/null; i=$((i+1)); done
         echo json growth > /dev/ttyS1; echo GROWTH; cat /dev/ttyS1; echo; echo END
         : > /tmp/held; echo /tmp/held > /sys/module/growing/parameters/hold
         echo json refs=dentry > /dev/ttyS1; echo REFS; cat /dev/ttyS1; echo; echo END
         for c in /sys/kernel/slab/*; do echo \"ALIASES ${{c##*/}} $(cat $c/aliases)\"; done
         echo HELD; read -r go; rmmod growing; dmesg"
    ))?;
    let mut session = guest.start()?;
    session.wait_for("\nHELD", RUN_TIMEOUT)?;
    held(&guest)?;
    merged(&guest, &session.shown())?;
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    no_kernel_complaint(&finished.stdout)?;
    let stdout = finished.stdout.replace('\r', "");
    let refusal = "first: error: growth compares 5 scans at least, and there were 0";
    ensure!(stdout.contains(refusal), "not {refusal:?}: {}", tests::tail(&stdout, 40));
    let reply = |to: &str| -> Result<Value> {
        let reply = stdout.split_once(&format!("\n{to}\n")).and_then(|(_, rest)| rest.split_once("END\n"));
        Ok(serde_json::from_str(reply.with_context(|| format!("no reply to {to}"))?.0.trim())?)
    };
    forgotten(&reply("REFS")?)?;
    let growth = reply("GROWTH")?;
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
    // Neither what is steady, nor the sawtooth, nor what the kernel keeps of the processes that each step starts.
    ensure!(listed.len() == 2, "something is listed that does not grow: {growth:#}");
    Ok(())
}

/// The entry with three references that nobody has any more is listed first, and nearly nothing else.
fn forgotten(refs: &Value) -> Result<()> {
    let rows = refs["refs"].as_array().context("refs")?;
    let first = rows.first().with_context(|| format!("nothing is listed: {refs}"))?;
    let excess = first["excess"].as_i64().context("excess")?;
    ensure!(
        (FORGOTTEN - STALE..=FORGOTTEN).contains(&excess)
            && first["site"].as_str().is_some_and(|s| s.contains("d_alloc")),
        "{refs:#}"
    );
    ensure!(rows.len() <= OTHERS && refs["objects"].as_u64() > Some(300), "{refs:#}");
    Ok(())
}

/// A cache that others were merged into has objects of their types, too: no count is read from any of them.
fn merged(guest: &Guest, shown: &str) -> Result<()> {
    let aliases: HashMap<&str, u32> = shown
        .lines()
        .filter_map(|line| line.strip_prefix("ALIASES ")?.trim().split_once(' '))
        .filter_map(|(name, count)| Some((name, count.parse().ok()?)))
        .collect();
    ensure!(aliases.len() > 50, "only {} caches in /sys/kernel/slab", aliases.len());
    let counts = builtin().counts;
    let others = ["nsproxy", "cred", "uid_cache", "vmap_area"];
    let names = counts.iter().map(|count| count.cache.as_str()).chain(others);
    let mut client = Client::of(guest)?;
    let mut refused = Vec::new();
    for name in names.filter(|name| aliases.get(name).is_some_and(|&others| others > 0)) {
        let reply = client.ask(&format!("refs={name}"))?;
        let told = ["names on this kernel", "merged it into another"].iter().any(|why| reply.contains(why));
        ensure!(reply.starts_with("error: ") && told, "refs={name} with {} aliases: {reply}", aliases[name]);
        refused.push(name);
    }
    ensure!(!refused.is_empty(), "no cache is merged: {aliases:?}");
    Ok(())
}

/// `refs=ADDR` of that entry and of one that is in order.
fn held(guest: &Guest) -> Result<()> {
    let listed = guest.json("refs=dentry")?;
    let address = listed["refs"][0]["object"].as_str().context("an object")?;
    let refs = &guest.json(&format!("refs={address}"))?["refs"];
    // One reference keeps the entry in the file system, without a pointer.
    ensure!(refs["count"] == FORGOTTEN + 1 && refs["own"] == 1, "{refs:#}");
    ensure!(refs["found"].as_i64().is_some_and(|found| found <= STALE), "{refs:#}");
    ensure!(refs["member"] == "d_lockref.count" && refs["inside"].as_u64() > Some(0), "{refs:#}");
    let text = guest.ctl(&format!("refs={address}"))?;
    let line = format!("counted and not there: {}\n", refs["excess"]);
    ensure!(text.contains(&line) && text.contains("struct dentry\n"), "{text}");
    // Its directory: counted by the entry, which points to it.
    let holder = text.lines().find_map(|line| line.split_once("its word at +")?.0.trim().split(' ').next());
    let parent = guest.ctl(&format!("refs={}", holder.context("no holder")?))?;
    ensure!(parent.contains("referenced by:\n"), "{parent}");
    Ok(())
}
