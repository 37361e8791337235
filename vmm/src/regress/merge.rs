//! `kleak-vmm regress merge`: the results of shards as those of one run.

use super::matrix::Shard;
use super::result::{self, Results};
use crate::cli::Failure;
use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Missing shards that are named.
const NAMED: usize = 8;

/// Joins the results in these files. They are incomplete where a shard is missing, and the user is told which.
///
/// # Errors
/// Exit code 2: a file is not there or has no results; two are of different suites, or have a result of the same test.
pub fn join(files: &[PathBuf]) -> Result<Results> {
    let mut joined: Option<Results> = None;
    let mut shards: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    for path in files {
        let (results, shard) = read(path)?;
        if let Some(shard) = shard {
            shards.entry(shard.count).or_default().insert(shard.index);
        }
        match &mut joined {
            None => joined = Some(Results { shard: None, ..results }),
            Some(known) => {
                check(known, &results, path)?;
                known.join(results);
            }
        }
    }
    let mut results = joined.ok_or_else(|| Failure::usage("No results to merge"))?;
    if let Some(missing) = missing(&shards) {
        eprintln!("kleak-vmm: warning: The results are incomplete, without those of {missing}");
        results.complete = false;
    }
    Ok(results)
}

fn read(path: &Path) -> Result<(Results, Option<Shard>)> {
    let failure = || {
        Failure::usage(format!("Cannot read results {}", path.display()))
            .hint("regress --report FILE.json writes them")
    };
    let text = fs::read_to_string(path).with_context(failure)?;
    let results: Results = serde_json::from_str(&text).with_context(failure)?;
    if results.schema != result::SCHEMA {
        return Err(anyhow::anyhow!("Its schema is {:?}", results.schema).context(failure()));
    }
    let shard = results.shard.as_deref().map(str::parse::<Shard>).transpose();
    let shard = shard.map_err(|what| anyhow::anyhow!("Its shard: {what}").context(failure()))?;
    Ok((results, shard))
}

/// Whether `more`, of the file `path`, can be of the same run.
fn check(known: &Results, more: &Results, path: &Path) -> Result<()> {
    if more.suite != known.suite {
        let what = format!(
            "{} is of suite {:?}, and a file before it of {:?}",
            path.display(),
            more.suite,
            known.suite
        );
        return Err(Failure::usage(what).hint("merge joins the shards of one suite").into());
    }
    let twice = more.tests.iter().find(|test| known.tests.iter().any(|other| other.id == test.id));
    if let Some(test) = twice {
        let what = format!("{} has a result of {}, as a file before it", path.display(), test.id);
        return Err(Failure::usage(what).hint("give the results of each shard once").into());
    }
    Ok(())
}

/// Names the shards that are missing; the indexes that are there, by the number of shards. Where that differs, tests were
/// left out unless each number is complete for itself.
fn missing(shards: &BTreeMap<u32, BTreeSet<u32>>) -> Option<String> {
    let missing = |(&count, there): (&u32, &BTreeSet<u32>)| {
        let there = there.clone();
        (1..=count).filter(move |index| !there.contains(index)).map(move |index| Shard { index, count })
    };
    let mut missing = shards.iter().flat_map(missing).map(|shard| shard.to_string());
    let named: Vec<String> = missing.by_ref().take(NAMED).collect();
    let more = if missing.next().is_some() { " and more" } else { "" };
    (!named.is_empty()).then(|| format!("shard {}{more}", named.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing_of(shards: &[(u32, u32)]) -> Option<String> {
        let mut by_count: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for &(index, count) in shards {
            by_count.entry(count).or_default().insert(index);
        }
        missing(&by_count)
    }

    #[test]
    fn missing_shards_are_named() {
        let table = [
            (vec![], None),
            (vec![(1, 1)], None),
            (vec![(2, 2), (1, 2)], None),
            (vec![(1, 2)], Some("shard 2/2")),
            (vec![(2, 4), (4, 4)], Some("shard 1/4, 3/4")),
            (vec![(1, 2), (2, 3)], Some("shard 2/2, 1/3, 3/3")),
        ];
        for (shards, expected) in table {
            assert_eq!(missing_of(&shards).as_deref(), expected, "{shards:?}");
        }
        let many = missing_of(&[(1, u32::MAX)]).unwrap();
        assert!(many.starts_with("shard 2/4294967295, 3/") && many.ends_with(" and more"), "{many}");
    }
}
