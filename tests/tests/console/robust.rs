//! A guest whose own lists are damaged makes a command answer with an error that names an address, soon, and nothing else:
//! the machine, the other commands and the guest go on.

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use tests::{Guest, RUN_TIMEOUT, kernel, long_test, module, run, test};

/// How long a list stays broken, seconds of the guest.
const BROKEN_S: u32 = 8;
/// A command may take so long, its process and the lab's line included; natively it is milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Commands that two clients send together. (Ten thousand in a row are tested without a guest: each is a way through the lab.)
const COMMANDS: usize = 1000;

/// The tests.
pub fn trials() -> Vec<Trial> {
    vec![
        test("damaged_lists_6.1-cloud", || damaged_lists("6.1-cloud")),
        long_test("damaged_lists_6.12-cloud", || damaged_lists("6.12-cloud")),
    ]
}

fn damaged_lists(line: &str) -> Result<()> {
    let kernel = kernel(line)?;
    let mut guest = Guest::new(&kernel, 1)?;
    guest.file(&module(&kernel, "breaking")?, "/breaking.ko").script(&format!(
        "echo READY
         while read -r how; do
             list=tasks; [ $how = slab ] && list=slab
             insmod /breaking.ko list=$list how=$how seconds={BROKEN_S}; rmmod breaking; echo \"after $how\"; done"
    ))?;
    let mut session = guest.start()?;
    session.wait_for("READY", RUN_TIMEOUT)?;
    for (before, how) in ["loop", "null", "wild", "user"].into_iter().enumerate() {
        session.type_line(how)?;
        session.wait_for_times("breaking: broken", before + 1, RUN_TIMEOUT)?;
        broken(&guest).with_context(|| format!("how={how}"))?;
        session.wait_for(&format!("after {how}"), RUN_TIMEOUT)?;
    }
    session.type_line("slab")?;
    session.wait_for_times("breaking: broken", 5, RUN_TIMEOUT)?;
    let damaged = guest.ctl("slabinfo")?;
    let line = "# cache breaking-item: freelists of 1 slabs are damaged, the first at 0xffff";
    ensure!(damaged.lines().any(|found| found.starts_with(line)), "{damaged}");
    session.wait_for("after slab", RUN_TIMEOUT)?;
    ensure!(!guest.ctl("slabinfo")?.contains("damaged"), "slabinfo");
    many(&guest)?;
    let healthy = guest.ctl("ps")?;
    ensure!(healthy.contains("kthreadd"), "{healthy}");
    guest.ctl("scan")?;
    guest.ctl("quit")?;
    session.finish()?.expect_code(0)?;
    Ok(())
}

/// While the list of tasks is broken.
fn broken(guest: &Guest) -> Result<()> {
    for command in ["ps", "scan"] {
        let asked = Instant::now();
        let socket = guest.socket();
        let socket = socket.to_str().context("socket path")?;
        let finished = run(["ctl", "--control", socket, command])?;
        let took = asked.elapsed();
        ensure!(took < PATIENCE, "{command} took {took:?}");
        let said = format!("{}{}", finished.stdout, finished.stderr);
        ensure!(finished.code != Some(0), "{command} found nothing wrong: {said}");
        let names_address = said.contains("0xffff") || said.contains("0x7ffd") || said.contains("0x0");
        ensure!(said.contains("error") && names_address, "{command}: {said}");
        ensure!(said.trim().lines().count() == 1, "{command} says more than a line: {said}");
    }
    ensure!(guest.ctl("status")?.contains("state: running"), "status");
    Ok(())
}

/// Clients at the same time, one of which vanishes in the middle of a reply, and many commands in a row.
fn many(guest: &Guest) -> Result<()> {
    let connect = || UnixStream::connect(guest.socket()).context("Cannot connect");
    let mut vanishing = connect()?;
    vanishing.write_all(b"slabinfo\nscan\nslabinfo\n")?;
    drop(vanishing);
    std::thread::scope(|scope| {
        let client = || -> Result<()> {
            let mut stream = connect()?;
            let mut reader = BufReader::new(stream.try_clone()?);
            for number in 0..COMMANDS / 2 {
                // Most cost nothing, so that it is the way that is tested, and some pause the guest.
                let command = if number % 100 == 0 { "json ps\n" } else { "json help quit\n" };
                stream.write_all(command.as_bytes())?;
                let mut line = String::new();
                reader.read_line(&mut line)?;
                ensure!(line.starts_with('{') && !line.contains("error"), "{number}: {line:?}");
            }
            Ok(())
        };
        let clients = [scope.spawn(client), scope.spawn(client)];
        clients.into_iter().try_for_each(|client| match client.join() {
            Ok(result) => result,
            Err(_) => bail!("a client panicked"),
        })
    })
}
