//! A machine that was saved shows what it showed when it ran: `snapshot=`, `core=`, `--snapshot-on-leak`, `analyze`.

use anyhow::{Context, Result, ensure};
use images::{Cache, KernelPackage};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use tests::{
    Finished, Guest, RUN_TIMEOUT, Scratch, kernel, long_test, module, no_kernel_complaint, report, run, test,
    with_packages,
};

/// Commands whose replies come from the machine alone, so that it makes no difference when they are given. ADDR is that of
/// a lost object.
const COMMANDS: [&str; 16] = [
    "dump=ADDR",
    "path=ADDR",
    "roots",
    "slabinfo",
    "vmallocinfo",
    "meminfo",
    "buddyinfo",
    "vmstat",
    "kmem -i",
    "ps",
    "procrank",
    "bt 1",
    "regs",
    "top caches",
    "alloc_calls=dentry",
    "refs=ADDR",
];
/// Memory of the guest.
const MEMORY_MIB: usize = 256;
/// Objects that a core's analysis may report beside the leaks: what annotations by backtrace would excuse.
const EXCESS: usize = 20;

fn main() -> ExitCode {
    tests::main(vec![
        test("what_was_saved_is_found_again_6.12-cloud", || found_again("6.12-cloud")),
        long_test("what_was_saved_is_found_again_6.1-cloud", || found_again("6.1-cloud")),
        with_packages(
            long_test("crash_and_drgn_open_a_core_6.1-cloud", crash_and_drgn),
            &["crash", "python3-drgn"],
        ),
    ])
}

/// A guest with planted leaks that stands still, and what was saved of it.
struct Saved {
    guest: Guest,
    kernel: KernelPackage,
    scratch: Scratch,
    /// What it showed itself.
    live: Value,
}

impl Saved {
    fn file(&self, name: &str) -> PathBuf {
        self.scratch.path(name)
    }

    fn command(&self, name: &str, line: &str) -> Result<String> {
        let finished = run([Path::new("analyze"), &self.file(name), Path::new("-c"), Path::new(line)])?;
        finished.expect_code(0)?;
        Ok(finished.stdout)
    }
}

/// Boots, plants, scans, saves; `look` is called while the machine stands still.
fn with_saved(line: &str, look: impl FnOnce(&Saved) -> Result<()>) -> Result<()> {
    let kernel = kernel(line)?;
    let scratch = Scratch::new()?;
    let mut guest = Guest::new(&kernel, 2)?;
    guest
        .option("--mem", format!("{MEMORY_MIB}M"))
        .option("--snapshot-on-leak", scratch.path("first.snap"))
        .file(&module(&kernel, "leaky")?, "/leaky.ko")
        .script(
            "insmod /leaky.ko case=all; sleep 3
             echo snapshot=/from-the-guest > /dev/ttyS1; cat /dev/ttyS1
             echo json core=/from-the-guest > /dev/ttyS1; cat /dev/ttyS1
             echo READY; read -r go",
        )?;
    let mut session = guest.start()?;
    session.wait_for("\nREADY", RUN_TIMEOUT)?;
    guest.ctl("pause")?;
    guest.ctl("scan")?;
    for (command, name) in [("snapshot", "snap"), ("core", "core")] {
        let reply = guest.ctl(&format!("{command}={}", scratch.path(name).display()))?;
        ensure!(reply.starts_with("saved: ") && !reply.contains("VMCOREINFO"), "{reply}");
    }
    let live = guest.json("report")?;
    let saved = Saved { guest, kernel, scratch, live };
    look(&saved)?;
    saved.guest.ctl("resume")?;
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    no_kernel_complaint(&finished.stdout)?;
    let refused = |start: &str| finished.stdout.lines().any(|line| line.starts_with(start));
    ensure!(refused("error: snapshot= writes a file on the host"), "{}", finished.stdout);
    ensure!(refused("{\"error\":\"core= writes a file on the host"), "{}", finished.stdout);
    ensure!(!Path::new("/from-the-guest").exists(), "the guest wrote on the host");
    ensure!(finished.stderr.contains("the machine is saved to "), "{}", finished.stderr);
    Ok(())
}

fn found_again(line: &str) -> Result<()> {
    with_saved(line, |saved| {
        snapshot_shows_the_same(saved)?;
        core_has_what_is_lost(saved)?;
        wrong_files_are_named(saved)
    })
}

/// Leaks, groups, replies: all as they were on the machine itself.
fn snapshot_shows_the_same(saved: &Saved) -> Result<()> {
    ensure!(
        saved.live["leaks"].as_array().is_some_and(|leaks| leaks.len() > 40),
        "{:#}",
        saved.live["groups"]
    );
    for name in ["snap", "first.snap"] {
        let json = saved.file("again.json");
        let finished = run([
            Path::new("analyze"),
            &saved.file(name),
            Path::new("--fail-on-leak"),
            Path::new("--report"),
            &json,
        ])?;
        finished.expect_code(1)?;
        let again = report(&json)?;
        for part in ["groups", "guest", "host"] {
            ensure!(
                again[part] == saved.live[part],
                "{name}: {:#}\nlive: {:#}",
                again[part],
                saved.live[part]
            );
        }
        let (again, live) = (leaks(&again)?, leaks(&saved.live)?);
        ensure!(again.len() == live.len(), "{name}: {} leaks, live {}", again.len(), live.len());
        for (again, live) in again.iter().zip(&live) {
            ensure!(again == live, "{name}: {again:#}\nlive: {live:#}");
        }
    }
    let lost = saved.live["leaks"][0]["address"].as_str().context("an address")?;
    for command in COMMANDS {
        let command = command.replace("ADDR", lost);
        let (live, again) = (saved.guest.ctl(&command)?, saved.command("snap", &command)?);
        ensure!(live == again, "{command}: {again}\nlive: {live}");
    }
    let uptime = |status: &str| {
        let seconds = status.lines().find_map(|line| line.strip_prefix("uptime_s: ")?.parse::<u64>().ok());
        seconds.with_context(|| format!("no uptime in {status}"))
    };
    let (live, again) = (uptime(&saved.guest.ctl("status")?)?, uptime(&saved.command("snap", "status")?)?);
    ensure!((1..=live).contains(&again), "saved {again} s after its start, now {live} s");
    Ok(())
}

/// The leaks of a report, but for whether they were new to that scan.
fn leaks(report: &Value) -> Result<Vec<Value>> {
    let mut leaks = report["leaks"].as_array().context("leaks")?.clone();
    leaks.iter_mut().filter_map(Value::as_object_mut).for_each(|leak| drop(leak.remove("new")));
    Ok(leaks)
}

/// Without the tracker's knowledge there are no backtraces, and what no metadata list is not found. The rest is; also in a
/// file as others write it.
fn core_has_what_is_lost(saved: &Saved) -> Result<()> {
    let wanted = listed(&saved.live)?;
    let found = of_core(saved, &saved.file("core"))?;
    let missed: Vec<_> = wanted.difference(&found).collect();
    ensure!(missed.is_empty(), "not found in the core: {missed:?}");
    let more = found.difference(&wanted).count();
    println!("core: {} leaks found, {more} objects beside them", wanted.len());
    ensure!(more <= EXCESS, "{more} objects beside the leaks");
    let others = saved.file("others");
    std::fs::write(&others, as_others_write_it(std::fs::read(saved.file("core"))?)?)?;
    ensure!(
        of_core(saved, &others)? == found,
        "a core without VMCOREINFO, its memory on no page of the file"
    );
    Ok(())
}

/// What `analyze` reports of a core.
fn of_core(saved: &Saved, core: &Path) -> Result<BTreeSet<String>> {
    let json = saved.file("core.json");
    let finished = run([
        Path::new("analyze"),
        core,
        Path::new("--kernel"),
        &saved.kernel.vmlinuz,
        Path::new("--report"),
        &json,
    ])?;
    finished.expect_code(0)?;
    ensure!(finished.stderr.contains("nobody tracked this machine"), "{}", finished.stderr);
    listed(&report(&json)?)
}

/// Addresses of the leaks that metadata list.
fn listed(report: &Value) -> Result<BTreeSet<String>> {
    let leaks = report["leaks"].as_array().context("leaks")?;
    let listed = |leak: &&Value| ["slab", "vmalloc", "percpu"].iter().any(|kind| leak["kind"] == *kind);
    Ok(leaks.iter().filter(listed).filter_map(|leak| Some(leak["address"].as_str()?.to_owned())).collect())
}

/// As QEMU's `dump-guest-memory` has it without a device for VMCOREINFO: no such note, and memory right behind the notes.
fn as_others_write_it(mut core: Vec<u8>) -> Result<Vec<u8>> {
    const EHDR: usize = 64;
    const PHDR: usize = 56;
    const SHIFT: usize = 0x3a0;
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let headers = usize::from(u16::from_le_bytes([core[56], core[57]]));
    let mut memory = usize::MAX;
    for header in (0..headers).map(|n| EHDR + n * PHDR) {
        // The others are notes.
        if core[header] != 1 {
            continue;
        }
        let offset = word(&core, header + 8) as usize;
        memory = memory.min(offset);
        core[header + 8..header + 16].copy_from_slice(&((offset + SHIFT) as u64).to_le_bytes());
    }
    let note = core[..memory].windows(10).position(|w| w == b"VMCOREINFO").context("no note")?;
    core[note] = b'X';
    let rest = core.split_off(memory);
    core.resize(memory + SHIFT, 0);
    core.extend(rest);
    Ok(core)
}

/// Every file that is not what it must be is refused in one line with a hint.
fn wrong_files_are_named(saved: &Saved) -> Result<()> {
    let refused = |arguments: &[&Path], what: &str| -> Result<()> {
        let finished: Finished = run([Path::new("analyze")].iter().chain(arguments))?;
        finished.expect_code(2)?;
        let mut lines = finished.stderr.lines().filter(|line| !line.starts_with("kleak-vmm: nobody"));
        let (error, hint) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        ensure!(error.contains(what) && hint.starts_with("hint: "), "wanted {what:?}: {}", finished.stderr);
        ensure!(lines.next().is_none(), "{}", finished.stderr);
        Ok(())
    };
    let snapshot = saved.file("snap");
    refused(&[&saved.file("core")], "a core without the kernel's image")?;
    let other = kernel("6.1.0-47-cloud")?.vmlinuz;
    refused(&[&snapshot, Path::new("--kernel"), &other], "not that of this kernel")?;
    refused(&[&saved.kernel.vmlinuz], "no ELF core")?;
    refused(&[&saved.file("absent")], "No such file")?;
    let whole = std::fs::read(&snapshot)?;
    let cut = saved.file("cut");
    std::fs::write(&cut, &whole[..whole.len() / 2])?;
    refused(&[&cut], "cut off")?;
    // The tracker's state lies behind the memory.
    let mut damaged = whole;
    damaged[(MEMORY_MIB << 20) + (1 << 16)] ^= 0xff;
    std::fs::write(&cut, &damaged)?;
    refused(&[&cut], "damaged")
}

/// The tools of the field read what was saved as they read a kdump.
fn crash_and_drgn() -> Result<()> {
    with_saved("6.1-cloud", |saved| {
        let vmlinux = saved.kernel.debug_vmlinux(&Cache::of_workspace())?;
        // Tasks are drgn's part: crash 8.0.2 finds none where `struct pid` ends in a flexible array.
        for name in ["core", "snap"] {
            let file = saved.file(name);
            let script = saved.scratch.file("commands", "sys\nkmem -i\nmod\nquit\n")?;
            let output =
                Command::new("crash").arg("-s").arg("-i").args([&script, &vmlinux, &file]).output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            ensure!(output.status.success(), "crash: {text}{}", String::from_utf8_lossy(&output.stderr));
            for wanted in [saved.kernel.release.as_str(), "leaky", "TOTAL MEM"] {
                ensure!(text.contains(wanted), "crash does not say {wanted:?}: {text}");
            }
            let program = "import drgn, sys\n\
                from drgn.helpers.linux import for_each_task\n\
                prog = drgn.Program()\nprog.set_core_dump(sys.argv[1])\nprog.load_debug_info([sys.argv[2]])\n\
                print(prog['init_uts_ns'].name.release.string_().decode())\n\
                print(' '.join(t.comm.string_().decode() for t in for_each_task(prog)))\n";
            let program = saved.scratch.file("look.py", program)?;
            let output = Command::new("/usr/bin/python3").args([&program, &file, &vmlinux]).output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            ensure!(output.status.success(), "drgn: {}", String::from_utf8_lossy(&output.stderr));
            for wanted in [saved.kernel.release.as_str(), "kthreadd"] {
                ensure!(text.contains(wanted), "drgn does not say {wanted:?}: {text}");
            }
        }
        Ok(())
    })
}
