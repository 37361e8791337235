//! Upstream's `samples/kmemleak/kmemleak-test.c` on stock kernels: it loses 13 objects when loaded; when it is
//! unloaded, the 10 elements of its list and one object per CPU are lost too.

use anyhow::{Context, Result, ensure};
use images::kernel::ARM64_LINES;
use std::process::ExitCode;
use std::time::Duration;
use tests::{
    ARM_PACKAGES, Exits, Guest, count_objects, in_vmx, kernel, kmemleak_test, long_test, no_kernel_complaint,
    sizes, test, with_packages,
};

fn main() -> ExitCode {
    let mut trials = vec![
        test("from_outside_6.1_2cpu", || from_outside("6.1-cloud", 2, Exits::Usual)),
        in_vmx("from_outside_6.1_1cpu", |exits| from_outside("6.1-cloud", 1, exits)),
        test("from_inside_6.12_1cpu", || from_inside("6.12-cloud", 1)),
        // The other halves.
        long_test("from_inside_6.1_1cpu", || from_inside("6.1-cloud", 1)),
        long_test("from_outside_6.12_2cpu", || from_outside("6.12-cloud", 2, Exits::Usual)),
    ];
    for line in ARM64_LINES {
        let name = line.replace("-cloud", "");
        let inside = long_test(format!("from_inside_{name}_1cpu"), || from_inside(line, 1));
        let outside = long_test(format!("from_outside_{name}_2cpu"), || from_outside(line, 2, Exits::Usual));
        trials.extend([inside, outside].map(|trial| with_packages(trial, &ARM_PACKAGES)));
    }
    tests::main(trials)
}

const LOADED: usize = 13;

/// Scans on a conservative stack are repeated as kmemleak's users do: a word that an earlier call left on a live stack can
/// hide an object until something else overwrites it.
const SCANS: usize = 3;

/// End of the line that every scan is answered with.
const NEW: &str = " new suspected memory leaks";

/// Sum of what the scans in a text found for the first time.
fn newly_found(text: &str) -> usize {
    let counts = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("kmemleak: ")?.strip_suffix(NEW)?.parse::<usize>().ok());
    counts.sum()
}

/// As a test script inside the guest drives kmemleak.
fn from_inside(line: &str, cpus: u32) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::new(&kernel, cpus)?;
    guest.file(&kmemleak_test(&kernel)?, "/kmemleak-test.ko").script(
        "insmod /kmemleak-test.ko; sleep 2
         once() { ls -lR /proc/self /dev > /dev/null; echo scan > /dev/ttyS1; cat /dev/ttyS1; }
         scan() { once | grep suspected; once | grep suspected; once; }
         echo FIRST; scan
         rmmod kmemleak_test; sleep 2
         echo SECOND; scan
         echo END",
    )?;
    let finished = guest.boot(0)?;
    let console = &finished.stdout;
    no_kernel_complaint(console)?;
    let between = |from: &str, to: &str| -> Result<String> {
        let rest = console.split_once(from).with_context(|| format!("no {from}"))?.1;
        Ok(rest.split_once(to).with_context(|| format!("no {to}"))?.0.to_owned())
    };
    let all = LOADED + 10 + cpus as usize;
    for (text, objects, new) in
        [(between("FIRST", "SECOND")?, LOADED, LOADED), (between("SECOND", "END")?, all, all - LOADED)]
    {
        ensure!(newly_found(&text) == new, "{} new ones, wanted {new}\n{text}", newly_found(&text));
        // Each scan's line is followed by the report of all that is known.
        let (_, last) = text.rsplit_once(NEW).context("no reply")?;
        ensure!(count_objects(last) == objects, "{} objects, wanted {objects}\n{last}", count_objects(last));
        let named =
            last.lines().filter(|l| l.contains("kmemleak_test_init") && l.contains("[kmemleak_test]"));
        ensure!(named.count() >= objects, "module symbols are missing\n{last}");
    }
    // The last scan, after the script, agrees.
    ensure!(sizes(&guest.report()?)?.len() == all, "{:?}", sizes(&guest.report()?)?);
    Ok(())
}

/// By `ctl` from the host, the guest waiting at a prompt meanwhile.
fn from_outside(line: &str, cpus: u32, exits: Exits) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::trapped(&kernel, cpus, exits)?;
    guest.file(&kmemleak_test(&kernel)?, "/kmemleak-test.ko").script(
        "churn() { while :; do ls -lR /proc/self /dev > /dev/null; sleep 1; done; }
         insmod /kmemleak-test.ko; sleep 2; churn & echo LOADED; read -r go
         rmmod kmemleak_test; sleep 2; echo UNLOADED; read -r go; kill %1",
    )?;
    let mut session = guest.start()?;
    let all = LOADED + 10 + cpus as usize;
    for (mark, objects, new) in [("LOADED", LOADED, LOADED), ("UNLOADED", all, all - LOADED)] {
        session.wait_for(&format!("\n{mark}"), guest.patience())?;
        let mut found = 0;
        for _ in 0..SCANS {
            std::thread::sleep(Duration::from_secs(2));
            found += newly_found(&guest.ctl("scan")?);
        }
        ensure!(found == new, "{found} new objects, wanted {new}");
        let text = guest.ctl("report")?;
        ensure!(
            count_objects(&text) == objects,
            "{} objects, wanted {objects}\n{text}",
            count_objects(&text)
        );
        session.type_line("go")?;
    }
    session.finish()?.expect_code(0)?;
    Ok(())
}
