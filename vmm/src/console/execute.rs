//! One executor for all surfaces: a request in, a reply out.

use super::Target;
use super::command::{Command, Request, help};
use introspect::report::plural;
use serde_json::{Value, json};
use std::sync::Arc;

/// Answers command lines. The surfaces know only this, so that a virtual machine in the lab can be driven through
/// a forwarder.
pub trait Commands: Send + Sync {
    /// Carries out one line.
    fn answer(&self, line: &str) -> Reply;

    /// Ends the virtual machine. The surfaces call it behind a [`Reply`] with `quit`, once the reply is written.
    fn quit(&self);
}

/// What a command line came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Printable text: empty, or lines each ending in a newline. The only control characters are newline and tab.
    pub body: String,
    /// The command was unknown or failed; `body` says so in one line (`error: ...` or `{"error": ...}`).
    pub failed: bool,
    /// The virtual machine is to end, once the reply is written.
    pub quit: bool,
}

impl Reply {
    /// A reply in text; control characters that may have come from the guest become dots.
    pub fn text(text: &str) -> Self {
        let mut body: String = text.chars().map(|c| if is_printable(c) { c } else { '.' }).collect();
        if !body.is_empty() && !body.ends_with('\n') {
            body.push('\n');
        }
        Self { body, failed: false, quit: false }
    }

    /// A reply of one line of JSON; JSON escapes control characters itself.
    pub fn json(value: &Value) -> Self {
        Self { body: format!("{value}\n"), failed: false, quit: false }
    }

    /// A refusal, in the form asked for.
    pub fn error(message: &str, json: bool) -> Self {
        let message = message.replace('\n', " ");
        let reply = if json {
            Self::json(&json!({ "error": message }))
        } else {
            Self::text(&format!("error: {message}"))
        };
        Self { failed: true, ..reply }
    }
}

/// Newline, tab, and whatever moves no cursor and ends no line.
fn is_printable(c: char) -> bool {
    !c.is_control() || c == '\n' || c == '\t'
}

/// Carries out commands on a [`Target`].
pub struct Executor {
    target: Arc<dyn Target>,
    /// Who asks is the guest.
    guest: bool,
}

impl Executor {
    /// Commands that act on `target`.
    pub fn new(target: Arc<dyn Target>) -> Self {
        Self { target, guest: false }
    }

    /// The same for the guest itself, which may have nothing written on the host.
    pub fn for_guest(target: Arc<dyn Target>) -> Self {
        Self { target, guest: true }
    }
}

impl Commands for Executor {
    fn answer(&self, line: &str) -> Reply {
        let request = Request::parse(line);
        match &request.command {
            Ok(Command::Save(how, _)) if self.guest => {
                let what =
                    format!("{}= writes a file on the host: use the monitor or kleak-vmm ctl", how.name());
                Reply::error(&what, request.json)
            }
            _ => execute(self.target.as_ref(), &request),
        }
    }

    fn quit(&self) {
        self.target.quit();
    }
}

/// Carries out a request. `quit` only marks the reply: whoever delivers it calls [`Target::quit`].
pub fn execute(target: &dyn Target, request: &Request) -> Reply {
    let command = match &request.command {
        Ok(command) => command,
        Err(message) => return Reply::error(message, request.json),
    };
    let result = if request.json { run_json(target, command) } else { run_text(target, command) };
    match result {
        Ok(reply) => Reply { quit: *command == Command::Quit, ..reply },
        Err(error) => Reply::error(&format!("{error:#}"), request.json),
    }
}

fn run_text(target: &dyn Target, command: &Command) -> anyhow::Result<Reply> {
    let text = match command {
        Command::Scan => format!("kmemleak: {} new suspected memory leaks", target.scan()?),
        Command::Report => target.report_text()?,
        Command::Clear => format!("cleared: {} painted gray", objects(target.clear()?)),
        Command::Off => target.off().map(|()| "tracking off".to_owned())?,
        Command::On => format!("tracking on: {} seeded", objects(target.on()?)),
        Command::Stack(on) => {
            target.set_stack(*on)?;
            format!("stack scanning {}", on_off(*on))
        }
        Command::Typed(on) => {
            target.set_typed(*on)?;
            format!("typed scanning {}", on_off(*on))
        }
        Command::PeriodicScan(on) => automatic_scans(target.set_periodic_scan(*on)?),
        Command::ScanPeriod(seconds) => {
            target.set_scan_period(*seconds)?;
            automatic_scans(*seconds)
        }
        Command::Dump(address) => target.dump(*address)?.text,
        Command::Path(address) => target.path(*address)?.text,
        Command::Roots => target.roots()?.text,
        Command::Possible => target.possible()?.text,
        Command::Canary => target.canary()?.text,
        Command::Status => {
            target.status()?.iter().map(|(key, value)| format!("{key}: {}\n", plain(value))).collect()
        }
        Command::Audit => {
            let audit = target.audit()?;
            let mut text = format!(
                "audit: tracked {}, missing {}, stale {}\n",
                audit.tracked, audit.missing, audit.stale
            );
            text.extend(audit.examples.iter().map(|example| format!("  {example}\n")));
            text
        }
        Command::Top(by) => target.top(*by)?.text,
        Command::AllocCalls(cache) => target.alloc_calls(cache)?.text,
        Command::Growth => target.growth()?.text,
        Command::Annotate(how, address) => target.annotate(*how, *address)?.text,
        Command::Accounting(account, when) => target.accounting(*account, *when)?.text,
        Command::KmemCache(cache, when) => target.kmem_cache(cache, *when)?.text,
        Command::Refs(address) => target.refs(*address)?.text,
        Command::RefsOf(cache) => target.refs_of(cache)?.text,
        Command::Mark => target.mark().map(|()| "marked: diff compares with now".to_owned())?,
        Command::Ps => target.ps()?.text,
        Command::Procrank => target.procrank()?.text,
        Command::Backtrace(pid) => target.backtrace(*pid)?.text,
        Command::Regs => target.regs()?.text,
        Command::Save(how, path) => target.save(*how, path)?.text,
        Command::Pause if target.pause()? => "paused: resume lets the guest go on".to_owned(),
        Command::Pause => "paused already".to_owned(),
        Command::Resume if target.resume()? => "resumed".to_owned(),
        Command::Resume => "running already".to_owned(),
        Command::Help(entry) => help(*entry),
        Command::Quit => "powering off".to_owned(),
    };
    Ok(Reply::text(&text))
}

fn run_json(target: &dyn Target, command: &Command) -> anyhow::Result<Reply> {
    let value = match command {
        Command::Scan => json!({ "new_leaks": target.scan()? }),
        Command::Report => target.report_json()?,
        Command::Clear => json!({ "cleared": target.clear()? }),
        Command::Off => target.off().map(|()| json!({ "tracking": false }))?,
        Command::On => json!({ "tracking": true, "seeded": target.on()? }),
        Command::Stack(on) => target.set_stack(*on).map(|()| json!({ "stack": on }))?,
        Command::Typed(on) => target.set_typed(*on).map(|()| json!({ "typed": on }))?,
        Command::PeriodicScan(on) => json!({ "scan_period": target.set_periodic_scan(*on)? }),
        Command::ScanPeriod(seconds) => {
            target.set_scan_period(*seconds).map(|()| json!({ "scan_period": seconds }))?
        }
        Command::Dump(address) => target.dump(*address)?.json,
        Command::Path(address) => target.path(*address)?.json,
        Command::Roots => target.roots()?.json,
        Command::Possible => target.possible()?.json,
        Command::Canary => target.canary()?.json,
        Command::Status => Value::Object(target.status()?.into_iter().collect()),
        Command::Audit => serde_json::to_value(target.audit()?)?,
        Command::Top(by) => target.top(*by)?.json,
        Command::AllocCalls(cache) => target.alloc_calls(cache)?.json,
        Command::Growth => target.growth()?.json,
        Command::Annotate(how, address) => target.annotate(*how, *address)?.json,
        Command::Accounting(account, when) => target.accounting(*account, *when)?.json,
        Command::KmemCache(cache, when) => target.kmem_cache(cache, *when)?.json,
        Command::Refs(address) => target.refs(*address)?.json,
        Command::RefsOf(cache) => target.refs_of(cache)?.json,
        Command::Mark => target.mark().map(|()| json!({ "marked": true }))?,
        Command::Ps => target.ps()?.json,
        Command::Procrank => target.procrank()?.json,
        Command::Backtrace(pid) => target.backtrace(*pid)?.json,
        Command::Regs => target.regs()?.json,
        Command::Save(how, path) => target.save(*how, path)?.json,
        Command::Pause => json!({ "paused": true, "changed": target.pause()? }),
        Command::Resume => json!({ "paused": false, "changed": target.resume()? }),
        Command::Help(entry) => json!({ "help": help(*entry) }),
        Command::Quit => json!({ "quit": true }),
    };
    Ok(Reply::json(&value))
}

fn objects(count: usize) -> String {
    format!("{count} object{}", plural(count as u64))
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

fn automatic_scans(period_seconds: u64) -> String {
    match period_seconds {
        0 => "automatic scans off".to_owned(),
        seconds => format!("automatic scans every {seconds} s"),
    }
}

/// A status value as a reader wants it: no quotes, no brackets, and a word where there is nothing.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.replace('\n', " "),
        Value::Array(values) if values.is_empty() => "none".to_owned(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(", "),
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| format!("{key} {}", plain(value))).collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_values_read_as_text() {
        let table = [
            (json!("two\nlines"), "two lines"),
            (json!(12), "12"),
            (json!([]), "none"),
            (json!(["bulk", "large"]), "bulk, large"),
            (json!({ "bytes": 4096, "references": 3 }), "bytes 4096, references 3"),
        ];
        for (value, text) in table {
            assert_eq!(plain(&value), text);
        }
    }
}
