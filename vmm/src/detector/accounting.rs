//! The console's accounting: the guest's memory by cache, by site, by zone, read at a pause.

use super::readings::Readings;
use super::{Detector, Parts, Work};
use crate::console::{Account, Answer, TopBy, When};
use anyhow::{Context, Result, bail};
use introspect::accounting::calls::{self, Calls};
use introspect::accounting::slabs::DamagedCache;
use introspect::accounting::{Table, areas, counters, growth, kmem, slabs, zones};
use introspect::linux::slab::{self, Cache};
use introspect::memory::Va;
use introspect::registry::{Object, StackId};
use introspect::scan::retained;
use rustc_hash::FxHashMap;
use serde_json::{Map, Value, json};
use std::rc::Rc;
use std::sync::PoisonError;

/// Rows that `top` shows.
const TOP: usize = 30;

/// What a command shows: tables with their names in JSON, the same ones each time.
type Tables = Vec<(&'static str, Table)>;

/// What `mark` remembered.
pub(super) type Mark = FxHashMap<Account, Tables>;

impl Detector {
    /// All rows as JSON; who reads it may want another order than that of bytes.
    pub(super) fn top_now(&self, by: TopBy) -> Result<Answer> {
        let (word, mut table) = self.top_table(by)?;
        let json = json!({ word: table.json() });
        table.truncate(TOP);
        Ok(Answer { text: table.text(), json })
    }

    fn top_table(&self, by: TopBy) -> Result<(&'static str, Table)> {
        let _work = self.work();
        Ok(match by {
            TopBy::Sites => ("sites", calls::sites(&self.calls(None)?)),
            TopBy::Caches => {
                let caches = self.caches()?;
                let names: FxHashMap<Va, String> = caches.into_iter().map(|c| (c.va, c.name)).collect();
                let name = |va: Va| names.get(&va).cloned().unwrap_or_else(|| format!("cache at {va}"));
                ("caches", calls::caches(&self.parts.recorder.state().registry, name))
            }
        })
    }

    pub(super) fn alloc_calls_of(&self, name: &str) -> Result<Answer> {
        let _work = self.work();
        let caches = self.caches()?;
        let cache = slab::named(&caches, name)?;
        let calls = self.calls(Some(cache.va))?;
        Ok(Answer { text: calls::text(&calls), json: json!({ "cache": name, "alloc_calls": calls }) })
    }

    fn calls(&self, cache: Option<Va>) -> Result<Vec<Calls>> {
        let now = self.parts.linux.jiffies(self.ram()).context("Cannot read the guest's clock")?;
        let modules = self.parts.recorder.modules.read().unwrap_or_else(PoisonError::into_inner);
        let symbolize = |va, at| self.parts.linux.resolve(&modules, va, at);
        // Names take their time, and a CPU that allocates waits for the registry.
        let groups = calls::by_backtrace(&self.parts.recorder.state().registry, cache, now);
        Ok(calls::named(groups, &symbolize))
    }

    /// The guest's slab caches, read at a pause: the list changes when modules come and go.
    fn caches(&self) -> Result<Vec<Cache>> {
        let paused = self.parts.guest.pause()?;
        self.parts.linux.caches(&paused.memory()).context("Cannot read the guest's list of slab caches")
    }

    /// Who holds the guest's memory: the largest sites and caches, the sites that keep most of it alive, and what grows.
    pub fn holders(&self) -> Result<Answer> {
        let (mut text, mut members) = (String::new(), Map::new());
        let tables = [
            self.top_table(TopBy::Sites),
            self.top_table(TopBy::Caches),
            self.retained_table().map(|table| ("retained", table)),
        ];
        for table in tables {
            match table {
                Ok((word, mut table)) => {
                    table.truncate(TOP);
                    text.push_str(&format!("{}\n", table.text()));
                    members.insert(word.to_owned(), table.json());
                }
                // The others say enough.
                Err(error) => text.push_str(&format!("error: {error:#}\n\n")),
            }
        }
        // Too few scans to tell are no news.
        if let Ok(growth) = self.growth_now() {
            text.push_str(&growth.text);
            members.insert("growth".into(), growth.json["growth"].clone());
        }
        Ok(Answer { text, json: Value::Object(members) })
    }

    /// Sites by the bytes that would be out of reach without their objects.
    fn retained_table(&self) -> Result<Table> {
        self.look(|input| {
            let symbolize = |va, at| input.linux.resolve(input.modules, va, at);
            let mut sites: FxHashMap<StackId, Rc<str>> = FxHashMap::default();
            let site = |object: &Object| {
                let named = sites.entry(object.stack).or_insert_with(|| {
                    let frames = input.registry.stacks.get(object.stack);
                    calls::site(frames, object.sequence, &symbolize).into()
                });
                Rc::clone(named)
            };
            let found = retained(input, site).context("Cannot look at all references")?;
            Ok(calls::retained(found.iter().map(|(site, retained)| (&**site, *retained))))
        })
    }

    pub(super) fn growth_now(&self) -> Result<Answer> {
        let work = self.work();
        let scans = work.history.len();
        if scans < growth::MIN_SAMPLES {
            let least = growth::MIN_SAMPLES;
            bail!(
                "growth compares {least} scans at least, and there were {scans}; scan=SECS makes them by themselves"
            );
        }
        let caches = self.caches()?;
        let cache_names: FxHashMap<Va, String> = caches.into_iter().map(|c| (c.va, c.name)).collect();
        let Parts { linux, recorder, .. } = &self.parts;
        let modules = recorder.modules.read().unwrap_or_else(PoisonError::into_inner);
        let symbolize = |va, at| linux.resolve(&modules, va, at);
        let function = |va| symbolize(va, u64::MAX).map_or_else(|| va.to_string(), |at| at.name.to_owned());
        let names = growth::Names {
            site: &|stack| {
                let frames = recorder.state().registry.stacks.get(stack).to_vec();
                calls::site(&frames, u64::MAX, &symbolize)
            },
            cache: &|va| cache_names.get(&va).cloned().unwrap_or_else(|| format!("cache at {va}")),
            freed: &|stack| {
                let callers = recorder.state().freed_by.of(stack).to_vec();
                callers.into_iter().map(|(caller, times)| (function(caller), times)).collect()
            },
        };
        let growing = work.history.growing(linux.hz(), &names);
        let text = match growing.is_empty() {
            true => format!("nothing grows: {scans} scans compared\n"),
            false => growth::table(&growing).text(),
        };
        Ok(Answer { text, json: json!({ "growth": growth::json(&growing), "scans": scans }) })
    }

    pub(super) fn account(&self, account: Account, when: When) -> Result<Answer> {
        let work = self.work();
        let paused = self.parts.guest.pause()?;
        let mut read = self.read(account, &Readings::new(&self.parts.linux, &paused.memory()))?;
        drop(paused);
        if when == When::SinceMark {
            read.subtract(marked(&work, account)?);
        }
        Ok(read.answer(account))
    }

    pub(super) fn kmem_cache_named(&self, name: &str, when: When) -> Result<Answer> {
        const ACCOUNT: Account = Account::KmemSlabs;
        let work = self.work();
        let paused = self.parts.guest.pause()?;
        let mut read = self.read(ACCOUNT, &Readings::new(&self.parts.linux, &paused.memory()))?;
        drop(paused);
        let mut before = match when {
            When::Now => None,
            When::SinceMark => Some(marked(&work, ACCOUNT)?.clone()),
        };
        let mut known = false;
        for (_, table) in read.tables.iter_mut().chain(before.iter_mut().flatten()) {
            kmem::only(table, name);
            known |= !table.rows.is_empty();
        }
        if !known {
            return Err(slab::unknown(name));
        }
        read.damage.iter_mut().for_each(|damage| damage.retain(|one| one.cache.as_deref() == Some(name)));
        before.iter().for_each(|before| read.subtract(before));
        Ok(read.answer(ACCOUNT))
    }

    /// Remembers what this kernel has of the accounting.
    pub(super) fn mark_now(&self) -> Result<()> {
        let mut work = self.work();
        let paused = self.parts.guest.pause()?;
        let memory = &paused.memory();
        let readings = Readings::new(&self.parts.linux, memory);
        let mut mark = Mark::default();
        let mut reason = None;
        for &account in Account::ALL {
            match self.read(account, &readings) {
                Ok(read) => {
                    mark.insert(account, read.tables);
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

    fn read(&self, account: Account, readings: &Readings<'_>) -> Result<Read> {
        let table = match account {
            Account::Slabinfo => slabs::table(readings.slabs()?),
            Account::KmemSlabs => kmem::slabs(readings.slabs()?),
            Account::Vmallocinfo => areas::table(&readings.areas()?, &|va| self.name(va)),
            Account::Meminfo => counters::meminfo(readings.counters()?, readings.totals()?),
            Account::Vmstat => counters::vmstat(readings.counters()?),
            Account::Kmem => {
                kmem::info(readings.counters()?, readings.totals()?, readings.shared_pages().ok())
            }
            Account::Buddyinfo => {
                let zones = readings.zones()?;
                let by_type = ("pagetypeinfo", zones::blocks_by_type(&zones));
                let tables = vec![(account.name(), zones::blocks(&zones)), by_type];
                return Ok(Read { tables, damage: None });
            }
        };
        let damage = match account {
            Account::Slabinfo | Account::KmemSlabs => Some(slabs::damage(readings.slabs()?)),
            _ => None,
        };
        Ok(Read { tables: vec![(account.name(), table)], damage })
    }
}

/// The mark's tables of one account.
fn marked(work: &Work, account: Account) -> Result<&Tables> {
    let Some(mark) = &work.mark else {
        bail!("Nothing to compare with: mark remembers the present for diff");
    };
    mark.get(&account).with_context(|| format!("{} could not be read at the last mark", account.name()))
}

/// One account as read.
struct Read {
    tables: Tables,
    /// Of accounts of slabs: where they cannot be trusted.
    damage: Option<Vec<DamagedCache>>,
}

impl Read {
    /// Leaves what changed since `before`.
    fn subtract(&mut self, before: &Tables) {
        for ((_, table), (_, before)) in self.tables.iter_mut().zip(before) {
            *table = table.since(before);
        }
    }

    fn answer(self, account: Account) -> Answer {
        let text = |table: &Table| match account {
            Account::Kmem => kmem::info_text(table),
            Account::KmemSlabs => kmem::slabs_text(table),
            _ => table.text(),
        };
        let texts: Vec<String> = self.tables.iter().map(|(_, table)| text(table)).collect();
        let same = self.tables.iter().all(|(_, table)| table.signed && table.rows.is_empty());
        let mut text = if same { "nothing has changed since mark\n".to_owned() } else { texts.join("\n") };
        let mut members: Map<String, Value> =
            self.tables.iter().map(|(name, table)| ((*name).to_owned(), table.json())).collect();
        if let Some(damage) = self.damage {
            text.extend(damage.iter().map(|damage| format!("# {damage}\n")));
            members.insert("damaged".into(), json!(damage));
        }
        Answer { text, json: Value::Object(members) }
    }
}
