//! The console's accounting: the guest's memory by cache, by site, by zone, read at a pause.

use super::Detector;
use super::reporting::resolve;
use crate::console::{Account, Answer, TopBy, When};
use crate::machine::FrozenRam;
use anyhow::{Context, Result, bail};
use introspect::accounting::calls::{self, Calls};
use introspect::accounting::{Table, areas, counters, slabs, zones};
use introspect::memory::Va;
use rustc_hash::FxHashMap;
use serde_json::{Value, json};
use std::sync::PoisonError;

/// Rows that `top` shows.
const TOP: usize = 30;

/// What a command shows: tables with their names in JSON, the same ones each time.
type Tables = Vec<(&'static str, Table)>;

/// What `mark` remembered.
pub(super) type Mark = FxHashMap<Account, Tables>;

impl Detector {
    pub(super) fn top_now(&self, by: TopBy) -> Result<Answer> {
        let _work = self.work();
        let (word, mut table) = match by {
            TopBy::Sites => ("sites", calls::sites(&self.calls(None)?)),
            TopBy::Caches => {
                let caches = self.parts.linux.caches(self.ram());
                let caches = caches.context("Cannot read the guest's list of slab caches")?;
                let names: FxHashMap<Va, String> = caches.into_iter().map(|c| (c.va, c.name)).collect();
                let name = |va: Va| names.get(&va).cloned().unwrap_or_else(|| format!("cache at {va}"));
                ("caches", calls::caches(&self.parts.recorder.state().registry, name))
            }
        };
        table.truncate(TOP);
        Ok(Answer { text: table.text(), json: json!({ word: table.json(), "omitted": table.omitted }) })
    }

    pub(super) fn alloc_calls_of(&self, name: &str) -> Result<Answer> {
        let _work = self.work();
        let caches = self.parts.linux.caches(self.ram());
        let caches = caches.context("Cannot read the guest's list of slab caches")?;
        let Some(cache) = caches.iter().find(|cache| cache.name == name) else {
            bail!("The guest has no slab cache of this name; slabinfo lists them");
        };
        let calls = self.calls(Some(cache.va))?;
        Ok(Answer { text: calls::text(&calls), json: json!({ "cache": name, "alloc_calls": calls }) })
    }

    fn calls(&self, cache: Option<Va>) -> Result<Vec<Calls>> {
        let now = self.parts.linux.jiffies(self.ram()).context("Cannot read the guest's clock")?;
        let modules = self.parts.recorder.modules.read().unwrap_or_else(PoisonError::into_inner);
        let symbolize = |va, at| resolve(&self.parts.linux, &modules, va, at);
        let state = self.parts.recorder.state();
        Ok(calls::by_backtrace(&state.registry, cache, now, &symbolize))
    }

    pub(super) fn account(&self, account: Account, when: When) -> Result<Answer> {
        let work = self.work();
        let name = account.name();
        let before = match (when, &work.mark) {
            (When::Now, _) => None,
            (When::SinceMark, None) => bail!("Nothing to compare with: mark remembers the present for diff"),
            (When::SinceMark, Some(mark)) => Some(
                mark.get(&account).with_context(|| format!("{name} could not be read at the last mark"))?,
            ),
        };
        let paused = self.parts.machine.pause()?;
        let mut tables = self.tables(account, &paused.memory())?;
        drop(paused);
        for ((_, table), (_, before)) in tables.iter_mut().zip(before.into_iter().flatten()) {
            *table = table.since(before);
        }
        let texts: Vec<String> = tables.iter().map(|(_, table)| table.text()).collect();
        let members = tables.iter().map(|(name, table)| ((*name).to_owned(), table.json()));
        Ok(Answer { text: texts.join("\n"), json: Value::Object(members.collect()) })
    }

    /// Remembers what this kernel has of the accounting.
    pub(super) fn mark_now(&self) -> Result<()> {
        let mut work = self.work();
        let paused = self.parts.machine.pause()?;
        let memory = &paused.memory();
        let mut mark = Mark::default();
        let mut reason = None;
        for &account in Account::ALL {
            match self.tables(account, memory) {
                Ok(tables) => {
                    mark.insert(account, tables);
                }
                Err(error) => reason = Some(error),
            }
        }
        match reason {
            Some(error) if mark.is_empty() => Err(error),
            _ => {
                work.mark = Some(mark);
                Ok(())
            }
        }
    }

    fn tables(&self, account: Account, memory: &FrozenRam<'_>) -> Result<Tables> {
        let linux = &self.parts.linux;
        let counters = || linux.counters(memory).context("Cannot read the guest's counters");
        let table = match account {
            Account::Slabinfo => {
                let map = linux.slab_map(memory).context("Cannot read the guest's slab metadata")?;
                slabs::table(&map)
            }
            Account::Vmallocinfo => {
                let areas = linux.vmalloc_info(memory).context("Cannot read the guest's vmalloc areas")?;
                areas::table(&areas, &|va| self.name(va))
            }
            Account::Meminfo => {
                let totals = linux.totals(memory).context("Cannot read the guest's amounts of memory")?;
                counters::meminfo(&counters()?, &totals)
            }
            Account::Vmstat => counters::vmstat(&counters()?),
            Account::Buddyinfo => {
                let zones = linux.memory_zones(memory).context("Cannot read the guest's memory zones")?;
                let by_type = ("pagetypeinfo", zones::blocks_by_type(&zones));
                return Ok(vec![(account.name(), zones::blocks(&zones)), by_type]);
            }
        };
        Ok(vec![(account.name(), table)])
    }
}
