//! A guest whose own structures are damaged: whatever is asked, the answer comes soon, and those commands that read the damage
//! name an address. The machine, the other commands and the guest go on.

use anyhow::{Context, Result, bail, ensure};
use introspect::kernel::Kernel;
use libtest_mimic::Trial;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use tests::{Client, Guest, RUN_TIMEOUT, Session, kernel, long_test, module, test};

/// How long a structure stays broken, seconds of the guest's clock: until the machine is paused.
const BROKEN_S: u32 = 4;
/// What a command may take natively, and in the lab: there every instruction of ours is interpreted, which makes it some forty
/// times slower, and its line is polled. So the lab's bound is the stricter one.
const PATIENCE: Duration = Duration::from_secs(1);
const PATIENCE_IN_LAB: Duration = Duration::from_secs(5);

/// Commands that two clients send together: in the long tests, and where each is a way through the lab and time is short.
const COMMANDS: usize = 10_000;
const FEWER_COMMANDS: usize = 1000;
/// What `help COMMAND` says where the guest stands still.
const PAUSED: &str = "The machine is paused";

/// Commands that take no value and change nothing that a later one needs.
const PLAIN: [&str; 22] = [
    "scan",
    "report",
    "status",
    "audit",
    "top sites",
    "top caches",
    "growth",
    "slabinfo",
    "vmallocinfo",
    "meminfo",
    "buddyinfo",
    "vmstat",
    "kmem",
    "kmem -s",
    "mark",
    "ps",
    "procrank",
    "bt",
    "regs",
    "roots",
    "possible",
    "canary",
];

/// The tests.
pub fn trials() -> Vec<Trial> {
    vec![
        test("damaged_structures_6.1-cloud", || {
            damaged("6.1-cloud", &["how=user", "how=scribble", "vmallocinfo"])
        }),
        long_test("all_damaged_structures_6.1-cloud", || damaged("6.1-cloud", &[""])),
        long_test("all_damaged_structures_6.12-cloud", || damaged("6.12-cloud", &[""])),
    ]
}

/// One way to break something: what the module is told, and which commands must notice.
struct Breakage {
    arguments: String,
    noticed_by: &'static [&'static str],
}

/// All ways, for a kernel at its link address.
fn breakages(kernel: &Kernel) -> Result<Vec<Breakage>> {
    let types = kernel.types.as_ref().context("no BTF")?;
    let symbol = |name: &str| kernel.symbols.lookup(name).with_context(|| format!("no symbol {name}"));
    let offset =
        |ty: &str, member: &str| types.offset(ty, member).with_context(|| format!("no {ty}.{member}"));
    let size = |ty: &str| types.size_of(ty).with_context(|| format!("no {ty}"));
    let mut all = Vec::new();
    let mut add = |arguments: String, noticed_by| all.push(Breakage { arguments, noticed_by });
    let tasks = &["ps", "procrank", "bt", "scan", "roots"];
    for how in ["loop", "null", "wild", "user"] {
        add(format!("what=tasks how={how}"), tasks);
    }
    add("what=threads how=wild".into(), tasks);
    add("what=tables".into(), &["procrank"]);
    for how in ["scribble", "loop", "wild"] {
        add(format!("what=freelist how={how}"), &["slabinfo", "kmem -s"]);
    }
    let cache = offset("slab", "slab_cache")?;
    add(format!("what=slab offset={cache} how=wild"), &["slabinfo", "kmem -s"]);
    let freelist = offset("slab", "freelist")?;
    add(format!("what=slab offset={freelist} how=wild"), &["slabinfo", "kmem -s"]);
    let caches = &["slabinfo", "kmem -s", "top caches", "alloc_calls=dentry"];
    for how in ["loop", "null", "wild"] {
        add(format!("what=list at={} how={how}", symbol("slab_caches")?), caches);
    }
    let name = offset("kmem_cache", "name")?;
    add(format!("what=pointer at={} through=1 offset={name} how=wild", symbol("dentry_cache")?), caches);
    let areas = match kernel.symbols.lookup("vmap_area_list") {
        Some(list) => format!("what=list at={list}"),
        None => {
            let busy = offset("vmap_node", "busy.head")?;
            format!("what=list at={} through=1 offset={busy}", symbol("vmap_nodes")?)
        }
    };
    for how in ["loop", "wild"] {
        add(format!("{areas} how={how}"), &["vmallocinfo", "scan"]);
    }
    // Zone DMA32, the largest blocks, of whatever type.
    let (zones, free) = (offset("pglist_data", "node_zones")?, offset("zone", "free_area")?);
    let blocks = zones + size("zone")? + free + 10 * size("free_area")?;
    let node = symbol("node_data")?;
    add(format!("what=list at={node} through=1 offset={blocks} heads=4 how=loop"), &["buddyinfo"]);
    let chunks = symbol("pcpu_chunk_lists")?;
    add(format!("what=list at={chunks} through=1 heads=16 how=loop"), &["scan", "roots"]);
    Ok(all)
}

/// `which`: texts one of which is in a breakage's arguments or among the commands that notice it.
fn damaged(line: &str, which: &[&str]) -> Result<()> {
    let package = kernel(line)?;
    let kernel = Kernel::open(&package.vmlinuz)?;
    let mut guest = Guest::new(&package, 1)?;
    guest.cmdline("nokaslr").file(&module(&package, "breaking")?, "/breaking.ko").script(&format!(
        "mkdir /canary; mount -t ramfs kleak-canary-of-this-guest /canary; echo READY
         while read -r arguments; do
             insmod /breaking.ko $arguments seconds={BROKEN_S}; rmmod breaking; echo AFTER; done"
    ))?;
    let mut session = guest.start()?;
    session.wait_for("READY", RUN_TIMEOUT)?;
    let mut client = Client::of(&guest)?;
    let mut slowest = (Duration::ZERO, String::new());
    let wanted = |one: &Breakage| {
        which.iter().any(|text| one.arguments.contains(text) || one.noticed_by.contains(text))
    };
    for (before, one) in breakages(&kernel)?.into_iter().filter(wanted).enumerate() {
        session.type_line(&one.arguments)?;
        session.wait_for_times("breaking: broken", before + 1, RUN_TIMEOUT)?;
        broken(&mut client, &one, &mut slowest).with_context(|| one.arguments.clone())?;
        session.wait_for_times("\nAFTER", before + 1, RUN_TIMEOUT)?;
    }
    eprintln!("slowest reply: {:?} of {}", slowest.0, slowest.1);
    let whole = client.ask("slabinfo")?;
    ensure!(!whole.contains("damaged") && !whole.starts_with("error"), "{whole}");
    pauses_are_said(&mut client, &with_arguments())?;
    many(&guest, if which == [""] { COMMANDS } else { FEWER_COMMANDS })?;
    end(&guest, session)
}

fn end(guest: &Guest, session: Session) -> Result<()> {
    let healthy = guest.ctl("ps")?;
    ensure!(healthy.contains("kthreadd"), "{healthy}");
    guest.ctl("scan")?;
    guest.ctl("quit")?;
    session.finish()?.expect_code(0)?;
    Ok(())
}

/// [`PLAIN`], and those that take something.
fn with_arguments() -> Vec<String> {
    let object = "0xffffffff81000000";
    let with_values = ["dump", "path", "refs"].map(|name| format!("{name}={object}"));
    let with_names = ["alloc_calls=dentry", "refs=dentry", "kmem -s dentry", "bt 1"].map(str::to_owned);
    PLAIN.map(str::to_owned).into_iter().chain(with_values).chain(with_names).collect()
}

/// A command stops the guest if, and only if, its help says so.
fn pauses_are_said(client: &mut Client, commands: &[String]) -> Result<()> {
    let changes = ["scan=off", "stack=on", "clear", "help", "not_leak=0xffffffff81000000"].map(str::to_owned);
    for command in commands.iter().chain(&changes) {
        let name = command.split([' ', '=']).next().unwrap_or_default();
        let name = if command.contains('=') { format!("{name}=") } else { name.to_owned() };
        let help = client.ask(&format!("help {name}"))?;
        let said = help.contains(PAUSED) || command == "top caches" && help.contains("the machine is paused");
        let before = pauses(client)?;
        let reply = client.ask(command)?;
        let paused = pauses(client)? > before;
        // What is refused may be so beforehand.
        let fits = paused == said || !paused && reply.starts_with("error: ");
        ensure!(fits, "{command}: paused {paused}, said {said}: {help}{reply}");
    }
    Ok(())
}

/// How often the guest has been stopped so far.
fn pauses(client: &mut Client) -> Result<u64> {
    let status = client.ask("status")?;
    let count = status.lines().find_map(|line| line.strip_prefix("pauses: ")?.parse().ok());
    count.with_context(|| format!("no pauses in {status}"))
}

/// Every command, while it is broken: the machine is held, so that it stays so.
fn broken(client: &mut Client, one: &Breakage, slowest: &mut (Duration, String)) -> Result<()> {
    let held = client.ask("pause")?;
    ensure!(held.starts_with("paused"), "{held}");
    let status = client.ask("status")?;
    let patience = if status.contains("\nlab: none\n") { PATIENCE } else { PATIENCE_IN_LAB };
    for command in with_arguments() {
        let asked = Instant::now();
        let reply = client.ask(&command)?;
        let took = asked.elapsed();
        ensure!(took < patience, "{command} took {took:?}");
        if took > slowest.0 {
            *slowest = (took, format!("{command}, {}", one.arguments));
        }
        let error = reply.starts_with("error: ");
        ensure!(!error || reply.lines().count() == 1, "{command} says more than a line: {reply}");
        if one.noticed_by.contains(&command.as_str()) {
            let told = if error { Some(reply.as_str()) } else { reply.lines().find(|l| l.starts_with("# ")) };
            ensure!(told.is_some_and(|line| line.contains("0x")), "{command} found nothing wrong: {reply}");
        }
    }
    let (state, resumed) = (client.ask("status")?, client.ask("resume")?);
    ensure!(state.contains("state: running") && resumed.starts_with("resumed"), "{state}\n{resumed}");
    Ok(())
}

/// Clients at the same time, one of which vanishes in the middle of a reply, and many commands in a row.
fn many(guest: &Guest, commands: usize) -> Result<()> {
    let connect = || UnixStream::connect(guest.socket()).context("Cannot connect");
    let mut vanishing = connect()?;
    vanishing.write_all(b"slabinfo\nscan\nslabinfo\n")?;
    drop(vanishing);
    std::thread::scope(|scope| {
        let client = || -> Result<()> {
            let mut stream = connect()?;
            let mut reader = BufReader::new(stream.try_clone()?);
            for number in 0..commands / 2 {
                // Most cost nothing, so that it is the way that is tested; some ask the detector, some pause the guest.
                let command = match number % 100 {
                    0 => "json ps\n",
                    n if n % 10 == 0 => "json status\n",
                    _ => "json help quit\n",
                };
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
