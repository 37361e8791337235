//! Whether what a test leaked is what it is meant to leak, is known, or is news.

use super::baseline::Baseline;
use super::result::{Group, Outcome, State, TestResult};
use super::suite::Expected;
use introspect::report::plural;

impl Expected {
    /// Whether leaks of this group are meant.
    fn means(&self, group: &Group) -> bool {
        let any = self.functions.is_empty() && self.count.is_some_and(|count| count > 0);
        any || self.functions.iter().any(|function| group.has(function))
    }

    /// How many of these leaks are meant.
    fn made<'a>(&self, groups: impl Iterator<Item = &'a Group>) -> u64 {
        groups.filter(|group| self.means(group)).map(|group| group.count).sum()
    }

    /// What is meant to be among these leaks and is not; None: nothing.
    pub fn missing<'a>(&self, groups: impl Iterator<Item = &'a Group> + Clone) -> Option<String> {
        let made = self.made(groups.clone());
        if let Some(count) = self.count.filter(|&count| made < count) {
            return Some(format!("{made} leak{}, {count} expected", plural(made)));
        }
        let absent = self.functions.iter().find(|f| !groups.clone().any(|group| group.has(f)))?;
        Some(format!("no leak by {absent}, which is expected"))
    }
}

impl TestResult {
    /// Sets the state of each group, and the outcome of a test that ran to its end as it should.
    pub fn judge(&mut self, expected: &Expected, baseline: &Baseline) {
        for group in &mut self.groups {
            group.state = match () {
                () if expected.means(group) => State::Expected,
                () if baseline.has(&group.id) => State::Known,
                () => State::New,
            };
        }
        self.groups.sort_by_key(|group| (group.state, std::cmp::Reverse(group.retained_bytes)));
        let (new, made) = (self.leaks(State::New), self.leaks(State::Expected));
        let (outcome, message) = match (expected.count, expected.missing(self.groups.iter())) {
            _ if new > 0 => (Outcome::Leaked, format!("{new} new leak{}", plural(new))),
            (Some(count), _) if made > count => {
                (Outcome::Leaked, format!("{made} leak{}, {count} expected", plural(made)))
            }
            (_, Some(what)) => (Outcome::Missing, what),
            _ => (Outcome::Passed, String::new()),
        };
        if self.outcome.is_verdict() {
            (self.outcome, self.message) = (outcome, message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{group, results, test};
    use super::*;

    fn judged(groups: Vec<Group>, expected: &Expected, baseline: &Baseline) -> (Outcome, Vec<State>, String) {
        let mut result = test("k/g/t", groups);
        result.judge(expected, baseline);
        (result.outcome, result.groups.iter().map(|group| group.state).collect(), result.message)
    }

    fn expecting(count: Option<u64>, functions: &[&str]) -> Expected {
        Expected { count, functions: functions.iter().map(|&f| f.to_owned()).collect() }
    }

    #[test]
    fn leaks_are_new_known_or_expected() {
        use State::{Expected as Meant, Known, New};
        let none = Baseline::default();
        let mut known = Baseline::default();
        known.update(&results(vec![test("k/g/t", vec![group("b", 2, "b_probe")])]));
        let a = || group("a", 3, "a_probe.constprop.0");
        let b = || group("b", 2, "b_probe");
        let table = [
            (vec![], expecting(None, &[]), &none, Outcome::Passed, vec![]),
            (vec![a()], expecting(None, &[]), &none, Outcome::Leaked, vec![New]),
            (vec![a()], expecting(Some(0), &[]), &none, Outcome::Leaked, vec![New]),
            (vec![b()], expecting(None, &[]), &known, Outcome::Passed, vec![Known]),
            (vec![a(), b()], expecting(None, &[]), &known, Outcome::Leaked, vec![New, Known]),
            (vec![a(), b()], expecting(Some(3), &["a_probe"]), &known, Outcome::Passed, vec![Known, Meant]),
            (vec![a(), b()], expecting(Some(3), &["a_probe"]), &none, Outcome::Leaked, vec![New, Meant]),
            (vec![a(), b()], expecting(Some(5), &[]), &none, Outcome::Passed, vec![Meant, Meant]),
            (vec![a()], expecting(Some(4), &[]), &none, Outcome::Missing, vec![Meant]),
            (vec![a()], expecting(Some(2), &[]), &none, Outcome::Leaked, vec![Meant]),
            (vec![a()], expecting(None, &["a_probe", "b_probe"]), &none, Outcome::Missing, vec![Meant]),
            (vec![a()], expecting(Some(2), &["a_probe", "b_probe"]), &none, Outcome::Leaked, vec![Meant]),
            (vec![], expecting(Some(1), &["a_probe"]), &none, Outcome::Missing, vec![]),
        ];
        for (groups, expected, baseline, outcome, states) in table {
            let (found, marked, message) = judged(groups, &expected, baseline);
            assert_eq!((found, marked), (outcome, states), "{expected:?}: {message}");
            assert_eq!(message.is_empty(), found == Outcome::Passed, "{message}");
        }
    }

    #[test]
    fn what_is_meant_is_missing_whatever_else_leaks() {
        let (a, b) = (group("a", 3, "a_probe"), group("b", 2, "b_probe"));
        let missing = |groups: &[Group], expected: Expected| expected.missing(groups.iter());
        let all = [a.clone(), b];
        assert_eq!(missing(&all, expecting(Some(5), &[])), None);
        assert_eq!(missing(&all, expecting(Some(3), &["a_probe"])), None);
        assert_eq!(
            missing(&all, expecting(Some(4), &["a_probe"])),
            Some("3 leaks, 4 expected".to_owned()),
            "those of others do not count"
        );
        assert_eq!(
            missing(&[a], expecting(None, &["a_probe", "b_probe"])),
            Some("no leak by b_probe, which is expected".to_owned())
        );
        assert_eq!(missing(&[], Expected::default()), None);
    }
}
