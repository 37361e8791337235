//! The console's accounting against the guest's own files in /proc, read while the guest waits.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::HashMap;
use std::process::ExitCode;
use std::time::Duration;
use tests::{Guest, RUN_TIMEOUT, kernel, no_kernel_complaint, test};

/// Files whose directory entries the guest makes between `mark` and `diff`.
const FILES: u64 = 400;
/// Entries that the guest may give back meanwhile: those of processes that ended, in /proc.
const ENTRIES_OF_OTHERS: i64 = 100;
/// Slabs by which a cache may differ from the guest's own two readings: those who read come and go between.
const SLABS_OF_READERS: i64 = 2;
/// One cache in so many may be further off: a burst (RCU frees maple nodes late) fits between two readings.
const ONE_IN_A_BURST: usize = 20;

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for line in ["6.1-cloud", "6.12-cloud"] {
        trials.push(test(format!("as_proc_says_{line}"), move || as_proc_says(line)));
        trials.push(test(format!("processes_as_smaps_says_{line}"), move || processes(line)));
    }
    tests::main(trials)
}

fn as_proc_says(line: &str) -> Result<()> {
    let mut guest = Guest::new(&kernel(line)?, 2)?;
    guest.script(&format!(
        "show() {{ echo \"== $1\"; cat /proc/slabinfo; echo '== stat'; cat /proc/[0-9]*/stat; echo == end; }}
         show before; echo READY; read -r go; show after
         echo MARKED; read -r go
         mkdir -p /tmp/many; i=0; while [ $i -lt {FILES} ]; do : > /tmp/many/f$i; i=$((i+1)); done
         echo MADE; read -r go"
    ))?;
    let mut session = guest.start()?;
    session.wait_for("\nREADY", RUN_TIMEOUT)?;
    let slabs = json(&guest, "slabinfo")?;
    let tasks = json(&guest, "ps")?;
    let trace = guest.ctl("bt 2")?;
    ensure!(trace.contains("kthreadd+0x") && trace.contains("ret_from_fork"), "{trace}");
    ensure!(!trace.contains("not complete"), "{trace}");
    held(&guest)?;
    session.type_line("go")?;
    session.wait_for("\nMARKED", RUN_TIMEOUT)?;
    guest.ctl("mark")?;
    session.type_line("go")?;
    session.wait_for("\nMADE", RUN_TIMEOUT)?;
    growth(&guest)?;
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    no_kernel_complaint(&finished.stdout)?;
    let console = finished.stdout.replace('\r', "");
    let part = |name: &str| {
        let rest = console.split_once(&format!("== {name}\n")).map(|(_, rest)| rest);
        rest.and_then(|r| r.split_once("== end")).map(|(part, _)| part).with_context(|| name.to_owned())
    };
    compare_slabs(&slabs["slabinfo"], part("before")?, part("after")?)?;
    compare_tasks(&tasks["ps"], part("before")?, part("after")?)
}

fn json(guest: &Guest, command: &str) -> Result<Value> {
    let reply = guest.ctl(&format!("json {command}"))?;
    serde_json::from_str(&reply).with_context(|| format!("{command}: {reply}"))
}

/// A held machine stands still and answers.
fn held(guest: &Guest) -> Result<()> {
    ensure!(guest.ctl("pause")?.starts_with("paused:"));
    let before = guest.ctl("regs")?;
    ensure!(before.contains("cpu 1: "), "{before}");
    std::thread::sleep(Duration::from_millis(300));
    let (after, status) = (guest.ctl("regs")?, guest.ctl("status")?);
    ensure!(before == after, "{before}\n{after}");
    ensure!(status.contains("paused: true"), "{status}");
    ensure!(guest.ctl("resume")?.starts_with("resumed"));
    ensure!(guest.ctl("resume")?.starts_with("running already"));
    Ok(())
}

/// The entries made since the mark are in the difference, and their callers are named.
fn growth(guest: &Guest) -> Result<()> {
    let changes = json(guest, "slabinfo diff")?;
    let changes = changes["slabinfo"].as_array().context("rows")?;
    let dentries = changes.iter().find(|row| row["name"] == "dentry").context("no dentry")?;
    let grown = dentries["active"].as_i64().context("active")?;
    ensure!(grown >= FILES as i64 - ENTRIES_OF_OTHERS, "{dentries}");
    let calls = json(guest, "alloc_calls=dentry")?;
    let calls = calls["alloc_calls"].as_array().context("calls")?;
    let counted: u64 = calls.iter().filter_map(|call| call["objects"].as_u64()).sum();
    ensure!(counted >= FILES, "{counted} dentries");
    let top = calls.first().and_then(|call| call["site"].as_str()).unwrap_or_default();
    ensure!(top.starts_with("__d_alloc+0x"), "{top}");
    let caches = guest.ctl("top caches")?;
    ensure!(caches.lines().any(|line| line.ends_with("  dentry")), "{caches}");
    Ok(())
}

/// Name, active objects, objects, size and slabs of each cache in /proc/slabinfo.
fn slabinfo(text: &str) -> HashMap<&str, [i64; 4]> {
    let lines = text.lines().filter(|line| line.contains(" : slabdata "));
    lines
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let number = |at: usize| fields.get(at).and_then(|f| f.parse().ok());
            Some((*fields.first()?, [number(1)?, number(2)?, number(3)?, number(14)?]))
        })
        .collect()
}

fn compare_slabs(ours: &Value, before: &str, after: &str) -> Result<()> {
    let (before, after) = (slabinfo(before), slabinfo(after));
    ensure!(before.len() > 50, "only {} caches in /proc/slabinfo", before.len());
    let ours: HashMap<&str, &Value> = ours
        .as_array()
        .context("rows")?
        .iter()
        .filter_map(|row| Some((row["name"].as_str()?, row)))
        .collect();
    let (mut steady, mut equal) = (0, 0);
    let mut off = Vec::new();
    for (name, theirs) in &before {
        let Some(later) = after.get(name) else { continue };
        let Some(row) = ours.get(name) else {
            // A cache without slabs has no row.
            ensure!(theirs[3].min(later[3]) <= SLABS_OF_READERS, "{name} is missing: {theirs:?}");
            continue;
        };
        let number = |member: &str| row[member].as_i64().with_context(|| format!("{member} of {name}"));
        let (active, total, slabs) = (number("active")?, number("total")?, number("slabs")?);
        ensure!(number("size")? == theirs[2], "{row}, theirs {theirs:?}");
        let per_slab = total.div_euclid(slabs.max(1)) + 1;
        let (least, most) = (theirs[3].min(later[3]), theirs[3].max(later[3]));
        let near = least - SLABS_OF_READERS <= slabs && slabs <= most + SLABS_OF_READERS;
        // What lies free in a CPU's own slabs is active to them: ours is never more.
        let most_active = theirs[0].max(later[0]) + SLABS_OF_READERS * per_slab;
        if !near || active > most_active {
            off.push(format!("{row}, theirs {theirs:?} and {later:?}"));
        }
        if theirs[1] == later[1] && theirs[3] == later[3] {
            steady += 1;
            equal += usize::from(total == theirs[1] && slabs == theirs[3]);
        }
    }
    ensure!(off.len() * ONE_IN_A_BURST <= before.len(), "{}", off.join("\n"));
    ensure!(steady > 50 && equal * 10 >= steady * 9, "{equal} of {steady} steady caches are equal");
    Ok(())
}

/// Every process that was there before and after is in `ps`, by name.
fn compare_tasks(ours: &Value, before: &str, after: &str) -> Result<()> {
    let ours = ours.as_array().context("rows")?;
    let stat = |text: &str| -> HashMap<i64, String> {
        let lines = text.split_once("== stat\n").map_or("", |(_, rest)| rest).lines();
        let parse = |line: &str| {
            let (pid, rest) = line.split_once(" (")?;
            let (comm, _) = rest.rsplit_once(") ")?;
            Some((pid.parse().ok()?, comm.to_owned()))
        };
        lines.filter_map(parse).collect()
    };
    let (before, after) = (stat(before), stat(after));
    let mut compared = 0;
    for (pid, comm) in before.iter().filter(|(pid, comm)| after.get(pid) == Some(comm)) {
        let row = ours.iter().find(|row| row["pid"] == *pid).with_context(|| format!("no pid {pid}"))?;
        // A kernel worker's name in /proc has what it works on behind its own.
        let name = row["comm"].as_str().unwrap_or_default();
        ensure!(comm.starts_with(name) && !name.is_empty(), "{row}, theirs {comm}");
        compared += 1;
    }
    ensure!(compared > 20, "only {compared} tasks compared");
    let init = ours.iter().find(|row| row["pid"] == 1).context("no init")?;
    ensure!(init["state"] == "S" && init["stack_bytes"].as_i64() > Some(0), "{init}");
    Ok(())
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
    let ours = json(&guest, "procrank")?;
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
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
