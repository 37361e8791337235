//! Stock kernels that boot, idle and power off: every symbol right, every object tracked, nothing reported.

use anyhow::{Context, Result, ensure};
use images::kernel::ARM64_LINES;
use introspect::image::KernelImage;
use introspect::symbols::SymbolTable;
use serde_json::Value;
use std::process::{Command, ExitCode};
use std::time::Duration;
use tests::{
    ARM_PACKAGES, Exits, Guest, RUN_TIMEOUT, Scratch, Session, in_vmx, kernel, long_test,
    no_kernel_complaint, test, with_packages,
};

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for (line, cpus) in [("6.1-cloud", 1), ("6.1-rt", 2), ("6.12-cloud", 2), ("6.12", 1)] {
        trials.push(test(format!("clean_{line}_{cpus}cpu"), move || clean(line, cpus)));
    }
    for line in ["6.1-cloud", "6.12-cloud"] {
        trials.push(test(format!("symbols_{line}"), move || symbols(line)));
        trials.push(test(format!("audit_under_load_{line}"), move || audit_under_load(line, false)));
        trials.push(long_test(format!("audit_from_the_first_moment_{line}"), move || {
            audit_under_load(line, true)
        }));
    }
    trials.push(test("smallest_guest", || size("128M", 1)));
    trials.push(with_packages(test("disks_6.12-cloud", || disks("6.12-cloud", "")), &["e2fsprogs"]));
    trials.push(with_packages(long_test("disks_6.1-cloud", || disks("6.1-cloud", "")), &["e2fsprogs"]));
    // Interrupts by the 8259.
    trials.push(with_packages(test("disks_6.1-cloud_nosmp", || disks("6.1-cloud", "nosmp")), &["e2fsprogs"]));
    for (line, words) in [("6.12-cloud", "nosmp"), ("6.1-cloud", "nolapic"), ("6.12-cloud", "noapic")] {
        let trial = long_test(format!("disks_{line}_{words}"), move || disks(line, words));
        trials.push(with_packages(trial, &["e2fsprogs"]));
    }
    for line in ["6.1-cloud", "6.12-cloud"] {
        trials.push(long_test(format!("a_halt_ends_the_run_{line}"), move || halt(line)));
    }
    // What the others show on other kernels.
    trials.push(long_test("clean_6.1_2cpu", || clean("6.1", 2)));
    trials.push(long_test("clean_6.12-rt_2cpu", || clean("6.12-rt", 2)));
    trials.push(in_vmx("clean_6.1-cloud", |exits| clean_by_int3("6.1-cloud", exits)));
    trials.push(long_test("many_cpus", || size("1G", 8)));
    for line in ARM64_LINES {
        for (cpus, words) in [(1, ""), (2, ""), (1, "nokaslr"), (2, "nokaslr")] {
            let name = format!("clean_{line}_{cpus}cpu{}{words}", if words.is_empty() { "" } else { "_" });
            let run = move || clean_arm64(line, cpus, words);
            // One of them always.
            let trial = match (*line, cpus, words) {
                ("6.12-cloud-arm64", 2, "") => test(name, run),
                _ => long_test(name, run),
            };
            trials.push(with_packages(trial, &ARM_PACKAGES));
        }
    }
    let trial = long_test("gic_v2_6.12-cloud-arm64", || gic_v2("6.12-cloud-arm64"));
    trials.push(with_packages(trial, &ARM_PACKAGES));
    tests::main(trials)
}

/// Boots, idles and powers off; with KASLR, as a stock command line has it.
fn clean(line: &str, cpus: u32) -> Result<()> {
    clean_guest(Guest::new(&kernel(line)?, cpus)?).map(drop)
}

/// The same by breakpoint exits, which only the lab `vmx` has.
fn clean_by_int3(line: &str, exits: Exits) -> Result<()> {
    let report = clean_guest(Guest::trapped(&kernel(line)?, 1, exits)?)?;
    ensure!(report["host"]["trap"] == "int3" && report["host"]["lab"] == "vmx", "{}", report["host"]);
    Ok(())
}

/// An arm64 guest, with these words on its command line.
fn clean_arm64(line: &str, cpus: u32, words: &str) -> Result<()> {
    let mut guest = Guest::new(&kernel(line)?, cpus)?;
    guest.cmdline(words);
    let report = clean_guest(guest)?;
    ensure!(report["host"]["trap"] == "brk", "{}", report["host"]);
    ensure!(report["guest"]["arch"] == "aarch64" && report["guest"]["cpus"] == cpus, "{}", report["guest"]);
    let moved = report["guest"]["kaslr_offset"] != "0x0";
    ensure!(moved == words.is_empty(), "KASLR: {}", report["guest"]);
    Ok(())
}

/// An arm64 guest on a host whose KVM has no GICv3 for guests.
fn gic_v2(line: &str) -> Result<()> {
    let mut guest = Guest::new(&kernel(line)?, 2)?;
    guest
        .with_gic_v2()?
        .flag("--fail-on-leak")
        .script("grep GIC /proc/interrupts; sleep 3; echo audit > /dev/ttyS1; cat /dev/ttyS1")?;
    let finished = guest.boot(0)?;
    no_kernel_complaint(&finished.stdout)?;
    // `gic_irq_print_chip` (drivers/irqchip/irq-gic.c) names the first so.
    for (said, wanted) in [(" GIC-0 ", true), (" GICv3 ", false), ("missing 0, stale 0", true)] {
        ensure!(finished.stdout.contains(said) == wanted, "{said:?}: {}", tests::tail(&finished.stdout, 30));
    }
    check_report(&guest.report()?)
}

fn clean_guest(mut guest: Guest) -> Result<Value> {
    guest
        .flag("--fail-on-leak")
        .script("sleep 3; echo audit > /dev/ttyS1; cat /dev/ttyS1; dmesg > /dev/null")?;
    let finished = guest.boot(0)?;
    no_kernel_complaint(&finished.stdout)?;
    ensure!(finished.stdout.contains("missing 0, stale 0"), "audit: {}", tests::tail(&finished.stdout, 10));
    let report = guest.report()?;
    check_report(&report)?;
    Ok(report)
}

/// Two disks, the second only read: a file system that is written to and checked afterwards, sectors that are as they were.
/// What the file system and its drivers allocate is no leak. With `words` on the command line, which leave the I/O APIC alone,
/// if any.
fn disks(line: &str, words: &str) -> Result<()> {
    const MIB: usize = 1 << 20;
    let scratch = Scratch::new()?;
    let data: Vec<u8> = (0..3 * MIB as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let (system, raw) = (scratch.file("fs.img", vec![0; 32 * MIB])?, scratch.file("raw,img", &data)?);
    host(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&system))?;
    let mut read_only = raw.clone().into_os_string();
    read_only.push(",ro");
    let mut guest = Guest::new(&kernel(line)?, 2)?;
    guest
        .cmdline(words)
        .flag("--fail-on-leak")
        .option("--disk", &system)
        .option("--disk", read_only)
        .script(
            "mkdir /disk; mount -t ext4 /dev/vda /disk
         cp /dev/vdb /disk/copy; mkdir /disk/many; for i in $(seq 200); do echo $i > /disk/many/$i; done
         sync; rm -r /disk/many; echo x > /dev/vdb && sync && echo WRITTEN
         umount /disk; mount -t ext4 /dev/vda /disk; cmp /disk/copy /dev/vdb && echo SAME; umount /disk
         grep virtio /proc/interrupts; sleep 2; echo audit > /dev/ttyS1; cat /dev/ttyS1",
        )?;
    let finished = guest.boot(0)?;
    no_kernel_complaint(&finished.stdout)?;
    let chip = if words.is_empty() { "IO-APIC" } else { "XT-PIC" };
    let by_chip = |line: &&str| line.contains(chip) && line.contains(" virtio");
    let interrupted = finished.stdout.lines().filter(by_chip).count();
    ensure!(interrupted == 2, "{interrupted} disks by {chip}: {}", tests::tail(&finished.stdout, 20));
    let said = |line: &str| finished.stdout.lines().any(|said| said == line);
    ensure!(said("SAME") && !said("WRITTEN"), "{}", tests::tail(&finished.stdout, 20));
    ensure!(finished.stdout.contains("missing 0, stale 0"), "audit: {}", tests::tail(&finished.stdout, 10));
    check_report(&guest.report()?)?;
    ensure!(std::fs::read(&raw)? == data, "a disk that is only read was written to");
    host(Command::new("e2fsck").args(["-f", "-n"]).arg(&system))?;
    let copied = Command::new("debugfs").args(["-R", "cat /copy"]).arg(&system).output()?;
    ensure!(copied.stdout == data, "{} bytes arrived on the host", copied.stdout.len());
    Ok(())
}

/// Without ACPI a kernel cannot switch the machine off, and halts instead.
fn halt(line: &str) -> Result<()> {
    let mut guest = Guest::new(&kernel(line)?, 2)?;
    guest
        .cmdline("acpi=off")
        .flag("--fail-on-leak")
        .script("sleep 3; echo audit > /dev/ttyS1; cat /dev/ttyS1")?;
    let finished = guest.boot(0)?;
    no_kernel_complaint(&finished.stdout)?;
    let last = tests::tail(&finished.stdout, 10);
    ensure!(finished.stdout.contains("missing 0, stale 0"), "audit: {last}");
    ensure!(last.contains("System halted"), "{last}");
    check_report(&guest.report()?)
}

/// Runs a program of the host.
fn host(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn check_report(report: &Value) -> Result<()> {
    ensure!(report["leaks"].as_array().context("leaks")?.is_empty(), "leaks: {:#}", report["groups"]);
    ensure!(report["scan"]["events_dropped"] == 0, "dropped: {}", report["scan"]);
    ensure!(
        report["scan"]["objects"].as_u64() > Some(10_000),
        "hardly anything is tracked: {}",
        report["scan"]
    );
    Ok(())
}

/// The guest's own list of symbols against ours, by checksum: a serial line is slow.
fn symbols(line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let image = KernelImage::open(&kernel.vmlinuz)?;
    let table = SymbolTable::recover(&image)?;
    let mut text = String::new();
    for symbol in table.iter() {
        text.push_str(&format!("{:016x} {} {}\n", symbol.va.0, symbol.kind, symbol.name));
    }
    let scratch = tests::Scratch::new()?;
    let ours = scratch.file("kallsyms", &text)?;
    let mut guest = Guest::new(&kernel, 1)?;
    guest.tracer("off").file(&ours, "/ours").cmdline("nokaslr").script(
        "echo 0 > /proc/sys/kernel/kptr_restrict
         grep -v '\\[' /proc/kallsyms > /theirs
         wc -l < /theirs
         cmp /ours /theirs && echo EQUAL || diff /ours /theirs | head -20",
    )?;
    let finished = guest.boot(0)?;
    ensure!(finished.stdout.contains("\nEQUAL"), "{}", tests::tail(&finished.stdout, 40));
    ensure!(table.len() > 50_000, "only {} symbols", table.len());
    Ok(())
}

/// Audits while two vCPUs allocate and free, and when asked from the first moments of boot on: never a difference.
fn audit_under_load(line: &str, from_the_start: bool) -> Result<()> {
    const AUDITS_UNDER_LOAD: usize = 6;
    let mut guest = Guest::new(&kernel(line)?, 2)?;
    guest.script(
        "load() { while :; do ls -lR /sys/kernel > /dev/null; mkdir -p /tmp/d$1/a/b; rm -r /tmp/d$1; (:); done; }
         load 1 & load 2 & echo BUSY; read -r go; kill %1 %2; wait",
    )?;
    let mut session = guest.start()?;
    let mut early = 0;
    while from_the_start
        && session.wait_for("\nBUSY", Duration::from_millis(500)).is_err()
        && session.is_running()?
    {
        // The socket is there before the kernel is.
        if guest.socket().exists()
            && let Ok(reply) = guest.ctl("audit")
        {
            ensure!(reply.contains("missing 0, stale 0"), "{reply}");
            early += 1;
        }
    }
    session.wait_for("\nBUSY", RUN_TIMEOUT)?;
    for _ in 0..AUDITS_UNDER_LOAD {
        let reply = guest.ctl("audit")?;
        ensure!(reply.contains("missing 0, stale 0"), "{reply}");
        std::thread::sleep(Duration::from_millis(700));
    }
    ensure!(early > 0 || !from_the_start, "no audit was made during boot");
    end(session)?;
    check_report(&guest.report()?)
}

fn end(mut session: Session) -> Result<()> {
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    no_kernel_complaint(&finished.stdout)
}

fn size(memory: &str, cpus: u32) -> Result<()> {
    let mut guest = Guest::new(&kernel("6.1-cloud")?, cpus)?;
    guest.option("--mem", memory).flag("--fail-on-leak").script("echo CPUS $(nproc)")?;
    let finished = guest.boot(0)?;
    ensure!(finished.stdout.contains(&format!("CPUS {cpus}")), "{}", tests::tail(&finished.stdout, 20));
    check_report(&guest.report()?)
}
