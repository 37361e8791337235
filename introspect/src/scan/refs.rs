//! Reference counts against references: who was counted and is not there.
//!
//! A reference that is counted is nearly always a pointer to the beginning of the counted structure. Words that point
//! elsewhere into it are links of lists and trees, which count nothing: they are told apart. A count above the pointers
//! found is one that somebody forgot to drop with the pointer. One below is no finding: pointers that count nothing are
//! common, and a stale word may look like one.

use super::guest::GuestMemory;
use super::places::{Place, place};
use super::referrers::{Holder, Referrer, Targets, each_word};
use super::structures::{member_at, sharers, structure_of};
use super::{ScanInput, heap};
use crate::linux::slab::{Cache, named};
use crate::memory::{FrozenMemory, Pa, PhysicalMemory, Va};
use crate::registry::Object;
use crate::types::Btf;
use anyhow::{Context, bail, ensure};
use guest_profiles::counts::{Count, OwnIf};
use std::ops::Range;

/// References that are listed: to an object's beginning, and into it.
const SHOWN: usize = 64;
const SHOWN_INSIDE: usize = 16;

/// Where the objects of a cache have their count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    /// Name of the cache.
    pub cache: String,
    /// Structure that the objects begin with.
    pub structure: String,
    /// Path of the count in it.
    pub member: String,
    /// What is counted without a pointer; empty when nothing is.
    pub reason: String,
    /// Offset of the count.
    at: u64,
    /// It has 64 bits.
    wide: bool,
    /// Offset that references point to.
    base: u64,
    own: u32,
    own_if: Option<Chain>,
}

/// Pointers to follow, and where the last must lead.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Chain {
    offsets: Vec<u64>,
    ends: Vec<Va>,
}

/// An object's count and its references.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// The object.
    pub object: Object,
    /// Its count.
    pub count: i64,
    /// References it counts without a pointer.
    pub own: u32,
    /// Pointers to it that were found.
    pub found: u64,
    /// Words that point elsewhere into it.
    pub inside: u64,
}

impl Counted {
    /// References counted that are not there; below zero when there are more than are counted.
    pub fn excess(&self) -> i64 {
        let found = i64::try_from(self.found).unwrap_or(i64::MAX);
        self.count.saturating_sub(self.own.into()).saturating_sub(found)
    }
}

/// The objects of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheRefs {
    /// Where their count is.
    pub counter: Counter,
    /// How many there are.
    pub objects: usize,
    /// Those that count more than there is, the largest excess first.
    pub exceeding: Vec<Counted>,
}

/// One object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectRefs {
    /// It.
    pub object: Object,
    /// Name of its slab cache.
    pub cache: Option<String>,
    /// Its count, or why that is not known.
    pub counted: Result<(Counter, Counted), String>,
    /// References to its beginning, or to what of it is counted, then those into it.
    pub references: Vec<Held>,
    /// References not listed.
    pub omitted: u64,
}

/// A reference and who holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Who.
    pub by: HeldBy,
    /// Offset in the object that the reference points to.
    pub to: u64,
    /// It is to where counted references point.
    pub counts: bool,
}

/// Who holds a reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeldBy {
    /// A word among the roots.
    Root(Place),
    /// A register of the vCPU with this index.
    Register(usize),
    /// A tracked object.
    Object {
        /// It.
        object: Object,
        /// Name of its slab cache.
        cache: Option<String>,
        /// Its C type.
        structure: Option<String>,
        /// Its member that has the reference.
        member: Option<String>,
        /// Offset of the reference in it.
        offset: u64,
    },
}

/// Objects of the slab cache `name` that count more references than are found.
///
/// # Errors
/// No such cache, one whose type or count is not known, or memory that cannot be read.
pub fn of_cache<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    rules: &[Count],
    name: &str,
) -> anyhow::Result<CacheRefs> {
    let caches = caches(input)?;
    let cache = named(&caches, name)?;
    let counter = counter(input, rules, &caches, cache)?;
    let mut all = Vec::new();
    for object in heap(input.registry).filter(|object| object.cache == cache.va) {
        // One that cannot be read any more is being freed.
        all.extend(counter.read(input, object).ok());
    }
    let objects = all.len();
    tally(input, &mut all, counter.base)?;
    all.retain(|counted| counted.count > 0 && counted.excess() > 0);
    all.sort_by_key(|counted| (std::cmp::Reverse(counted.excess()), counted.object.sequence));
    Ok(CacheRefs { counter, objects, exceeding: all })
}

/// The object at or around `address`, and every reference to it.
///
/// # Errors
/// No such object, or memory that cannot be read. That its count is not known is none.
pub fn of_object<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    rules: &[Count],
    address: Va,
) -> anyhow::Result<ObjectRefs> {
    let object = input.object_at(address)?;
    let caches = caches(input)?;
    let cache = caches.iter().find(|cache| cache.va == object.cache);
    let counted = match cache {
        Some(cache) => counter(input, rules, &caches, cache).and_then(|counter| {
            let counted = counter.read(input, object)?;
            Ok((counter, counted))
        }),
        None => Err(anyhow::anyhow!("It is in no slab cache")),
    };
    let mut counted = counted.map_err(|error| format!("{error:#}"));
    let base = counted.as_ref().map_or(0, |(counter, _)| counter.base);
    let guest = input.guest()?;
    let mut listing = Listing::new(input, &guest, &caches);
    let targets = Targets::of(input, &object)?;
    each_word(input, &guest, &targets.windows(), |holder, word| {
        if !is_of(&holder, object.address) {
            let to = targets.offset(word);
            listing.add(holder, to, to == base);
        }
    })?;
    if let Ok((_, counted)) = &mut counted {
        (counted.found, counted.inside) = (listing.found, listing.inside);
    }
    let (references, omitted) = listing.finish()?;
    Ok(ObjectRefs { object, cache: cache.map(|cache| cache.name.clone()), counted, references, omitted })
}

fn caches<M: PhysicalMemory>(input: &ScanInput<'_, M>) -> anyhow::Result<Vec<Cache>> {
    input.linux.caches(input.memory).context("Cannot read the guest's list of slab caches")
}

fn is_of(holder: &Holder<'_>, target: Va) -> bool {
    matches!(holder, Holder::Object { object, .. } if object.address == target)
}

/// Counts the references to every object of `all`, whose counted references point to `base`.
fn tally<M: FrozenMemory>(input: &ScanInput<'_, M>, all: &mut [Counted], base: u64) -> anyhow::Result<()> {
    all.sort_unstable_by_key(|counted| counted.object.address);
    let (Some(first), Some(last)) = (all.first(), all.last()) else { return Ok(()) };
    let window: Range<u64> = first.object.address.0..super::referrers::addresses(&last.object).end;
    each_word(input, &input.guest()?, &[window], |holder, word| {
        let from = match holder {
            Holder::Object { object, .. } => Some(object.address),
            Holder::Root { .. } | Holder::Register { .. } => None,
        };
        count_word(all, base, from, word);
    })
}

/// Adds a word that is in the object at `from`, or in none, to what is known of the object it points into. `all` is in
/// the order of addresses.
fn count_word(all: &mut [Counted], base: u64, from: Option<Va>, word: u64) {
    let next = all.partition_point(|counted| counted.object.address.0 <= word);
    let Some(counted) = next.checked_sub(1).and_then(|at| all.get_mut(at)) else { return };
    let to = word - counted.object.address.0;
    if to < counted.object.size && from != Some(counted.object.address) {
        *if to == base { &mut counted.found } else { &mut counted.inside } += 1;
    }
}

/// Where the objects of a cache have their count: not, where they may be of another type than its name says.
fn counter<M: PhysicalMemory>(
    input: &ScanInput<'_, M>,
    rules: &[Count],
    caches: &[Cache],
    cache: &Cache,
) -> anyhow::Result<Counter> {
    let name = &cache.name;
    let alike = caches.iter().filter(|other| other.name == *name).count();
    ensure!(alike == 1, "The guest has {alike} slab caches {name:?}, so their objects may be of other types");
    let types = input.linux.kernel.types.as_ref().context("The kernel has no BTF")?;
    match sharers(input, cache.va) {
        Some(..=1) => {}
        Some(names) => {
            bail!(
                "Slab cache {name:?} is used under {names} names on this kernel (SLUB merges caches of like objects), so its \
                 objects may be of other types"
            )
        }
        None => bail!("Whether slab cache {name:?} has other names cannot be told on this kernel"),
    }
    let counter = match rules.iter().find(|rule| rule.cache == *name) {
        Some(rule) => Counter::of_rule(rule, types, &|symbol| input.linux.symbol(symbol))?,
        None => {
            let structure = structure_of(input, cache.va, name, cache.object_size);
            structure.and_then(|structure| Counter::of_type(name, &structure, types)).with_context(|| {
                format!("Where objects of slab cache {name:?} keep a reference count is not known; --profile can say")
            })?
        }
    };
    let end = counter.at.max(counter.base) + if counter.wide { 8 } else { 4 };
    ensure!(
        end <= cache.object_size,
        "The objects of slab cache {name:?} are no struct {}",
        counter.structure
    );
    Ok(counter)
}

impl Counter {
    /// From a row of a profile.
    ///
    /// # Errors
    /// A structure or member that this kernel does not have, or a member that is no count.
    pub fn of_rule(rule: &Count, types: &Btf, symbol: &dyn Fn(&str) -> Option<Va>) -> anyhow::Result<Self> {
        let lacks = |member: &str| format!("The kernel's BTF has no {member} in struct {}", rule.structure);
        let field = |member: &str| types.field(&rule.structure, member).with_context(|| lacks(member));
        let count = field(&rule.member)?;
        ensure!([4, 8].contains(&count.size), "{} of struct {} is no count", rule.member, rule.structure);
        let base = rule.within.as_deref().map_or(Ok(0), |member| field(member).map(|field| field.offset))?;
        let own_if = rule.own_if.as_ref().map(|own_if| Chain::of(own_if, &rule.structure, types, symbol));
        Ok(Self {
            cache: rule.cache.clone(),
            structure: rule.structure.clone(),
            member: rule.member.clone(),
            reason: rule.reason.clone(),
            at: count.offset,
            wide: count.size == 8,
            base,
            own: rule.own,
            own_if: own_if.transpose()?,
        })
    }

    /// The only member of a structure that can be nothing but a count.
    fn of_type(cache: &str, structure: &str, types: &Btf) -> Option<Self> {
        let members = types.members(structure)?;
        let inner = |ty: &str| match ty {
            "refcount_t" | "struct refcount_struct" | "struct kref" => Some(("", 0)),
            "struct lockref" => types.offset("lockref", "count").map(|offset| (".count", offset)),
            _ => None,
        };
        let mut counts = members.iter().filter_map(|member| Some((member, inner(&member.type_name)?)));
        let (member, (path, offset)) = counts.next().filter(|_| counts.next().is_none())?;
        Some(Self {
            cache: cache.to_owned(),
            structure: structure.to_owned(),
            member: format!("{}{path}", member.name),
            reason: String::new(),
            at: member.field.offset + offset,
            wide: false,
            base: 0,
            own: 0,
            own_if: None,
        })
    }

    /// The count of an object, without references yet.
    fn read<M: PhysicalMemory>(&self, input: &ScanInput<'_, M>, object: Object) -> anyhow::Result<Counted> {
        let at = object.address + self.at;
        let count = if self.wide {
            input.linux.read_u64(input.memory, at)?.cast_signed()
        } else {
            input.linux.read_u32(input.memory, at)?.cast_signed().into()
        };
        let more = self.own_if.as_ref().is_some_and(|chain| chain.holds(input, object.address));
        let own = self.own.saturating_add(more.into());
        Ok(Counted { object, count, own, found: 0, inside: 0 })
    }
}

impl Chain {
    fn of(
        own_if: &OwnIf,
        structure: &str,
        types: &Btf,
        symbol: &dyn Fn(&str) -> Option<Va>,
    ) -> anyhow::Result<Self> {
        let mut structure = structure.to_owned();
        let mut offsets = Vec::new();
        for (n, step) in own_if.path.iter().enumerate() {
            let lacks = || format!("The kernel's BTF has no pointer {step} in struct {structure}");
            let field = types.field(&structure, step).filter(|field| field.size == 8).with_context(lacks)?;
            offsets.push(field.offset);
            if n + 1 < own_if.path.len() {
                let members = types.members(&structure).unwrap_or_default();
                let member = members.iter().find(|member| member.name == step).with_context(lacks)?;
                let target = member.type_name.strip_prefix("struct ").and_then(|ty| ty.strip_suffix(" *"));
                structure = target.with_context(lacks)?.to_owned();
            }
        }
        let mut ends: Vec<Va> = own_if.symbols.iter().filter_map(|name| symbol(name)).collect();
        ends.extend(own_if.null.then_some(Va(0)));
        Ok(Self { offsets, ends })
    }

    fn holds<M: PhysicalMemory>(&self, input: &ScanInput<'_, M>, object: Va) -> bool {
        let mut at = object;
        for &offset in &self.offsets {
            let Ok(next) = input.linux.read_va(input.memory, at + offset) else { return false };
            at = next;
        }
        self.ends.contains(&at)
    }
}

/// References while they are found.
struct Listing<'x, 'a, M> {
    input: &'x ScanInput<'a, M>,
    caches: &'x [Cache],
    guest: &'x GuestMemory<'a, M>,
    exact: Vec<(Referrer, u64)>,
    other: Vec<(Referrer, u64)>,
    found: u64,
    inside: u64,
}

impl<'x, 'a, M: FrozenMemory> Listing<'x, 'a, M> {
    fn new(input: &'x ScanInput<'a, M>, guest: &'x GuestMemory<'a, M>, caches: &'x [Cache]) -> Self {
        Self { input, caches, guest, exact: Vec::new(), other: Vec::new(), found: 0, inside: 0 }
    }

    fn add(&mut self, holder: Holder<'_>, to: u64, counts: bool) {
        let (number, list, most) = match counts {
            true => (&mut self.found, &mut self.exact, SHOWN),
            false => (&mut self.inside, &mut self.other, SHOWN_INSIDE),
        };
        *number += 1;
        if list.len() < most {
            list.push((holder.to_referrer(), to));
        }
    }

    /// What was listed, and how many were not.
    fn finish(self) -> anyhow::Result<(Vec<Held>, u64)> {
        let mut held = Vec::new();
        for (counts, list) in [(true, &self.exact), (false, &self.other)] {
            for (holder, to) in list {
                held.push(Held { by: self.describe(holder)?, to: *to, counts });
            }
        }
        let omitted = (self.found + self.inside).saturating_sub(held.len() as u64);
        Ok((held, omitted))
    }

    fn describe(&self, holder: &Referrer) -> anyhow::Result<HeldBy> {
        Ok(match holder {
            Referrer::Root { region, pa } => {
                let place = place(self.input, self.guest, region, Pa(*pa));
                HeldBy::Root(place.context("Cannot find out whose a reference is")?)
            }
            Referrer::Register { cpu } => HeldBy::Register(*cpu),
            Referrer::Object { object, offset } => {
                let cache = self.caches.iter().find(|cache| cache.va == object.cache);
                let structure = cache
                    .and_then(|cache| structure_of(self.input, cache.va, &cache.name, cache.object_size));
                let types = self.input.linux.kernel.types.as_ref();
                let member =
                    types.zip(structure.as_deref()).and_then(|(types, name)| member_at(types, name, *offset));
                HeldBy::Object {
                    object: *object,
                    cache: cache.map(|cache| cache.name.clone()),
                    structure,
                    member,
                    offset: *offset,
                }
            }
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::types::synthetic::{Builder, Part};
    use proptest::prelude::*;

    pub(in crate::scan) fn counted(address: u64, count: i64) -> Counted {
        let object = Object { address: Va(address), pid: 7, ..Object::sample() };
        Counted { object, count, own: 0, found: 0, inside: 0 }
    }

    /// `struct outer { long number; refcount_t users; struct inner in; struct middle *way; }` and the like.
    fn types() -> Btf {
        let mut b = Builder::new();
        let (word, half, short) = (b.int("u64", 8), b.int("u32", 4), b.int("u16", 2));
        let structure = |b: &mut Builder, name: &str, bytes, members: &[(&str, u32, u32)]| {
            let parts: Vec<Part<'_>> = members.iter().map(|&(name, ty, at)| (name, ty, at * 8, 0)).collect();
            b.structure(name, bytes, &parts)
        };
        let counter = structure(&mut b, "refcount_struct", 4, &[("refs", half, 0)]);
        let counter = b.typedef("refcount_t", counter);
        let inner = structure(&mut b, "inner", 16, &[("count", word, 8)]);
        let operations = structure(&mut b, "operations", 8, &[("open", word, 0)]);
        let operations = b.pointer(operations);
        let middle = structure(&mut b, "middle", 32, &[("op", operations, 24)]);
        let middle = b.pointer(middle);
        let members = [
            ("number", word, 0),
            ("users", counter, 8),
            ("in", inner, 16),
            ("way", middle, 32),
            ("s", short, 40),
        ];
        structure(&mut b, "outer", 48, &members);
        let lock = structure(&mut b, "lockref", 8, &[("count", half, 4)]);
        structure(&mut b, "locked", 16, &[("ref", lock, 8)]);
        structure(&mut b, "two", 16, &[("a", counter, 0), ("b", lock, 8)]);
        Btf::parse(&b.bytes()).expect("types")
    }

    pub(in crate::scan) fn counter(reason: &str) -> Counter {
        Counter { reason: reason.to_owned(), ..Counter::of_type("c", "outer", &types()).expect("a count") }
    }

    fn rule(text: &str) -> Count {
        let rule = format!("[[count]]\ncache='c'\ntype='outer'\nsource=[]\nreason='r'\n{text}");
        guest_profiles::annotations::parse(&rule).expect("a rule").counts.remove(0)
    }

    #[test]
    fn a_row_names_count_base_and_what_has_no_pointer() {
        let symbol = |name: &str| (name == "ops").then_some(Va(0x5000));
        let of = |text: &str| Counter::of_rule(&rule(text), &types(), &symbol);
        let counter = of("member='users'\nown=1").expect("a count");
        assert_eq!((counter.at, counter.wide, counter.base, counter.own), (8, false, 0, 1));
        let counter = of("member='in.count'\nwithin='in'").expect("a count");
        assert_eq!((counter.at, counter.wide, counter.base), (24, true, 16));
        let counter =
            of("member='users'\nown_if={path=['way','op'],symbols=['gone','ops']}").expect("a count");
        assert_eq!(counter.own_if, Some(Chain { offsets: vec![32, 24], ends: vec![Va(0x5000)] }));
        let counter = of("member='users'\nown_if={path=['in.count'],null=true}").expect("a count");
        assert_eq!(counter.own_if, Some(Chain { offsets: vec![24], ends: vec![Va(0)] }));
        let refused = [
            ("member='none'", "no none in struct outer"),
            ("member='in'", "in of struct outer is no count"),
            ("member='s'", "s of struct outer is no count"),
            ("member='users'\nown_if={path=['users'],null=true}", "no pointer users in struct outer"),
            ("member='users'\nown_if={path=['number','op'],null=true}", "no pointer number in struct outer"),
            ("member='users'\nown_if={path=['way','no'],symbols=['ops']}", "no pointer no in struct middle"),
        ];
        for (text, expected) in refused {
            let error = format!("{:#}", of(text).expect_err(text));
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_structure_with_one_count_needs_no_row() {
        let types = types();
        let found = |name| Counter::of_type("c", name, &types).map(|counter| (counter.member, counter.at));
        assert_eq!(found("outer"), Some(("users".into(), 8)));
        assert_eq!(found("locked"), Some(("ref.count".into(), 12)));
        // Which of them, nobody knows; and none at all.
        assert_eq!((found("two"), found("inner"), found("gone")), (None, None, None));
        assert_eq!(member_at(&types, "outer", 26).as_deref(), Some("in.count"));
        assert_eq!(member_at(&types, "outer", 20).as_deref(), Some("in"));
        assert_eq!(member_at(&types, "outer", 44), None);
    }

    #[test]
    fn an_excess_is_what_is_counted_and_not_there() {
        let one = Counted { own: 1, found: 2, inside: 9, ..counted(0x1000, 5) };
        assert_eq!(one.excess(), 2);
        assert_eq!(Counted { found: u64::MAX, ..one }.excess(), 4 - i64::MAX);
    }

    proptest! {
        #[test]
        fn each_word_counts_for_the_object_it_points_into(
            words in proptest::collection::vec((0x0f00..0x1500_u64, proptest::option::of(0..8_u64)), 0..200),
            base in (0..12_u64).prop_map(|n| 8 * n),
        ) {
            // With a gap between any two.
            let mut all: Vec<Counted> = (0..8).map(|n| counted(0x1000 + 128 * n, 1)).collect();
            let address = |n: u64| Va(0x1000 + 128 * n);
            for &(word, from) in &words {
                count_word(&mut all, base, from.map(address), word);
            }
            for one in &all {
                let start = one.object.address;
                let others = || words.iter().filter(|(_, from)| from.map(address) != Some(start));
                let exact = others().filter(|(word, _)| *word == start.0 + base).count() as u64;
                let any = others().filter(|(word, _)| (start.0..start.0 + 96).contains(word)).count() as u64;
                prop_assert_eq!((one.found, one.inside), (exact, any - exact));
            }
        }
    }
}
