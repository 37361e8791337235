//! What a suite came to, `kleak-regress/1`: the model that every form of result is written from, and that `merge` reads.

use super::baseline::{Baseline, Entry};
use crate::cli::ExitCode;
use introspect::accounting::calls;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;

/// Name and version of the JSON form.
pub const SCHEMA: &str = "kleak-regress/1";

/// How a test ended. The worst of what happened, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// As it should.
    Passed,
    /// It leaked what neither it nor the baseline expects.
    Leaked,
    /// It did not leak what it is meant to.
    Missing,
    /// Wrong exit status, or its set-up or a module failed.
    Failed,
    /// It did not end in time and was killed inside the guest.
    TimedOut,
    /// The guest panicked, reset or went off while it ran.
    Crashed,
    /// The guest did not answer any more.
    Hung,
    /// The guest did not come up, or died before the test's turn.
    NotBooted,
    /// The process with the guest was killed, or the detector did not answer.
    Worker,
    /// This host cannot run the guest, says the process that was to.
    Host,
    /// The detector missed some of what was allocated and freed.
    Untracked,
    /// The detector no longer worked: its canary was not found.
    Canary,
    /// The run was ended before.
    Interrupted,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Passed,
        Self::Leaked,
        Self::Missing,
        Self::Failed,
        Self::TimedOut,
        Self::Crashed,
        Self::Hung,
        Self::NotBooted,
        Self::Worker,
        Self::Host,
        Self::Untracked,
        Self::Canary,
        Self::Interrupted,
    ];

    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Leaked => "leaked",
            Self::Missing => "missing",
            Self::Failed => "failed",
            Self::TimedOut => "timed-out",
            Self::Crashed => "crashed",
            Self::Hung => "hung",
            Self::NotBooted => "not-booted",
            Self::Worker => "worker",
            Self::Host => "host",
            Self::Untracked => "untracked",
            Self::Canary => "canary",
            Self::Interrupted => "interrupted",
        }
    }

    /// Whether the leaks are the news, and not that the test could not be made.
    pub fn is_verdict(self) -> bool {
        self <= Self::Missing
    }
}

/// Whether a leak is news.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It is.
    New,
    /// It is in the baseline.
    Known,
    /// The test is meant to make it.
    Expected,
}

/// One function of a backtrace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// Its name; None for an address without.
    pub symbol: Option<String>,
    /// Its module; None for the kernel.
    pub module: Option<String>,
}

impl Frame {
    /// `name [module]`.
    pub fn text(&self) -> String {
        let symbol = self.symbol.as_deref().unwrap_or("?");
        self.module.as_ref().map_or_else(|| symbol.to_owned(), |module| format!("{symbol} [{module}]"))
    }
}

/// Leaks with the same backtrace, made by one test; fields as in `kleak-report/1`, `state` added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// The same over reboots, KASLR and rebuilds.
    pub id: String,
    /// Number of leaks.
    pub count: u64,
    /// How many of them are direct.
    pub direct: u64,
    /// Bytes.
    pub bytes: u64,
    /// Bytes that its direct leaks keep.
    pub retained_bytes: u64,
    /// Kind of memory.
    pub kind: String,
    /// Slab cache.
    pub cache: Option<String>,
    /// Innermost function first.
    pub backtrace: Vec<Frame>,
    /// Whether it is news.
    #[serde(default = "new")]
    pub state: State,
}

fn new() -> State {
    State::New
}

impl Group {
    /// The innermost function that is no allocator's: what a reader calls the leak by.
    pub fn site(&self) -> String {
        let is_none = |frame: &&Frame| !frame.symbol.as_deref().is_some_and(calls::is_allocator);
        self.backtrace
            .iter()
            .find(is_none)
            .or(self.backtrace.first())
            .map_or_else(|| "?".to_owned(), Frame::text)
    }

    /// Whether this function is in the backtrace, whatever the compiler has put behind its name.
    pub fn has(&self, function: &str) -> bool {
        let plain = |symbol: &str| symbol.split('.').next() == Some(function);
        self.backtrace.iter().filter_map(|frame| frame.symbol.as_deref()).any(plain)
    }
}

/// The result of one test on one kernel and guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestResult {
    /// `KERNEL/GUEST/TEST`.
    pub id: String,
    /// Kernel's name in the suite.
    pub kernel: String,
    /// What the kernel calls itself, `uname -r`; None where its file does not say.
    #[serde(default)]
    pub release: Option<String>,
    /// Guest's name in the suite.
    pub guest: String,
    /// Its own name.
    pub test: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, in one line; empty where there is nothing to say.
    pub message: String,
    /// Exit status of its command, where it ended.
    pub status: Option<i32>,
    /// Wall-clock time on the host, milliseconds, settling and scan included.
    pub millis: u64,
    /// What it leaked, by backtrace.
    pub groups: Vec<Group>,
    /// End of what the guest's console said meanwhile; empty for a test that passed.
    pub console: Vec<String>,
    /// What was live when it had settled; None for one that did not get there.
    #[serde(default)]
    pub heap: Option<Heap>,
}

/// Everything allocated and not freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heap {
    /// Number of objects.
    pub objects: u64,
    /// Bytes.
    pub bytes: u64,
}

/// In results, of a kernel whose release is not known.
pub const UNKNOWN_RELEASE: &str = "release unknown";

impl TestResult {
    /// The kernel's release as it is shown.
    pub fn release_text(&self) -> &str {
        self.release.as_deref().unwrap_or(UNKNOWN_RELEASE)
    }

    /// Number of leaks in these states.
    pub fn leaks(&self, state: State) -> u64 {
        self.groups.iter().filter(|group| group.state == state).map(|group| group.count).sum()
    }
}

/// One boot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BootResult {
    /// Kernel's name in the suite.
    pub kernel: String,
    /// Guest's name in the suite.
    pub guest: String,
    /// Wall-clock time, milliseconds.
    pub millis: u64,
    /// What became of the canary: `found`, or why not; None where the guest did not live to be asked.
    pub canary: Option<String>,
    /// Leaks of the boot itself that no test asked for: a test without `run` would have had them.
    pub unasked_leaks: u64,
    /// What kept growing from test to test, although all of it is referenced; the fastest first.
    #[serde(default)]
    pub growth: Vec<Growth>,
}

/// A site or slab cache that keeps growing, as the console's `growth` has it; what is left out here is there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Growth {
    /// `site` or `cache`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Bytes an hour.
    pub bytes_per_hour: f64,
    /// Live objects at each scan.
    pub history: Vec<u64>,
}

/// A leak of the baseline that is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fixed {
    /// Group.
    pub id: String,
    /// What the baseline calls it.
    pub site: String,
    /// Ids of the tests that made it.
    pub tests: BTreeSet<String>,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`].
    pub schema: String,
    /// Name of the suite.
    pub suite: String,
    /// Its file, as it was given; relative where it is below the working folder.
    pub file: String,
    /// Whether all tests have their result; one that was interrupted has none.
    pub complete: bool,
    /// The shard, `I/N`.
    pub shard: Option<String>,
    /// When it began, seconds since 1970 UTC.
    pub started: u64,
    /// How long it took, milliseconds.
    pub millis: u64,
    /// One for each test on each kernel and guest, in the suite's order.
    pub tests: Vec<TestResult>,
    /// In the order in which they ended.
    pub boots: Vec<BootResult>,
    /// Leaks of the baseline whose tests all ran and did not make them any more.
    pub fixed: Vec<Fixed>,
    /// Ids of all tests of the suite in its order, whichever part of them was to run.
    #[serde(default)]
    pub order: Vec<String>,
    /// The baseline that leaks were known by.
    #[serde(default)]
    pub baseline: Baseline,
}

impl Results {
    /// Of a suite of this name and file, before the first test.
    pub fn new(suite: &str, file: &Path, shard: Option<String>) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            schema: SCHEMA.to_owned(),
            suite: suite.to_owned(),
            file: file.to_string_lossy().into_owned(),
            complete: false,
            shard,
            started: now.map_or(0, |now| now.as_secs()),
            millis: 0,
            tests: Vec::new(),
            boots: Vec::new(),
            fixed: Vec::new(),
            order: Vec::new(),
            baseline: Baseline::default(),
        }
    }

    /// How many tests ended so.
    pub fn count(&self, outcome: Outcome) -> usize {
        self.tests.iter().filter(|test| test.outcome == outcome).count()
    }

    /// Number of leaks in this state, over all tests.
    pub fn leaks(&self, state: State) -> u64 {
        self.tests.iter().map(|test| test.leaks(state)).sum()
    }

    /// Whether some boot's canary was looked for and not found.
    pub fn canary_lost(&self) -> bool {
        self.boots.iter().any(|boot| boot.canary.as_deref().is_some_and(|canary| canary != FOUND))
    }

    /// Whether there are leaks that neither their tests nor the baseline expect.
    pub fn leaked(&self) -> bool {
        self.count(Outcome::Leaked) > 0 || self.leaks(State::New) > 0
    }

    /// Puts the tests into the suite's order.
    pub fn sort(&mut self) {
        let place: HashMap<&str, usize> = self.order.iter().map(String::as_str).zip(0..).collect();
        // Results of a suite that was changed meanwhile may have others, at the end.
        self.tests.sort_by_key(|test| place.get(test.id.as_str()).copied().unwrap_or(usize::MAX));
    }

    /// Says which leaks of the baseline are gone.
    pub fn compare(&mut self) {
        let seen: BTreeSet<&str> =
            self.tests.iter().flat_map(|test| &test.groups).map(|group| group.id.as_str()).collect();
        let ran: BTreeMap<&str, bool> =
            self.tests.iter().map(|test| (test.id.as_str(), test.outcome.is_verdict())).collect();
        let gone = self.baseline.entries.iter().filter(|entry| {
            let all_ran = entry.tests.iter().all(|id| ran.get(id.as_str()) == Some(&true));
            all_ran && !entry.tests.is_empty() && !seen.contains(entry.id.as_str())
        });
        let fixed = |entry: &Entry| Fixed {
            id: entry.id.clone(),
            site: entry.site.clone(),
            tests: entry.tests.clone(),
        };
        self.fixed = gone.map(fixed).collect();
    }

    /// The exit code of the contract. A lost canary comes first, as nothing else can be believed then; leaks go before
    /// tests that could not be made, as `run --fail-on-leak` has it, and a test that failed may well leak on its way out.
    /// A host that could run none of them cannot.
    pub fn exit_code(&self) -> ExitCode {
        match () {
            () if self.canary_lost() => ExitCode::Guest,
            () if self.leaked() || self.count(Outcome::Missing) > 0 => ExitCode::Leaks,
            () if !self.tests.is_empty() && self.count(Outcome::Host) == self.tests.len() => ExitCode::Host,
            () if !self.complete || self.tests.iter().any(|test| test.outcome != Outcome::Passed) => {
                ExitCode::Guest
            }
            () => ExitCode::Success,
        }
    }

    /// The exit code for `git bisect run`. Any other code below 128 would mean that the kernel is bad, and one that
    /// does not leak what a test is meant to is not.
    pub fn bisect_exit_code(&self) -> ExitCode {
        match self.exit_code() {
            ExitCode::Success => ExitCode::Success,
            ExitCode::Leaks if self.leaked() => ExitCode::Leaks,
            _ => ExitCode::Untested,
        }
    }

    /// Moves the results of another shard in.
    pub fn join(&mut self, other: Self) {
        self.complete &= other.complete;
        self.started = self.started.min(other.started);
        self.millis = self.millis.max(other.millis);
        self.tests.extend(other.tests);
        self.boots.extend(other.boots);
        self.shard = None;
        let known: HashSet<String> = self.order.iter().cloned().collect();
        self.order.extend(other.order.into_iter().filter(|id| !known.contains(id)));
        self.baseline.join(other.baseline);
        self.sort();
    }
}

/// [`BootResult::canary`] of a detector that works.
pub const FOUND: &str = "found";

#[cfg(test)]
mod tests {
    use super::super::fixture::{group, results, test};
    use super::*;

    #[test]
    fn exit_codes_are_the_contracts() {
        let of = |outcomes: &[Outcome]| {
            let with = |outcome| TestResult { outcome, ..test("k/g/t", Vec::new()) };
            results(outcomes.iter().map(|&outcome| with(outcome)).collect())
        };
        use Outcome::{Crashed, Interrupted, Leaked, Missing, Passed};
        assert_eq!(of(&[Passed, Passed]).exit_code(), ExitCode::Success);
        assert_eq!(of(&[Passed, Leaked, Crashed]).exit_code(), ExitCode::Leaks);
        assert_eq!(of(&[Missing]).exit_code(), ExitCode::Leaks);
        assert_eq!(of(&[Passed, Crashed]).exit_code(), ExitCode::Guest);
        assert_eq!(of(&[Interrupted]).exit_code(), ExitCode::Guest);
        assert_eq!(of(&[Outcome::Host, Outcome::Host]).exit_code(), ExitCode::Host);
        assert_eq!(of(&[Outcome::Host, Passed]).exit_code(), ExitCode::Guest);
        assert_eq!(of(&[Outcome::Worker, Outcome::Worker]).exit_code(), ExitCode::Guest);
        let mut leaky =
            TestResult { outcome: Outcome::Failed, ..test("k/g/t", vec![group("a", 1, "a_probe")]) };
        assert_eq!(results(vec![leaky.clone()]).exit_code(), ExitCode::Leaks);
        leaky.groups[0].state = State::Known;
        assert_eq!(results(vec![leaky]).exit_code(), ExitCode::Guest);
        let mut partial = of(&[Passed]);
        partial.complete = false;
        assert_eq!(partial.exit_code(), ExitCode::Guest);
        let mut dead = of(&[Leaked]);
        let boot = |canary: Option<&str>| BootResult {
            kernel: "k".into(),
            guest: "g".into(),
            millis: 1,
            canary: canary.map(str::to_owned),
            unasked_leaks: 0,
            growth: Vec::new(),
        };
        dead.boots = vec![boot(Some(FOUND)), boot(None)];
        assert_eq!(dead.exit_code(), ExitCode::Leaks);
        dead.boots.push(boot(Some("not traced")));
        assert_eq!(dead.exit_code(), ExitCode::Guest);
    }

    #[test]
    fn a_leak_is_fixed_when_all_its_tests_ran_without_it() {
        let leaky = |id: &str| test(id, vec![group("b", 2, "b_probe")]);
        let clean = |id: &str| test(id, Vec::new());
        let mut known = Baseline::default();
        known.update(&results(vec![leaky("k/g/1"), leaky("k/g/2")]));
        let fixed = |tests: Vec<TestResult>| {
            let mut results = Results { baseline: known.clone(), ..results(tests) };
            results.compare();
            results.fixed.len()
        };
        assert_eq!(fixed(vec![clean("k/g/1"), clean("k/g/2")]), 1);
        assert_eq!(fixed(vec![clean("k/g/1"), leaky("k/g/2")]), 0);
        assert_eq!(fixed(vec![clean("k/g/1")]), 0, "the other test may be another shard's");
        let crashed = TestResult { outcome: Outcome::Crashed, ..clean("k/g/2") };
        assert_eq!(fixed(vec![clean("k/g/1"), crashed]), 0);
    }

    #[test]
    fn what_shards_had_in_common_is_there_once_and_in_order() {
        let order = ["j/g/1", "j/g/2", "k/g/1", "k/g/2"].map(str::to_owned).to_vec();
        let shard = |ids: [&str; 2], known: &str| {
            let mut baseline = Baseline::default();
            for id in ids {
                baseline
                    .update(&results(vec![test(id, vec![group(known, 1, known), group("c", 1, "c_probe")])]));
            }
            let tests = ids.map(|id| test(id, Vec::new())).to_vec();
            Results { order: order.clone(), baseline, ..results(tests) }
        };
        let mut all = shard(["j/g/2", "k/g/1"], "a");
        all.join(shard(["j/g/1", "k/g/2"], "b"));
        assert_eq!(
            all.tests.iter().map(|test| &test.id).collect::<Vec<_>>(),
            order.iter().collect::<Vec<_>>()
        );
        assert_eq!(all.order, order);
        let known: Vec<_> = all.baseline.entries.iter().map(|e| (e.id.as_str(), e.tests.len())).collect();
        assert_eq!(known, [("a", 2), ("b", 2), ("c", 4)]);
        all.compare();
        assert_eq!(all.fixed.len(), 3);
        let mut changed = shard(["j/g/2", "k/g/2"], "a");
        changed.join(Results { order: vec!["k/g/3".into()], ..results(vec![test("k/g/3", Vec::new())]) });
        changed.join(results(vec![test("j/g/1", Vec::new())]));
        let ids: Vec<_> = changed.tests.iter().map(|test| test.id.as_str()).collect();
        assert_eq!(ids, ["j/g/1", "j/g/2", "k/g/2", "k/g/3"]);
    }

    #[test]
    fn to_bisect_only_leaks_are_bad() {
        let of = |outcome: Outcome, groups: Vec<Group>| {
            results(vec![TestResult { outcome, ..test("k/g/t", groups) }]).bisect_exit_code()
        };
        let leak = |state| vec![Group { state, ..group("a", 1, "a_probe") }];
        assert_eq!(of(Outcome::Passed, leak(State::Known)), ExitCode::Success);
        assert_eq!(of(Outcome::Leaked, leak(State::New)), ExitCode::Leaks);
        assert_eq!(of(Outcome::Leaked, leak(State::Expected)), ExitCode::Leaks, "more than are meant");
        assert_eq!(of(Outcome::Failed, leak(State::New)), ExitCode::Leaks);
        assert_eq!(of(Outcome::Missing, leak(State::Expected)), ExitCode::Untested);
        assert_eq!(of(Outcome::Crashed, Vec::new()), ExitCode::Untested);
        assert_eq!(of(Outcome::Host, Vec::new()), ExitCode::Untested);
    }

    #[test]
    fn a_leak_is_called_by_who_asked_for_it() {
        let mut group = group("a", 1, "my_open");
        for (at, name) in ["__kmalloc_node_track_caller", "kstrdup"].into_iter().enumerate() {
            group.backtrace.insert(at, Frame { symbol: Some(name.into()), module: None });
        }
        group.backtrace[2].module = Some("my".into());
        assert_eq!(group.site(), "my_open [my]");
        group.backtrace.truncate(1);
        assert_eq!(group.site(), "__kmalloc_node_track_caller");
        for allocators in [["kvasprintf", "kasprintf"], ["pcpu_alloc_noprof", "__alloc_percpu_gfp"]] {
            group.backtrace = allocators
                .into_iter()
                .chain(["my_probe"])
                .map(|name| Frame { symbol: Some(name.into()), module: None })
                .collect();
            assert_eq!(group.site(), "my_probe", "as the console's top sites has it");
        }
        group.backtrace.clear();
        assert_eq!(group.site(), "?");
    }

    #[test]
    fn json_is_read_as_it_was_written() {
        let all = results(vec![test("k/g/t", vec![group("a", 3, "a_probe")])]);
        let text = serde_json::to_string(&all).unwrap();
        assert_eq!(serde_json::from_str::<Results>(&text).unwrap(), all);
        for outcome in Outcome::ALL {
            assert_eq!(serde_json::to_value(outcome).unwrap(), outcome.name());
        }
    }
}
