//! The words a user types: parsing, help and completion.

use introspect::memory::Va;

/// A console command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Scan now.
    Scan,
    /// All unreferenced objects.
    Report,
    /// Paint the reported objects gray.
    Clear,
    /// Stop tracking.
    Off,
    /// Resume tracking.
    On,
    /// Scan task stacks or not.
    Stack(bool),
    /// Start or stop the automatic scans, at the period set before.
    PeriodicScan(bool),
    /// Period of the automatic scans in seconds; 0 stops them.
    ScanPeriod(u64),
    /// What is known of the object at, or around, an address.
    Dump(Va),
    /// Treat the object at, or around, an address otherwise from now on.
    Annotate(Annotation, Va),
    /// A shortest chain of references to the object at, or around, an address.
    Path(Va),
    /// What each part of the roots contributes, and what is not read.
    Roots,
    /// Prove that a leak would be found.
    Canary,
    /// Tracer, hooks, objects, events.
    Status,
    /// Registry against the guest's slab and per-CPU metadata.
    Audit,
    /// Live memory by allocation site or by cache.
    Top(TopBy),
    /// Live objects of a slab cache by backtrace.
    AllocCalls(String),
    /// What keeps growing from scan to scan.
    Growth,
    /// The guest's accounting, or what changed in it since the last mark.
    Accounting(Account, When),
    /// Remember the accounting of now.
    Mark,
    /// Tasks.
    Ps,
    /// Processes by the memory they map.
    Procrank,
    /// Backtrace of the tasks with this pid, or of those that run.
    Backtrace(Option<i32>),
    /// Registers of every vCPU.
    Regs,
    /// Stop the machine until `resume`.
    Pause,
    /// Let it go on.
    Resume,
    /// The list of commands, or what one of them does.
    Help(Option<&'static Entry>),
    /// End the virtual machine.
    Quit,
}

/// What kmemleak's functions of these names do to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Annotation {
    /// Never reported, always scanned.
    NotLeak,
    /// Never reported, never scanned.
    Ignore,
    /// Reported, never scanned.
    NoScan,
}

impl Annotation {
    const ALL: [Self; 3] = [Self::NotLeak, Self::Ignore, Self::NoScan];

    /// The command's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotLeak => "not_leak",
            Self::Ignore => "ignore",
            Self::NoScan => "no_scan",
        }
    }
}

/// What `top` adds up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopBy {
    /// Function that allocated.
    Sites,
    /// Slab cache, or kind of memory.
    Caches,
}

/// A part of the guest's accounting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Account {
    /// Slab caches.
    Slabinfo,
    /// Areas of the vmalloc space.
    Vmallocinfo,
    /// Memory by use.
    Meminfo,
    /// Free blocks of the page allocator.
    Buddyinfo,
    /// Counters of the memory management.
    Vmstat,
}

impl Account {
    /// All of them: what `mark` remembers.
    pub const ALL: &[Self] =
        &[Self::Slabinfo, Self::Vmallocinfo, Self::Meminfo, Self::Buddyinfo, Self::Vmstat];

    /// The command's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Slabinfo => "slabinfo",
            Self::Vmallocinfo => "vmallocinfo",
            Self::Meminfo => "meminfo",
            Self::Buddyinfo => "buddyinfo",
            Self::Vmstat => "vmstat",
        }
    }

    fn of(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|account| account.name() == name)
    }
}

/// Which accounting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// As it is.
    Now,
    /// What changed since the last mark.
    SinceMark,
}

/// A command and the form its reply takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What to do; the error of a line that is none says what was expected.
    pub command: Result<Command, String>,
    /// Reply with one line of JSON (`json COMMAND`).
    pub json: bool,
}

/// One line of `help`.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    /// The word before any `=` or argument.
    pub name: &'static str,
    /// How it is written.
    pub usage: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// What `help COMMAND` adds to the summary.
    pub detail: &'static str,
    /// Spellings that completion offers.
    completions: &'static [&'static str],
}

/// Every command, in the order of `help`.
pub const COMMANDS: &[Entry] = &[
    Entry {
        name: "scan",
        usage: "scan",
        summary: "scan guest memory now",
        detail: "The machine is paused meanwhile. The reply counts the leaks not reported before.",
        completions: &["scan"],
    },
    Entry {
        name: "scan=",
        usage: "scan=on|off|SECS",
        summary: "automatic scans: resume, stop, or set the period",
        detail: "scan=on takes the period set before (600 s at first); scan=0 is scan=off.",
        completions: &["scan=on", "scan=off", "scan="],
    },
    Entry {
        name: "report",
        usage: "report",
        summary: "print all unreferenced objects",
        detail: "In the format of /sys/kernel/debug/kmemleak, in allocation order; empty without leaks.",
        completions: &["report"],
    },
    Entry {
        name: "clear",
        usage: "clear",
        summary: "stop reporting the objects reported so far",
        detail: "They are painted gray: still tracked and scanned, never reported again.",
        completions: &["clear"],
    },
    Entry {
        name: "off",
        usage: "off",
        summary: "stop tracking allocations",
        detail: "Forgets what was tracked and what was found. Unlike kmemleak's this can be undone, with on.",
        completions: &["off"],
    },
    Entry {
        name: "on",
        usage: "on",
        summary: "resume tracking allocations",
        detail: "What exists by then is taken from the guest's own metadata, without a backtrace and as in use: only\n\
                 what is allocated from now on can be reported.",
        completions: &["on"],
    },
    Entry {
        name: "stack",
        usage: "stack=on|off",
        summary: "scan the stacks of tasks, or not",
        detail: "Off finds leaks whose only trace is a stale stack slot, at the price of false alarms.",
        completions: &["stack=on", "stack=off"],
    },
    Entry {
        name: "dump",
        usage: "dump=ADDR",
        summary: "everything known of the object at ADDR",
        detail: "ADDR is hexadecimal, with or without 0x, and may point into the object, or into a CPU's copy of it.",
        completions: &["dump="],
    },
    Entry {
        name: "path",
        usage: "path=ADDR",
        summary: "a shortest chain of references from a root to the object at ADDR",
        detail: "ADDR is as for dump. An object that nothing refers to is unreachable; one that only lost objects refer to\n\
                 has a chain from the first of them. The machine is paused for as long as a scan takes.",
        completions: &["path="],
    },
    Entry {
        name: "roots",
        usage: "roots",
        summary: "what each part of the roots refers to, and what is not read",
        detail: "Bytes, words that point into objects, and objects it was the first to point into, in reading order. The\n\
                 machine is paused for as long as a scan takes.",
        completions: &["roots"],
    },
    Entry {
        name: "canary",
        usage: "canary",
        summary: "prove that a leak would be found",
        detail: "The guest mounts one first: mount -t ramfs kleak-canary-of-this-guest DIR, and waits for the minimum age. The\n\
                 machine is paused; what refers to the kernel's copy of that name is taken away, a scan made, and all put\n\
                 back. An error if the scan does not report it.",
        completions: &["canary"],
    },
    Entry {
        name: "status",
        usage: "status",
        summary: "tracer, hooks, objects, events, last scan",
        detail: "Dropped events are always 0, or the registry can no longer be trusted.",
        completions: &["status"],
    },
    Entry {
        name: "audit",
        usage: "audit",
        summary: "compare the registry with the guest's slab and per-CPU metadata",
        detail: "Missing: allocated in the guest, not tracked. Stale: tracked, free in the guest.",
        completions: &["audit"],
    },
    Entry {
        name: "top",
        usage: "top [sites|caches]",
        summary: "live bytes and objects by allocation site or cache",
        detail: "From the registry, so of what is tracked; largest first. A site is the first function of the backtrace\n\
                 that does not allocate for its caller. Without a word: sites.",
        completions: &["top", "top sites", "top caches"],
    },
    Entry {
        name: "alloc_calls",
        usage: "alloc_calls=CACHE",
        summary: "who allocated the live objects of a slab cache",
        detail: "By backtrace, with counts, ages in jiffies and pids: slub_debug's alloc_traces without slub_debug.",
        completions: &["alloc_calls="],
    },
    Entry {
        name: "growth",
        usage: "growth",
        summary: "sites and caches whose live count keeps growing from scan to scan",
        detail: "Leaks that stay referenced: a list never pruned, a count never dropped. It takes five scans at least, and\n\
                 lists what rises without plateau or falling back: rates an hour, the confidence that the trend is none\n\
                 of chance, and who has freed objects of the same site.",
        completions: &["growth"],
    },
    Entry {
        name: "not_leak",
        usage: "not_leak=ADDR",
        summary: "never report the object, but scan it",
        detail: "As kmemleak_not_leak(); the address may be anywhere in the object.",
        completions: &["not_leak="],
    },
    Entry {
        name: "ignore",
        usage: "ignore=ADDR",
        summary: "neither report nor scan the object",
        detail: "As kmemleak_ignore(); the address may be anywhere in the object.",
        completions: &["ignore="],
    },
    Entry {
        name: "no_scan",
        usage: "no_scan=ADDR",
        summary: "do not look for references in the object",
        detail: "As kmemleak_no_scan(); the address may be anywhere in the object.",
        completions: &["no_scan="],
    },
    Entry {
        name: "slabinfo",
        usage: "slabinfo [diff]",
        summary: "slab caches: objects, slabs, bytes; or their change since mark",
        detail: "From the guest's slab metadata, at a pause. Active objects are those really allocated: /proc/slabinfo\n\
                 counts as active what lies free in a CPU's own slabs, too.",
        completions: &["slabinfo", "slabinfo diff"],
    },
    Entry {
        name: "vmallocinfo",
        usage: "vmallocinfo [diff]",
        summary: "vmalloc areas: addresses, bytes, pages, caller, kind; or their change",
        detail: "As /proc/vmallocinfo. Bytes are of address space and include the guard page. diff lists the areas that\n\
                 came and went since mark.",
        completions: &["vmallocinfo", "vmallocinfo diff"],
    },
    Entry {
        name: "meminfo",
        usage: "meminfo [diff]",
        summary: "memory by use in kB, as /proc/meminfo; or its change since mark",
        detail: "What CPUs have counted and not added to the sums yet is included, as after a refresh of the guest's\n\
                 statistics. Lines that no counter stands behind are left out.",
        completions: &["meminfo", "meminfo diff"],
    },
    Entry {
        name: "buddyinfo",
        usage: "buddyinfo [diff]",
        summary: "free blocks by zone and order, and by migrate type; or their change",
        detail: "The second table counts the blocks on the free lists of each type, as /proc/pagetypeinfo does.",
        completions: &["buddyinfo", "buddyinfo diff"],
    },
    Entry {
        name: "vmstat",
        usage: "vmstat [diff]",
        summary: "counters of the memory management, as /proc/vmstat; or their change",
        detail: "What CPUs have counted and not added to the sums yet is included, as after a refresh of the guest's\n\
                 statistics. The two limits of dirty pages are left out: the kernel works them out when asked.",
        completions: &["vmstat", "vmstat diff"],
    },
    Entry {
        name: "mark",
        usage: "mark",
        summary: "remember the accounting of now, for diff",
        detail: "One mark is kept; the commands that take diff compare with it.",
        completions: &["mark"],
    },
    Entry {
        name: "ps",
        usage: "ps",
        summary: "tasks: pid, state, CPU, kernel stack in use, name",
        detail: "States are those of /proc/PID/stat. The idle tasks of all CPUs have pid 0. stack_bytes is 0 for a task\n\
                 that runs user code.",
        completions: &["ps"],
    },
    Entry {
        name: "procrank",
        usage: "procrank",
        summary: "processes by memory: VSS, RSS, PSS, USS in KiB",
        detail: "From the page tables, at a pause. VSS: address space. RSS: pages mapped. PSS: each divided among those who\n\
                 map it. USS: those that nobody else maps.",
        completions: &["procrank"],
    },
    Entry {
        name: "bt",
        usage: "bt [PID]",
        summary: "kernel backtrace of a task, or of every running one",
        detail: "By the kernel's own stack tables; PID is that of the initial namespace, and of a thread.",
        completions: &["bt", "bt "],
    },
    Entry {
        name: "regs",
        usage: "regs",
        summary: "registers of every vCPU",
        detail: "At a pause between two instructions.",
        completions: &["regs"],
    },
    Entry {
        name: "pause",
        usage: "pause",
        summary: "stop the machine until resume",
        detail: "All other commands work meanwhile. Given on the guest's own port, only another surface can resume.",
        completions: &["pause"],
    },
    Entry {
        name: "resume",
        usage: "resume",
        summary: "let a paused machine go on",
        detail: "The guest's clock is told, so that its watchdogs do not complain.",
        completions: &["resume"],
    },
    Entry {
        name: "json",
        usage: "json COMMAND",
        summary: "the reply of COMMAND as one line of JSON",
        detail: "An error is an object with the single member error.",
        completions: &["json "],
    },
    Entry {
        name: "help",
        usage: "help [COMMAND]",
        summary: "this list, or what COMMAND does",
        detail: "A command that takes a value is named with or without its =.",
        completions: &["help "],
    },
    Entry {
        name: "quit",
        usage: "quit",
        summary: "end the virtual machine",
        detail: "At once, as if the power were cut; the scan at exit still happens.",
        completions: &["quit"],
    },
];

impl Request {
    /// Parses one line; surrounding white space does not matter.
    pub fn parse(line: &str) -> Self {
        let line = line.trim();
        match line.split_once(char::is_whitespace) {
            Some(("json", rest)) => Self { command: Command::parse(rest), json: true },
            _ if line == "json" => Self { command: Err("json takes a command: try help".into()), json: true },
            _ => Self { command: Command::parse(line), json: false },
        }
    }
}

impl Command {
    /// Parses a command without the `json` prefix.
    ///
    /// # Errors
    /// One line that says what was expected.
    pub fn parse(line: &str) -> Result<Self, String> {
        let line = line.trim();
        let (name, argument) = match line.split_once(char::is_whitespace) {
            Some((name, rest)) => (name, Some(rest.trim())),
            None => (line, None),
        };
        if name == "help" {
            return argument.map(find_entry).transpose().map(Self::Help);
        }
        if let Some((name, value)) = line.split_once('=') {
            return Self::parse_assignment(name.trim_end(), value.trim());
        }
        if let Some(account) = Account::of(name) {
            return match argument {
                None => Ok(Self::Accounting(account, When::Now)),
                Some("diff") => Ok(Self::Accounting(account, When::SinceMark)),
                Some(word) => Err(format!("{name} takes nothing or diff, not {}", quote(word))),
            };
        }
        if name == "top" {
            return match argument {
                None | Some("sites") => Ok(Self::Top(TopBy::Sites)),
                Some("caches") => Ok(Self::Top(TopBy::Caches)),
                Some(word) => Err(format!("top takes sites or caches, not {}", quote(word))),
            };
        }
        if name == "bt" {
            return match argument {
                None => Ok(Self::Backtrace(None)),
                Some(pid) => decimal(pid)
                    .and_then(|pid| i32::try_from(pid).ok())
                    .map(|pid| Self::Backtrace(Some(pid)))
                    .ok_or_else(|| format!("bt takes a process id, not {}", quote(pid))),
            };
        }
        let command = match name {
            "ps" => Self::Ps,
            "growth" => Self::Growth,
            "procrank" => Self::Procrank,
            "regs" => Self::Regs,
            "pause" => Self::Pause,
            "resume" => Self::Resume,
            "mark" => Self::Mark,
            "scan" => Self::Scan,
            "report" => Self::Report,
            "clear" => Self::Clear,
            "off" => Self::Off,
            "on" => Self::On,
            "status" => Self::Status,
            "roots" => Self::Roots,
            "canary" => Self::Canary,
            "audit" => Self::Audit,
            "quit" => Self::Quit,
            "stack" => return Err("stack takes a value: stack=on or stack=off".into()),
            "alloc_calls" => return Err("alloc_calls takes a slab cache: alloc_calls=CACHE".into()),
            "dump" | "path" | "not_leak" | "ignore" | "no_scan" => {
                return Err(format!("{name} takes an address: {name}=ADDR"));
            }
            "" => return Err("empty command: try help".into()),
            _ => return Err(unknown(name)),
        };
        match argument {
            Some(argument) => Err(format!("{name} takes no argument, but was given {}", quote(argument))),
            None => Ok(command),
        }
    }

    fn parse_assignment(name: &str, value: &str) -> Result<Self, String> {
        let address = || {
            let expected = || format!("{name}= takes a hexadecimal address, not {}", quote(value));
            parse_address(value).ok_or_else(expected)
        };
        if let Some(annotation) = Annotation::ALL.into_iter().find(|annotation| annotation.name() == name) {
            return Ok(Self::Annotate(annotation, address()?));
        }
        match (name, value) {
            ("stack", "on") => Ok(Self::Stack(true)),
            ("stack", "off") => Ok(Self::Stack(false)),
            ("stack", _) => Err(format!("stack= takes on or off, not {}", quote(value))),
            ("scan", "on") => Ok(Self::PeriodicScan(true)),
            ("scan", "off") => Ok(Self::PeriodicScan(false)),
            ("scan", _) => decimal(value)
                .map(Self::ScanPeriod)
                .ok_or_else(|| format!("scan= takes on, off or a number of seconds, not {}", quote(value))),
            ("dump", _) => Ok(Self::Dump(address()?)),
            ("path", _) => Ok(Self::Path(address()?)),
            ("alloc_calls", "") => Err("alloc_calls= takes the name of a slab cache".into()),
            // No name has white space (`kmem_cache_sanity_check`, mm/slab_common.c); a line of help has.
            ("alloc_calls", name) if name.contains(char::is_whitespace) => {
                Err(format!("alloc_calls= takes the name of one slab cache, not {}", quote(name)))
            }
            ("alloc_calls", cache) => Ok(Self::AllocCalls(cache.to_owned())),
            _ if COMMANDS.iter().any(|entry| entry.name == name) => Err(format!("{name} takes no value")),
            _ => Err(unknown(name)),
        }
    }
}

/// Hexadecimal address, with or without `0x`.
fn parse_address(text: &str) -> Option<Va> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text);
    let all_hex = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
    all_hex.then(|| u64::from_str_radix(digits, 16).ok().map(Va)).flatten()
}

/// Unsigned decimal; `u64::from_str` would take a leading plus sign.
fn decimal(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

fn find_entry(name: &str) -> Result<&'static Entry, String> {
    COMMANDS
        .iter()
        .find(|entry| entry.name == name)
        .or_else(|| COMMANDS.iter().find(|entry| entry.name == name.trim_end_matches('=')))
        .ok_or_else(|| unknown(name))
}

fn unknown(name: &str) -> String {
    format!("unknown command {}: try help", quote(name))
}

/// `text` between quotes, shortened and without control characters: it may come from the guest.
fn quote(text: &str) -> String {
    const SHOWN: usize = 40;
    let short: String = text.chars().take(SHOWN).collect();
    let dots = if short.len() < text.len() { "..." } else { "" };
    format!("\"{}{dots}\"", short.escape_debug())
}

/// Spellings that begin with `prefix`, sorted: what Tab offers.
///
/// Behind `json ` and `help ` commands are completed too.
pub fn complete(prefix: &str) -> Vec<String> {
    let start = prefix.trim_start();
    for outer in ["json ", "help "] {
        if let Some(rest) = start.strip_prefix(outer) {
            let inner =
                complete(rest).into_iter().filter(|c| !c.starts_with("json ") && !c.starts_with("help "));
            return inner.map(|c| format!("{outer}{c}")).collect();
        }
    }
    let spellings = COMMANDS.iter().flat_map(|entry| entry.completions);
    let mut found: Vec<String> = spellings.filter(|c| c.starts_with(start)).map(|&c| c.to_owned()).collect();
    found.sort();
    found
}

/// The reply of `help` and `help COMMAND`.
pub fn help(entry: Option<&Entry>) -> String {
    match entry {
        Some(entry) => format!("{}: {}\n{}\n", entry.usage, entry.summary, entry.detail),
        None => {
            let width = COMMANDS.iter().map(|entry| entry.usage.len()).max().unwrap_or(0) + 2;
            COMMANDS.iter().map(|entry| format!("{:<width$}{}\n", entry.usage, entry.summary)).collect()
        }
    }
}
