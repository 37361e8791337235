//! One boot and the tests in it: prepares the guest's files, follows the driver's marks, has the detector scan, and
//! gives each leak to the test that made it.

use super::driver::{self, Step, Trouble, What};
use super::files::{Files, own_disk};
use super::findings::{self, add, count, take_leaks};
use super::matrix::{self, Boot};
use super::recipes::Ready;
use super::result::{BootResult, FOUND, Group, Growth, Heap, Outcome, TestResult};
use super::suite::{Action, Suite, Test};
use super::worker::{Ending, Live, NoLine, Worker};
use crate::cli::failure;
use crate::cli::values::{FileSpec, format_size};
use crate::run::{SETTLE_MS, SETTLE_WITH_MODULES_MS};
use anyhow::{Context, Result};
use images::initramfs::GuestModule;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a guest is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Beyond what a test may take itself: the driver's own work, in a guest that is traced and may be emulated.
    pub grace: Duration,
    /// Without a sign of life: several times [`driver::PULSE`].
    pub silence: Duration,
}

/// Less in tests.
pub const PATIENCE: Patience = Patience { grace: Duration::from_secs(60), silence: Duration::from_secs(90) };
/// Lines of the console that a result keeps.
const CONSOLE_LINES: usize = 60;
/// How often a scan that does not find all leaks expected, or a canary that is not found, is tried: a word that an earlier
/// call left on a stack can hide an object until it is overwritten.
const TRIES: u32 = 3;
/// Between two tries.
const PAUSE: Duration = Duration::from_secs(2);

/// Why a test was interrupted.
const STOPPED: &str = "the run was ended";
/// Why one was that had not begun.
pub const NOT_BEGUN: &str = "the run was ended before it";

/// What all boots have in common.
pub struct Environment<'a> {
    /// The suite.
    pub suite: &'a Suite,
    /// The program that boots a guest: this one.
    pub program: PathBuf,
    /// Options of `run` for all boots, such as `--lab never`.
    pub options: Vec<OsString>,
    /// Where the consoles' logs go.
    pub logs: Option<PathBuf>,
    /// A folder for files of the moment.
    pub scratch: PathBuf,
    /// [`PATIENCE`]; less in tests.
    pub patience: Patience,
    /// Processes that run.
    pub live: Arc<Live>,
}

/// Takes results as they come.
pub trait Sink: Sync {
    /// A test has its result; one that had another before gets this one.
    fn test(&self, result: TestResult, test: &Test);
    /// A boot has ended.
    fn boot(&self, result: BootResult);
}

/// Runs the tests of the boot at `index` of `boots`, all that there are. A guest that dies takes only the test with it
/// that was running: the others get another boot.
pub fn run(
    environment: &Environment<'_>,
    boots: &[Boot],
    index: usize,
    kernel: &Result<Ready>,
    sink: &dyn Sink,
) {
    let boot = &boots[index];
    let same = |other: &&Boot| (other.kernel, other.guest) == (boot.kernel, boot.guest);
    let mut tests = boots.iter().filter(same).flat_map(|other| &other.tests);
    let judged = tests.any(|&test| is_boot_test(&environment.suite.tests[test]));
    let mut pending: Vec<usize> = boot.tests.clone();
    let mut attempt = 0;
    while !pending.is_empty() {
        attempt += 1;
        let part = Boot { tests: std::mem::take(&mut pending), ..*boot };
        let name = format!("{}-{attempt}", index + 1);
        let release = kernel.as_ref().ok().and_then(|kernel| kernel.release.clone());
        let mut session = Session { release, ..Session::new(environment, part, judged, sink) };
        match kernel {
            _ if environment.live.stopped() => session.fail_rest(Outcome::Interrupted, NOT_BEGUN),
            Ok(kernel) => session.run(kernel, &name),
            Err(error) => session.fail_rest(Outcome::NotBooted, &failure::sentence(error)),
        }
        pending = session.left;
    }
}

/// Files and arguments of a boot.
struct Prepared {
    folder: PathBuf,
    arguments: Vec<OsString>,
    socket: PathBuf,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

struct Session<'a> {
    environment: &'a Environment<'a>,
    boot: Boot,
    /// The kernel's.
    release: Option<String>,
    /// Some test of the run asks for the leaks of the boot itself.
    judged: bool,
    sink: &'a dyn Sink,
    /// Tests of `boot` not ended yet, for another boot.
    left: Vec<usize>,
    /// What became of the canary so far.
    canary: Option<String>,
    /// When the canary that was found last was allocated, in allocator events.
    canary_at: Option<u64>,
    console: VecDeque<String>,
    /// The driver has said that the guest is ready.
    up: bool,
    began: Instant,
    /// Leaks of the boot itself, for the test that asks for them.
    of_boot: Vec<Group>,
    /// Leaks of the test at hand: whatever happens next, they are in its result.
    taken: Vec<Group>,
    /// What was live behind the test at hand.
    heap: Option<Heap>,
    growth: Vec<Growth>,
}

impl<'a> Session<'a> {
    fn new(environment: &'a Environment<'a>, boot: Boot, judged: bool, sink: &'a dyn Sink) -> Self {
        Self {
            environment,
            boot,
            release: None,
            judged,
            sink,
            left: Vec::new(),
            canary: None,
            canary_at: None,
            console: VecDeque::new(),
            up: false,
            began: Instant::now(),
            of_boot: Vec::new(),
            taken: Vec::new(),
            heap: None,
            growth: Vec::new(),
        }
    }

    fn suite(&self) -> &'a Suite {
        self.environment.suite
    }

    fn run(&mut self, kernel: &Ready, name: &str) {
        let modules = self.ready_tests(kernel);
        if self.boot.tests.is_empty() {
            return;
        }
        let began = Instant::now();
        let token = format!("{:x}-{name}", std::process::id());
        let worker = self.prepare(kernel, name, &token, &modules).and_then(|prepared| {
            let log = self.log(name)?;
            let Environment { program, live, .. } = self.environment;
            let worker = Worker::start(program, &prepared.arguments, &prepared.socket, log, live)?;
            Ok((worker, prepared))
        });
        let (mut worker, _prepared) = match worker {
            Ok(both) => both,
            Err(_) if self.environment.live.stopped() => {
                return self.fail_rest(Outcome::Interrupted, NOT_BEGUN);
            }
            Err(error) => return self.fail_rest(Outcome::NotBooted, &failure::sentence(&error)),
        };
        let trouble = self.follow(&mut worker, &token).err();
        if trouble.as_ref().is_some_and(|end| !matches!(end, End::NoLine(NoLine::Ended))) {
            worker.ask_to_end();
        }
        let ending = worker.finish();
        if let Some(end) = trouble {
            self.attribute(end, &ending);
        }
        let suite = self.suite();
        self.sink.boot(BootResult {
            kernel: suite.kernels[self.boot.kernel].name.clone(),
            guest: suite.guests[self.boot.guest].name.clone(),
            millis: millis(began),
            canary: self.canary.take(),
            unasked_leaks: if self.judged { 0 } else { count(&self.of_boot) },
            growth: std::mem::take(&mut self.growth),
        });
    }

    /// Modules of each test. Tests whose modules or files are not there get their result now.
    fn ready_tests(&mut self, kernel: &Ready) -> Vec<Vec<GuestModule>> {
        let mut modules = Vec::new();
        let mut ready = Vec::new();
        for test in std::mem::take(&mut self.boot.tests) {
            let row = &self.suite().tests[test];
            let files = row.files.iter().try_for_each(|file| kernel.file(&file.host).map(drop));
            match files.and_then(|()| kernel.modules(&row.modules)) {
                Ok(found) => {
                    ready.push(test);
                    modules.push(found);
                }
                Err(error) => self.fail(test, Outcome::Failed, &failure::sentence(&error)),
            }
        }
        self.boot.tests = ready;
        modules
    }

    fn log(&self, name: &str) -> Result<Option<File>> {
        let Some(folder) = &self.environment.logs else { return Ok(None) };
        let plain = |c: char| if c.is_alphanumeric() || "._-".contains(c) { c } else { '-' };
        let kernel = self.suite().kernels[self.boot.kernel].name.chars().map(plain).collect::<String>();
        let path = folder.join(format!("{kernel}-{name}.log"));
        File::create(&path).map(Some).with_context(|| format!("Cannot write {}", path.display()))
    }

    /// Writes the driver and what it needs; the arguments of `run`.
    fn prepare(
        &self,
        kernel: &Ready,
        name: &str,
        token: &str,
        modules: &[Vec<GuestModule>],
    ) -> Result<Prepared> {
        let folder = self.environment.scratch.join(name);
        fs::create_dir_all(&folder).with_context(|| format!("Cannot create {}", folder.display()))?;
        let mut prepared = Prepared { socket: folder.join("control"), folder, arguments: vec!["run".into()] };
        let mut files = Files { folder: prepared.folder.clone(), list: Vec::new() };
        self.write_tests(&mut files, token, modules)?;
        let suite = self.suite();
        let guest = &suite.guests[self.boot.guest];
        let tests = self.boot.tests.iter().flat_map(|&test| &suite.tests[test].files);
        for file in guest.files.iter().chain(tests) {
            files.list.push(FileSpec { host: kernel.file(&file.host)?, guest: file.guest.clone() });
        }
        let modules = kernel.modules(&guest.modules)?;
        let modules = modules.iter().enumerate().map(|(index, module)| files.of_guest(index, module));
        let modules: Vec<OsString> = modules.collect::<Result<_>>()?;
        let disks =
            guest.disks.iter().enumerate().map(|(index, disk)| own_disk(&prepared.folder, index, disk));
        let disks: Vec<OsString> = disks.collect::<Result<_>>()?;
        let mut option = |name: &str, value: OsString| {
            let mut word = OsString::from(format!("{name}="));
            word.push(value);
            prepared.arguments.push(word);
        };
        option("--kernel", kernel.path.clone().into());
        option("--mem", format_size(guest.mem_bytes).into());
        option("--cpus", guest.cpus.to_string().into());
        option("--cmdline", guest.cmdline.clone().into());
        option("--control", prepared.socket.clone().into());
        option("--exec", format!("sh {}/driver", driver::FOLDER).into());
        // Scans are made when tests end, and at no other time.
        option("--scan-period", "0".into());
        option("--scan-at-exit", "no".into());
        suite.profile.iter().for_each(|profile| option("--profile", profile.clone().into()));
        suite.suppressions.iter().for_each(|file| option("--suppressions", file.clone().into()));
        guest.initramfs.iter().for_each(|path| option("--initrd", path.clone().into()));
        disks.into_iter().for_each(|disk| option("--disk", disk));
        modules.into_iter().for_each(|module| option("--module", module));
        for file in &files.list {
            let mut value = file.host.clone().into_os_string();
            value.push(":");
            value.push(&file.guest);
            option("--file", value);
        }
        prepared.arguments.extend(self.environment.options.iter().cloned());
        Ok(prepared)
    }

    /// The driver, and the files of each test.
    fn write_tests(&self, files: &mut Files, token: &str, modules: &[Vec<GuestModule>]) -> Result<()> {
        let suite = self.suite();
        let mut steps = Vec::new();
        for (index, (&test, modules)) in self.boot.tests.iter().zip(modules).enumerate() {
            let row = &suite.tests[test];
            files.of_test(index, row, modules)?;
            let names =
                modules.iter().map(|module| (module.name.clone(), module.parameters.clone())).collect();
            steps.push(Step { test: row, modules: names, settle_ms: settle(suite, row) });
        }
        let boot_settle = suite.settle_ms.unwrap_or(SETTLE_MS);
        files.write("driver", "driver", driver::script(token, boot_settle, &steps).as_bytes())
    }

    /// From power-on to the end of the last test.
    fn follow(&mut self, worker: &mut Worker, token: &str) -> Result<(), End> {
        let suite = self.suite();
        let mut answered = 0;
        let mut deadline = Instant::now() + Duration::from_secs(suite.boot_timeout_s);
        let mut silent_at = deadline;
        self.left = self.boot.tests.clone();
        loop {
            let line = worker.line(deadline.min(silent_at)).map_err(|why| match why {
                NoLine::Late if silent_at < deadline => End::Silent,
                other => End::NoLine(other),
            })?;
            let Some(mark) = driver::parse(&line, token) else {
                self.remember(line);
                continue;
            };
            if mark.what == What::Alive {
                silent_at = Instant::now() + self.environment.patience.silence;
                continue;
            }
            if mark.number > answered {
                match mark.what {
                    What::Alive => {}
                    What::Ready => {
                        take_leaks(worker, &mut self.of_boot).map_err(End::Detector)?;
                        self.ask_canary(worker)?;
                        self.ask_status(worker)?;
                        self.up = true;
                        self.console.clear();
                    }
                    What::Done { test, status, trouble } => self.conclude(worker, test, status, trouble)?,
                }
                if self.left.is_empty() {
                    self.growth = findings::growth(worker);
                    // That it is gone already is as good.
                    let _ = worker.request("quit");
                    return Ok(());
                }
                answered = mark.number;
                let Patience { grace, silence } = self.environment.patience;
                silent_at = Instant::now() + silence;
                deadline = Instant::now()
                    + grace
                    + self.left.first().map_or(Duration::ZERO, |&test| allowance(suite, &suite.tests[test]));
                self.began = Instant::now();
            }
            worker.type_text(&driver::answer(mark.number));
        }
    }

    /// A test has ended: its leaks and its result.
    fn conclude(
        &mut self,
        worker: &mut Worker,
        place: usize,
        status: i32,
        trouble: Option<Trouble>,
    ) -> Result<(), End> {
        let Some(&test) = self.boot.tests.get(place).filter(|test| self.left.first() == Some(test)) else {
            return Err(out_of_step());
        };
        let row = &self.suite().tests[test];
        take_leaks(worker, &mut self.taken).map_err(End::Detector)?;
        for _ in 1..TRIES {
            if trouble.is_some() || !self.is_missing(row) {
                break;
            }
            std::thread::sleep(PAUSE);
            take_leaks(worker, &mut self.taken).map_err(End::Detector)?;
        }
        self.ask_canary(worker)?;
        self.ask_status(worker)?;
        let (outcome, message) = match trouble {
            Some(Trouble::Late) => (Outcome::TimedOut, format!("it did not end within {} s", row.timeout_s)),
            Some(Trouble::Setup) => (Outcome::Failed, format!("its set-up exited with {status}")),
            Some(Trouble::Load(name)) => {
                (Outcome::Failed, format!("module {name} could not be loaded, or was loaded already"))
            }
            Some(Trouble::Unload(name)) => (Outcome::Failed, format!("module {name} could not be unloaded")),
            None if row.action != Action::Nothing && status != row.status => {
                (Outcome::Failed, format!("it exited with {status}, not with {}", row.status))
            }
            None => (Outcome::Passed, String::new()),
        };
        let mut result = self.result(test, outcome, &message);
        result.status = (row.action != Action::Nothing).then_some(status);
        self.console.clear();
        self.left.remove(0);
        self.sink.test(result, row);
        Ok(())
    }

    /// Whether the test at hand has not made all the leaks that it is meant to.
    fn is_missing(&self, test: &Test) -> bool {
        let of_boot = self.of_boot.iter().filter(|_| is_boot_test(test));
        test.expected.missing(self.taken.iter().chain(of_boot)).is_some()
    }

    /// The boot ended before its time: whose fault it is, and what becomes of the tests that are left.
    fn attribute(&mut self, end: End, ending: &Ending) {
        let said = ending.error.as_deref();
        let running = self.up;
        let (outcome, message) = match (&end, ending) {
            (End::Canary(why), _) => {
                (Outcome::Canary, format!("the detector did not find its canary: {why}"))
            }
            (End::Losses(what), _) => (Outcome::Untracked, what.clone()),
            _ if self.environment.live.stopped() => (Outcome::Interrupted, STOPPED.to_owned()),
            (End::Silent, _) => {
                let seconds = self.environment.patience.silence.as_secs();
                let outcome = if running { Outcome::Hung } else { Outcome::NotBooted };
                (outcome, format!("no sign of life from the guest for {seconds} s: its time stands still"))
            }
            (End::NoLine(NoLine::Late), _) if running => {
                (Outcome::Hung, "the guest does not answer any more".to_owned())
            }
            (End::NoLine(NoLine::Late), _) => {
                let seconds = self.suite().boot_timeout_s;
                (
                    Outcome::NotBooted,
                    format!("the guest was not up within {seconds} s, the suite's boot_timeout_s"),
                )
            }
            (_, Ending { signal: Some(signal), .. })
                if !matches!(end, End::Detector(_)) || *signal != libc::SIGTERM =>
            {
                (Outcome::Worker, format!("the process with the guest was killed by signal {signal}"))
            }
            (_, Ending { code: Some(4), .. }) => {
                (Outcome::Host, said.unwrap_or("this host cannot run it").to_owned())
            }
            (_, Ending { code: Some(3), .. }) if running => {
                (Outcome::Crashed, said.unwrap_or("it failed").to_owned())
            }
            (End::Detector(error), _) => (Outcome::Worker, format!("{error:#}")),
            (_, _) if running => (Outcome::Crashed, said.unwrap_or("the guest went off").to_owned()),
            (_, _) => (Outcome::NotBooted, said.unwrap_or("the guest went off").to_owned()),
        };
        match self.left.first().copied() {
            None => {}
            Some(test) if running => {
                self.left.remove(0);
                self.fail(test, outcome, &message);
            }
            // They have not begun, which the next boot, that is none, says of them.
            Some(_) if outcome == Outcome::Interrupted => {}
            Some(_) => self.fail_rest(outcome, &message),
        }
    }

    fn fail_rest(&mut self, outcome: Outcome, message: &str) {
        let rest =
            if self.left.is_empty() { self.boot.tests.clone() } else { std::mem::take(&mut self.left) };
        for test in rest {
            self.fail(test, outcome, message);
            // What it took is the first one's: the others did not begin.
            self.began = Instant::now();
        }
    }

    fn fail(&mut self, test: usize, outcome: Outcome, message: &str) {
        let result = self.result(test, outcome, message);
        self.sink.test(result, &self.suite().tests[test]);
    }

    /// The result of a test, with the leaks found so far.
    fn result(&mut self, test: usize, outcome: Outcome, message: &str) -> TestResult {
        let suite = self.suite();
        let Boot { kernel, guest, .. } = self.boot;
        let mut groups = std::mem::take(&mut self.taken);
        if is_boot_test(&suite.tests[test]) {
            add(&mut groups, std::mem::take(&mut self.of_boot));
        }
        TestResult {
            id: matrix::id(suite, kernel, guest, test),
            kernel: suite.kernels[kernel].name.clone(),
            release: self.release.clone(),
            guest: suite.guests[guest].name.clone(),
            test: suite.tests[test].name.clone(),
            outcome,
            message: message.to_owned(),
            status: None,
            millis: millis(self.began),
            groups,
            console: self.console.iter().cloned().collect(),
            heap: self.heap.take(),
        }
    }

    /// Whether the detector still finds a leak made to be found, and made since it was last asked.
    fn ask_canary(&mut self, worker: &mut Worker) -> Result<(), End> {
        let mut why = String::new();
        for attempt in 0..TRIES {
            if attempt > 0 && !self.environment.live.stopped() {
                std::thread::sleep(PAUSE);
            }
            match findings::canary(worker, self.canary_at).map_err(End::Detector)? {
                Ok(at) => {
                    self.canary_at = at;
                    self.canary = Some(FOUND.to_owned());
                    return Ok(());
                }
                Err(error) => why = error,
            }
        }
        self.canary = Some(why.clone());
        Err(End::Canary(why))
    }

    /// Whether the detector saw all that the guest allocated and freed. Otherwise the registry has gaps, so that
    /// neither the leaks found since it was last asked nor those of later tests can be believed.
    fn ask_status(&mut self, worker: &mut Worker) -> Result<(), End> {
        let status = findings::status(worker).map_err(End::Detector)?;
        self.heap = Some(status.heap);
        let Some(losses) = status.losses() else { return Ok(()) };
        let leaks = count(&std::mem::take(&mut self.taken)) + count(&std::mem::take(&mut self.of_boot));
        Err(End::Losses(format!(
            "the detector missed something: {losses}; leaks that are not believed: {leaks}"
        )))
    }

    fn remember(&mut self, line: String) {
        // Before each mark is an empty line, that of a sign of life included: they would push out what the guest said.
        if line.is_empty() {
            return;
        }
        if self.console.len() == CONSOLE_LINES {
            self.console.pop_front();
        }
        let printable = |c: char| if c.is_control() && c != '\t' { '.' } else { c };
        self.console.push_back(line.chars().map(printable).collect());
    }
}

/// Why a boot ended before its time.
enum End {
    NoLine(NoLine),
    /// The detector did not do what it was asked.
    Detector(anyhow::Error),
    /// It did not find its canary, and why.
    Canary(String),
    /// It did not see everything, and what happened.
    Losses(String),
    /// No sign of life from the guest, whatever else it says.
    Silent,
}

fn out_of_step() -> End {
    End::Detector(anyhow::anyhow!("The guest's driver is at another test than the host"))
}

/// It asks what the boot itself leaks.
fn is_boot_test(test: &Test) -> bool {
    test.action == Action::Nothing && test.modules.is_empty() && test.setup.is_none()
}

/// How long the guest settles behind a test.
fn settle(suite: &Suite, test: &Test) -> u64 {
    let usual = if test.modules.is_empty() { SETTLE_MS } else { SETTLE_WITH_MODULES_MS };
    suite.settle_ms.unwrap_or(usual)
}

/// Longest time that a test may take until it has settled.
fn allowance(suite: &Suite, test: &Test) -> Duration {
    let runs = u64::from(test.repeat) + u64::from(test.setup.is_some());
    Duration::from_secs(test.timeout_s.saturating_mul(runs)) + Duration::from_millis(settle(suite, test))
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
