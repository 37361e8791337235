//! The guest's own tracers on the functions we trap, and modules that come and go: neither breaks the guest, nor is an event
//! missed.

use anyhow::{Context, Result, ensure};
use guest_profiles::hooks::{Tracked, builtin};
use images::kernel::ARM64_LINES;
use introspect::hooks::{JUMP_LEN, plan};
use introspect::kernel::Kernel;
use serde_json::Value;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};
use tests::{
    ARM_PACKAGES, Client, Exits, Guest, in_vmx, kernel, long_test, module, no_kernel_complaint, test,
    with_packages,
};

fn main() -> ExitCode {
    let mut trials = vec![
        test("a_lost_trap_is_made_good_6.1-cloud", || lost_trap("breakpoint", Exits::Usual)),
        test("a_lost_jump_is_made_good_6.1-cloud", || lost_trap("ring", Exits::Usual)),
        in_vmx("a_lost_trap_is_made_good_6.1-cloud", |exits| lost_trap("breakpoint", exits)),
        in_vmx("ftrace_and_kprobes_6.1-cloud", |exits| traced("6.1-cloud", "breakpoint", exits)),
    ];
    for line in ["6.1-cloud", "6.12-cloud"] {
        for tracer in ["breakpoint", "ring"] {
            let name = format!("ftrace_and_kprobes_by_{tracer}_{line}");
            trials.push(long_test(name, move || traced(line, tracer, Exits::Usual)));
        }
        trials.push(long_test(format!("a_hundred_modules_{line}"), move || modules(line)));
    }
    for line in ARM64_LINES {
        let trial =
            long_test(format!("ftrace_and_kprobes_{line}"), || traced(line, "breakpoint", Exits::Usual));
        trials.push(with_packages(trial, &ARM_PACKAGES));
    }
    tests::main(trials)
}

/// Rounds of work, and a folder to list.
const USUAL: (u32, &str) = (20, "/proc/sys/net");
/// The same by traps, each of which costs an exit; it is the patching that counts.
const SLOW: (u32, &str) = (2, "/proc/sys/net/core");

/// In the guest: work for the allocator.
fn work((rounds, folder): (u32, &str)) -> String {
    format!(
        "work() {{ i=0; while [ $i -lt {rounds} ]; do (:); mkdir -p /tmp/d/a; ls -lR {folder} > /dev/null; rm -r /tmp/d
                    i=$((i+1)); done; }}"
    )
}

/// The audit after each change of the guest's text, from inside; `name` tells them apart.
fn audit(name: &str) -> String {
    format!("echo audit > /dev/ttyS1; echo {name}: $(cat /dev/ttyS1)")
}

fn check(guest: &Guest, stdout: &str, names: &[&str]) -> Result<()> {
    no_kernel_complaint(stdout)?;
    for name in names {
        let line = stdout.lines().find(|line| line.starts_with(&format!("{name}: audit")));
        ensure!(line.is_some_and(|line| line.contains("missing 0, stale 0")), "{name}: {line:?}\n{stdout}");
    }
    let report = guest.report()?;
    ensure!(report["scan"]["events_dropped"] == 0, "dropped: {}", report["scan"]);
    ensure!(report["leaks"].as_array().is_some_and(Vec::is_empty), "leaks: {:#}", report["groups"]);
    Ok(())
}

fn traced(line: &str, tracer: &str, exits: Exits) -> Result<()> {
    let mut guest = Guest::trapped(&kernel(line)?, 2, exits)?;
    guest.tracer(tracer).script(&format!(
        "{}
         t=/sys/kernel/tracing; [ -e $t/trace ] || mount -t tracefs none $t; cd $t || exit 1
         echo 64 > buffer_size_kb
         work; {}
         for f in kfree kmem_cache_free kmem_cache_alloc kmem_cache_alloc_noprof vfree; do
             echo $f >> set_ftrace_filter; done 2> /dev/null
         echo function > current_tracer; work; {}
         echo TRACED $(grep -c kfree trace)
         echo nop > current_tracer; echo > set_ftrace_filter; work
         echo 'p:first kfree' > kprobe_events; echo 'r:back kmem_cache_free' >> kprobe_events
         echo 1 > events/kprobes/enable; work; {}
         echo PROBED $(grep -c first: trace) $(grep -c back: trace)
         echo 0 > events/kprobes/enable; echo > kprobe_events; work; {}",
        work(if tracer == "breakpoint" { SLOW } else { USUAL }),
        audit("before"),
        audit("ftrace"),
        audit("kprobes"),
        audit("after")
    ))?;
    let finished = guest.boot(0)?;
    check(&guest, &finished.stdout, &["before", "ftrace", "kprobes", "after"])?;
    for tracer in ["TRACED ", "PROBED "] {
        let counts = finished.stdout.lines().find_map(|line| line.trim().strip_prefix(tracer));
        let seen = counts.is_some_and(|c| c.split(' ').all(|n| n.parse::<u64>().is_ok_and(|n| n > 0)));
        ensure!(
            seen,
            "the guest's tracer saw nothing: {tracer}{counts:?}\n{}",
            tests::tail(&finished.stdout, 30)
        );
    }
    Ok(())
}

fn modules(line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::new(&kernel, 2)?;
    guest.file(&module(&kernel, "clean")?, "/clean.ko").script(&format!(
        "i=0; while [ $i -lt 100 ]; do insmod /clean.ko rounds=1 && rmmod clean || exit 1; i=$((i+1)); done; {}",
        audit("modules")
    ))?;
    let finished = guest.boot(0)?;
    check(&guest, &finished.stdout, &["modules"])
}

/// The module `patch` overwrites the trap in `kfree`, or the jump in its place: nothing is seen to be freed any more, until a scan finds out, or the guest
/// changes its text again.
fn lost_trap(tracer: &str, exits: Exits) -> Result<()> {
    // `out imm8, al`, or `int3`.
    let (trap, trap_len) = if exits == Exits::Usual { ("pio", 2) } else { ("int3", 1) };
    let package = kernel("6.1-cloud")?;
    let image = Kernel::open(&package.vmlinuz)?;
    let plan = plan(&image, &builtin(), &[Tracked::Slab], trap_len);
    let site = &plan.traps.iter().find(|trap| trap.function == "kfree").context("no trap in kfree")?.site;
    let code = image.image.bytes_at(site.va, JUMP_LEN).context("no code in kfree")?;
    let bytes = code.iter().rev().fold(0_u64, |bytes, byte| bytes << 8 | u64::from(*byte));
    let mut guest = Guest::trapped(&package, 2, exits)?;
    guest.file(&module(&package, "patch")?, "/patch.ko").file(&module(&package, "clean")?, "/clean.ko");
    if exits == Exits::Usual {
        guest.option("--trap", trap);
    }
    guest.tracer(tracer).cmdline("nokaslr").script(&format!(
        "overwrite() {{ insmod /patch.ko at={} bytes={bytes:#x} length={JUMP_LEN}; }}
         echo READY; read -r go; overwrite && echo PATCHED
         read -r go; rmmod patch; sleep 2; echo GONE
         read -r go; overwrite; insmod /clean.ko rounds=1 && echo LOADED; read -r go; rmmod clean patch",
        site.va
    ))?;
    let mut session = guest.start()?;
    session.wait_for("\nREADY", guest.patience())?;
    let mut client = Client::of(&guest)?;
    let exact = |reply: &str| reply.contains("missing 0, stale 0");
    let before = client.ask("audit")?;
    ensure!(exact(&before), "{before}");
    session.type_line("go")?;
    session.wait_for("\nPATCHED", guest.patience())?;
    let missed = client.ask("audit")?;
    ensure!(!exact(&missed), "nothing was missed: {missed}");
    let found = client.ask("scan")?;
    ensure!(found.contains(" 0 new"), "{found}");
    let after = client.ask("audit")?;
    ensure!(exact(&after), "{after}");
    session.type_line("go")?;
    session.wait_for("\nGONE", guest.patience())?;
    let found = client.ask("scan")?;
    ensure!(found.contains(" 0 new"), "{found}");
    let last = client.ask("audit")?;
    ensure!(exact(&last), "what the trap planted again should have seen: {last}");
    let status: Value = serde_json::from_str(&client.ask("json status")?)?;
    ensure!(status["traps_rearmed"] == 1 && status["events_dropped"] == 0, "{status:#}");
    ensure!(status["tracer"] == tracer && (tracer != "ring" || status["hooks_by_ring"] != 0), "{status:#}");
    session.type_line("go")?;
    session.wait_for("\nLOADED", guest.patience())?;
    noticed_at_once(&mut client, &status)?;
    drop(client);
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    let said = finished.stderr.lines().filter(|line| line.contains("overwrote the traps at"));
    let said: Vec<&str> = said.collect();
    let place = site.va.to_string();
    ensure!(
        said.len() == 2 && said.iter().all(|line| line.contains(&place) && line.contains("made good")),
        "{}",
        finished.stderr
    );
    no_kernel_complaint(&finished.stdout)
}

/// A module was loaded behind another overwriting: the trap is planted again, and the gap closed, without a scan.
fn noticed_at_once(client: &mut Client, before: &Value) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(30);
    let status = loop {
        let status: Value = serde_json::from_str(&client.ask("json status")?)?;
        if status["traps_rearmed"] == 2 || Instant::now() > end {
            break status;
        }
        sleep(Duration::from_millis(300));
    };
    ensure!(status["traps_rearmed"] == 2 && status["scans"] == before["scans"], "{status:#}");
    ensure!(status["text_changes"].as_u64() > before["text_changes"].as_u64(), "{status:#}");
    let audit = client.ask("audit")?;
    ensure!(audit.contains("missing 0, stale 0"), "{audit}");
    Ok(())
}
