//! Annotation rules, resolved to one kernel's addresses.
//!
//! Rules name functions, objects have backtraces: every distinct backtrace is compared with the rules once
//! ([`Treatments::refresh`]), after which an object's treatment is a look-up by its [`StackId`].

use crate::kernel::Kernel;
use crate::linux::{Linux, ModuleMap};
use crate::memory::Va;
use crate::registry::{Object, StackDepot, StackId};
use crate::symbols::Symbol;
use guest_profiles::annotations::Annotation;
use rustc_hash::FxHashMap;
use std::ops::Range;

/// The code of one function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function<'a> {
    /// Symbol name.
    pub name: &'a str,
    /// Run-time addresses.
    pub code: Range<Va>,
}

/// Rules with the code they name, and which of them each backtrace passes through.
#[derive(Debug, Default)]
pub struct Treatments {
    rules: Vec<Annotation>,
    /// Code of the functions named, with the rule's number; ascending by start.
    code: Vec<(Range<Va>, usize)>,
    /// The longest of them: how far to look back.
    longest: u64,
    /// Distinct sets of rules, the empty one first; [`Treatments::stacks`] has their numbers by [`StackId`].
    sets: Vec<Vec<usize>>,
    stacks: Vec<u32>,
    numbers: FxHashMap<Vec<usize>, u32>,
}

impl Treatments {
    /// Finds the functions that the rules name. Rules whose functions the kernel does not have match nothing.
    pub fn resolve<'a>(rules: &[Annotation], functions: impl IntoIterator<Item = Function<'a>>) -> Self {
        let mut wanted: FxHashMap<&str, Vec<(usize, usize)>> = FxHashMap::default();
        for (number, rule) in rules.iter().enumerate() {
            for (choice, name) in rule.functions.iter().enumerate() {
                wanted.entry(name).or_default().push((number, choice));
            }
        }
        // The best alternative seen of each rule, and its code.
        let mut best: Vec<(usize, Vec<Range<Va>>)> = vec![(usize::MAX, Vec::new()); rules.len()];
        for function in functions {
            for &(number, choice) in wanted.get(plain_name(function.name)).into_iter().flatten() {
                let (chosen, code) = &mut best[number];
                if choice < *chosen {
                    (*chosen, *code) = (choice, Vec::new());
                }
                if choice == *chosen {
                    code.push(function.code.clone());
                }
            }
        }
        let numbered = best.into_iter().enumerate();
        let mut code: Vec<_> =
            numbered.flat_map(|(number, (_, code))| code.into_iter().map(move |c| (c, number))).collect();
        code.sort_unstable_by_key(|(c, _)| c.start);
        let longest = code.iter().map(|(c, _)| c.end - c.start).max().unwrap_or(0);
        let (sets, numbers) = (vec![Vec::new()], [(Vec::new(), 0)].into_iter().collect());
        Self { rules: rules.to_vec(), code, longest, sets, stacks: Vec::new(), numbers }
    }

    /// [`Treatments::resolve`] with the functions of a booted kernel and of the modules loaded now.
    pub fn of_guest(rules: &[Annotation], linux: &Linux, modules: &ModuleMap) -> Self {
        let slide = linux.placement.slide;
        let kernel = functions(linux.kernel.symbols.iter().map(|s| (s.va, s.kind, s.name)))
            .map(|f| Function { code: f.code.start + slide..f.code.end + slide, ..f });
        let modules = modules.live().flat_map(|m| functions(m.symbols.iter().map(plain)));
        Self::resolve(rules, kernel.chain(modules))
    }

    /// Compares backtraces stored since the last call with the rules.
    pub fn refresh(&mut self, depot: &StackDepot) {
        for id in self.stacks.len()..depot.len() {
            let mut set: Vec<usize> =
                depot.get(StackId(id as u32)).iter().flat_map(|&frame| self.rules_at(frame)).collect();
            set.sort_unstable();
            set.dedup();
            let next = self.sets.len() as u32;
            let number = *self.numbers.entry(set.clone()).or_insert(next);
            if number == next {
                self.sets.push(set);
            }
            self.stacks.push(number);
        }
    }

    /// The first rule that matches an object; `cache` is the name of its slab cache, or empty.
    pub fn of(&self, object: &Object, cache: &str) -> Option<&Annotation> {
        let set = self.stacks.get(object.stack.0 as usize).map_or(&[][..], |&n| &self.sets[n as usize]);
        self.rules.iter().enumerate().find_map(|(number, rule)| {
            let matches = (rule.functions.is_empty() || set.contains(&number))
                && rule.kind.as_deref().is_none_or(|k| k == object.kind.name())
                && rule.cache.as_deref().is_none_or(|c| c == cache);
            matches.then_some(rule)
        })
    }

    /// Rules that name the function a call at return address `frame` was made from.
    fn rules_at(&self, frame: Va) -> impl Iterator<Item = usize> + '_ {
        let end = self.code.partition_point(|(c, _)| c.start < frame);
        let start = self.code.partition_point(|(c, _)| c.start.0.saturating_add(self.longest) < frame.0);
        self.code[start.min(end)..end].iter().filter(move |(c, _)| frame <= c.end).map(|&(_, number)| number)
    }
}

/// Code symbols with their ends, which are the next higher symbols' addresses.
fn functions<'a>(symbols: impl Iterator<Item = (Va, char, &'a str)>) -> impl Iterator<Item = Function<'a>> {
    let mut symbols: Vec<_> = symbols.collect();
    symbols.sort_by_key(|&(va, ..)| va);
    let mut ends = Vec::with_capacity(symbols.len());
    let (mut end, mut above) = (Va(u64::MAX), Va(u64::MAX));
    for &(va, ..) in symbols.iter().rev() {
        if va != above {
            (end, above) = (above, va);
        }
        ends.push(end);
    }
    let code = symbols.into_iter().zip(ends.into_iter().rev());
    code.filter(|((_, kind, _), _)| matches!(kind, 't' | 'T' | 'w' | 'W'))
        .map(|((start, _, name), end)| Function { name, code: start..end })
}

fn plain(symbol: &Symbol) -> (Va, char, &str) {
    (symbol.va, symbol.kind, &symbol.name)
}

/// True when the image of a kernel has a function that a rule names so.
pub fn has_function(kernel: &Kernel, name: &str) -> bool {
    let is_code = |kind: char| matches!(kind, 't' | 'T' | 'w' | 'W');
    kernel.symbols.iter().any(|symbol| is_code(symbol.kind) && plain_name(symbol.name) == name)
}

/// A function's name without what compilers append to the names of its clones (`.isra.0`, `.part.0`, `.cold`).
fn plain_name(name: &str) -> &str {
    name.split_once('.').map_or(name, |(plain, _)| plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Kind;
    use guest_profiles::annotations::{Action, parse};

    fn function(name: &str, start: u64, len: u64) -> Function<'_> {
        Function { name, code: Va(start)..Va(start + len) }
    }

    fn object(stack: StackId, kind: Kind) -> Object {
        Object { size: 8, cache: Va(0), kind, stack, ..Object::sample() }
    }

    #[test]
    fn rules_match_functions_of_the_backtrace() {
        let rules = "
            [[annotation]]
            action = 'gray'
            functions = ['inlined_away', 'outer']
            source = []
            reason = 'first'
            [[annotation]]
            action = 'black'
            functions = ['helper']
            kind = 'vmalloc'
            source = []
            reason = 'second'
            [[annotation]]
            action = 'no-scan'
            cache = 'plain'
            source = []
            reason = 'third'";
        let rules = parse(rules).unwrap().annotations;
        let functions = [
            function("outer", 0x100, 0x40),
            function("helper.isra.0", 0x140, 0x10),
            function("other", 0x150, 0x1000),
        ];
        let mut treatments = Treatments::resolve(&rules, functions);
        let mut depot = StackDepot::default();
        // A return address may be the first byte behind a function whose last instruction is the call.
        let cases = [
            (&[0x139, 0x155][..], Kind::Slab, "", Some(Action::Gray)),
            (&[0x160, 0x140], Kind::Slab, "", Some(Action::Gray)),
            (&[0x100, 0x151], Kind::Slab, "", None),
            (&[0x150], Kind::Vmalloc, "", Some(Action::Black)),
            (&[0x150], Kind::Large, "", None),
            (&[0x150], Kind::Large, "plain", Some(Action::NoScan)),
            (&[], Kind::Slab, "", None),
        ];
        for (frames, kind, cache, expected) in cases {
            let frames: Vec<Va> = frames.iter().map(|&f| Va(f)).collect();
            let id = depot.intern(&frames);
            treatments.refresh(&depot);
            let rule = treatments.of(&object(id, kind), cache);
            assert_eq!(rule.map(|r| r.action), expected, "{frames:?} {kind:?} {cache}");
        }
    }

    #[test]
    fn records_of_an_in_kernel_kmemleak_are_black() {
        let treatments = Treatments::resolve(&guest_profiles::annotations::builtin().annotations, []);
        let object = object(StackId(0), Kind::Slab);
        for (cache, expected) in [
            ("kmemleak_object", Some(Action::Black)),
            ("kmemleak_scan_area", Some(Action::Black)),
            ("kmalloc-256", None),
        ] {
            assert_eq!(treatments.of(&object, cache).map(|rule| rule.action), expected, "{cache}");
        }
    }

    #[test]
    fn code_ends_where_the_next_symbol_starts() {
        let symbol = |va, kind, name: &str| Symbol { va: Va(va), kind, name: name.into() };
        let symbols =
            [symbol(1, 't', "a"), symbol(1, 'T', "alias"), symbol(5, 'd', "data"), symbol(9, 'W', "z")];
        let found: Vec<_> =
            functions(symbols.iter().map(plain)).map(|f| (f.name, f.code.start.0, f.code.end.0)).collect();
        assert_eq!(found, [("a", 1, 5), ("alias", 1, 5), ("z", 9, u64::MAX)]);
    }
}
