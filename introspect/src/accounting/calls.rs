//! Who holds memory: the registry's live objects by allocation site (`top`, `alloc_calls=CACHE`).

use super::{Cell, Column, Role, Table};
use crate::memory::Va;
use crate::registry::{Kind, Object, Registry, StackId};
use crate::scan::Retained;
use crate::symbols::Resolved;
use rustc_hash::FxHashMap;
use serde::Serialize;
use std::fmt::Write;

/// Beginnings of the names of functions that allocate for their caller: a backtrace that starts in them says nothing
/// before it leaves them. The families of include/linux/slab.h, vmalloc.h and string.h; what the compiler makes of
/// them (`.isra.0`, `_noprof` since 6.10) begins alike. The last are those of include/linux/percpu.h.
const ALLOCATORS: &[&str] = &[
    "kmalloc",
    "__kmalloc",
    "__do_kmalloc",
    "___kmalloc",
    "kzalloc",
    "kcalloc",
    "kmem_cache_alloc",
    "__kmem_cache_alloc",
    "krealloc",
    "__krealloc",
    "slab_alloc",
    "__slab_alloc",
    "___slab_alloc",
    "vmalloc",
    "__vmalloc",
    "vzalloc",
    "kvmalloc",
    "__kvmalloc",
    "kvrealloc",
    "kmemdup",
    "kvmemdup",
    "kstrdup",
    "kstrndup",
    "kvasprintf",
    "kasprintf",
    "memdup_user",
    "vmemdup_user",
    "strndup_user",
    "pcpu_alloc",
    "__alloc_percpu",
    "__alloc_reserved_percpu",
];

/// Names a code address as it was at an event.
pub type Symbolize<'a> = &'a dyn Fn(Va, u64) -> Option<Resolved<'a>>;

/// Live objects that were allocated on the same path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Calls {
    /// Objects.
    pub objects: u64,
    /// Their sizes added up.
    pub bytes: u64,
    /// The first function of the backtrace that is no allocator, `name+0xOFF/0xSIZE [module]`; "unknown" for objects
    /// that were there before tracking.
    pub site: String,
    /// Youngest, mean and oldest, in jiffies.
    pub age_jiffies: [u64; 3],
    /// Smallest and largest pid that allocated them.
    pub pids: [i32; 2],
    /// The whole backtrace.
    pub backtrace: Vec<String>,
}

/// What is known of one backtrace's objects before it has a name.
struct Sum {
    objects: u64,
    bytes: u64,
    newest: u64,
    ages: u64,
    age: [u64; 2],
    pids: [i32; 2],
}

impl Sum {
    fn add(&mut self, object: &Object, now: u64) {
        let age = now.saturating_sub(object.jiffies);
        self.objects += 1;
        self.bytes = self.bytes.saturating_add(object.size);
        self.newest = self.newest.max(object.sequence);
        self.ages = self.ages.saturating_add(age);
        self.age = [self.age[0].min(age), self.age[1].max(age)];
        self.pids = [self.pids[0].min(object.pid), self.pids[1].max(object.pid)];
    }
}

impl Default for Sum {
    fn default() -> Self {
        Self { objects: 0, bytes: 0, newest: 0, ages: 0, age: [u64::MAX, 0], pids: [i32::MAX, i32::MIN] }
    }
}

/// Live objects of one backtrace, not yet named.
pub struct Group {
    frames: Vec<Va>,
    sum: Sum,
}

/// Live objects by backtrace; those of one cache, or all. `now` is the guest's jiffies.
pub fn by_backtrace(registry: &Registry, cache: Option<Va>, now: u64) -> Vec<Group> {
    let mut sums: FxHashMap<StackId, Sum> = FxHashMap::default();
    let wanted = |o: &Object| cache.is_none_or(|cache| o.kind == Kind::Slab && o.cache == cache);
    for object in registry.objects().filter(wanted) {
        sums.entry(object.stack).or_default().add(&object, now);
    }
    let frames = |stack| registry.stacks.get(stack).to_vec();
    sums.into_iter().map(|(stack, sum)| Group { frames: frames(stack), sum }).collect()
}

/// Names the groups, most objects first.
pub fn named(groups: Vec<Group>, symbolize: Symbolize<'_>) -> Vec<Calls> {
    let named = |Group { frames, sum }| {
        let names: Vec<Option<Resolved<'_>>> =
            frames.iter().map(|&frame| symbolize(frame, sum.newest)).collect();
        let backtrace: Vec<String> =
            frames.iter().zip(&names).map(|(frame, name)| describe(*frame, name.as_ref())).collect();
        let site = site_of(&names);
        Calls {
            objects: sum.objects,
            bytes: sum.bytes,
            site: backtrace.get(site).cloned().unwrap_or_else(|| "unknown".to_owned()),
            age_jiffies: [sum.age[0], sum.ages / sum.objects.max(1), sum.age[1]],
            pids: sum.pids,
            backtrace,
        }
    };
    let mut calls: Vec<Calls> = groups.into_iter().map(named).collect();
    calls.sort_by(|a, b| b.objects.cmp(&a.objects).then_with(|| a.backtrace.cmp(&b.backtrace)));
    calls
}

/// Whether the function of this name allocates for its caller, who is then the one to name.
pub fn is_allocator(name: &str) -> bool {
    ALLOCATORS.iter().any(|allocator| name.starts_with(allocator))
}

/// Index of the first frame that is no allocator's.
fn site_of(names: &[Option<Resolved<'_>>]) -> usize {
    let allocates = |name: &Option<Resolved<'_>>| name.as_ref().is_some_and(|n| is_allocator(n.name));
    names.iter().position(|name| !allocates(name)).unwrap_or(0)
}

/// The site of a backtrace as [`Calls::site`] has it; `at` is the event it is of.
pub fn site(frames: &[Va], at: u64, symbolize: Symbolize<'_>) -> String {
    let names: Vec<Option<Resolved<'_>>> = frames.iter().map(|&frame| symbolize(frame, at)).collect();
    let site = site_of(&names);
    frames.get(site).map_or_else(|| "unknown".to_owned(), |&frame| describe(frame, names[site].as_ref()))
}

fn describe(frame: Va, name: Option<&Resolved<'_>>) -> String {
    name.map_or_else(|| frame.to_string(), Resolved::to_string)
}

/// The layout of slub_debug's `alloc_traces`.
pub fn text(calls: &[Calls]) -> String {
    let mut text = String::from("#  count caller age=min/mean/max in jiffies, pid=min-max\n");
    for call in calls {
        let [min, mean, max] = call.age_jiffies;
        let _ = write!(text, "{:>8} {} age={min}/{mean}/{max}", call.objects, call.site);
        let [first, last] = call.pids;
        let _ = if first == last {
            writeln!(text, " pid={first}")
        } else {
            writeln!(text, " pid={first}-{last}")
        };
        for frame in &call.backtrace {
            let _ = writeln!(text, "             {frame}");
        }
        text.push('\n');
    }
    text
}

/// `top sites`: allocation sites by live bytes.
pub fn sites(calls: &[Calls]) -> Table {
    let columns = vec![
        Column::new("bytes", Role::Amount),
        Column::new("objects", Role::Amount),
        Column::new("site", Role::Key),
    ];
    let mut sums: FxHashMap<&str, [u64; 2]> = FxHashMap::default();
    for call in calls {
        let sum = sums.entry(&call.site).or_default();
        *sum = [sum[0].saturating_add(call.bytes), sum[1] + call.objects];
    }
    let mut table = Table::new(columns, 0);
    let row = |(site, [bytes, objects]): (&str, [u64; 2])| vec![bytes.into(), objects.into(), site.into()];
    table.rows = sums.into_iter().map(row).collect();
    table.sort();
    table
}

/// Sites by the bytes that they keep alive.
pub fn retained<'a>(sites: impl Iterator<Item = (&'a str, Retained)>) -> Table {
    let columns = vec![
        Column::new("retained_bytes", Role::Amount),
        Column::new("objects", Role::Amount),
        Column::new("site", Role::Key),
    ];
    let mut table = Table::new(columns, 0);
    table.rows = sites.map(|(site, sum)| vec![sum.bytes.into(), sum.objects.into(), site.into()]).collect();
    table.sort();
    table
}

/// `top caches`: live bytes by slab cache; what is in none by its kind. `name` names a cache.
pub fn caches(registry: &Registry, name: impl Fn(Va) -> String) -> Table {
    let columns = vec![
        Column::new("bytes", Role::Amount),
        Column::new("objects", Role::Amount),
        Column::new("cache", Role::Key),
    ];
    let mut sums: FxHashMap<(Kind, Va), [u64; 2]> = FxHashMap::default();
    for object in registry.objects() {
        let cache = if object.kind == Kind::Slab { object.cache } else { Va(0) };
        let sum = sums.entry((object.kind, cache)).or_default();
        *sum = [sum[0].saturating_add(object.size), sum[1] + 1];
    }
    let mut table = Table::new(columns, 0);
    for ((kind, cache), [bytes, objects]) in sums {
        let name = if kind == Kind::Slab { name(cache) } else { kind.instead_of_cache() };
        table.rows.push(vec![bytes.into(), objects.into(), Cell::Text(name)]);
    }
    table.sort();
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{AllocEvent, Backtrace};

    const CACHES: [Va; 2] = [Va(0x1000), Va(0x2000)];

    fn registry() -> Registry {
        let mut registry = Registry::default();
        let mut alloc = |address, size, kind, cache, pid, jiffies, stack: &[Va]| {
            registry.alloc(&AllocEvent {
                address: Va(address),
                size,
                kind,
                cache,
                comm: [0; 16],
                pid,
                jiffies,
                stack: Backtrace::Frames(stack),
            });
        };
        alloc(0x100, 32, Kind::Slab, CACHES[0], 7, 100, &[Va(1), Va(2), Va(3)]);
        alloc(0x200, 32, Kind::Slab, CACHES[0], 9, 40, &[Va(1), Va(2), Va(3)]);
        alloc(0x300, 32, Kind::Slab, CACHES[0], 7, 90, &[Va(1), Va(3)]);
        alloc(0x400, 500, Kind::Slab, CACHES[1], 1, 90, &[Va(1), Va(2), Va(4)]);
        alloc(0x500, 9000, Kind::Vmalloc, Va(0), 1, 90, &[]);
        registry
    }

    fn symbolize(va: Va, _: u64) -> Option<Resolved<'static>> {
        let name = ["kmalloc_trace", "kstrdup", "my_open"].get(va.0 as usize - 1)?;
        Some(Resolved { name, offset: 4, size: 16, module: (va.0 == 3).then_some("my") })
    }

    #[test]
    fn objects_of_a_cache_by_backtrace() {
        let calls = named(by_backtrace(&registry(), Some(CACHES[0]), 110), &symbolize);
        let wanted = "\
#  count caller age=min/mean/max in jiffies, pid=min-max
       2 my_open+0x4/0x10 [my] age=10/40/70 pid=7-9
             kmalloc_trace+0x4/0x10
             kstrdup+0x4/0x10
             my_open+0x4/0x10 [my]

       1 my_open+0x4/0x10 [my] age=20/20/20 pid=7
             kmalloc_trace+0x4/0x10
             my_open+0x4/0x10 [my]

";
        assert_eq!(text(&calls), wanted);
    }

    #[test]
    fn sites_are_behind_the_allocators() {
        let calls = named(by_backtrace(&registry(), None, 110), &symbolize);
        let wanted = "bytes  objects  site\n 9000        1  unknown\n  500        1  0x4\n   96        3  my_open+0x4/0x10 [my]\n";
        assert_eq!(sites(&calls).text(), wanted);
    }

    #[test]
    fn caches_have_names_and_other_memory_its_kind() {
        let table = caches(&registry(), |va| format!("cache-{va}"));
        let wanted = "bytes  objects  cache\n 9000        1  (vmalloc)\n  500        1  cache-0x2000\n   96        3  cache-0x1000\n";
        assert_eq!(table.text(), wanted);
    }
}
