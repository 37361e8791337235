//! The console's accounting: the guest's memory by cache, by site, by zone, read at a pause.

use super::Detector;
use super::reporting::resolve;
use crate::console::{Account, Answer, TopBy, When};
use crate::machine::FrozenRam;
use anyhow::{Context, Result, bail};
use introspect::accounting::calls::{self, Calls};
use introspect::accounting::{Table, slabs};
use introspect::memory::Va;
use rustc_hash::FxHashMap;
use serde_json::{Map, Value, json};
use std::sync::PoisonError;

/// Rows that `top` shows.
const TOP: usize = 30;

/// What `mark` remembered: a table for each part of the accounting.
pub(super) type Mark = FxHashMap<Account, Table>;

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
        if when == When::SinceMark && work.mark.is_none() {
            bail!("Nothing to compare with: mark remembers the present for diff");
        }
        let paused = self.parts.machine.pause()?;
        let mut table = self.table(account, &paused.memory())?;
        drop(paused);
        if when == When::SinceMark
            && let Some(before) = work.mark.as_ref().and_then(|mark| mark.get(&account))
        {
            table = table.since(before);
        }
        let mut members = Map::new();
        members.insert(account.name().to_owned(), table.json());
        Ok(Answer { text: table.text(), json: Value::Object(members) })
    }

    pub(super) fn mark_now(&self) -> Result<()> {
        let mut work = self.work();
        let paused = self.parts.machine.pause()?;
        let memory = &paused.memory();
        let tables = Account::ALL.iter().map(|&account| Ok((account, self.table(account, memory)?)));
        work.mark = Some(tables.collect::<Result<Mark>>()?);
        Ok(())
    }

    fn table(&self, account: Account, memory: &FrozenRam<'_>) -> Result<Table> {
        let linux = &self.parts.linux;
        match account {
            Account::Slabinfo => {
                let map = linux.slab_map(memory).context("Cannot read the guest's slab metadata")?;
                Ok(slabs::table(&map))
            }
        }
    }
}
