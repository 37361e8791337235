//! One boot of the oracle kernel, both detectors: what each reports of upstream's test module and of every case of `leaky`,
//! as the table of `docs/accuracy.md`.

use anyhow::{Context, Result, ensure};
use images::{Built, Cache, leaky, modules};
use serde_json::Value;
use std::env;
use std::fmt::Write;
use std::fs;
use tests::{Guest, RUN_TIMEOUT, no_kernel_complaint};

/// Objects that upstream's module has lost once it is loaded (samples/kmemleak/kmemleak-test.c of 6.1, without a
/// per-CPU allocation of its own).
const UPSTREAM: usize = 13;

/// Both scan so often, and the guest calls a lot in between, for a word that an earlier call left on a live stack can hide an object until
/// something else overwrites it.
const SCANS: usize = 3;

/// Objects that `annotated` has lost once it is loaded.
const ANNOTATED: usize = 3;

/// A detector's report of one object.
struct Found {
    address: String,
    /// Function and module of each frame, as kmemleak writes them.
    frames: Vec<String>,
}

impl Found {
    fn is_through(&self, function: &str) -> bool {
        self.frames.iter().any(|frame| frame.split(['+', ' ']).any(|word| word == function))
    }
}

/// What kmemleak says in its text.
fn theirs(text: &str) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    let mut in_backtrace = false;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("unreferenced object ") {
            let address = rest.split(' ').next().unwrap_or_default().to_owned();
            found.push(Found { address, frames: Vec::new() });
            in_backtrace = false;
        } else if line.starts_with("  backtrace") {
            in_backtrace = true;
        } else if let (Some(last), true) = (found.last_mut(), in_backtrace) {
            last.frames.push(line.trim().to_owned());
        }
    }
    found
}

/// What we say in JSON.
fn ours(report: &Value) -> Result<Vec<Found>> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let frame = |frame: &Value| format!("{} [{}]", text(&frame["symbol"]), text(&frame["module"]));
    let leaks = report["leaks"].as_array().context("leaks")?;
    let found = |leak: &Value| {
        let frames = leak["backtrace"].as_array().context("backtrace")?;
        Ok(Found { address: text(&leak["address"]), frames: frames.iter().map(frame).collect() })
    };
    leaks.iter().map(found).collect()
}

/// A row of the table.
struct Row {
    name: String,
    planted: usize,
    /// Objects reported by kmemleak, and by us.
    theirs: usize,
    ours: usize,
    /// Why they differ, where they do.
    why: String,
    /// We say ourselves that this kernel does not let us see such objects.
    uncovered: bool,
}

impl Row {
    /// One without a reason to differ: what kmemleak reports and what we do.
    fn plain(name: &str, planted: usize, [theirs, ours]: [usize; 2]) -> Self {
        Self { name: name.to_owned(), planted, theirs, ours, why: String::new(), uncovered: false }
    }
}

/// Runs both, prints the table, and writes it where `KLEAK_ACCURACY` says.
pub fn compare() -> Result<()> {
    let Reports { mut theirs, ours, uncovered, held } = reports()?;
    // Of code that is gone, such as a module's initialisation, kmemleak prints numbers.
    for found in &mut theirs {
        found
            .frames
            .extend(ours.iter().filter(|o| o.address == found.address).flat_map(|o| o.frames.clone()));
    }
    let mut rows: Vec<Row> = leaky::CASES.iter().map(|case| row(case, &theirs, &ours, &uncovered)).collect();
    let through = |found: &[Found], what: &str| found.iter().filter(|f| f.is_through(what)).count();
    let whole = [
        ("upstream's kmemleak-test", UPSTREAM, "[kmemleak_test]"),
        ("annotations: not_leak, ignore, no_scan, scan_area", ANNOTATED, "[annotated]"),
    ];
    for (name, planted, module) in whole {
        rows.push(Row::plain(name, planted, [&theirs, &ours].map(|found| through(found, module))));
    }
    let attributed = |count: fn(&Row) -> usize| rows.iter().map(count).sum::<usize>();
    let (kernel_theirs, kernel_ours) =
        (theirs.len() - attributed(|r| r.theirs), ours.len() - attributed(|r| r.ours));
    rows.push(Row::plain("the kernel itself", 0, [kernel_theirs, kernel_ours]));
    let table = table(&rows);
    println!("{table}");
    if let Some(file) = env::var_os("KLEAK_ACCURACY") {
        fs::write(&file, &table).with_context(|| format!("Cannot write {}", file.display()))?;
    }
    for row in &rows {
        let wanted = if row.uncovered { 0 } else { row.planted };
        ensure!(row.ours == wanted, "{}: planted {}, we found {}\n{held}", row.name, row.planted, row.ours);
        ensure!(
            row.theirs <= row.planted || !row.why.is_empty(),
            "{}: kmemleak reports {}, nobody knows why",
            row.name,
            row.theirs
        );
    }
    ensure!(
        through(&ours, "annotated_held") == 0,
        "an object of annotated is reported in spite of what was said"
    );
    // Stale words hide some from kmemleak, never most.
    let searched = leaky::CASES.iter().filter(|case| case.kmemleak_misses.is_none());
    let wanted =
        searched.map(|case| case.reported_at(leaky::Since::Load).len()).sum::<usize>() + UPSTREAM + ANNOTATED;
    let found: usize = rows.iter().map(|row| row.theirs.min(row.planted)).sum();
    ensure!(found * 4 > wanted * 3, "kmemleak finds {found} of {wanted}");
    Ok(())
}

/// What kmemleak and we report at the same state of the guest, which waits meanwhile.
struct Reports {
    theirs: Vec<Found>,
    ours: Vec<Found>,
    /// What we cannot see on this kernel, as `status` says.
    uncovered: Vec<String>,
    /// Why we do not report the others of upstream's objects, as `path=` says; the elements of its list are among them.
    held: String,
}

fn reports() -> Result<Reports> {
    let cache = Cache::of_workspace();
    let oracle = Built::oracle(&cache)?;
    let mut guest = Guest::of_image(&oracle.bzimage, 2)?;
    guest.cmdline("kmemleak=on no_hash_pointers").option("--scan-at-exit", "no");
    guest.option("--track", "slab,vmalloc,percpu,pages,ioremap");
    guest.file(&modules::own(&cache, &oracle.headers, "leaky")?, "/leaky.ko");
    guest.file(&modules::own(&cache, &oracle.headers, "annotated")?, "/annotated.ko");
    guest.file(&modules::kmemleak_test(&cache, &oracle.headers)?, "/kmemleak-test.ko").script(&format!(
            "mount -t debugfs none /sys/kernel/debug
             echo scan=off > /sys/kernel/debug/kmemleak
             calls() {{ ls -lR /proc/self /dev > /dev/null; }}
             insmod /leaky.ko case=all; insmod /annotated.ko; insmod /kmemleak-test.ko; sleep 4
             n=0; while [ $n -lt {SCANS} ]; do calls; sleep 6; echo scan > /sys/kernel/debug/kmemleak; n=$((n+1)); done
             cat /sys/kernel/debug/kmemleak > /tmp/theirs
             dmesg | grep 'kmemleak: .* = '
             n=0; while [ $n -lt {SCANS} ]; do calls; echo READY $n; read -r go; n=$((n+1)); done
             echo THEIRS; cat /tmp/theirs; echo END"
        ))?;
    let mut session = guest.start()?;
    for scan in 0..SCANS {
        session.wait_for(&format!("\nREADY {scan}"), RUN_TIMEOUT)?;
        guest.ctl("scan")?;
        if scan + 1 < SCANS {
            session.type_line("go")?;
        }
    }
    let ours = ours(&guest.json("report")?)?;
    let uncovered = serde_json::from_value(guest.json("status")?["uncovered"].take()).context("uncovered")?;
    let shown = session.shown();
    // `kmemleak: WHAT = ADDRESS`, without 0x.
    let upstream = shown.lines().filter_map(|line| line.split_once("kmemleak: ")?.1.trim().split_once(" = "));
    let held = upstream.map(|(what, address)| (what, format!("0x{address}")));
    let held = held.filter(|(_, address)| ours.iter().all(|found| found.address != *address));
    let held =
        held.map(|(what, address)| Ok(format!("{what}: {}\n", guest.ctl(&format!("path={address}"))?)));
    let held = held.collect::<Result<String>>()?;
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    no_kernel_complaint(&finished.stdout)?;
    let stdout = finished.stdout.replace('\r', "");
    let (_, rest) = stdout.split_once("THEIRS\n").context("no report of the kernel's")?;
    let (text, _) = rest.split_once("END\n").context("the kernel's report does not end")?;
    Ok(Reports { theirs: theirs(text), ours, uncovered, held })
}

fn row(case: &leaky::Case, theirs: &[Found], ours: &[Found], uncovered: &[String]) -> Row {
    let function = case.function();
    let count = |found: &[Found]| found.iter().filter(|f| f.is_through(&function)).count();
    let planted = case.reported_at(leaky::Since::Load).len();
    let (theirs, ours) = (count(theirs), count(ours));
    let uncovered = case.needs == leaky::Needs::Ioremap && uncovered.iter().any(|what| what == "ioremap");
    let why = if uncovered {
        "kmemleak does not track device memory; nor does kleak-vmm in this build of the kernel, whose ioremap has no place for \
         a trap, and says so"
    } else if theirs > planted && theirs <= planted + case.kmemleak_adds.len() {
        "kmemleak does not read pages: the pointer is in one"
    } else if theirs < planted {
        case.kmemleak_misses
            .unwrap_or("kmemleak did not find all: some word equals the address, most likely a stale one")
    } else {
        ""
    };
    Row { name: case.name.to_owned(), planted, theirs, ours, why: why.to_owned(), uncovered }
}

fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| Case | Planted | kmemleak found | kleak-vmm found | False alarms of kmemleak | of kleak-vmm | Why they differ |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let Row { name, planted, theirs, ours, why, .. } = row;
        let alarms = |found: &usize| found.saturating_sub(*planted);
        let (false_theirs, false_ours) = (alarms(theirs), alarms(ours));
        let (theirs, ours) = (theirs.min(planted), ours.min(planted));
        let _ = writeln!(
            text,
            "| {name} | {planted} | {theirs} | {ours} | {false_theirs} | {false_ours} | {why} |"
        );
    }
    text
}
