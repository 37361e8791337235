//! `run --gdb`: Debian's gdb on a stock kernel, from its first instruction on.

use anyhow::{Context, Result, ensure};
use introspect::hooks::plan;
use introspect::kernel::Kernel;
use introspect::memory::Va;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use tests::{Client, Guest, RUN_TIMEOUT, kernel, long_test, no_kernel_complaint, test, with_packages};

/// Bytes of a trap by port write; the lab has no others.
const TRAP_LEN: usize = 2;
/// Text of /proc/version that is changed in the kernel's memory.
const WORD: &str = " version ";

fn main() -> ExitCode {
    let with_gdb = |trial| with_packages(trial, &["gdb"]);
    tests::main(vec![
        with_gdb(test("a_debugger_stops_looks_and_changes_6.12-cloud", || debugged("6.12-cloud"))),
        with_gdb(long_test("a_debugger_stops_looks_and_changes_6.1-cloud", || debugged("6.1-cloud"))),
    ])
}

/// A guest that waits for its debugger, and its kernel's addresses.
struct Debugged {
    guest: Guest,
    kernel: Kernel,
    socket: PathBuf,
}

impl Debugged {
    fn symbol(&self, name: &str) -> Result<Va> {
        self.kernel.symbols.lookup(name).with_context(|| format!("no symbol {name}"))
    }

    fn command(&self, commands: &[String]) -> Command {
        let mut gdb = Command::new("gdb");
        gdb.args(["-nx", "-batch", "-iex", "set debuginfod enabled off", "-iex", "set remotetimeout 60"]);
        gdb.arg("-ex").arg(format!("target remote {}", self.socket.display()));
        for command in commands {
            gdb.arg("-ex").arg(command);
        }
        gdb
    }

    /// What gdb says to these commands; a line that begins with `== ` stands before the answer to each.
    fn gdb(&self, commands: &[&str]) -> Result<Vec<String>> {
        let marked = commands.iter().flat_map(|&command| ["echo \\n== \\n".to_owned(), command.to_owned()]);
        let output = self.command(&marked.collect::<Vec<_>>()).output().context("Cannot run gdb")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let answers: Vec<String> = text.split("\n== \n").skip(1).map(str::to_owned).collect();
        ensure!(answers.len() == commands.len(), "{commands:?}: {text}\n{errors}");
        Ok(answers.into_iter().map(|answer| answer + &errors).collect())
    }
}

/// The number behind `= ` of a `print/x`.
fn number(answer: &str) -> Result<u64> {
    let digits = answer.split("= 0x").nth(1).and_then(|rest| rest.split_whitespace().next());
    u64::from_str_radix(digits.with_context(|| format!("no number: {answer}"))?, 16).context("a number")
}

/// Addresses of the instructions in an answer to `x/i`.
fn addresses(listing: &str) -> Vec<u64> {
    let address = |line: &str| {
        let digits = line.trim_start_matches("=> ").trim_start().strip_prefix("0x")?;
        u64::from_str_radix(digits.split(|c: char| !c.is_ascii_hexdigit()).next()?, 16).ok()
    };
    listing.lines().filter_map(address).collect()
}

fn debugged(line: &str) -> Result<()> {
    let package = kernel(line)?;
    let mut guest = Guest::new(&package, 2)?;
    let socket = guest.socket().with_file_name("gdb.sock");
    let mut address = socket.clone().into_os_string();
    address.push(",wait");
    guest.option("--gdb", address).cmdline("nokaslr").script(
        "echo READY; read -r go; while :; do read -r v < /proc/version; echo \"VERSION $v\"; sleep 1; done",
    )?;
    let debugged = Debugged { kernel: Kernel::open(&package.vmlinuz)?, guest, socket };
    let mut session = debugged.guest.start()?;
    let deadline = Instant::now() + RUN_TIMEOUT;
    while !debugged.socket.exists() {
        ensure!(session.is_running()? && Instant::now() < deadline, "nobody waits for gdb");
        std::thread::sleep(Duration::from_millis(100));
    }
    from_the_first_instruction(&debugged)?;
    session.wait_for("\nREADY", RUN_TIMEOUT)?;
    session.type_line("go")?;
    session.wait_for("VERSION Linux version", RUN_TIMEOUT)?;
    looks_around(&debugged)?;
    breaks_and_changes(&debugged)?;
    session.wait_for("VERSION Linux VERSION", RUN_TIMEOUT)?;
    at_a_trap(&debugged)?;
    interrupted(&debugged)?;
    vanishes(&debugged)?;
    let before = session.shown().matches("VERSION Linux").count();
    session.wait_for_times("VERSION Linux", before + 2, RUN_TIMEOUT)?;
    // Nothing was overlooked meanwhile, and nothing of the debugger's is left.
    let audit = debugged.guest.json("audit")?;
    ensure!(
        audit["missing"] == 0 && audit["stale"] == 0 && audit["tracked"].as_u64() > Some(1000),
        "{audit}"
    );
    let status = debugged.guest.json("status")?;
    ensure!(status["events_dropped"] == 0 && status["traps_rearmed"] == 0, "{status:#}");
    ensure!(debugged.guest.ctl("scan")?.contains(" 0 new"), "leaks");
    debugged.guest.ctl("quit")?;
    let finished = session.finish()?;
    finished.expect_code(0)?;
    ensure!(!debugged.socket.exists(), "the debugger's socket is left behind");
    no_kernel_complaint(&finished.stdout)
}

/// The guest has not begun when the debugger comes; it runs into a breakpoint in code that is not mapped yet.
fn from_the_first_instruction(debugged: &Debugged) -> Result<()> {
    let start = debugged.symbol("start_kernel")?;
    let answers = debugged.gdb(&[
        "info threads",
        &format!("break *{:#x}", start.0),
        "continue",
        "print/x $rip",
        "delete",
        "monitor status",
        "detach",
    ])?;
    ensure!(answers[0].contains("vCPU 0") && answers[0].contains("vCPU 1"), "{}", answers[0]);
    ensure!(number(&answers[3])? == start.0, "stopped at {}, not in start_kernel: {answers:#?}", answers[3]);
    ensure!(answers[5].contains("paused: true") && answers[5].contains("scans: 0"), "{}", answers[5]);
    Ok(())
}

/// Memory as the kernel knows it, without traps; one vCPU alone takes steps.
fn looks_around(debugged: &Debugged) -> Result<()> {
    let banner = debugged.symbol("linux_banner")?;
    let plan = plan(
        &debugged.kernel,
        &guest_profiles::hooks::builtin(),
        &guest_profiles::hooks::Tracked::ALL,
        TRAP_LEN,
    );
    let site = &plan.traps.iter().find(|trap| trap.function == "kfree").context("kfree is not trapped")?.site;
    let dump = format!("x/{}xb {:#x}", site.original.len(), site.va.0);
    let answers = debugged.gdb(&[
        &format!("x/s {:#x}", banner.0),
        &dump,
        "x/xb 0xffffc00000000000",
        "set scheduler-locking on",
        "thread 2",
        "print/x $rip",
        "thread 1",
        "x/2i $rip",
        "stepi",
        "print/x $rip",
        "info registers",
        "thread 2",
        "print/x $rip",
        "print/x $cs",
        "detach",
    ])?;
    ensure!(answers[0].contains("\"Linux version 6."), "{}", answers[0]);
    let bytes: Vec<u8> = answers[1]
        .lines()
        .filter_map(|line| line.split_once(":\t"))
        .flat_map(|(_, bytes)| bytes.split_whitespace())
        .filter_map(|byte| u8::from_str_radix(byte.trim_start_matches("0x"), 16).ok())
        .collect();
    ensure!(bytes == site.original, "{bytes:02x?}, the kernel has {:02x?} there", site.original);
    ensure!(answers[2].contains("Cannot access memory at address 0xffffc00000000000"), "{}", answers[2]);
    ensure!(addresses(&answers[7]).len() == 2, "{}", answers[7]);
    let (from, to) = (addresses(&answers[7])[0], number(&answers[9])?);
    ensure!(from != to, "no step was made: {answers:#?}");
    ensure!(answers[10].contains("rax ") && answers[10].contains("eflags "), "{}", answers[10]);
    ensure!(number(&answers[5])? == number(&answers[12])?, "the other vCPU moved: {answers:#?}");
    ensure!([0x10, 0x33].contains(&number(&answers[13])?), "{}", answers[13]);
    Ok(())
}

/// A breakpoint that the guest runs into, steps from there, registers and memory that are changed.
fn breaks_and_changes(debugged: &Debugged) -> Result<()> {
    let (function, text) = (debugged.symbol("version_proc_show")?, debugged.symbol("linux_proc_banner")?);
    let stop = format!("break *{:#x}", function.0);
    let word = format!("x/s {:#x}", text.0 + 2);
    let change = format!("set {{char[9]}}{:#x} = \" VERSION\"", text.0 + 2);
    let answers = debugged.gdb(&[
        &stop,
        "continue",
        "print/x $rip",
        "x/4i $rip",
        "stepi",
        "print/x $rip",
        "stepi",
        "print/x $rip",
        "print/x $r11",
        "set $r11 = 0x123456789abcdef0",
        "stepi",
        "print/x $r11",
        "continue",
        "print/x $rip",
        "hbreak *0xffffffff81000000",
        &word,
        &change,
        &word,
        "delete",
        "detach",
    ])?;
    let ips = [2, 5, 7].map(|at: usize| number(&answers[at]));
    let listed = addresses(&answers[3]);
    for (ip, listed) in ips.into_iter().zip(&listed) {
        ensure!(ip? == *listed, "steps do not follow the code: {answers:#?}");
    }
    ensure!(listed.first() == Some(&function.0), "stopped elsewhere: {answers:#?}");
    ensure!(number(&answers[11])? == 0x1234_5678_9abc_def0, "{}", answers[11]);
    ensure!(number(&answers[13])? == function.0, "not met again: {answers:#?}");
    ensure!(
        answers[15].contains(WORD) && answers[17].contains(WORD.to_uppercase().trim_end()),
        "{answers:#?}"
    );
    Ok(())
}

/// A breakpoint where a trap of the tracer stands: both see it.
fn at_a_trap(debugged: &Debugged) -> Result<()> {
    let plan = plan(
        &debugged.kernel,
        &guest_profiles::hooks::builtin(),
        &guest_profiles::hooks::Tracked::ALL,
        TRAP_LEN,
    );
    let site = &plan.traps.iter().find(|trap| trap.function == "kfree").context("kfree is not trapped")?.site;
    let before = debugged.guest.json("status")?["events_free"].as_u64().context("events_free")?;
    let answers = debugged.gdb(&[
        &format!("break *{:#x}", site.va.0),
        "continue",
        "print/x $rip",
        "stepi",
        "print/x $rip",
        "delete",
        "detach",
    ])?;
    ensure!(number(&answers[2])? == site.va.0, "{answers:#?}");
    let behind = site.va.0 + site.original.len() as u64;
    ensure!((site.va.0 + 1..=behind).contains(&number(&answers[4])?), "{answers:#?}");
    let after = debugged.guest.json("status")?["events_free"].as_u64().context("events_free")?;
    ensure!(after > before, "the tracer saw nothing");
    Ok(())
}

/// Ctrl-C while the guest runs.
fn interrupted(debugged: &Debugged) -> Result<()> {
    let commands = ["echo GOES\\n", "continue", "echo STOPPED\\n", "print/x $rip", "detach"];
    let mut command = debugged.command(&commands.map(str::to_owned));
    let mut gdb = command.stdout(Stdio::piped()).spawn().context("Cannot run gdb")?;
    let mut lines = BufReader::new(gdb.stdout.take().context("stdout")?).lines();
    while !lines.next().context("gdb ended")??.contains("GOES") {}
    std::thread::sleep(Duration::from_secs(3));
    let killed = Command::new("kill").arg("-INT").arg(gdb.id().to_string()).status()?;
    ensure!(killed.success(), "kill: {killed}");
    let rest: Vec<String> = lines.collect::<Result<_, _>>()?;
    gdb.wait()?;
    let rest = rest.join("\n");
    ensure!(rest.contains("SIGINT") && rest.contains("STOPPED") && rest.contains("= 0x"), "{rest}");
    Ok(())
}

/// A debugger that is killed while it has the machine stopped, and its breakpoint stands in the code; the console is told why
/// `resume` does not help.
fn vanishes(debugged: &Debugged) -> Result<()> {
    let commands = [
        "set breakpoint always-inserted on",
        &format!("break *{:#x}", debugged.symbol("version_proc_show")?.0),
        "continue",
        "echo HAS IT\\n",
        "python import time; time.sleep(1000)",
    ]
    .map(str::to_owned);
    let mut gdb = debugged.command(&commands).stdout(Stdio::piped()).spawn().context("Cannot run gdb")?;
    let mut lines = BufReader::new(gdb.stdout.take().context("stdout")?).lines();
    while !lines.next().context("gdb ended")??.contains("HAS IT") {}
    let mut client = Client::of(&debugged.guest)?;
    let refused = client.ask("resume")?;
    ensure!(refused.starts_with("error: A debugger keeps the machine stopped"), "{refused}");
    ensure!(client.ask("ps")?.contains("kthreadd"), "commands do not work while a debugger is there");
    gdb.kill()?;
    gdb.wait()?;
    Ok(())
}
