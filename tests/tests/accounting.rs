//! The console's accounting against the guest's own files in /proc, read while the guest waits.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::process::ExitCode;
use std::time::Duration;
use tests::{Guest, RUN_TIMEOUT, kernel, no_kernel_complaint, run, test};

/// Files whose directory entries the guest makes between `mark` and `diff`.
const FILES: u64 = 400;
/// Entries that the guest may give back meanwhile: those of processes that ended, in /proc.
const ENTRIES_OF_OTHERS: i64 = 100;
/// Slabs by which a cache may differ from the guest's own two readings: those who read come and go between.
const SLABS_OF_READERS: i64 = 2;
/// One cache in so many may be further off: a burst (RCU frees maple nodes late) fits between two readings.
const ONE_IN_A_BURST: usize = 20;
/// Nor does a burst change a cache more than so many times.
const BURST: i64 = 2;
/// vCPUs.
const CPUS: i64 = 2;
/// Objects in the partial slabs that a CPU keeps, at most: `set_cpu_partial` (mm/slub.c) takes 120 of the smallest, in slabs
/// that are half full.
const KEPT_BY_A_CPU: i64 = 2 * 120;
/// Pages by which an amount may differ from the guest's own two readings: the process that reads is there only while it
/// does, and is given back late.
const PAGES_OF_READERS: i64 = 200;
/// Lines of /proc/meminfo in which that process counts itself each time.
const OF_READERS: [&str; 5] = ["AnonPages", "KernelStack", "PageTables", "Committed_AS", "VmallocUsed"];
/// Areas of the vmalloc space that may differ: kernel stacks of those processes.
const STACKS_OF_READERS: usize = 6;
/// Lines of /proc/vmstat without a counter behind them.
const NO_COUNTERS: [&str; 3] = ["nr_dirty_threshold", "nr_dirty_background_threshold", "nr_unstable"];
/// Lines of /proc/meminfo that both kernels must have an answer for.
const LINES: [&str; 23] = [
    "MemTotal",
    "MemFree",
    "MemAvailable",
    "Buffers",
    "Cached",
    "SwapCached",
    "Active",
    "Inactive",
    "Unevictable",
    "SwapTotal",
    "Dirty",
    "AnonPages",
    "Mapped",
    "Shmem",
    "Slab",
    "SReclaimable",
    "SUnreclaim",
    "KernelStack",
    "PageTables",
    "CommitLimit",
    "Committed_AS",
    "VmallocUsed",
    "Percpu",
];

fn main() -> ExitCode {
    let lines = ["6.1-cloud", "6.12-cloud"];
    tests::main(lines.map(|line| test(format!("as_proc_says_{line}"), move || as_proc_says(line))).into())
}

fn as_proc_says(line: &str) -> Result<()> {
    let mut guest = Guest::new(&kernel(line)?, CPUS as u32)?;
    guest.script(&format!(
        "show() {{ echo \"== $1\"; cat /proc/slabinfo; echo '== stat'; cat /proc/[0-9]*/stat; echo == end; }}
         memory() {{ cat /proc/sys/vm/stat_refresh
             for f in vmallocinfo buddyinfo meminfo vmstat; do echo \"== $f $1\"; cat /proc/$f; echo == end; done; }}
         echo 1 > /proc/sys/kernel/kptr_restrict
         # No message of the kernel's may stand in the middle of what is compared; they come at the end.
         echo 1 > /proc/sys/kernel/printk
         show before; echo READY; read -r go; show after
         memory before; echo COUNTED; read -r go; memory after
         echo MARKED; read -r go
         mkdir -p /tmp/many; i=0; while [ $i -lt {FILES} ]; do : > /tmp/many/f$i; i=$((i+1)); done
         echo MADE; read -r go; dmesg"
    ))?;
    let mut session = guest.start()?;
    session.wait_for("\nREADY", RUN_TIMEOUT)?;
    guest.ctl("pause")?;
    let slabs = guest.json("slabinfo")?;
    crash_slabs(&guest, &slabs)?;
    guest.ctl("resume")?;
    let tasks = guest.json("ps")?;
    let trace = guest.ctl("bt 2")?;
    ensure!(trace.contains("kthreadd+0x") && trace.contains("ret_from_fork"), "{trace}");
    ensure!(!trace.contains("not complete"), "{trace}");
    held(&guest)?;
    session.type_line("go")?;
    session.wait_for("\nCOUNTED", RUN_TIMEOUT)?;
    guest.ctl("pause")?;
    let [vmallocinfo, buddyinfo, meminfo, vmstat] =
        ["vmallocinfo", "buddyinfo", "meminfo", "vmstat"].map(|command| guest.json(command));
    crash_memory(&guest, meminfo.as_ref().ok().context("meminfo")?)?;
    guest.ctl("resume")?;
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
    compare_tasks(&tasks["ps"], part("before")?, part("after")?)?;
    compare_areas(&vmallocinfo?, part("vmallocinfo before")?, part("vmallocinfo after")?)?;
    compare_blocks(&buddyinfo?, part("buddyinfo before")?, part("buddyinfo after")?)?;
    compare_meminfo(&meminfo?, part("meminfo before")?, part("meminfo after")?)?;
    compare_vmstat(&vmstat?, part("vmstat before")?, part("vmstat after")?)
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

/// `kmem -s` has what `slabinfo` has, at the same pause; that is compared with the guest's own file.
fn crash_slabs(guest: &Guest, slabinfo: &Value) -> Result<()> {
    let kmem = guest.json("kmem -s")?;
    let kmem = rows(&kmem, "kmem -s")?;
    let slabs = rows(slabinfo, "slabinfo")?;
    ensure!(slabs.len() > 50 && slabinfo["damaged"] == Value::Array(Vec::new()), "{}", slabinfo["damaged"]);
    let amounts = |row: &Value, names: [&str; 4]| names.map(|name| row[name].as_i64());
    for row in slabs {
        let ours = amounts(row, ["object_size", "active", "total", "slabs"]);
        let same = |other: &&Value| {
            other["name"] == row["name"] && amounts(other, ["objsize", "allocated", "total", "slabs"]) == ours
        };
        let found = kmem.iter().find(same).with_context(|| format!("no {row} in kmem -s"))?;
        ensure!(found["ssize"].as_i64() >= row["size"].as_i64(), "{found}, {row}");
    }
    let one = guest.ctl("kmem -s dentry")?;
    let lines: Vec<&str> = one.lines().collect();
    ensure!(lines.len() == 2 && lines[0].starts_with("CACHE  ") && lines[1].ends_with("  dentry"), "{one}");
    ensure!(ctl_fails(guest, "kmem -s nothing")?.contains("no slab cache"));
    Ok(())
}

/// `kmem` has what `meminfo` has, at the same pause; that is compared with the guest's own file.
fn crash_memory(guest: &Guest, meminfo: &Value) -> Result<()> {
    let kmem = guest.json("kmem")?;
    let pages =
        |name: &str| rows(&kmem, "kmem").ok()?.iter().find(|row| row["name"] == name)?["pages"].as_i64();
    let kb =
        |name: &str| rows(meminfo, "meminfo").ok()?.iter().find(|row| row["name"] == name)?["kB"].as_i64();
    let pairs = [
        ("TOTAL MEM", "MemTotal"),
        ("FREE", "MemFree"),
        ("BUFFERS", "Buffers"),
        ("CACHED", "Cached"),
        ("SLAB", "Slab"),
        ("TOTAL HUGE", "Hugetlb"),
        ("TOTAL SWAP", "SwapTotal"),
        ("SWAP FREE", "SwapFree"),
        ("COMMIT LIMIT", "CommitLimit"),
        ("COMMITTED", "Committed_AS"),
    ];
    for (crash, proc) in pairs {
        let (ours, theirs) = (pages(crash), kb(proc));
        ensure!(
            ours.is_some() && ours.map(|pages| pages * 4) == theirs,
            "{crash} {ours:?}, {proc} {theirs:?}"
        );
    }
    let [total, free, used, shared] = ["TOTAL MEM", "FREE", "USED", "SHARED"].map(pages);
    ensure!(used == total.zip(free).map(|(total, free)| total - free), "{kmem}");
    ensure!(shared > Some(100) && shared < used, "{kmem}");
    ensure!(guest.ctl("kmem -i")?.contains("% of TOTAL MEM\n"));
    Ok(())
}

/// The one line that a command that cannot be carried out is answered with.
fn ctl_fails(guest: &Guest, command: &str) -> Result<String> {
    let socket = guest.socket();
    let socket = socket.to_str().context("socket path")?;
    let finished = run(["ctl", "--control", socket].into_iter().chain(command.split(' ')))?;
    finished.expect_code(2)?;
    Ok(finished.stderr)
}

/// The entries made since the mark are in the difference, and their callers are named.
fn growth(guest: &Guest) -> Result<()> {
    let changes = guest.json("slabinfo diff")?;
    let changes = changes["slabinfo"].as_array().context("rows")?;
    let dentries = changes.iter().find(|row| row["name"] == "dentry").context("no dentry")?;
    let grown = dentries["active"].as_i64().context("active")?;
    ensure!(grown >= FILES as i64 - ENTRIES_OF_OTHERS, "{dentries}");
    changes_of_memory(guest)?;
    let calls = guest.json("alloc_calls=dentry")?;
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
        // What lies free in a CPU's own slabs is active to them: ours is never more, and less by no more than that.
        let most_active = theirs[0].max(later[0]) + SLABS_OF_READERS * per_slab;
        let free = CPUS * (2 * per_slab + KEPT_BY_A_CPU) + SLABS_OF_READERS * per_slab;
        let least_active = theirs[0].min(later[0]) - free;
        let what = || format!("{row}, theirs {theirs:?} and {later:?}");
        if !near || !(least_active..=most_active).contains(&active) {
            off.push(what());
        }
        ensure!(
            slabs * BURST >= least - SLABS_OF_READERS && slabs <= (most + SLABS_OF_READERS) * BURST,
            "{}",
            what()
        );
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
    ensure!(compared > 20, "only {compared} of {} and {} tasks compared", before.len(), after.len());
    let init = ours.iter().find(|row| row["pid"] == 1).context("no init")?;
    ensure!(init["state"] == "S" && init["stack_bytes"].as_i64() > Some(0), "{init}");
    Ok(())
}

/// The same growth in the page allocator's terms: files without data are slabs, and making them is work that is counted.
fn changes_of_memory(guest: &Guest) -> Result<()> {
    let change = |command: &str, name: &str, member: &str| -> Result<i64> {
        let reply = guest.json(&format!("{command} diff"))?;
        let row = rows(&reply, command)?.iter().find(|row| row["name"] == name);
        row.and_then(|row| row[member].as_i64()).with_context(|| format!("no {name} in {reply}"))
    };
    let slab_kb = change("meminfo", "Slab", "kB")?;
    ensure!((100..4000).contains(&slab_kb), "{slab_kb} kB of slabs");
    ensure!(change("vmstat", "nr_slab_reclaimable", "value")? > 0);
    ensure!(change("kmem", "SLAB", "pages")? * 4 >= slab_kb / 2);
    let dentries = guest.ctl("kmem -s dentry diff")?;
    ensure!(dentries.lines().nth(1).is_some_and(|line| line.contains("  +")), "{dentries}");
    ensure!(change("vmstat", "pgfault", "value")? > 0);
    let blocks = guest.json("buddyinfo diff")?;
    let rows_of_zones = rows(&blocks, "buddyinfo")?;
    ensure!(!rows_of_zones.is_empty(), "nothing of all that in {blocks}");
    // There may be more free pages than before: CPUs give back what they had kept for themselves.
    for row in rows_of_zones {
        let by_order = (0..=10).filter_map(|order| Some(row[order.to_string()].as_i64()? << order));
        ensure!(row["pages"] == by_order.sum::<i64>(), "{row}");
    }
    rows(&guest.json("vmallocinfo diff")?, "vmallocinfo")?;
    Ok(())
}

fn rows<'a>(reply: &'a Value, command: &str) -> Result<&'a Vec<Value>> {
    reply[command].as_array().with_context(|| format!("{command}: {reply}"))
}

/// How far a value is from the range between two others.
fn off(value: i64, one: i64, other: i64) -> i64 {
    let (least, most) = (one.min(other), one.max(other));
    (least - value).max(value - most).max(0)
}

/// Names and values of `name value` or `name: value kB`, in order.
fn values(text: &str) -> Vec<(&str, i64)> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?.trim_end_matches(':'), words.next()?.parse().ok()?))
        })
        .collect()
}

fn compare_vmstat(ours: &Value, before: &str, after: &str) -> Result<()> {
    let ours = rows(ours, "vmstat")?;
    let (before, after) = (values(before), values(after));
    ensure!(before.len() > 100 && before.len() == after.len(), "{} counters in /proc/vmstat", before.len());
    let theirs: Vec<&str> =
        before.iter().map(|&(name, _)| name).filter(|n| !NO_COUNTERS.contains(n)).collect();
    let names: Vec<&str> = ours.iter().filter_map(|row| row["name"].as_str()).collect();
    ensure!(names == theirs, "{names:?}\n{theirs:?}");
    let first_event = names.iter().position(|&name| name == "pgpgin").context("no events")?;
    let (mut steady, mut equal) = (0, 0);
    for (at, row) in ours.iter().enumerate() {
        let find = |all: &[(&str, i64)]| all.iter().find(|(name, _)| row["name"] == *name).map(|&(_, v)| v);
        let value = row["value"].as_i64().with_context(|| row.to_string())?;
        let (before, after) = find(&before).zip(find(&after)).with_context(|| row.to_string())?;
        // Events and placements only grow, and the file has every CPU's.
        let exact = at >= first_event || names[at].starts_with("numa_");
        let bound = if exact { 0 } else { PAGES_OF_READERS };
        ensure!(off(value, before, after) <= bound, "{row}, theirs {before} and {after}");
        steady += usize::from(before == after);
        equal += usize::from(before == after && value == before);
    }
    ensure!(steady > 50 && equal * 10 >= steady * 9, "{equal} of {steady} steady counters are equal");
    Ok(())
}

fn compare_meminfo(ours: &Value, before: &str, after: &str) -> Result<()> {
    let ours = rows(ours, "meminfo")?;
    let (before, after): (HashMap<_, _>, HashMap<_, _>) =
        (values(before).into_iter().collect(), values(after).into_iter().collect());
    for line in LINES {
        ensure!(ours.iter().any(|row| row["name"] == line), "no {line}");
    }
    let (mut steady, mut others) = (0, Vec::new());
    for row in ours {
        let name = row["name"].as_str().with_context(|| row.to_string())?;
        let value = row["kB"].as_i64().with_context(|| row.to_string())?;
        let theirs = before.get(name).zip(after.get(name));
        let (&before, &after) = theirs.with_context(|| format!("/proc/meminfo has no {name}"))?;
        ensure!(off(value, before, after) <= 4 * PAGES_OF_READERS, "{row}, theirs {before} and {after}");
        let is_steady = before == after && !OF_READERS.contains(&name);
        steady += usize::from(is_steady);
        if is_steady && value != before {
            others.push(format!("{row}, theirs {before} twice"));
        }
    }
    // One slab that readers take and give back is in four lines: MemFree, MemAvailable, Slab, and a part of that.
    ensure!(steady > 10 && others.len() * 5 <= steady, "of {steady} steady lines:\n{}", others.join("\n"));
    Ok(())
}

/// Zone and free blocks by order, of /proc/buddyinfo.
fn buddyinfo(text: &str) -> Vec<(&str, Vec<i64>)> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("Node 0, zone "));
    lines
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?, words.filter_map(|word| word.parse().ok()).collect()))
        })
        .collect()
}

fn compare_blocks(ours: &Value, before: &str, after: &str) -> Result<()> {
    let by_type = rows(ours, "pagetypeinfo")?;
    let ours = rows(ours, "buddyinfo")?;
    let (before, after) = (buddyinfo(before), buddyinfo(after));
    ensure!(!before.is_empty() && before.len() == ours.len(), "{ours:?}, theirs {before:?}");
    let pages = |blocks: &[i64]| -> i64 { (0..).zip(blocks).map(|(order, blocks)| blocks << order).sum() };
    for (row, ((zone, before), (_, after))) in ours.iter().zip(before.iter().zip(&after)) {
        ensure!(row["node"] == 0 && row["zone"] == *zone, "{row}, theirs {zone}");
        let count = |row: &Value, order: usize| row[order.to_string()].as_i64();
        let blocks: Vec<i64> = (0..).map_while(|order| count(row, order)).collect();
        ensure!(blocks.len() == before.len(), "{row}, theirs {before:?}");
        let (total, least, most) = (pages(&blocks), pages(before), pages(after));
        ensure!(off(total, least, most) <= PAGES_OF_READERS, "{row}, theirs {before:?} and {after:?}");
        ensure!(row["pages"] == total, "{row}");
        ensure!(before != after || blocks == *before, "{row}, theirs {before:?} twice");
        // The allocator's count and the lists it is of.
        for (order, blocks) in blocks.into_iter().enumerate() {
            let of_zone = by_type.iter().filter(|ty| ty["zone"] == *zone);
            let listed: i64 = of_zone.filter_map(|ty| count(ty, order)).sum();
            ensure!(listed == blocks, "order {order} of {zone}: {blocks} counted, {listed} listed");
        }
    }
    Ok(())
}

/// Lines of /proc/vmallocinfo, without what is being given back and without the nodes pages are on.
fn vmallocinfo(text: &str) -> HashSet<String> {
    let lines = text.lines().filter(|line| line.starts_with("0x") && !line.contains("unpurged"));
    let words = |line: &str| -> Vec<String> {
        let on_node = |word: &str| word.starts_with('N') && word.contains('=');
        line.split_whitespace().filter(|word| !on_node(word)).map(str::to_owned).collect()
    };
    lines.map(|line| words(line).join(" ")).collect()
}

fn compare_areas(ours: &Value, before: &str, after: &str) -> Result<()> {
    let ours = rows(ours, "vmallocinfo")?;
    let (before, after) = (vmallocinfo(before), vmallocinfo(after));
    ensure!(before.len() > 30 && after.len() > 30, "{} areas in /proc/vmallocinfo", before.len());
    let lines: HashSet<String> = ours
        .iter()
        .map(|row| {
            let text = |member: &str| row[member].as_str().unwrap_or_default().to_owned();
            let pages = row["pages"].as_i64().filter(|&pages| pages != 0);
            let parts = [
                text("range"),
                row["bytes"].to_string(),
                Some(text("caller")).filter(|caller| caller != "-").unwrap_or_default(),
                pages.map(|pages| format!("pages={pages}")).unwrap_or_default(),
                text("flags"),
            ];
            parts.iter().filter(|part| !part.is_empty()).cloned().collect::<Vec<_>>().join(" ")
        })
        .collect();
    let missing: Vec<&String> = before.intersection(&after).filter(|line| !lines.contains(*line)).collect();
    let unknown: Vec<&String> = lines.iter().filter(|&l| !before.contains(l) && !after.contains(l)).collect();
    ensure!(
        missing.len() <= STACKS_OF_READERS && unknown.len() <= STACKS_OF_READERS,
        "missing {missing:#?}\nunknown {unknown:#?}"
    );
    Ok(())
}
