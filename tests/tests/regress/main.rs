//! `kleak-vmm regress` on real guests.

use anyhow::{Context, Result, ensure};
use images::{Cache, cache};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tests::{Finished, Guest, RUN_TIMEOUT, Scratch, Session, kernel, long_test, module, run, test};

fn main() -> ExitCode {
    let mut trials = vec![test("leaks_are_those_of_the_test_that_made_them", attribution)];
    trials.push(long_test("a_guest_that_dies_takes_one_test_with_it", real_faults));
    trials.push(long_test("groups_are_the_same_over_boots_and_cpus", stable_groups));
    trials.push(long_test("the_canary_is_found_and_its_reference_put_back", canary));
    trials.push(long_test("an_untraced_canary_is_not_found", untraced));
    trials.push(long_test("bisect_finds_the_commit_that_leaks", bisect));
    for suite in ["planted", "kmemleak-test", "io_uring", "boot"] {
        trials.push(long_test(format!("suite_{suite}"), move || shipped(suite)));
    }
    tests::main(trials)
}

/// A folder with a suite, and its results.
struct Case(Scratch);

impl Case {
    fn new(suite: &str) -> Result<Self> {
        let scratch = Scratch::new()?;
        scratch.file("suite.toml", suite)?;
        Ok(Self(scratch))
    }

    fn arguments(&self, more: &[&str]) -> Vec<String> {
        let path = |name: &str| self.0.path(name).display().to_string();
        let mut line = vec!["regress".to_owned(), path("suite.toml")];
        for name in ["results.json", "results.xml", "results.sarif", "results.html"] {
            line.extend(["--report".to_owned(), path(name)]);
        }
        line.extend(["--logs".to_owned(), path("logs")]);
        line.extend(more.iter().map(|&word| word.to_owned()));
        line
    }

    fn regress(&self, code: i32, more: &[&str]) -> Result<(Finished, Value)> {
        let mut session = Session::start(self.arguments(more))?;
        // Longer than a boot: several of them.
        let deadline = std::time::Instant::now() + RUN_TIMEOUT * 6;
        while session.is_running()? && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        let finished = session.finish()?;
        finished.expect_code(code)?;
        let text = std::fs::read_to_string(self.0.path("results.json")).context("results")?;
        Ok((finished, serde_json::from_str(&text)?))
    }
}

/// Kernel, guest and the test that the boot itself leaks nothing.
fn head(kernel: &Path, cpus: u32) -> String {
    format!(
        "settle_ms = 2000\nboot_timeout_s = 240\n[[kernel]]\nname = \"k\"\npath = \"{}\"\n[[guest]]\nname = \"g\"\n\
         cpus = {cpus}\ncmdline = \"loglevel=5 watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=120\"\n\
         [[test]]\nname = \"boot\"\n",
        kernel.display()
    )
}

fn planted(module: &Path, name: &str, expected: &str) -> String {
    format!("[[test]]\nname = \"{name}\"\nmodules = [\"{},case={name}\"]\n{expected}\n", module.display())
}

/// Outcome and number of leaks of each test.
fn outcomes(results: &Value) -> Result<Vec<(&str, &str, u64)>> {
    let tests = results["tests"].as_array().context("tests")?;
    tests.iter().map(outcome).collect()
}

fn outcome(test: &Value) -> Result<(&str, &str, u64)> {
    let groups = test["groups"].as_array().context("groups")?;
    let leaks = groups.iter().filter_map(|group| group["count"].as_u64()).sum();
    Ok((test["test"].as_str().context("test")?, test["outcome"].as_str().context("outcome")?, leaks))
}

fn canaries(results: &Value) -> Vec<&Value> {
    results["boots"].as_array().into_iter().flatten().map(|boot| &boot["canary"]).collect()
}

/// One boot: what each test leaks is its own, the right and the wrong.
fn attribution() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let leaky = module(&kernel, "leaky")?;
    let mut suite = head(&kernel.vmlinuz, 1);
    suite += &planted(&leaky, "list", "leaks = 5\nfunctions = [\"leaky_list\"]");
    suite += "[[test]]\nname = \"status\"\nrun = \"exit 3\"\nstatus = 3\n";
    suite += &planted(&leaky, "cycle", "");
    let case = Case::new(&suite)?;
    let (finished, results) = case.regress(1, &[])?;
    let wanted =
        [("boot", "passed", 0), ("list", "passed", 5), ("status", "passed", 0), ("cycle", "leaked", 2)];
    ensure!(outcomes(&results)? == wanted, "{}\n{}", finished.stdout, finished.stderr);
    ensure!(canaries(&results) == ["found"], "{:#}", results["boots"]);
    let frames = results["tests"][3]["groups"][0]["backtrace"].as_array().context("backtrace")?;
    ensure!(frames.iter().any(|f| f["symbol"] == "leaky_cycle" && f["module"] == "leaky"), "{frames:?}");
    ensure!(finished.stdout.contains("k/g/cycle: leaked: 2 new leaks"), "{}", finished.stdout);
    for (name, part) in [
        ("results.xml", "<failure type=\"leaked\""),
        ("results.sarif", "\"2.1.0\""),
        ("results.html", "<svg"),
    ] {
        let text = std::fs::read_to_string(case.0.path(name))?;
        ensure!(text.contains(part), "{name}: {text}");
    }
    ensure!(std::fs::read_dir(case.0.path("logs"))?.count() == 1, "no log of the boot");
    Ok(())
}

fn real_faults() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let mut suite = head(&kernel.vmlinuz, 1);
    suite += "[[test]]\nname = \"panic\"\nrun = \"echo c > /proc/sysrq-trigger\"\n";
    suite += "[[test]]\nname = \"late\"\nrun = \"sleep 10000\"\ntimeout_s = 3\n";
    suite += "[[test]]\nname = \"module\"\nmodules = [\"absent.ko\"]\n";
    suite += "[[test]]\nname = \"off\"\nrun = \"poweroff -f\"\n";
    suite += "[[test]]\nname = \"last\"\nrun = \"true\"\n";
    let (finished, results) = Case::new(&suite)?.regress(3, &[])?;
    let wanted = [
        ("boot", "passed", 0),
        ("panic", "crashed", 0),
        ("late", "timed-out", 0),
        ("module", "failed", 0),
        ("off", "crashed", 0),
        ("last", "passed", 0),
    ];
    ensure!(outcomes(&results)? == wanted, "{}\n{}", finished.stdout, finished.stderr);
    let why = results["tests"][1]["message"].as_str().unwrap_or_default();
    ensure!(why.contains("Kernel panic - not syncing: sysrq"), "{why}");
    Ok(())
}

/// The kernel is elsewhere in memory each time, and other CPUs allocate.
fn stable_groups() -> Result<()> {
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

const PLANT: &str =
    "mkdir -p /kleak/canary; mount -t ramfs kleak-canary-of-this-guest /kleak/canary; sleep 2; echo READY
                     read -r go; cat /proc/mounts; umount /kleak/canary && echo UNMOUNTED";

fn canary() -> Result<()> {
    let mut guest = Guest::new(&kernel("6.12-cloud")?, 2)?;
    guest.script(PLANT)?;
    let mut session = guest.start()?;
    session.wait_for("\nREADY", RUN_TIMEOUT)?;
    let reply: Value = serde_json::from_str(&guest.ctl("json canary")?)?;
    ensure!(reply["canary"]["found"] == true, "{reply}");
    let functions = reply["canary"]["functions"].to_string();
    ensure!(functions.contains("alloc_vfsmnt") || functions.contains("vfs_create_mount"), "{functions}");
    // It is no leak of the guest's, before or after.
    ensure!(guest.ctl("scan")?.contains(" 0 new"), "the canary stayed lost");
    session.type_line("go")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    for part in ["kleak-canary-of-this-guest /kleak/canary ramfs", "\nUNMOUNTED"] {
        ensure!(finished.stdout.contains(part), "no {part:?}: {}", tests::tail(&finished.stdout, 60));
    }
    tests::no_kernel_complaint(&finished.stdout)
}

fn untraced() -> Result<()> {
    let mut guest = Guest::new(&kernel("6.1-cloud")?, 1)?;
    guest.option("--tracer", "off").script(PLANT)?;
    let mut session = guest.start()?;
    session.wait_for("\nREADY", RUN_TIMEOUT)?;
    let socket = guest.socket();
    let finished = run(["ctl", "--control", socket.to_str().context("socket")?, "canary"])?;
    finished.expect_code(2)?;
    ensure!(finished.stderr.contains("was not traced"), "{}", finished.stderr);
    session.type_line("go")?;
    session.finish()?.expect_code(0)?;
    Ok(())
}

/// A suite of `images/suites`, as it is.
fn shipped(name: &str) -> Result<()> {
    let path = cache::workspace().join(format!("images/suites/{name}.toml"));
    let case = Case::new(&std::fs::read_to_string(path)?)?;
    let (finished, results) = case.regress(0, &[])?;
    let tests = outcomes(&results)?;
    ensure!(tests.iter().all(|(_, outcome, _)| *outcome == "passed"), "{}", finished.stdout);
    Ok(())
}

/// `git bisect run` on a history of a module's source, built for each commit.
fn bisect() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let headers = images::kernel::Headers::fetch(&Cache::of_workspace(), &kernel)?;
    let repository = Scratch::new()?;
    let git = |words: &[&str]| -> Result<String> {
        let mut command = std::process::Command::new("git");
        command.arg("-C").arg(repository.path("")).args([
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@example.org",
        ]);
        let output = command.args(words).output().context("git")?;
        ensure!(output.status.success(), "git {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    git(&["init", "-q"])?;
    let mut commits = Vec::new();
    let history = ["kfree(p);", "/* tidy */ kfree(p);", "", "/* later */", "/* newest */"];
    for body in history {
        let source = format!(
            "#include <linux/module.h>\n#include <linux/slab.h>\n\
             static noinline void drop(void *p) {{ {body} }}\n\
             static int __init begin(void) {{ drop(kmalloc(100, GFP_KERNEL)); return 0; }}\n\
             static void __exit end(void) {{ }}\nmodule_init(begin);\nmodule_exit(end);\nMODULE_LICENSE(\"GPL\");\n"
        );
        repository.file("driver.c", source)?;
        repository.file("Kbuild", "obj-m := driver.o\n")?;
        git(&["add", "."])?;
        git(&["commit", "-q", "-m", "change"])?;
        commits.push(git(&["rev-parse", "HEAD"])?);
    }
    // Built beforehand: what `git bisect run` would do itself with a script that calls make.
    let cache = Cache::of_workspace();
    let built = Scratch::new()?;
    for commit in &commits {
        git(&["checkout", "-q", commit])?;
        let source = Scratch::new()?;
        for name in ["driver.c", "Kbuild"] {
            source.file(name, std::fs::read(repository.path(name))?)?;
        }
        let module: PathBuf = images::modules::build(&cache, &headers, &source.path(""), "driver")?;
        std::fs::copy(module, built.path(&format!("{commit}.ko")))?;
    }
    let suite = head(&kernel.vmlinuz, 1)
        + "[[test]]\nname = \"driver\"\nmodules = [\"COMMIT.ko\"]\n"
            .replace("COMMIT", &built.path("now").display().to_string())
            .as_str();
    let case = Case::new(&suite)?;
    let step = format!(
        "cp {0}/$(git rev-parse HEAD).ko {0}/now.ko && exec {1} regress {2} --bisect-exit-codes",
        built.path("").display(),
        tests::binary()?.display(),
        case.0.path("suite.toml").display()
    );
    git(&["bisect", "start", &commits[4], &commits[0]])?;
    let said = git(&["bisect", "run", "sh", "-c", &step])?;
    ensure!(said.contains(&format!("{} is the first bad commit", commits[2])), "{said}");
    Ok(())
}
