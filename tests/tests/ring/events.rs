//! What one task of a guest allocated and freed, event by event, out of a log of events.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Events in their order, each by what is the same in every run: what, how, from where, and a free by the number of the
/// event that it takes back.
pub type Stream = Vec<String>;

/// The events of the task of this name, and the frees of what it allocated.
pub fn of_task(log: &Path, comm: &str) -> Result<Stream> {
    let text = std::fs::read_to_string(log).with_context(|| format!("No events {}", log.display()))?;
    let mut lines = text.lines();
    ensure!(lines.next() == Some(r#"{"schema":"kleak-events/1"}"#), "no events");
    let mut backtraces = BTreeMap::new();
    let mut live = HashMap::new();
    let mut stream = Stream::new();
    for line in lines {
        let mut line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        if !line["backtrace"].is_null() {
            backtraces.insert(line["stack"].as_u64(), line["backtrace"].take());
            continue;
        }
        let address = line["address"].as_str().context("no address")?.to_owned();
        match line["event"].as_str().context("no event")? {
            "alloc" if line["comm"] == comm => {
                let backtrace = backtraces.get(&line["stack"].as_u64()).context("no backtrace")?;
                live.insert(address, stream.len());
                stream.push(format!("{} bytes {} {} {backtrace}", line["size"], line["kind"], cache(&line)));
            }
            "alloc" => {
                live.remove(&address);
            }
            event => {
                if let Some(number) = live.remove(&address) {
                    stream.push(format!("{event} {} bytes of {number} {}", line["size"], line["caller"]));
                }
            }
        }
    }
    ensure!(live.is_empty(), "of {} events these were not taken back: {live:?}", stream.len());
    Ok(stream)
}

/// The cache's name without the number of one of several copies, which every boot chooses anew (CONFIG_RANDOM_KMALLOC_CACHES).
fn cache(line: &Value) -> String {
    let name = line["cache"].as_str().unwrap_or("?");
    match name.strip_prefix("kmalloc-rnd-").and_then(|copy| copy.split_once('-')) {
        Some((_, size)) => format!("kmalloc-{size}"),
        None => name.to_owned(),
    }
}

/// Says where they part, if they do.
pub fn same(by_traps: &Stream, by_ring: &Stream) -> Result<()> {
    let at = by_traps.iter().zip(by_ring).take_while(|(a, b)| a == b).count();
    ensure!(
        by_traps == by_ring,
        "event {at} of {} by traps: {:?}\nof {} by the ring: {:?}",
        by_traps.len(),
        by_traps.get(at),
        by_ring.len(),
        by_ring.get(at)
    );
    Ok(())
}
