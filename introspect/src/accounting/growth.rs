//! `growth`: what keeps growing although everything in it is referenced.
//!
//! Marking finds what nothing points to. A reference count that is never dropped or a list that is never pruned leaves its
//! objects referenced, and only their number tells. Each scan counts the live objects of every allocation site and of
//! every cache; of these series those are listed that rise and show no sign of a plateau or of a sawtooth:
//!
//! - the Mann-Kendall test finds a rising trend, whatever its form (H. B. Mann, Nonparametric tests against trend,
//!   Econometrica 13, 1945; ties as in M. G. Kendall, Rank correlation methods, 1975), and
//! - the least count of each part of the time is above that of the part before: what is freed now and then falls back; and
//! - within the last part it still rises, by a quarter of what it rises by in general at least: what has reached its size
//!   stays.
//!
//! Objects that the kernel keeps for later, or has not got round to freeing yet, are not counted: their number rises for
//! minutes and falls at once, and a workload that scans see between two such moments would be taken for a leak.
//!
//! The rate is the median of the slopes between all pairs of counts (P. K. Sen, Journal of the American Statistical
//! Association 63, 1968), which one burst does not move.

use super::{Cell, Column, Role, Table};
use crate::memory::Va;
use crate::registry::{Kind, Registry, StackId};
use rustc_hash::{FxHashMap, FxHashSet};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::ops::Range;

/// Counts kept; when they are full every second is dropped, so that they reach back to the beginning.
const MAX_SAMPLES: usize = 64;
/// Fewer say nothing: the test's confidence in five rising counts is 0.986.
pub const MIN_SAMPLES: usize = 5;
/// Parts of the time whose least counts are compared.
const PARTS: usize = 4;
/// What has slowed down to less than this part of its general slope is taken to have reached its size.
const STILL: f64 = 0.25;
/// Callers remembered that free the objects of one backtrace.
const MAX_FREERS: usize = 4;
const SECONDS_PER_HOUR: f64 = 3600.0;

/// Whose objects are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
enum Counted {
    Backtrace(StackId),
    Cache(Kind, Va),
}

/// The live objects at one moment.
#[derive(Clone, Serialize, Deserialize)]
struct Sample {
    jiffies: u64,
    /// Objects and bytes.
    live: FxHashMap<Counted, [u64; 2]>,
}

/// Live objects over time.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct History {
    samples: Vec<Sample>,
}

impl History {
    /// Counts the live objects now, without those at the addresses `unused`, which nobody uses although they are
    /// allocated.
    pub fn note(&mut self, registry: &Registry, unused: &FxHashSet<Va>, jiffies: u64) {
        let mut live: FxHashMap<Counted, [u64; 2]> = FxHashMap::default();
        for object in registry.objects().filter(|object| !unused.contains(&object.address)) {
            let cache = Counted::Cache(object.kind, object.cache);
            for counted in [Counted::Backtrace(object.stack), cache] {
                let sum = live.entry(counted).or_default();
                *sum = [sum[0] + 1, sum[1].saturating_add(object.size)];
            }
        }
        if self.samples.len() == MAX_SAMPLES {
            let mut n = 0;
            self.samples.retain(|_| {
                n += 1;
                n % 2 == 1
            });
        }
        self.samples.push(Sample { jiffies, live });
    }

    /// Drops what no history has: of one from a file, whoever wrote that.
    pub fn bound(&mut self) {
        self.samples.truncate(MAX_SAMPLES);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.samples.clear();
    }

    /// How many counts there are.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// True before the first.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// What grows, by bytes an hour. `hz` is the guest's jiffies in a second.
    pub fn growing(&self, hz: u64, names: &Names<'_>) -> Vec<Growing> {
        let Some(last) = self.samples.last() else { return Vec::new() };
        let mut series: FxHashMap<Name, Series> = FxHashMap::default();
        for counted in last.live.keys() {
            let name = match *counted {
                Counted::Backtrace(stack) => Name::Site((names.site)(stack)),
                Counted::Cache(Kind::Slab, cache) => Name::Cache((names.cache)(cache)),
                Counted::Cache(kind, _) => Name::Cache(kind.instead_of_cache()),
            };
            let freed = match *counted {
                Counted::Backtrace(stack) => (names.freed)(stack),
                Counted::Cache(..) => Vec::new(),
            };
            let sums = series.entry(name).or_insert_with(|| Series::new(self.samples.len()));
            sums.add(self.samples.iter().map(|s| s.live.get(counted).copied().unwrap_or_default()), freed);
        }
        let first = self.samples.first().map_or(0, |s| s.jiffies);
        let hour = hz.max(1) as f64 * SECONDS_PER_HOUR;
        let hours: Vec<f64> =
            self.samples.iter().map(|s| s.jiffies.saturating_sub(first) as f64 / hour).collect();
        let mut growing: Vec<Growing> =
            series.into_iter().filter_map(|(name, series)| series.growing(name, &hours)).collect();
        growing
            .sort_by(|a, b| b.bytes_per_hour.total_cmp(&a.bytes_per_hour).then_with(|| a.name.cmp(&b.name)));
        growing
    }
}

/// How things are called.
pub struct Names<'a> {
    /// The allocation site of a backtrace.
    pub site: &'a dyn Fn(StackId) -> String,
    /// A slab cache.
    pub cache: &'a dyn Fn(Va) -> String,
    /// Who has freed objects of a backtrace, and how many.
    pub freed: &'a dyn Fn(StackId) -> Vec<(String, u64)>,
}

/// What grows.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Name {
    /// An allocation site.
    Site(String),
    /// A slab cache, or another kind of memory in brackets.
    Cache(String),
}

/// Something that grows.
#[derive(Debug, Clone, PartialEq)]
pub struct Growing {
    /// It.
    pub name: Name,
    /// Its live objects now.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects an hour.
    pub objects_per_hour: f64,
    /// Bytes an hour.
    pub bytes_per_hour: f64,
    /// Probability that the trend is none of chance: 0.95 and more.
    pub confidence: f64,
    /// Functions that have freed objects of the same site, most of them first.
    pub freed_by: Vec<(String, u64)>,
    /// Live objects at each scan that was compared, oldest first.
    pub history: Vec<u64>,
}

/// The counts of one name.
struct Series {
    objects: Vec<f64>,
    bytes: Vec<f64>,
    freed: FxHashMap<String, u64>,
}

impl Series {
    fn new(len: usize) -> Self {
        Self { objects: vec![0.0; len], bytes: vec![0.0; len], freed: FxHashMap::default() }
    }

    fn add(&mut self, counts: impl Iterator<Item = [u64; 2]>, freed: Vec<(String, u64)>) {
        for ((objects, bytes), count) in self.objects.iter_mut().zip(&mut self.bytes).zip(counts) {
            *objects += count[0] as f64;
            *bytes += count[1] as f64;
        }
        for (function, times) in freed {
            let sum = self.freed.entry(function).or_default();
            *sum = sum.saturating_add(times);
        }
    }

    fn growing(self, name: Name, hours: &[f64]) -> Option<Growing> {
        let confidence = trend(hours, &self.objects)?;
        let mut freed_by: Vec<(String, u64)> = self.freed.into_iter().collect();
        freed_by.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        freed_by.truncate(MAX_FREERS);
        Some(Growing {
            name,
            objects: self.objects.last().copied().unwrap_or(0.0) as u64,
            bytes: self.bytes.last().copied().unwrap_or(0.0) as u64,
            objects_per_hour: slope(hours, &self.objects),
            bytes_per_hour: slope(hours, &self.bytes),
            confidence,
            freed_by,
            history: self.objects.iter().map(|&count| count as u64).collect(),
        })
    }
}

/// Confidence of a rising trend (Mann-Kendall, one-sided, continuity corrected); None for too few counts or a trend that is
/// not rising.
fn rising(counts: &[f64]) -> Option<f64> {
    let n = counts.len() as f64;
    if counts.len() < MIN_SAMPLES {
        return None;
    }
    let pairs = counts.iter().enumerate().flat_map(|(i, a)| counts[i + 1..].iter().map(move |b| b - a));
    let sum: f64 = pairs.map(|d| if d == 0.0 { 0.0 } else { d.signum() }).sum();
    if sum <= 1.0 {
        return None;
    }
    let spread = |n: f64| n * (n - 1.0) * (2.0 * n + 5.0);
    let mut sorted = counts.to_vec();
    sorted.sort_by(f64::total_cmp);
    let ties: f64 = sorted.chunk_by(|a, b| a == b).map(|equal| spread(equal.len() as f64)).sum();
    let variance = (spread(n) - ties) / 18.0;
    (variance > 0.0).then(|| normal((sum - 1.0) / variance.sqrt()))
}

/// Confidence that the counts rise, where they show neither a sawtooth nor a plateau.
fn trend(times: &[f64], counts: &[f64]) -> Option<f64> {
    let confidence = rising(counts).filter(|confidence| *confidence >= 0.95)?;
    let parts = parts(times);
    (minima_rise(&parts, counts) && still_rises(times, counts, parts.last()?.start)).then_some(confidence)
}

/// The samples of each part of the time; a part without any is none.
fn parts(times: &[f64]) -> Vec<Range<usize>> {
    let count = PARTS.min(times.len() / 2).max(1);
    let (Some(first), Some(last)) = (times.first(), times.last()) else { return Vec::new() };
    let part = |time: &f64| (((time - first) / (last - first) * count as f64) as usize).min(count - 1);
    let mut end = 0;
    let chunks = times.chunk_by(|a, b| part(a) == part(b));
    let place = |chunk: &[f64]| {
        end += chunk.len();
        end - chunk.len()..end
    };
    chunks.map(place).collect()
}

/// Whether the least count of each part is above that of the part before.
fn minima_rise(parts: &[Range<usize>], counts: &[f64]) -> bool {
    let least: Vec<f64> =
        parts.iter().map(|part| counts[part.clone()].iter().copied().fold(f64::INFINITY, f64::min)).collect();
    least.len() > 1 && least.is_sorted_by(|a, b| a < b)
}

/// Whether the second half of the samples from `last` on is above the first as the slope of all lets expect.
fn still_rises(times: &[f64], counts: &[f64], last: usize) -> bool {
    let start = last.min(times.len().saturating_sub(2));
    let middle = start + (times.len() - start) / 2;
    let rise = |of: &[f64]| median(of[middle..].to_vec()) - median(of[start..middle].to_vec());
    let rose = rise(counts);
    rose > 0.0 && rose >= STILL * slope(times, counts) * rise(times)
}

/// 0 of nothing.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match (values.len(), values.len() / 2) {
        (0, _) => 0.0,
        (n, middle) if n % 2 == 0 => (values[middle - 1] + values[middle]) / 2.0,
        (_, middle) => values[middle],
    }
}

/// Median slope between all pairs; 0 when all are at one time.
fn slope(times: &[f64], counts: &[f64]) -> f64 {
    let mut slopes = Vec::with_capacity(times.len() * times.len() / 2);
    for (i, (t, c)) in times.iter().zip(counts).enumerate() {
        let later = times[i + 1..].iter().zip(&counts[i + 1..]).filter(|(later, _)| *later > t);
        slopes.extend(later.map(|(later, count)| (count - c) / (later - t)));
    }
    median(slopes)
}

/// Distribution function of the standard normal distribution for z >= 0, to 7 digits (Abramowitz and Stegun, Handbook of
/// Mathematical Functions, 26.2.17).
fn normal(z: f64) -> f64 {
    const B: [f64; 5] = [0.319_381_530, -0.356_563_782, 1.781_477_937, -1.821_255_978, 1.330_274_429];
    let t = 1.0 / (1.0 + 0.231_641_9 * z);
    let polynomial = B.iter().rev().fold(0.0, |sum, b| (sum + b) * t);
    1.0 - (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt() * polynomial
}

/// One row per thing that grows.
pub fn table(growing: &[Growing]) -> Table {
    let columns = vec![
        Column::new("objects", Role::Amount),
        Column::new("objects_per_hour", Role::Amount),
        Column::new("bytes_per_hour", Role::Amount),
        Column::new("confidence_percent", Role::Fact),
        Column::new("what", Role::Key),
        Column::new("freed_by", Role::Fact),
    ];
    let mut table = Table::new(columns, 2);
    for g in growing {
        let what = match &g.name {
            Name::Site(name) => name.clone(),
            Name::Cache(name) => format!("cache {name}"),
        };
        let freed: Vec<String> = g.freed_by.iter().map(|(name, times)| format!("{name} ({times})")).collect();
        let freed = if freed.is_empty() { "-".to_owned() } else { freed.join(", ") };
        table.rows.push(vec![
            g.objects.into(),
            Cell::Number(g.objects_per_hour.round() as i64),
            Cell::Number(g.bytes_per_hour.round() as i64),
            Cell::Number((g.confidence * 100.0).floor() as i64),
            Cell::Text(what),
            Cell::Text(freed),
        ]);
    }
    table
}

/// The same for programs.
pub fn json(growing: &[Growing]) -> Value {
    let one = |g: &Growing| {
        let (kind, name) = match &g.name {
            Name::Site(name) => ("site", name),
            Name::Cache(name) => ("cache", name),
        };
        let freed: Vec<Value> =
            g.freed_by.iter().map(|(name, times)| json!({ "function": name, "count": times })).collect();
        json!({
            "kind": kind, "name": name, "objects": g.objects, "bytes": g.bytes,
            "objects_per_hour": g.objects_per_hour, "bytes_per_hour": g.bytes_per_hour,
            "confidence": g.confidence, "freed_by": freed, "history": g.history,
        })
    };
    growing.iter().map(one).collect()
}

/// Who frees objects, by the backtrace that allocated them: callers of the functions that free.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct FreedBy {
    callers: FxHashMap<StackId, Vec<(Va, u64)>>,
}

impl FreedBy {
    /// An object that was allocated on `stack` was freed by the code at `caller`. The first few callers of each backtrace
    /// are told apart.
    pub fn note(&mut self, stack: StackId, caller: Va) {
        let callers = self.callers.entry(stack).or_default();
        if let Some((_, times)) = callers.iter_mut().find(|(known, _)| *known == caller) {
            *times += 1;
        } else if callers.len() < MAX_FREERS {
            callers.push((caller, 1));
        }
    }

    /// Callers that freed objects of `stack`, and how many each.
    pub fn of(&self, stack: StackId) -> &[(Va, u64)] {
        self.callers.get(&stack).map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{AllocEvent, Backtrace};
    use proptest::prelude::*;

    #[test]
    fn the_test_has_the_values_of_the_tables() {
        // Kendall's table: S = 10 of n = 5 has the exact probability 0.0083; the normal approximation 0.0137.
        let five = rising(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        assert!((five - 0.9863).abs() < 1e-3, "{five}");
        assert!((normal(1.96) - 0.975).abs() < 1e-4 && (normal(0.0) - 0.5).abs() < 1e-6);
        assert_eq!(rising(&[5.0, 4.0, 3.0, 2.0, 1.0]), None);
        assert_eq!(rising(&[3.0; 9]), None);
        assert_eq!(rising(&[1.0, 2.0, 3.0, 4.0]), None);
    }

    fn listed(counts: &[u32]) -> bool {
        let counts: Vec<f64> = counts.iter().map(|&c| c.into()).collect();
        let times: Vec<f64> = (0..counts.len()).map(|n| n as f64).collect();
        trend(&times, &counts).is_some()
    }

    /// As soon as two counts are equal at the top, that is.
    #[test]
    fn what_has_filled_up_is_not_listed_at_any_scan_after() {
        let ramp =
            |rising: u32, flat: u32| (0..rising + flat).map(move |n| 10 * (n.min(rising) + 1)).collect();
        for (rising, flat) in [(2, 3), (3, 3), (3, 60), (8, 8), (48, 16)] {
            let counts: Vec<u32> = ramp(rising, flat);
            for len in (rising + flat.min(1 + rising / 3) + 1) as usize..=counts.len() {
                assert!(!listed(&counts[..len]), "{:?}", &counts[..len]);
            }
        }
        let fills = [10, 40, 70, 90, 100, 100, 100, 100, 100, 100, 100, 100];
        for len in 6..fills.len() {
            assert!(!listed(&fills[..len]), "{:?}", &fills[..len]);
        }
        let leaks: Vec<u32> = ramp(64, 0);
        for len in MIN_SAMPLES..leaks.len() {
            assert!(listed(&leaks[..len]), "{:?}", &leaks[..len]);
        }
    }

    /// Old counts are further apart than new ones; parts are of the time, not of the counts.
    #[test]
    fn parts_are_of_the_time() {
        assert_eq!(parts(&[0.0, 4.0, 8.0, 12.0, 13.0, 14.0, 15.0, 16.0]), [0..1, 1..2, 2..3, 3..8]);
        assert_eq!(parts(&[0.0, 1.0, 2.0, 99.0, 100.0, 100.0]), [0..3, 3..6]);
        assert_eq!(parts(&[5.0; 6]).first(), Some(&(0..6)));
        assert_eq!(parts(&[]), []);
    }

    #[test]
    fn what_rises_is_listed_and_what_has_settled_or_falls_back_is_not() {
        assert!(listed(&[10, 20, 30, 40, 50]));
        assert!(listed(&[0, 9, 12, 20, 19, 31, 40, 42, 55, 60, 58, 71]));
        // A cache that fills up; a pool; a sawtooth; noise.
        assert!(!listed(&[10, 40, 70, 90, 100, 100, 100, 100, 100, 100, 100, 100]));
        assert!(!listed(&[64; 12]));
        assert!(!listed(&[20, 40, 60, 0, 20, 40, 60, 0, 20, 40, 60, 80]));
        assert!(!listed(&[7, 3, 9, 4, 8, 5, 7, 6, 9, 3, 8, 4]));
    }

    #[test]
    fn one_burst_does_not_move_the_rate() {
        let times: Vec<f64> = (0..9).map(f64::from).collect();
        let mut counts: Vec<f64> = times.iter().map(|t| t * 6.0).collect();
        assert_eq!(slope(&times, &counts), 6.0);
        counts[4] += 1000.0;
        assert_eq!(slope(&times, &counts), 6.0);
        assert_eq!(slope(&[1.0, 1.0], &[2.0, 5.0]), 0.0);
    }

    fn registry(live: u64) -> Registry {
        let mut registry = Registry::default();
        for n in 0..live {
            registry.alloc(&AllocEvent {
                address: Va(0x1000 + 64 * n),
                size: 64,
                kind: Kind::Slab,
                cache: Va(0x77),
                comm: [0; 16],
                pid: 1,
                jiffies: 0,
                stack: Backtrace::Frames(&[Va(0x42)]),
            });
        }
        registry
    }

    #[test]
    fn a_site_and_its_cache_grow_together() {
        let mut history = History::default();
        for n in 0..6 {
            history.note(&registry(10 + 5 * n), &FxHashSet::default(), 250 * 60 * n);
        }
        let names = Names {
            site: &|_| "my_alloc".into(),
            cache: &|va| format!("cache-{:x}", va.0),
            freed: &|_| vec![("my_put".into(), 3)],
        };
        let growing = history.growing(250, &names);
        let found: Vec<&Name> = growing.iter().map(|g| &g.name).collect();
        assert_eq!(found, [&Name::Site("my_alloc".into()), &Name::Cache("cache-77".into())]);
        let site = &growing[0];
        assert_eq!(
            (site.objects, site.bytes, site.objects_per_hour, site.bytes_per_hour),
            (35, 2240, 300.0, 19200.0)
        );
        assert_eq!(site.freed_by, [("my_put".to_owned(), 3)]);
        let text = table(&growing).text();
        assert!(
            text.contains("my_alloc") && text.contains("my_put (3)") && text.contains("cache cache-77"),
            "{text}"
        );
    }

    #[test]
    fn what_nobody_uses_does_not_count() {
        let mut history = History::default();
        for n in 0..6 {
            // Ten in use, and more and more that wait to be freed.
            let waiting = (10..10 + 5 * n).map(|n| Va(0x1000 + 64 * n)).collect();
            history.note(&registry(10 + 5 * n), &waiting, 250 * 60 * n);
        }
        let names = Names { site: &|_| "s".into(), cache: &|_| "c".into(), freed: &|_| vec![] };
        assert_eq!(history.growing(250, &names), []);
    }

    #[test]
    fn the_history_is_bounded_and_reaches_back() {
        let mut history = History::default();
        for n in 0..1000 {
            history.note(&registry(1), &FxHashSet::default(), n);
        }
        assert!(history.len() <= MAX_SAMPLES && history.samples[0].jiffies == 0);
        assert_eq!(history.samples.last().unwrap().jiffies, 999);
    }

    proptest! {
        #[test]
        fn nothing_panics(counts in prop::collection::vec(0..50_u32, 0..70), times in prop::collection::vec(0..9_u64, 70)) {
            let counts: Vec<f64> = counts.into_iter().map(f64::from).collect();
            let times: Vec<f64> = times[..counts.len().min(70)].iter().map(|&t| t as f64).collect();
            let counts = &counts[..times.len()];
            let _ = (rising(counts), trend(&times, counts), slope(&times, counts));
        }
    }
}
