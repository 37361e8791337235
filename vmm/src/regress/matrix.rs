//! Which tests run on which kernel and guest, in which boots; and which of them are this shard's.

use super::suite::{BootMode, Suite};
use std::str::FromStr;

/// Tests that share a boot: indexes into the suite's lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// Kernel.
    pub kernel: usize,
    /// Guest.
    pub guest: usize,
    /// Tests, in the order in which they run.
    pub tests: Vec<usize>,
}

/// One of several machines that share a suite, `I/N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// From 1.
    pub index: u32,
    /// How many there are.
    pub count: u32,
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match parsed {
            Some((index, count)) if (1..=count).contains(&index) => Ok(Self { index, count }),
            _ => Err(format!("expected I/N with I from 1 to N, such as 1/4, not {text:?}")),
        }
    }
}

impl std::fmt::Display for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl Shard {
    /// Whether the test of this id is this shard's: by a hash of the id alone, so that adding a test moves no other.
    fn has(self, id: &str) -> bool {
        crc32fast::hash(id.as_bytes()) % self.count == self.index - 1
    }
}

/// `KERNEL/GUEST/TEST`: what a result is called.
pub fn id(suite: &Suite, kernel: usize, guest: usize, test: usize) -> String {
    format!("{}/{}/{}", suite.kernels[kernel].name, suite.guests[guest].name, suite.tests[test].name)
}

/// Ids of all tests of a suite, in its order.
pub fn ids(suite: &Suite) -> Vec<String> {
    ids_of(suite, &boots(suite, None, &[]))
}

fn ids_of(suite: &Suite, boots: &[Boot]) -> Vec<String> {
    let of_boot = |boot: &Boot| {
        boot.tests.iter().map(|&test| id(suite, boot.kernel, boot.guest, test)).collect::<Vec<_>>()
    };
    boots.iter().flat_map(of_boot).collect()
}

/// The boots of a suite. `only` keeps the tests whose id contains one of these; none keep all.
pub fn boots(suite: &Suite, shard: Option<Shard>, only: &[String]) -> Vec<Boot> {
    let mut boots = Vec::new();
    for kernel in 0..suite.kernels.len() {
        for guest in 0..suite.guests.len() {
            let wanted = |&test: &usize| {
                let row = &suite.tests[test];
                let names = |list: &Option<Vec<String>>, name: &String| {
                    list.as_ref().is_none_or(|l| l.contains(name))
                };
                let id = id(suite, kernel, guest, test);
                names(&row.kernels, &suite.kernels[kernel].name)
                    && names(&row.guests, &suite.guests[guest].name)
                    && shard.is_none_or(|shard| shard.has(&id))
                    && (only.is_empty() || only.iter().any(|only| id.contains(only)))
            };
            let tests: Vec<usize> = (0..suite.tests.len()).filter(wanted).collect();
            match suite.boot {
                BootMode::Shared if tests.is_empty() => {}
                BootMode::Shared => boots.push(Boot { kernel, guest, tests }),
                BootMode::PerTest => {
                    boots.extend(tests.into_iter().map(|test| Boot { kernel, guest, tests: vec![test] }));
                }
            }
        }
    }
    boots
}

#[cfg(test)]
mod tests {
    use super::super::fixture::suite;
    use super::*;

    const SUITE: &str = r#"
        [[kernel]]
        path = "a"
        [[kernel]]
        path = "b"
        [[guest]]
        name = "one"
        [[guest]]
        name = "two"
        cpus = 2
        [[test]]
        name = "everywhere"
        [[test]]
        name = "only-b"
        kernels = ["b"]
        [[test]]
        name = "only-two"
        guests = ["two"]
    "#;

    #[test]
    fn kernels_times_guests_times_tests() {
        let mut suite = suite(SUITE);
        let shared = boots(&suite, None, &[]);
        assert_eq!(
            ids_of(&suite, &shared),
            [
                "a/one/everywhere",
                "a/two/everywhere",
                "a/two/only-two",
                "b/one/everywhere",
                "b/one/only-b",
                "b/two/everywhere",
                "b/two/only-b",
                "b/two/only-two"
            ]
        );
        assert_eq!(shared.len(), 4);
        suite.boot = BootMode::PerTest;
        let single = boots(&suite, None, &[]);
        assert_eq!((single.len(), ids_of(&suite, &single)), (8, ids_of(&suite, &shared)));
        assert_eq!(ids(&suite), ids_of(&suite, &single));
        let only = |texts: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
            ids_of(&suite, &boots(&suite, None, &texts))
        };
        assert_eq!(only(&["b/two/only"]), ["b/two/only-b", "b/two/only-two"]);
        assert_eq!(only(&["only-b", "a/one/", "c/"]), ["a/one/everywhere", "b/one/only-b", "b/two/only-b"]);
        assert!(only(&["c/"]).is_empty());
    }

    #[test]
    fn shards_are_disjoint_and_together_all() {
        let suite = suite(SUITE);
        let all = ids_of(&suite, &boots(&suite, None, &[]));
        for count in [1, 2, 3, 7] {
            let mut together: Vec<String> = (1..=count)
                .flat_map(|index| ids_of(&suite, &boots(&suite, Some(Shard { index, count }), &[])))
                .collect();
            let mut all = all.clone();
            all.sort();
            together.sort();
            assert_eq!(together, all, "{count}");
        }
        let spread = (1..=2).map(|index| boots(&suite, Some(Shard { index, count: 2 }), &[]).len());
        assert!(spread.min() > Some(0), "all tests are one shard's");
    }

    #[test]
    fn shards_are_written_i_of_n() {
        assert_eq!("2/3".parse(), Ok(Shard { index: 2, count: 3 }));
        for wrong in ["", "1", "0/2", "3/2", "1/0", "a/2", "-1/2", "1/2/3"] {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
        }
    }
}
