//! What the module `leaky` (`images/modules/leaky/leaky.c`) plants, and what a detector must say of it.

/// How a lost object hangs together with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Nothing lost points to it.
    Direct,
    /// Only reachable from another lost object.
    Indirect,
    /// One of several lost objects that reach one another.
    Cycle,
}

/// A lost object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost {
    /// Bytes, as kmemleak counts: of the slab object, of a large kmalloc as asked for, of an area in whole pages, of one
    /// CPU's copy.
    pub size: u64,
    /// How it hangs together with others.
    pub kind: Kind,
}

/// From when on the objects of a case are to be reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// Once the module is loaded.
    Load,
    /// Once it is unloaded.
    Unload,
}

/// What only a detector that tracks it can report: the words of `--track`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// What kmemleak tracks.
    Nothing,
    /// Blocks of pages.
    Pages,
    /// Device memory.
    Ioremap,
}

/// One `case=NAME`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// NAME.
    pub name: &'static str,
    /// What must be reported; nothing else of the case may be.
    pub reported: &'static [Lost],
    /// From when on.
    pub since: Since,
    /// What has to be tracked for it.
    pub needs: Needs,
    /// What kmemleak reports beside it, as it cannot look where the pointer is.
    pub kmemleak_adds: &'static [Lost],
    /// Why kmemleak does not report it, where it never does.
    pub kmemleak_misses: Option<&'static str>,
}

impl Case {
    /// The function in the backtrace of every object of the case.
    pub fn function(&self) -> String {
        format!("leaky_{}", self.name)
    }

    /// What must be reported at `time`.
    pub fn reported_at(&self, time: Since) -> &'static [Lost] {
        if self.since == Since::Load || time == Since::Unload { self.reported } else { &[] }
    }

    /// What must be reported in the end when only what kmemleak tracks is tracked.
    pub fn reported_by_default(&self) -> &'static [Lost] {
        if self.needs == Needs::Nothing { self.reported } else { &[] }
    }
}

const fn direct(size: u64) -> Lost {
    Lost { size, kind: Kind::Direct }
}

const fn indirect(size: u64) -> Lost {
    Lost { size, kind: Kind::Indirect }
}

const fn cycle(size: u64) -> Lost {
    Lost { size, kind: Kind::Cycle }
}

const fn case(name: &'static str, reported: &'static [Lost]) -> Case {
    Case {
        name,
        reported,
        since: Since::Load,
        needs: Needs::Nothing,
        kmemleak_adds: &[],
        kmemleak_misses: None,
    }
}

/// Why kmemleak knows nothing of an object.
const NOT_ITS: &str = "kmemleak tracks neither pages nor device memory";
/// Why kmemleak knows nothing of a second address.
const NO_VMAP: &str = "kmemleak does not track what vmap and vm_map_ram return";

/// All cases, in the order in which `case=all` plants them.
pub const CASES: &[Case] = &[
    case("kmalloc", &[direct(8), direct(64), direct(1024), direct(4096), direct(65536)]),
    case(
        "forms",
        &[
            direct(16),
            direct(32),
            direct(96),
            direct(128),
            direct(64),
            direct(512),
            direct(256),
            direct(2048),
            direct(12288),
            direct(200),
            direct(200),
        ],
    ),
    case("vmalloc", &[direct(1 << 20)]),
    case("cache", &[direct(200); 2]),
    case("bulk", &[direct(200); 4]),
    case("softirq", &[direct(192)]),
    case("hidden", &[direct(512)]),
    case("stale", &[direct(256)]),
    Case {
        kmemleak_misses: Some("a number looks like the only pointer, and kmemleak takes every word for one"),
        ..case("typed", &[direct(192)])
    },
    case("list", &[cycle(64), cycle(96), cycle(96), cycle(96), cycle(96)]),
    case("cycle", &[cycle(128); 2]),
    case(
        "tree",
        &[direct(96), indirect(96), indirect(96), indirect(96), indirect(96), indirect(96), indirect(96)],
    ),
    case("chain", &[direct(64), indirect(64), indirect(64), indirect(64)]),
    case("indirect", &[direct(192), indirect(640 << 10)]),
    Case { kmemleak_misses: Some(NO_VMAP), ..case("vmap_lost", &[direct(80 * 4096)]) },
    Case { kmemleak_misses: Some(NO_VMAP), ..case("map_ram_lost", &[direct(8192), direct(80 * 4096)]) },
    Case {
        kmemleak_misses: Some("before 6.12 kmemleak does not look for lost per-CPU allocations"),
        ..case("percpu_lost", &[direct(96)])
    },
    Case {
        needs: Needs::Pages,
        kmemleak_misses: Some(NOT_ITS),
        ..case(
            "pages_lost",
            &[
                direct(4096),
                direct(16384),
                direct(32768),
                direct(12288),
                direct(4096),
                direct(4096),
                direct(4096),
                direct(4096),
            ],
        )
    },
    Case {
        needs: Needs::Pages,
        kmemleak_misses: Some(NOT_ITS),
        ..case("pages_listed", &[cycle(64), cycle(4096), cycle(4096), cycle(4096)])
    },
    Case {
        needs: Needs::Pages,
        kmemleak_misses: Some(NOT_ITS),
        ..case("pages_inside", &[direct(4096), indirect(96)])
    },
    Case {
        needs: Needs::Ioremap,
        kmemleak_misses: Some(NOT_ITS),
        ..case("device_lost", &[direct(320 << 10)])
    },
    Case { since: Since::Unload, ..case("unload", &[direct(32); 3]) },
    case("register", &[]),
    case("stack", &[]),
    case("percpu", &[]),
    case("percpu_alloc", &[]),
    case("interior", &[]),
    case("timer", &[]),
    case("rcu", &[]),
    Case { kmemleak_adds: &[direct(512)], ..case("page", &[]) },
    case("pages", &[]),
    case("freed", &[]),
];

/// The cases of `case=demo`.
pub const DEMO: &[&str] =
    &["kmalloc", "vmalloc", "cache", "hidden", "list", "tree", "stack", "percpu", "timer", "rcu", "freed"];

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = include_str!("../modules/leaky/leaky.c");

    /// The table in the source's head: name, and the second column as this module would write it.
    fn documented() -> Vec<(String, String)> {
        let mut table: Vec<(String, String)> = Vec::new();
        let lines = SOURCE.lines().skip_while(|line| !line.contains("reported      ")).skip(1);
        for line in lines.take_while(|line| line.trim() != "*") {
            let line = line.trim().trim_start_matches('*');
            // Names begin in the first column of the table; what follows two spaces is the next column.
            if let Some(row) = line.strip_prefix("   ").filter(|row| !row.starts_with(' ')) {
                let (name, rest) = row.split_once(' ').unwrap();
                let column = rest.trim_start().split("  ").next().unwrap().trim();
                table.push((name.to_owned(), column.to_owned()));
            }
        }
        table
    }

    fn written(case: &Case) -> String {
        let mut text = String::new();
        for (index, lost) in case.reported.iter().enumerate() {
            let kind = match lost.kind {
                Kind::Direct => "direct",
                Kind::Indirect => "indirect",
                Kind::Cycle => "cycle",
            };
            text += &lost.size.to_string();
            let next = case.reported.get(index + 1).map(|next| next.kind);
            if next != Some(lost.kind) {
                text += &format!(" {kind}");
            }
            if next.is_some() {
                text += ", ";
            }
        }
        if case.since == Since::Unload {
            text += " after rmmod";
        }
        text += match case.needs {
            Needs::Nothing => "",
            Needs::Pages => " with --track pages",
            Needs::Ioremap => " with --track ioremap",
        };
        if text.is_empty() { "nothing".into() } else { text }
    }

    #[test]
    fn the_source_documents_the_same() {
        let expected: Vec<_> = CASES.iter().map(|case| (case.name.to_owned(), written(case))).collect();
        assert_eq!(documented(), expected);
    }

    #[test]
    fn the_source_plants_the_same() {
        for case in CASES {
            let demo = DEMO.contains(&case.name);
            let expect = if case.since == Since::Load { case.reported_by_default().len() } else { 0 };
            let row = format!("\t{{ \"{}\", {expect}, {demo}, ", case.name);
            assert!(SOURCE.contains(&row), "{row}");
            assert!(SOURCE.contains(&format!("LEAKY int {}(", case.function())) || case.name == "softirq");
        }
        assert_eq!(SOURCE.matches("\n\t{ \"").count(), CASES.len());
    }
}
