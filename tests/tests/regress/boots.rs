//! Tests in real guests: what they leak, what goes wrong with them.

use super::{Case, canaries, head, outcomes, planted, shipped_text};
use anyhow::{Context, Result, ensure};
use images::cpio::CpioWriter;
use images::kernel::Headers;
use images::{Cache, KernelPackage};
use std::path::PathBuf;
use std::process::Command;
use tests::{Scratch, kernel, module};

/// Part of the shipped suite of planted leaks, and tests that are not in it, in one boot: what each leaks is its own, and a group
/// is the same in two builds of one source.
pub fn attribution() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let builds = Scratch::new()?;
    let [first, second] =
        [("first", ""), ("second", UNRELATED)].map(|(name, more)| build_twice(&kernel, &builds, name, more));
    let (first, second) = (first?, second?);
    let offsets = [&first, &second].map(offset_of_lose);
    ensure!(
        offsets[0].as_ref().ok() != offsets[1].as_ref().ok(),
        "the second build is as the first: {offsets:?}"
    );
    let mut suite = format!("settle_ms = 2000\n{}", shipped_text("planted")?);
    suite += "[[test]]\nname = \"status\"\nrun = \"exit 3\"\nstatus = 3\n";
    suite += "[[test]]\nname = \"unexpected\"\nmodules = [\"recipe:leaky,case=cycle\"]\n";
    for (name, module) in [("build-1", &first), ("build-2", &second)] {
        suite += &format!(
            "[[test]]\nname = \"{name}\"\nmodules = [\"{}\"]\nleaks = 1\nfunctions = [\"lose\"]\n",
            module.display()
        );
    }
    let case = Case::new(&suite)?;
    let names = ["boot", "list", "status", "unexpected", "build-1", "build-2"];
    let only = names.map(|name| format!("--only=6.1-cloud/two-cpus/{name}"));
    let (finished, results) = case.regress(1, &only.each_ref().map(String::as_str))?;
    let wanted = [
        ("boot", "passed", 0),
        ("list", "passed", 5),
        ("status", "passed", 0),
        ("unexpected", "leaked", 2),
        ("build-1", "passed", 1),
        ("build-2", "passed", 1),
    ];
    ensure!(outcomes(&results)? == wanted, "{}\n{}", finished.stdout, finished.stderr);
    ensure!(canaries(&results) == ["found"], "{:#}", results["boots"]);
    let tests = &results["tests"];
    let frames = tests[3]["groups"][0]["backtrace"].as_array().context("backtrace")?;
    ensure!(frames.iter().any(|f| f["symbol"] == "leaky_cycle" && f["module"] == "leaky"), "{frames:?}");
    ensure!(
        finished.stdout.contains("6.1-cloud/two-cpus/unexpected: leaked: 2 new leaks"),
        "{}",
        finished.stdout
    );
    for part in [": 2 objects, 2 direct, 256 bytes", &format!("\nkernel 6.1-cloud: {}\n", kernel.release)] {
        ensure!(finished.stdout.contains(part), "no {part:?} in {}", finished.stdout);
    }
    let [first, second] = [4, 5].map(|test: usize| &tests[test]["groups"][0]);
    ensure!(first["id"].is_string() && first["id"] == second["id"], "{first:#} and {second:#}");
    for (name, part) in [
        ("results.xml", "<failure type=\"leaked\""),
        ("results.sarif", "\"2.1.0\""),
        ("results.html", "<svg"),
    ] {
        let text = std::fs::read_to_string(case.0.path(name))?;
        ensure!(text.contains(part), "{name}: {text}");
    }
    let logs: Vec<_> = std::fs::read_dir(case.0.path("logs"))?.collect::<Result<_, _>>()?;
    ensure!(logs.len() == 1, "one boot, but {} logs", logs.len());
    let log = std::fs::read_to_string(logs[0].path())?;
    ensure!(!log.contains(": not found"), "the driver calls what the guest does not have: {log}");
    Ok(())
}

/// Moves what comes behind it.
const UNRELATED: &str = "__attribute__((no_reorder)) int unrelated(int n);\nint unrelated(int n) { int i, s = 0; for (i = 0; i < n; i++) s ^= s * 31 + \
                         (i << (n & 7)); return s; }\n";

/// A module that keeps the only CPU to itself, interrupts and all.
const HANG: &str = "#include <linux/module.h>\n#include <linux/irqflags.h>\n\
                    static int __init begin(void) { local_irq_disable(); for (;;) barrier(); return 0; }\n\
                    static void __exit end(void) { }\n\
                    module_init(begin);\nmodule_exit(end);\nMODULE_LICENSE(\"GPL\");\n";

/// A module that loses an object, with `more` before the function that does.
fn build_twice(kernel: &KernelPackage, folder: &Scratch, name: &str, more: &str) -> Result<PathBuf> {
    let text = format!(
        "#include <linux/module.h>\n#include <linux/slab.h>\n{more}\
         static noinline __attribute__((noipa, no_reorder)) int lose(size_t size) {{ return kmalloc(size, GFP_KERNEL) ? 0 : -ENOMEM; }}\n\
         static int __init begin(void) {{ return lose(200); }}\nstatic void __exit end(void) {{ }}\n\
         module_init(begin);\nmodule_exit(end);\nMODULE_LICENSE(\"GPL\");\n"
    );
    build(kernel, folder, name, &text)
}

/// A module with this source.
fn build(kernel: &KernelPackage, folder: &Scratch, name: &str, text: &str) -> Result<PathBuf> {
    let source = Scratch::new()?;
    source.file("driver.c", text)?;
    source.file("Kbuild", "obj-m := driver.o\n")?;
    let cache = Cache::of_workspace();
    let built = images::modules::build(&cache, &Headers::fetch(&cache, kernel)?, &source.path(""), "driver")?;
    std::fs::create_dir_all(folder.path(name))?;
    let copy = folder.path(name).join("driver.ko");
    std::fs::copy(built, &copy)?;
    Ok(copy)
}

/// Where in the module the function is.
fn offset_of_lose(module: &PathBuf) -> Result<String> {
    let output = Command::new("nm").arg(module).output().context("Cannot run nm")?;
    let symbols = String::from_utf8_lossy(&output.stdout);
    let line = symbols.lines().find(|line| line.ends_with(" lose")).context("no symbol lose")?;
    Ok(line.to_owned())
}

/// An initramfs of the guest's own, packed, with ours laid over it: its tools and links are there, and leaks are found.
pub fn initramfs() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let leaky = module(&kernel, "leaky")?;
    let busybox = images::initramfs::find_busybox().context("busybox")?;
    let mut archive = CpioWriter::new(Vec::new());
    archive.folder("usr/bin", 0o755)?;
    archive.symlink("bin", "usr/bin")?;
    archive.file("usr/bin/theirs", 0o755, &std::fs::read(busybox)?)?;
    archive.symlink("usr/bin/cat", "theirs")?;
    archive.file("etc/theirs", 0o644, b"right\n")?;
    archive.file("init", 0o755, b"not to be run")?;
    let folder = Scratch::new()?;
    let plain = folder.file("base.cpio", archive.finish()?)?;
    let packed = Command::new("gzip").arg(&plain).status().context("gzip")?;
    ensure!(packed.success(), "gzip: {packed}");
    let guest = format!("name = \"g\"\ninitramfs = \"{}\"", folder.path("base.cpio.gz").display());
    let mut suite = head(&kernel.vmlinuz, 1).replace("name = \"g\"", &guest);
    suite += "[[test]]\nname = \"theirs\"\nrun = \"[ -h /bin ] && [ $(/bin/cat /etc/theirs) = right ] && exit 7\"\n\
              status = 7\n";
    suite += &planted(&leaky, "list", "leaks = 5\nfunctions = [\"leaky_list\"]");
    let (finished, results) = Case::new(&suite)?.regress(0, &[])?;
    let wanted = [("boot", "passed", 0), ("theirs", "passed", 0), ("list", "passed", 5)];
    ensure!(outcomes(&results)? == wanted, "{}\n{}", finished.stdout, finished.stderr);
    Ok(())
}

/// What a test writes to a disk is there for none of the others, and not on the host.
pub fn disks() -> Result<()> {
    let folder = Scratch::new()?;
    let disk = folder.file("disk.img", vec![0; 1 << 20])?;
    let guest = format!("name = \"g\"\ndisks = [\"{}\"]", disk.display());
    let kernel = kernel("6.1-cloud")?;
    let mut suite = String::from("boot = \"per-test\"\n") + &head(&kernel.vmlinuz, 1);
    suite = suite.replace("name = \"g\"", &guest);
    for name in ["first", "second"] {
        suite += &format!(
            "[[test]]\nname = \"{name}\"\nrun = '[ \"$(dd if=/dev/vda bs=1 count=5 2> /dev/null)\" != found ] && \
             echo found > /dev/vda && sync && [ \"$(head -n 1 /dev/vda)\" = found ]'\n"
        );
    }
    let (finished, results) = Case::new(&suite)?.regress(0, &["--only=k/g/first", "--only=k/g/second"])?;
    let wanted = [("first", "passed", 0), ("second", "passed", 0)];
    ensure!(outcomes(&results)? == wanted, "{}\n{}", finished.stdout, finished.stderr);
    ensure!(std::fs::read(&disk)? == vec![0; 1 << 20], "the host's disk was written to");
    Ok(())
}

/// A guest that panics, goes off, hangs or does not boot, a test that does not end, a module that is not there.
pub fn faults() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let mut suite = head(&kernel.vmlinuz, 1);
    suite += "[[test]]\nname = \"panic\"\nrun = \"echo c > /proc/sysrq-trigger\"\n";
    suite += "[[test]]\nname = \"late\"\nrun = \"sleep 10000\"\ntimeout_s = 3\n";
    suite += "[[test]]\nname = \"module\"\nmodules = [\"absent.ko\"]\n";
    suite += "[[test]]\nname = \"off\"\nrun = \"poweroff -f\"\n";
    let builds = Scratch::new()?;
    let hang = build(&kernel, &builds, "hang", HANG)?;
    suite += &format!("[[test]]\nname = \"hang\"\nmodules = [\"{}\"]\ntimeout_s = 600\n", hang.display());
    suite += "[[test]]\nname = \"last\"\nrun = \"true\"\n";
    suite += "[[guest]]\nname = \"dead\"\ncmdline = \"loglevel=5 rdinit=/absent\"\n";
    let (finished, results) = Case::new(&suite)?.regress(3, &[])?;
    let wanted = [
        ("boot", "passed", 0),
        ("panic", "crashed", 0),
        ("late", "timed-out", 0),
        ("module", "failed", 0),
        ("off", "crashed", 0),
        ("hang", "hung", 0),
        ("last", "passed", 0),
    ];
    let all = outcomes(&results)?;
    let (here, dead) = all.split_at(wanted.len().min(all.len()));
    ensure!(here == wanted, "{}\n{}", finished.stdout, finished.stderr);
    // What is not there is known before a boot.
    let of_dead = |test: &str| if test == "module" { "failed" } else { "not-booted" };
    let fits = dead.len() == wanted.len() && dead.iter().all(|(test, outcome, _)| *outcome == of_dead(test));
    ensure!(fits, "{dead:?}\n{}", finished.stdout);
    let why = results["tests"][1]["message"].as_str().unwrap_or_default();
    ensure!(why.contains("Kernel panic - not syncing: sysrq"), "{why}");
    Ok(())
}

/// The kernel is elsewhere in memory each time, and other CPUs allocate.
pub fn stable_groups() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let leaky = module(&kernel, "leaky")?;
    let mut found = Vec::new();
    for cpus in [1, 2] {
        let suite =
            head(&kernel.vmlinuz, cpus) + &planted(&leaky, "tree", "") + &planted(&leaky, "forms", "");
        let (_, results) = Case::new(&suite)?.regress(1, &[])?;
        let tests = results["tests"].as_array().context("tests")?;
        let groups = tests.iter().flat_map(|test| test["groups"].as_array().into_iter().flatten());
        let mut ids: Vec<String> = groups.map(|group| group["id"].to_string()).collect();
        ids.sort();
        found.push(ids);
    }
    ensure!(found[0] == found[1] && found[0].len() > 5, "{found:?}");
    Ok(())
}
