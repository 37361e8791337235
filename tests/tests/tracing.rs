//! The guest's own tracers on the functions we trap, and modules that come and go: neither breaks the guest, nor is an event
//! missed.

use anyhow::{Result, ensure};
use std::process::ExitCode;
use tests::{Guest, kernel, long_test, module, no_kernel_complaint};

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for line in ["6.1-cloud", "6.12-cloud"] {
        trials.push(long_test(format!("ftrace_and_kprobes_{line}"), move || traced(line)));
        trials.push(long_test(format!("a_hundred_modules_{line}"), move || modules(line)));
    }
    tests::main(trials)
}

/// In the guest: work for the allocator.
const WORK: &str = "work() { i=0; while [ $i -lt 20 ]; do (:); mkdir -p /tmp/d/a; ls -lR /proc/sys/net > /dev/null; rm -r /tmp/d;
                    i=$((i+1)); done; }";

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

fn traced(line: &str) -> Result<()> {
    let mut guest = Guest::new(&kernel(line)?, 2)?;
    guest.script(&format!(
        "{WORK}
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
