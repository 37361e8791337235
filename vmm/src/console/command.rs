//! The words a user types: what they stand for, help and completion. Parsing is in `parse`.

use super::account::{Account, When};
use introspect::memory::Va;
use std::path::PathBuf;

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
    /// Follow only words that can hold a pointer or not.
    Typed(bool),
    /// Objects in use only by a pointer into their middle.
    Possible,
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
    /// The reference count of the object at, or around, an address, and its references.
    Refs(Va),
    /// Objects of a slab cache whose reference count is higher than the references found.
    RefsOf(String),
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
    /// `kmem -s` of the caches with one name.
    KmemCache(String, When),
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
    /// Write the machine to a file.
    Save(SaveAs, PathBuf),
    /// Stop the machine until `resume`.
    Pause,
    /// Let it go on.
    Resume,
    /// The list of commands, or what one of them does.
    Help(Option<&'static Entry>),
    /// End the virtual machine.
    Quit,
}

impl Command {
    /// True for what changes only how a machine goes on, so that there is nothing to do in one that was saved.
    pub fn is_for_running(&self) -> bool {
        matches!(
            self,
            Self::Off
                | Self::On
                | Self::PeriodicScan(_)
                | Self::ScanPeriod(_)
                | Self::Pause
                | Self::Resume
                | Self::Quit
        )
    }
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
    pub(super) const ALL: [Self; 3] = [Self::NotLeak, Self::Ignore, Self::NoScan];

    /// The command's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotLeak => "not_leak",
            Self::Ignore => "ignore",
            Self::NoScan => "no_scan",
        }
    }
}

/// What a machine is saved as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaveAs {
    /// For `analyze`: with what is tracked.
    Snapshot,
    /// An ELF vmcore: the machine alone.
    Core,
}

impl SaveAs {
    pub(super) const ALL: [Self; 2] = [Self::Snapshot, Self::Core];

    /// The command's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Core => "core",
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

/// A command and the form its reply takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What to do; the error of a line that is none says what was expected.
    pub command: Result<Command, String>,
    /// Reply with one line of JSON (`json COMMAND`).
    pub json: bool,
}

/// How long a command stops the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// Not at all.
    No,
    /// While it reads structures that must agree with each other.
    Moment,
    /// While it looks at the whole heap.
    Scan,
    /// While all of its memory is written.
    Copy,
}

impl Pause {
    /// What help says of it.
    fn text(self) -> &'static str {
        match self {
            Self::No => "",
            Self::Moment => "The machine is paused for a moment.\n",
            Self::Scan => "The machine is paused for as long as a scan takes.\n",
            Self::Copy => "The machine is paused while its memory is written.\n",
        }
    }
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
    /// Whether the guest stands still for it.
    pause: Pause,
    /// Spellings that completion offers.
    completions: &'static [&'static str],
}

/// Every command, in the order of `help`.
pub const COMMANDS: &[Entry] = &[
    Entry {
        name: "scan",
        usage: "scan",
        summary: "scan guest memory now",
        detail: "The reply counts the leaks not reported before.",
        pause: Pause::Scan,
        completions: &["scan"],
    },
    Entry {
        name: "scan=",
        usage: "scan=on|off|SECS",
        summary: "automatic scans: resume, stop, or set the period",
        detail: "scan=on takes the period set before (600 s at first); scan=0 is scan=off.",
        pause: Pause::No,
        completions: &["scan=on", "scan=off", "scan="],
    },
    Entry {
        name: "report",
        usage: "report",
        summary: "print all unreferenced objects",
        detail: "In the format of /sys/kernel/debug/kmemleak, in allocation order; empty without leaks.",
        pause: Pause::No,
        completions: &["report"],
    },
    Entry {
        name: "clear",
        usage: "clear",
        summary: "stop reporting the objects reported so far",
        detail: "They are painted gray: still tracked and scanned, never reported again.",
        pause: Pause::No,
        completions: &["clear"],
    },
    Entry {
        name: "off",
        usage: "off",
        summary: "stop tracking allocations",
        detail: "Forgets what was tracked and what was found. Unlike kmemleak's this can be undone, with on.",
        pause: Pause::Moment,
        completions: &["off"],
    },
    Entry {
        name: "on",
        usage: "on",
        summary: "resume tracking allocations",
        detail: "What exists by then is taken from the guest's own metadata, without a backtrace and as in use: only\n\
                 what is allocated from now on can be reported.",
        pause: Pause::Moment,
        completions: &["on"],
    },
    Entry {
        name: "stack",
        usage: "stack=on|off",
        summary: "scan the stacks of tasks, or not",
        detail: "Off finds leaks whose only trace is a stale stack slot, at the price of false alarms.",
        pause: Pause::No,
        completions: &["stack=on", "stack=off"],
    },
    Entry {
        name: "typed",
        usage: "typed=on|off",
        summary: "follow only words that can hold a pointer, or all",
        detail: "On finds leaks hidden by numbers that look like addresses, in objects whose C type is known.",
        pause: Pause::No,
        completions: &["typed=on", "typed=off"],
    },
    Entry {
        name: "dump",
        usage: "dump=ADDR",
        summary: "everything known of the object at ADDR",
        detail: "ADDR is hexadecimal, with or without 0x, and may point into the object, or into a CPU's copy of it.",
        pause: Pause::Scan,
        completions: &["dump="],
    },
    Entry {
        name: "path",
        usage: "path=ADDR",
        summary: "a shortest chain of references from a root to the object at ADDR",
        detail: "ADDR is as for dump. An object that nothing refers to is unreachable; one that only lost objects refer to\n\
                 has a chain from the first of them.",
        pause: Pause::Scan,
        completions: &["path="],
    },
    Entry {
        name: "roots",
        usage: "roots",
        summary: "what each part of the roots refers to, and what is not read",
        detail: "Bytes, words that point into objects, and objects it was the first to point into, in reading order.",
        pause: Pause::Scan,
        completions: &["roots"],
    },
    Entry {
        name: "possible",
        usage: "possible",
        summary: "possible leaks: objects in use only by a pointer into their middle",
        detail: "Most are found through a list or tree in them, and are no leaks. By origin; those first that are unlike\n\
                 most of their origin. Never counted as leaks.",
        pause: Pause::Scan,
        completions: &["possible"],
    },
    Entry {
        name: "canary",
        usage: "canary",
        summary: "prove that a leak would be found",
        detail: "The guest mounts one first: mount -t ramfs kleak-canary-of-this-guest DIR, and waits for the minimum age.\n\
                 What refers to the kernel's copy of that name is taken away, a scan made, and all put back. An error if\n\
                 the scan does not report it.",
        pause: Pause::Scan,
        completions: &["canary"],
    },
    Entry {
        name: "status",
        usage: "status",
        summary: "tracer, hooks, objects, events, last scan",
        detail: "Dropped events are always 0, or the registry can no longer be trusted.",
        pause: Pause::No,
        completions: &["status"],
    },
    Entry {
        name: "audit",
        usage: "audit",
        summary: "compare the registry with the guest's slab and per-CPU metadata",
        detail: "Missing: allocated in the guest, not tracked. Stale: tracked, free in the guest.",
        pause: Pause::Moment,
        completions: &["audit"],
    },
    Entry {
        name: "top",
        usage: "top [sites|caches]",
        summary: "live bytes and objects by allocation site or cache",
        detail: "From the registry, so of what is tracked; largest first. A site is the first function of the backtrace\n\
                 that does not allocate for its caller. Without a word: sites.\n\
                 For the names of caches the machine is paused for a moment.",
        pause: Pause::No,
        completions: &["top", "top sites", "top caches"],
    },
    Entry {
        name: "alloc_calls",
        usage: "alloc_calls=CACHE",
        summary: "who allocated the live objects of a slab cache",
        detail: "By backtrace, with counts, ages in jiffies and pids: slub_debug's alloc_traces without slub_debug.",
        pause: Pause::Moment,
        completions: &["alloc_calls="],
    },
    Entry {
        name: "growth",
        usage: "growth",
        summary: "sites and caches whose live count keeps growing from scan to scan",
        detail: "Leaks that stay referenced: a list never pruned, a count never dropped. It takes five scans at least, and\n\
                 lists what rises without plateau or falling back: rates an hour, the confidence that the trend is none\n\
                 of chance, and who has freed objects of the same site.",
        pause: Pause::Moment,
        completions: &["growth"],
    },
    Entry {
        name: "not_leak",
        usage: "not_leak=ADDR",
        summary: "never report the object, but scan it",
        detail: "As kmemleak_not_leak(); the address may be anywhere in the object.",
        pause: Pause::No,
        completions: &["not_leak="],
    },
    Entry {
        name: "ignore",
        usage: "ignore=ADDR",
        summary: "neither report nor scan the object",
        detail: "As kmemleak_ignore(); the address may be anywhere in the object.",
        pause: Pause::No,
        completions: &["ignore="],
    },
    Entry {
        name: "no_scan",
        usage: "no_scan=ADDR",
        summary: "do not look for references in the object",
        detail: "As kmemleak_no_scan(); the address may be anywhere in the object.",
        pause: Pause::No,
        completions: &["no_scan="],
    },
    Entry {
        name: "slabinfo",
        usage: "slabinfo [diff]",
        summary: "slab caches: objects, slabs, bytes; or their change since mark",
        detail: "From the guest's slab metadata. Active objects are those really allocated: /proc/slabinfo\n\
                 counts as active what lies free in a CPU's own slabs, too.",
        pause: Pause::Moment,
        completions: &["slabinfo", "slabinfo diff"],
    },
    Entry {
        name: "vmallocinfo",
        usage: "vmallocinfo [diff]",
        summary: "vmalloc areas: addresses, bytes, pages, caller, kind; or their change",
        detail: "As /proc/vmallocinfo. Bytes are of address space and include the guard page. diff lists the areas that\n\
                 came and went since mark.",
        pause: Pause::Moment,
        completions: &["vmallocinfo", "vmallocinfo diff"],
    },
    Entry {
        name: "meminfo",
        usage: "meminfo [diff]",
        summary: "memory by use in kB, as /proc/meminfo; or its change since mark",
        detail: "What CPUs have counted and not added to the sums yet is included, as after a refresh of the guest's\n\
                 statistics. Lines that no counter stands behind are left out.",
        pause: Pause::Moment,
        completions: &["meminfo", "meminfo diff"],
    },
    Entry {
        name: "buddyinfo",
        usage: "buddyinfo [diff]",
        summary: "free blocks by zone and order, and by migrate type; or their change",
        detail: "The second table counts the blocks on the free lists of each type, as /proc/pagetypeinfo does.",
        pause: Pause::Moment,
        completions: &["buddyinfo", "buddyinfo diff"],
    },
    Entry {
        name: "vmstat",
        usage: "vmstat [diff]",
        summary: "counters of the memory management, as /proc/vmstat; or their change",
        detail: "What CPUs have counted and not added to the sums yet is included, as after a refresh of the guest's\n\
                 statistics. The two limits of dirty pages are left out: the kernel works them out when asked.",
        pause: Pause::Moment,
        completions: &["vmstat", "vmstat diff"],
    },
    Entry {
        name: "kmem",
        usage: "kmem [-i|-s [CACHE]] [diff]",
        summary: "memory by use, or slab caches, as the crash utility's kmem; or their change",
        detail: "-i, or nothing: memory by use. -s: slab caches, or only CACHE. In the layout of crash's commands of these\n\
                 names, from what meminfo and slabinfo read.",
        pause: Pause::Moment,
        completions: &["kmem", "kmem -i", "kmem -s", "kmem diff", "kmem -s diff"],
    },
    Entry {
        name: "refs",
        usage: "refs=ADDR|CACHE",
        summary: "reference counts against the references found in memory",
        detail: "Of the object at ADDR: its count, and who refers to it. Of a slab cache: the objects whose count is higher\n\
                 than the references found, so that some user dropped its pointer and not its reference. ADDR begins\n\
                 with 0x or ffff.",
        pause: Pause::Scan,
        completions: &["refs="],
    },
    Entry {
        name: "mark",
        usage: "mark",
        summary: "remember the accounting of now, for diff",
        detail: "One mark is kept; the commands that take diff compare with it.",
        pause: Pause::Moment,
        completions: &["mark"],
    },
    Entry {
        name: "ps",
        usage: "ps",
        summary: "tasks: pid, state, CPU, kernel stack in use, name",
        detail: "States are those of /proc/PID/stat. The idle tasks of all CPUs have pid 0. stack_bytes is 0 for a task\n\
                 that runs user code.",
        pause: Pause::Moment,
        completions: &["ps"],
    },
    Entry {
        name: "procrank",
        usage: "procrank",
        summary: "processes by memory: VSS, RSS, PSS, USS in KiB",
        detail: "From the page tables. VSS: address space. RSS: pages mapped. PSS: each divided among those who\n\
                 map it. USS: those that nobody else maps.",
        pause: Pause::Moment,
        completions: &["procrank"],
    },
    Entry {
        name: "bt",
        usage: "bt [PID]",
        summary: "kernel backtrace of a task, or of every running one",
        detail: "By the kernel's own stack tables; PID is that of the initial namespace, and of a thread.",
        pause: Pause::Moment,
        completions: &["bt", "bt "],
    },
    Entry {
        name: "regs",
        usage: "regs",
        summary: "registers of every vCPU",
        detail: "Between two instructions.",
        pause: Pause::Moment,
        completions: &["regs"],
    },
    Entry {
        name: "snapshot",
        usage: "snapshot=FILE",
        summary: "save the machine and what is tracked, for kleak-vmm analyze",
        detail: "Memory, registers, objects with their backtraces, and the kernel image; crash and drgn open it, too. What is\n\
                 at FILE is replaced if it is such a file. Not on the guest's own port: FILE is the host's.",
        pause: Pause::Copy,
        completions: &["snapshot="],
    },
    Entry {
        name: "core",
        usage: "core=FILE",
        summary: "save the machine as an ELF vmcore, for crash and drgn",
        detail: "Memory and registers, as kdump's /proc/vmcore has them; the kernel's own instructions are where the traps\n\
                 are. What is at FILE is replaced if it is such a file. Not on the guest's own port: FILE is the host's.",
        pause: Pause::Copy,
        completions: &["core="],
    },
    Entry {
        name: "pause",
        usage: "pause",
        summary: "stop the machine until resume",
        detail: "All other commands work meanwhile. Given on the guest's own port, only another surface can resume.",
        pause: Pause::No,
        completions: &["pause"],
    },
    Entry {
        name: "resume",
        usage: "resume",
        summary: "let a paused machine go on",
        detail: "The guest's clock is told, so that its watchdogs do not complain.",
        pause: Pause::No,
        completions: &["resume"],
    },
    Entry {
        name: "json",
        usage: "json COMMAND",
        summary: "the reply of COMMAND as one line of JSON",
        detail: "An error is an object with the single member error.",
        pause: Pause::No,
        completions: &["json "],
    },
    Entry {
        name: "help",
        usage: "help [COMMAND]",
        summary: "this list, or what COMMAND does",
        detail: "A command that takes a value is named with or without its =.",
        pause: Pause::No,
        completions: &["help "],
    },
    Entry {
        name: "quit",
        usage: "quit",
        summary: "end the virtual machine",
        detail: "At once, as if the power were cut; the scan at exit still happens.",
        pause: Pause::No,
        completions: &["quit"],
    },
];

/// Spellings that begin with `prefix`, sorted: what Tab offers.
///
/// Behind `json ` and `help ` commands are completed too.
pub fn complete(prefix: &str) -> Vec<String> {
    let start = prefix.trim_start();
    if let Some(rest) = start.strip_prefix("json ") {
        let inner = complete(rest).into_iter().filter(|c| !c.starts_with("json "));
        return inner.map(|c| format!("json {c}")).collect();
    }
    let mut found: Vec<String> = match start.strip_prefix("help ") {
        Some(rest) => {
            let names = COMMANDS.iter().map(|entry| entry.name.trim_end_matches('='));
            names.filter(|name| name.starts_with(rest)).map(|name| format!("help {name}")).collect()
        }
        None => {
            let spellings = COMMANDS.iter().flat_map(|entry| entry.completions);
            spellings.filter(|c| c.starts_with(start)).map(|&c| c.to_owned()).collect()
        }
    };
    found.sort();
    found.dedup();
    found
}

/// The reply of `help` and `help COMMAND`.
pub fn help(entry: Option<&Entry>) -> String {
    match entry {
        Some(entry) => {
            let Entry { usage, summary, detail, pause, .. } = entry;
            format!("{usage}: {summary}\n{detail}\n{}", pause.text())
        }
        None => {
            let width = COMMANDS.iter().map(|entry| entry.usage.len()).max().unwrap_or(0) + 2;
            COMMANDS.iter().map(|entry| format!("{:<width$}{}\n", entry.usage, entry.summary)).collect()
        }
    }
}
