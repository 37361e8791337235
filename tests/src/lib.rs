//! Shared by the integration tests: the binary under test, guests to boot, what they printed.
//!
//! The tests drive `kleak-vmm` as a user does: by its command line, its console and its reports. On a host
//! without usable KVM it goes through the lab by itself, so the tests do not know where they run.

pub mod schemas;
mod session;
pub mod work;

pub use session::{Client, Session, run};

use anyhow::{Context, Result, bail, ensure};
use images::host_packages;
use images::kernel::Headers;
use images::{Cache, KernelPackage, modules, programs};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// The guest's port to the detector, as scripts name it; [`Guest::script`] puts in what it is on the guest's architecture.
pub const PORT: &str = "/dev/ttyS1";
/// The same on arm64.
const ARM64_PORT: &str = "/dev/ttyAMA1";

/// Longest any one run may take; the lab is slow.
pub const RUN_TIMEOUT: Duration = Duration::from_secs(400);
/// The same in the lab `vmx`.
const VMX_TIMEOUT: Duration = Duration::from_secs(1500);
/// Between the end of a run by its own time limit and the test's.
const MARGIN_S: u64 = 60;

/// What the lab `vmx` needs of Debian.
const VMX_PACKAGES: [&str; 7] =
    ["bochs", "bochs-term", "bochsbios", "vgabios", "isolinux", "syslinux-common", "xorriso"];

/// What the lab `arm`, and modules for its guests, need of Debian.
pub const ARM_PACKAGES: [&str; 2] = ["qemu-system-arm", "gcc-12-aarch64-linux-gnu"];

/// Machines that run at a time: a boot in the lab keeps little more than one host CPU busy.
const PARALLEL: usize = 2;

/// How a Linux kernel says that it ran into a breakpoint nobody set. QEMU before 8.1 can keep a translation of the one
/// that stands in code for a moment while the kernel patches it, when another CPU runs there ("accel/tcg: Always lock
/// pages before translation" is the fix): any kernel with several CPUs under its TCG dies of it now and then, in the
/// lab that is the guest or the helper. We set no such breakpoint there, so it is never our own.
///
/// Or it meets that one again and again, until its time is over, while its text is patched early in its boot.
const STRAY_BREAKPOINT: [&str; 2] = ["int3: 0000 [#", " asm_exc_int3+0x0/"];

/// Starts something with a guest again, once, when a kernel that the lab's QEMU killed made it fail, and says so.
///
/// # Errors
/// Those of `body`.
pub fn despite_qemu<T>(label: &str, body: impl Fn() -> Result<T>) -> Result<T> {
    let is_stray = |error: &anyhow::Error| {
        let said = format!("{error:#}");
        STRAY_BREAKPOINT.iter().any(|sign| said.contains(sign))
    };
    match body() {
        Err(error) if is_stray(&error) => {
            eprintln!("{label} is started again: QEMU let a kernel run into a breakpoint that was gone");
            body()
        }
        result => result,
    }
}

/// One named test, [`despite_qemu`].
pub fn test(name: impl Into<String>, body: impl Fn() -> Result<()> + Send + 'static) -> Trial {
    let name = name.into();
    let label = name.clone();
    Trial::test(name, move || {
        despite_qemu(&label, &body).map_err(|error| {
            let said = format!("{error:#}");
            note_failure(&label, &said);
            Failed::from(said)
        })
    })
}

/// Leaves what a failed test said in the folder that `KLEAK_FAILURES` names, whence `cargo xtask test` repeats it at its end:
/// a run of hours has long outputs, and of a run in CI often only the end is kept.
fn note_failure(name: &str, said: &str) {
    let Some(folder) = std::env::var_os("KLEAK_FAILURES").map(PathBuf::from) else { return };
    if let Err(error) = std::fs::write(folder.join(name), said) {
        eprintln!("{name}: Cannot write {}: {error}", folder.display());
    }
}

/// A long test: `cargo xtask test --full` runs it, otherwise it is counted as ignored.
pub fn long_test(name: impl Into<String>, body: impl Fn() -> Result<()> + Send + 'static) -> Trial {
    let full = std::env::var_os("KLEAK_FULL").is_some();
    test(name, body).with_kind(if full { "" } else { "needs --full" }).with_ignored_flag(!full)
}

/// A test that needs these Debian packages on the host. Where one is missing it is skipped, and that is said, unless
/// `KLEAK_REQUIRE` is set.
pub fn with_packages(trial: Trial, packages: &[&str]) -> Trial {
    let there = |name: &str| host_packages::ALL.iter().any(|one| one.name == name && one.is_installed());
    match packages.iter().find(|name| !there(name)) {
        Some(missing) if std::env::var_os("KLEAK_REQUIRE").is_none() && !trial.has_ignored_flag() => {
            eprintln!("skipped: {}: needs Debian's {missing}; `cargo xtask test` installs it", trial.name());
            trial.with_ignored_flag(true)
        }
        _ => trial,
    }
}

/// By what exits a test's guest is trapped, and so where it runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Exits {
    /// Those that the host has: port writes in the lab `svm`.
    Usual,
    /// Breakpoints, in the lab `vmx`.
    Breakpoint,
}

/// A test that has been named for its usual exits, by breakpoint exits: a long one, as a boot takes minutes there.
pub fn in_vmx(name: &str, body: impl Fn(Exits) -> Result<()> + Send + 'static) -> Trial {
    with_packages(long_test(format!("{name}_in_vmx"), move || body(Exits::Breakpoint)), &VMX_PACKAGES)
}

/// Runs tests, each with a machine of its own, in `cargo test`'s format.
///
/// Without the prepared binary and images every test is skipped with the reason, unless
/// `KLEAK_REQUIRE` is set, as `cargo xtask test` does: then that is a failure.
pub fn main(trials: Vec<Trial>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(arguments.test_threads.unwrap_or(PARALLEL));
    let missing = std::env::var_os("KLEAK_VMM").is_none();
    if missing && std::env::var_os("KLEAK_REQUIRE").is_some() {
        eprintln!("KLEAK_VMM is not set: nothing to test");
        return ExitCode::FAILURE;
    }
    if missing && !arguments.list {
        eprintln!(
            "skipped: KLEAK_VMM does not name the binary; `cargo xtask test` builds it, prepares the guests and runs these"
        );
    }
    let trials = trials.into_iter().map(|t| if missing { t.with_ignored_flag(true) } else { t }).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// The binary under test.
///
/// # Errors
/// `KLEAK_VMM` is not set.
pub fn binary() -> Result<PathBuf> {
    let path = std::env::var_os("KLEAK_VMM")
        .context("KLEAK_VMM does not name the binary; use `cargo xtask test`")?;
    Ok(path.into())
}

/// A fresh scratch directory, removed with the value.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Under the system's temporary directory.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new() -> Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("kleak-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("Cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    /// A path inside it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A file inside it with this content.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.path(name);
        std::fs::write(&path, content).with_context(|| format!("Cannot write {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What a finished run left.
#[derive(Debug)]
pub struct Finished {
    /// Exit code; None when a signal ended it.
    pub code: Option<i32>,
    /// Standard output: the guest's console and the report.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Fails with all output unless the exit code is `code`.
    ///
    /// # Errors
    /// It is another.
    pub fn expect_code(&self, code: i32) -> Result<&Self> {
        ensure!(
            self.code == Some(code),
            "exit code {:?}, wanted {code}\n--- stdout (tail)\n{}\n--- stderr\n{}",
            self.code,
            tail(&self.stdout, 60),
            self.stderr
        );
        Ok(self)
    }
}

/// The last `lines` lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Runs one console command against a running machine and returns the reply.
///
/// # Errors
/// `ctl` fails.
pub fn ctl(socket: &Path, command: &str) -> Result<String> {
    let socket = socket.to_str().context("socket path")?;
    let finished = run(["ctl", "--control", socket].into_iter().chain(command.split(' ')))?;
    finished.expect_code(0).with_context(|| format!("ctl {command}"))?;
    Ok(finished.stdout)
}

/// Reads a JSON report.
///
/// # Errors
/// Not there, or not JSON, or of another schema.
pub fn report(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| format!("No report {}", path.display()))?;
    let value: Value = serde_json::from_str(&text)?;
    ensure!(value["schema"] == "kleak-report/1", "schema {}", value["schema"]);
    Ok(value)
}

/// Number of `unreferenced object` headers in kmemleak's text.
pub fn count_objects(text: &str) -> usize {
    text.lines().filter(|line| line.starts_with("unreferenced object 0x")).count()
}

/// A stock kernel: the newest of a line such as `6.1-cloud`, or an exact one such as `6.1.0-47-cloud`.
///
/// # Errors
/// It cannot be fetched.
pub fn kernel(name: &str) -> Result<KernelPackage> {
    KernelPackage::fetch(&Cache::of_workspace(), name)
}

/// One of our own test modules, built for a stock kernel.
///
/// # Errors
/// It cannot be built.
pub fn module(kernel: &KernelPackage, name: &str) -> Result<PathBuf> {
    let cache = Cache::of_workspace();
    modules::own(&cache, &Headers::fetch(&cache, kernel)?, name)
}

/// Upstream's `kmemleak-test` module, built for a stock kernel.
///
/// # Errors
/// It cannot be fetched or built.
pub fn kmemleak_test(kernel: &KernelPackage) -> Result<PathBuf> {
    let cache = Cache::of_workspace();
    modules::kmemleak_test(&cache, &Headers::fetch(&cache, kernel)?)
}

/// One of our own programs for guests, static.
///
/// # Errors
/// It does not compile.
pub fn program(name: &str) -> Result<PathBuf> {
    programs::build(&Cache::of_workspace(), name)
}

/// A guest: `kleak-vmm run` with this kernel and the usual options for tests.
pub struct Guest {
    arguments: Vec<OsString>,
    port: &'static str,
    /// None: the default.
    tracer: Option<OsString>,
    cmdline: String,
    timeout_s: u64,
    patience: Duration,
    /// Folder of programs that take the place of the host's.
    programs: Option<PathBuf>,
    scratch: Scratch,
}

impl Guest {
    /// `kernel` with `cpus` vCPUs, a control socket and a JSON report; in the lab that has its processors, where the host has
    /// others.
    ///
    /// # Errors
    /// No scratch directory to be had.
    pub fn new(kernel: &KernelPackage, cpus: u32) -> Result<Self> {
        let mut guest = Self::of_image(&kernel.vmlinuz, cpus)?;
        if kernel.is_arm64() {
            guest.port = ARM64_PORT;
            if std::env::consts::ARCH != "aarch64" {
                guest.option("--lab", "arm");
            }
        }
        Ok(guest)
    }

    /// The same with any kernel image.
    ///
    /// # Errors
    /// No scratch directory to be had.
    pub fn of_image(kernel: &Path, cpus: u32) -> Result<Self> {
        let scratch = Scratch::new()?;
        // Warnings and worse: each character on the console is two exits, a quarter of the time of a boot in the lab. And a
        // CPU that an emulator gives no time for half a minute is no lockup of the guest's.
        let cmdline = "loglevel=5 watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=120".to_owned();
        let mut guest = Self {
            arguments: vec!["run".into()],
            port: PORT,
            // To try everything by a tracer that is not the default.
            tracer: std::env::var_os("KLEAK_TRACER"),
            cmdline,
            timeout_s: 0,
            patience: RUN_TIMEOUT,
            programs: None,
            scratch,
        };
        guest.timeout(RUN_TIMEOUT.as_secs() - MARGIN_S);
        guest.option("--kernel", kernel).option("--cpus", cpus.to_string());
        let (socket, report) = (guest.socket(), guest.report_path());
        guest.option("--control", socket).option("--report", report);
        Ok(guest)
    }

    /// `kernel` with `cpus` vCPUs, or one where one is slow enough, trapped by these exits.
    ///
    /// # Errors
    /// No scratch directory to be had.
    pub fn trapped(kernel: &KernelPackage, cpus: u32, exits: Exits) -> Result<Self> {
        if exits == Exits::Usual {
            return Self::new(kernel, cpus);
        }
        let mut guest = Self::new(kernel, 1)?;
        guest.timeout(VMX_TIMEOUT.as_secs() - MARGIN_S);
        guest.option("--lab", "vmx").option("--trap", "int3");
        Ok(guest)
    }

    /// How long it may take, whatever it does.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Adds an option and its value.
    pub fn option(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.arguments.extend([name.into(), value.into()]);
        self
    }

    /// Has it traced by this tracer.
    pub fn tracer(&mut self, name: &str) -> &mut Self {
        self.tracer = Some(name.into());
        self
    }

    /// Adds words to the kernel's command line.
    pub fn cmdline(&mut self, words: &str) -> &mut Self {
        self.cmdline.push(' ');
        self.cmdline.push_str(words);
        self
    }

    /// Ends the run after this many seconds.
    pub fn timeout(&mut self, seconds: u64) -> &mut Self {
        self.timeout_s = seconds;
        self.patience = RUN_TIMEOUT.max(Duration::from_secs(seconds + MARGIN_S));
        self
    }

    /// Runs it in a lab `arm` whose machine has a GICv2 and no GICv3, so that KVM has only that for guests.
    ///
    /// # Errors
    /// The program that starts such a machine cannot be written.
    pub fn with_gic_v2(&mut self) -> Result<&mut Self> {
        use std::os::unix::fs::PermissionsExt;
        const QEMU: &str = "qemu-system-aarch64";
        let text = format!(
            "#!/bin/sh
             mine=$(dirname \"$0\"); PATH=$(echo \"$PATH\" | sed \"s|^$mine:||\")
             for word; do shift; set -- \"$@\" \"$(echo \"$word\" | sed s/gic-version=3/gic-version=2/)\"; done
             exec {QEMU} \"$@\"
"
        );
        let program = self.scratch.file(QEMU, text)?;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
        self.programs = program.parent().map(Path::to_owned);
        Ok(self)
    }

    /// Adds an option without a value.
    pub fn flag(&mut self, name: &str) -> &mut Self {
        self.arguments.push(name.into());
        self
    }

    /// Copies a file into the guest.
    pub fn file(&mut self, host: &Path, guest: &str) -> &mut Self {
        let mut pair = host.as_os_str().to_owned();
        pair.push(":");
        pair.push(guest);
        self.option("--file", pair)
    }

    /// Runs this shell script in the guest. [`PORT`] in it is the guest's port to the detector.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn script(&mut self, text: &str) -> Result<&mut Self> {
        let mut text = text.replace(PORT, self.port);
        if self.port == ARM64_PORT {
            // A character echoed there is five exits, and reports are long.
            text = format!("stty -F {ARM64_PORT} -echo; {text}");
        }
        let path = self.scratch.file("script.sh", text)?;
        Ok(self.file(&path, "/script.sh").option("--exec", "sh /script.sh"))
    }

    /// Its control socket.
    pub fn socket(&self) -> PathBuf {
        self.scratch.path("control.sock")
    }

    /// Where its report goes.
    pub fn report_path(&self) -> PathBuf {
        self.scratch.path("report.json")
    }

    /// Starts it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&self) -> Result<Session> {
        let session = Session::start_with(self.all_arguments(), self.programs.as_deref())?;
        Ok(session.with_patience(self.patience))
    }

    /// Starts it on a terminal.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_on_terminal(&self) -> Result<Session> {
        Ok(Session::start_on_terminal(self.all_arguments())?.with_patience(self.patience))
    }

    fn all_arguments(&self) -> impl Iterator<Item = OsString> {
        let rest = ["--timeout", &self.timeout_s.to_string(), "--cmdline", &self.cmdline].map(OsString::from);
        let tracer = self.tracer.iter().flat_map(|tracer| ["--tracer".into(), tracer.clone()]);
        self.arguments.iter().cloned().chain(rest).chain(tracer)
    }

    /// Boots it, waits for its end and checks the exit code.
    ///
    /// # Errors
    /// Another exit code.
    pub fn boot(&self, code: i32) -> Result<Finished> {
        let finished = self.start()?.finish()?;
        finished.expect_code(code)?;
        Ok(finished)
    }

    /// Its final report.
    ///
    /// # Errors
    /// There is none.
    pub fn report(&self) -> Result<Value> {
        report(&self.report_path())
    }

    /// Runs a console command.
    ///
    /// # Errors
    /// It fails.
    pub fn ctl(&self, command: &str) -> Result<String> {
        ctl(&self.socket(), command)
    }

    /// Runs a console command in its JSON form.
    ///
    /// # Errors
    /// It fails, or does not answer in JSON.
    pub fn json(&self, command: &str) -> Result<Value> {
        let reply = self.ctl(&format!("json {command}"))?;
        serde_json::from_str(&reply).with_context(|| format!("{command}: {reply}"))
    }
}

/// Sizes of a report's leaks, ascending.
///
/// # Errors
/// Not a report.
pub fn sizes(report: &Value) -> Result<Vec<u64>> {
    let leaks = report["leaks"].as_array().context("no leaks in the report")?;
    let mut sizes: Vec<u64> = leaks.iter().filter_map(|l| l["size"].as_u64()).collect();
    sizes.sort_unstable();
    Ok(sizes)
}

/// Lines of a guest's console that tell of a kernel defect: none may appear in any test.
///
/// # Errors
/// Names the first.
pub fn no_kernel_complaint(console: &str) -> Result<()> {
    const BAD: [&str; 8] = [
        "WARNING: ",
        "BUG: ",
        "kernel BUG at",
        "Oops",
        "general protection fault",
        "soft lockup",
        "ftrace bug",
        "Call Trace:",
    ];
    // What the kernel thinks of Bochs' Skylake, which no guest can help.
    const CPU: &str = "RETBleed: WARNING: Spectre v2 mitigation";
    let complains = |line: &&str| BAD.iter().any(|bad| line.contains(bad)) && !line.contains(CPU);
    match console.lines().find(complains) {
        Some(line) => bail!("the guest's kernel complains: {line}"),
        None => Ok(()),
    }
}
