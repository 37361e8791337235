//! kmemleak's annotations for kernels that were built without it, suppressions of known leaks, and where objects keep their
//! reference count.
//!
//! All are tables of one kind of file, so that a project keeps its own beside its tests:
//!
//! ```
//! let rules = guest_profiles::annotations::parse(r#"
//!     [[annotation]]
//!     action = "gray"
//!     functions = ["mydrv_register"]
//!     source = ["mydrv.c:120"]
//!     reason = "The device keeps its address."
//!
//!     [[suppress]]
//!     name = "known leak of otherdrv, bug 1234"
//!     function = "otherdrv_*"
//!     module = "otherdrv"
//! "#).unwrap();
//! assert!(rules.suppressions[0].matches("kmalloc-64", [("otherdrv_probe", Some("otherdrv"))]));
//! ```

use crate::counts::Count;
use crate::types::CacheType;
use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};
use toml::Spanned;

/// What a scan does with the objects a rule matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Never report, always read (kmemleak_not_leak).
    Gray,
    /// Never report, never read (kmemleak_ignore).
    Black,
    /// Report, never read (kmemleak_no_scan).
    NoScan,
    /// Report, read the bytes from `start` to `end` only (kmemleak_scan_area).
    Area,
}

impl Action {
    /// As rule files have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gray => "gray",
            Self::Black => "black",
            Self::NoScan => "no-scan",
            Self::Area => "area",
        }
    }
}

/// One row of `data/annotations.toml`, whose head says what the fields mean.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Annotation {
    /// Treatment.
    pub action: Action,
    /// Alternative functions anywhere in the allocation's backtrace, best first.
    #[serde(default)]
    pub functions: Vec<String>,
    /// Kind of object, as reports name it.
    pub kind: Option<String>,
    /// Name of the slab cache.
    pub cache: Option<String>,
    /// For [`Action::Area`]: first byte that is read.
    pub start: Option<u64>,
    /// For [`Action::Area`]: first byte that is not read any more; the object's end when absent.
    pub end: Option<u64>,
    /// Lines of the kernel source that say the same.
    pub source: Vec<String>,
    /// Why the object looks lost.
    pub reason: String,
}

/// A leak that is known and not to be reported. All patterns given must match; `*` stands for any characters, `?`
/// for one.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Suppression {
    /// Shown in the table of suppressions used.
    pub name: String,
    /// Some function of the backtrace.
    pub function: Option<String>,
    /// Module of that function (of any function, when none is given).
    pub module: Option<String>,
    /// Slab cache.
    pub cache: Option<String>,
    /// Line of its file that it begins in; with [`parse_file`] `FILE:LINE`.
    #[serde(skip)]
    pub place: String,
}

/// The contents of one file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// Treatment of objects in scans.
    pub annotations: Vec<Annotation>,
    /// Leaks not to be reported.
    pub suppressions: Vec<Suppression>,
    /// Where objects keep their reference count.
    pub counts: Vec<Count>,
    /// What the objects of slab caches are.
    pub types: Vec<CacheType>,
    /// C names of types of 8 bytes or more that hold no pointers.
    pub not_pointers: Vec<String>,
}

/// A file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default, rename = "annotation")]
    annotations: Vec<Spanned<Annotation>>,
    #[serde(default, rename = "suppress")]
    suppressions: Vec<Spanned<Suppression>>,
    #[serde(default, rename = "count")]
    counts: Vec<Spanned<Count>>,
    #[serde(default, rename = "type")]
    types: Vec<Spanned<CacheType>>,
    #[serde(default)]
    not_pointers: Vec<String>,
}

impl Rules {
    /// Adds another file's rules after these.
    pub fn extend(&mut self, other: Self) {
        self.annotations.extend(other.annotations);
        self.suppressions.extend(other.suppressions);
        // The first row of a cache counts: a project's own goes before the built-in one.
        self.counts.splice(..0, other.counts);
        self.types.splice(..0, other.types);
        self.not_pointers.extend(other.not_pointers);
    }
}

const KINDS: [&str; 8] = ["slab", "large", "vmalloc", "percpu", "page", "memblock", "ioremap", "vmap"];

/// The built-in rules.
///
/// # Panics
/// Never: the data is part of the crate and a unit test loads it.
pub fn builtin() -> Rules {
    let mut rules = parse(include_str!("../data/annotations.toml")).expect("built-in annotations are valid");
    rules.extend(parse(include_str!("../data/counts.toml")).expect("built-in counts are valid"));
    rules.extend(parse(include_str!("../data/types.toml")).expect("built-in types are valid"));
    rules
}

/// The built-in rules and those of a rule file.
///
/// # Errors
/// As [`parse`].
pub fn builtin_and(text: Option<&str>) -> Result<Rules> {
    let mut rules = builtin();
    if let Some(text) = text {
        rules.extend(parse(text)?);
    }
    Ok(rules)
}

/// Reads a rule file.
///
/// # Errors
/// Not TOML, an unknown key, or a rule that matches everything, names an unknown kind or an empty area; with its line.
pub fn parse(text: &str) -> Result<Rules> {
    let line = |at: usize| 1 + text.bytes().take(at).filter(|&b| b == b'\n').count();
    let file: File = toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        anyhow!("Line {}: {}", line(at), error.message())
    })?;
    let mut rules = Rules {
        annotations: checked(file.annotations, &line, check)?,
        suppressions: Vec::new(),
        counts: checked(file.counts, &line, Count::check)?,
        types: checked(file.types, &line, CacheType::check)?,
        not_pointers: file.not_pointers,
    };
    for rule in file.suppressions {
        let place = line(rule.span().start).to_string();
        let rule = checked(vec![rule], &line, Suppression::check)?;
        rules.suppressions.extend(rule.into_iter().map(|rule| Suppression { place: place.clone(), ..rule }));
    }
    Ok(rules)
}

/// Reads a rule file of this name, which the places of its suppressions have.
///
/// # Errors
/// As [`parse`].
pub fn parse_file(name: &str, text: &str) -> Result<Rules> {
    let mut rules = parse(text)?;
    rules.suppressions.iter_mut().for_each(|rule| rule.place = format!("{name}:{}", rule.place));
    Ok(rules)
}

fn checked<T>(
    rows: Vec<Spanned<T>>,
    line: &impl Fn(usize) -> usize,
    check: impl Fn(&T) -> Result<()>,
) -> Result<Vec<T>> {
    let row = |row: Spanned<T>| {
        check(row.get_ref()).with_context(|| format!("Line {}", line(row.span().start)))?;
        Ok(row.into_inner())
    };
    rows.into_iter().map(row).collect()
}

fn check(rule: &Annotation) -> Result<()> {
    ensure!(!rule.functions.is_empty() || rule.cache.is_some(), "It names no function and no cache");
    ensure!(rule.functions.iter().all(|f| !f.is_empty()), "A function name is empty");
    if let Some(kind) = &rule.kind {
        ensure!(KINDS.contains(&kind.as_str()), "Kind {kind:?} is none of {}", KINDS.join(", "));
    }
    if rule.action == Action::Area {
        let start = rule.start.context("An area needs its start")?;
        ensure!(rule.end.is_none_or(|end| start < end), "The area ends before it starts");
    } else {
        ensure!(rule.start.is_none() && rule.end.is_none(), "Only an area has start and end");
    }
    Ok(())
}

impl Suppression {
    fn check(&self) -> Result<()> {
        let patterns = [&self.function, &self.module, &self.cache];
        ensure!(
            patterns.iter().any(|p| p.is_some()),
            "Suppression {:?} has no function, module or cache",
            self.name
        );
        Ok(())
    }

    /// True when it covers an object of `cache` (empty: none) with a backtrace of functions and their modules.
    pub fn matches<'a>(
        &self,
        cache: &str,
        frames: impl IntoIterator<Item = (&'a str, Option<&'a str>)>,
    ) -> bool {
        let fits = |pattern: &Option<String>, text: &str| pattern.as_ref().is_none_or(|p| wildcard(p, text));
        let frame_matters = self.function.is_some() || self.module.is_some();
        fits(&self.cache, cache)
            && (!frame_matters
                || frames.into_iter().any(|(function, module)| {
                    fits(&self.function, function) && fits(&self.module, module.unwrap_or_default())
                }))
    }
}

/// Matches `*` and `?`, in time proportional to the product of the lengths at worst.
fn wildcard(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    // Where to go on when a later mismatch makes the last star swallow one more character.
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                p += 1;
                star = Some((p, t));
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((after, swallowed)) = star else { return false };
                star = Some((after, swallowed + 1));
                (p, t) = (after, swallowed + 1);
            }
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: &str = "[[annotation]]\nsource=[]\nreason='r'\n";

    #[test]
    fn builtin_rules_load_and_cite_their_source() {
        let rules = builtin();
        assert!(rules.suppressions.is_empty());
        assert!(rules.annotations.iter().all(|r| !r.source.is_empty() && !r.reason.is_empty()));
        assert!(rules.counts.iter().all(|r| !r.source.is_empty()));
        assert!(!rules.types.is_empty() && rules.types.iter().all(|r| !r.source.is_empty()));
        let sources = rules.annotations.iter().flat_map(|r| &r.source);
        let sources = sources.chain(rules.counts.iter().flat_map(|r| &r.source));
        for source in sources.chain(rules.types.iter().flat_map(|r| &r.source)) {
            let (place, version) = source.split_once(" (").expect("source names its kernel");
            let (_, line) = place.split_once(".c:").expect("source is a C file and line");
            assert!(line.parse::<u32>().is_ok() && version.ends_with(')'), "{source}");
        }
    }

    #[test]
    fn bad_rules_are_refused_with_their_reason() {
        let cases = [
            ("action='gray'", "names no function"),
            ("action='gray'\nfunctions=['']", "empty"),
            ("action='grey'\nfunctions=['f']", "unknown variant"),
            ("action='gray'\nfunctions=['f']\nkind='heap'", "none of slab"),
            ("action='area'\nfunctions=['f']", "needs its start"),
            ("action='area'\nfunctions=['f']\nstart=8\nend=8", "ends before"),
            ("action='gray'\nfunctions=['f']\nend=8", "Only an area"),
            ("action='gray'\nfunctions=['f']\nversion='6.1'", "unknown field"),
        ];
        for (text, expected) in cases {
            let error = format!("{:#}", parse(&format!("{RULE}{text}")).unwrap_err());
            assert!(error.contains(expected), "{text}: {error}");
        }
        let count = "[[count]]\ncache='c'\ntype='t'\nmember='n'\nsource=[]\n";
        for (text, expected) in [("own=1", "needs its reason"), ("kind='x'", "unknown field")] {
            let error = format!("{:#}", parse(&format!("{count}{text}")).unwrap_err());
            assert!(error.contains(expected), "{text}: {error}");
        }
        let error = format!("{:#}", parse("\n[[suppress]]\nname='all'").unwrap_err());
        assert_eq!(error, "Line 2: Suppression \"all\" has no function, module or cache");
        let error = format!("{:#}", parse("\n\nsuppress = 1").unwrap_err());
        assert!(error.starts_with("Line 3: "), "{error}");
        assert!(parse(&format!("{RULE}action='area'\ncache='c'\nstart=16")).is_ok());
    }

    #[test]
    fn suppression_needs_every_pattern_in_one_frame() {
        let text = "[[suppress]]\nname='n'\nfunction='a_*'\nmodule='m?d'\ncache='kmalloc-*'\n";
        let rule = &parse(text).unwrap().suppressions[0];
        let frames = [("kmalloc", None), ("a_probe", Some("mod"))];
        assert_eq!(rule.place, "1");
        assert_eq!(parse_file("f", &format!("\n{text}")).unwrap().suppressions[0].place, "f:2");
        assert!(rule.matches("kmalloc-8", frames));
        assert!(!rule.matches("dentry", frames));
        assert!(!rule.matches("kmalloc-8", [("a_probe", None), ("b", Some("mod"))]));
        let cache_only = Suppression { function: None, module: None, ..rule.clone() };
        assert!(cache_only.matches("kmalloc-8", []));
    }

    #[test]
    fn wildcards() {
        for (pattern, text, expected) in [
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("a*c*e", "abcde", true),
            ("a*c*e", "abcdef", false),
            ("?", "", false),
            ("*ab", "aab", true),
            ("*aab*", "aaaab", true),
        ] {
            assert_eq!(wildcard(pattern, text), expected, "{pattern} {text}");
        }
    }
}
