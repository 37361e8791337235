//! From a line to a command, or to one line that says what was expected.

use super::account::{Account, When};
use super::command::{Annotation, COMMANDS, Command, Entry, Request, SaveAs, TopBy};
use introspect::memory::Va;

impl Request {
    /// Parses one line; surrounding white space does not matter.
    pub fn parse(line: &str) -> Self {
        let line = line.trim();
        match line.split_once(char::is_whitespace) {
            Some(("json", rest)) if rest.split_whitespace().next() == Some("json") => {
                Self { command: Err("json takes a command, not json again".into()), json: true }
            }
            Some(("json", rest)) => Self { command: Command::parse(rest), json: true },
            _ if line == "json" => Self { command: Err("json takes a command: try help".into()), json: true },
            _ => Self { command: Command::parse(line), json: false },
        }
    }
}

impl Command {
    /// Parses a command without the `json` prefix.
    ///
    /// # Errors
    /// One line that says what was expected.
    pub fn parse(line: &str) -> Result<Self, String> {
        let line = line.trim();
        let (name, argument) = match line.split_once(char::is_whitespace) {
            Some((name, rest)) => (name, Some(rest.trim())),
            None => (line, None),
        };
        if name == "help" {
            return argument.map(find_entry).transpose().map(Self::Help);
        }
        if let Some((name, value)) = line.split_once('=') {
            return Self::parse_assignment(name.trim_end(), value.trim());
        }
        if name == "kmem" {
            return Self::parse_kmem(argument.unwrap_or_default());
        }
        if let Some(account) = Account::of(name) {
            return match argument {
                None => Ok(Self::Accounting(account, When::Now)),
                Some("diff") => Ok(Self::Accounting(account, When::SinceMark)),
                Some(word) => Err(format!("{name} takes nothing or diff, not {}", quote(word))),
            };
        }
        if name == "top" {
            return match argument {
                None | Some("sites") => Ok(Self::Top(TopBy::Sites)),
                Some("caches") => Ok(Self::Top(TopBy::Caches)),
                Some(word) => Err(format!("top takes sites or caches, not {}", quote(word))),
            };
        }
        if name == "bt" {
            return match argument {
                None => Ok(Self::Backtrace(None)),
                Some(pid) => decimal(pid)
                    .and_then(|pid| i32::try_from(pid).ok())
                    .map(|pid| Self::Backtrace(Some(pid)))
                    .ok_or_else(|| format!("bt takes a process id, not {}", quote(pid))),
            };
        }
        let command = match name {
            "ps" => Self::Ps,
            "growth" => Self::Growth,
            "procrank" => Self::Procrank,
            "regs" => Self::Regs,
            "pause" => Self::Pause,
            "resume" => Self::Resume,
            "mark" => Self::Mark,
            "scan" => Self::Scan,
            "report" => Self::Report,
            "clear" => Self::Clear,
            "off" => Self::Off,
            "on" => Self::On,
            "status" => Self::Status,
            "roots" => Self::Roots,
            "possible" => Self::Possible,
            "canary" => Self::Canary,
            "audit" => Self::Audit,
            "quit" => Self::Quit,
            "stack" | "typed" => return Err(format!("{name} takes a value: {name}=on or {name}=off")),
            "refs" => return Err("refs takes an address or a slab cache: refs=ADDR or refs=CACHE".into()),
            "alloc_calls" => return Err("alloc_calls takes a slab cache: alloc_calls=CACHE".into()),
            "snapshot" | "core" => return Err(format!("{name} takes a file: {name}=FILE")),
            "dump" | "path" | "not_leak" | "ignore" | "no_scan" => {
                return Err(format!("{name} takes an address: {name}=ADDR"));
            }
            "" => return Err("empty command: try help".into()),
            _ => return Err(unknown(name)),
        };
        match argument {
            Some(argument) => Err(format!("{name} takes no argument, but was given {}", quote(argument))),
            None => Ok(command),
        }
    }

    fn parse_kmem(arguments: &str) -> Result<Self, String> {
        let words: Vec<&str> = arguments.split_whitespace().collect();
        let (words, when) = match words.split_last() {
            Some((&"diff", rest)) => (rest, When::SinceMark),
            _ => (&words[..], When::Now),
        };
        match words {
            [] | ["-i"] => Ok(Self::Accounting(Account::Kmem, when)),
            ["-s"] => Ok(Self::Accounting(Account::KmemSlabs, when)),
            ["-s", cache] => Ok(Self::KmemCache((*cache).to_owned(), when)),
            _ => Err(format!("kmem takes -i, or -s and a slab cache, and diff, not {}", quote(arguments))),
        }
    }

    fn parse_assignment(name: &str, value: &str) -> Result<Self, String> {
        let address = || {
            let expected =
                || format!("{name}= takes a hexadecimal address of up to 16 digits, not {}", quote(value));
            parse_address(value).ok_or_else(expected)
        };
        if let Some(annotation) = Annotation::ALL.into_iter().find(|annotation| annotation.name() == name) {
            return Ok(Self::Annotate(annotation, address()?));
        }
        if let Some(how) = SaveAs::ALL.into_iter().find(|how| how.name() == name) {
            return match value {
                "" => Err(format!("{name}= takes the name of a file")),
                // A line of help has some.
                file if file.contains(char::is_whitespace) => {
                    Err(format!("{name}= takes the name of a file without white space, not {}", quote(file)))
                }
                file => Ok(Self::Save(how, file.into())),
            };
        }
        match (name, value) {
            ("stack", "on") => Ok(Self::Stack(true)),
            ("stack", "off") => Ok(Self::Stack(false)),
            ("stack", _) => Err(format!("stack= takes on or off, not {}", quote(value))),
            ("typed", "on") => Ok(Self::Typed(true)),
            ("typed", "off") => Ok(Self::Typed(false)),
            ("typed", _) => Err(format!("typed= takes on or off, not {}", quote(value))),
            ("scan", "on") => Ok(Self::PeriodicScan(true)),
            ("scan", "off") => Ok(Self::PeriodicScan(false)),
            ("scan", _) => decimal(value)
                .map(Self::ScanPeriod)
                .ok_or_else(|| format!("scan= takes on, off or a number of seconds, not {}", quote(value))),
            ("dump", _) => Ok(Self::Dump(address()?)),
            ("path", _) => Ok(Self::Path(address()?)),
            ("alloc_calls", "") => Err("alloc_calls= takes the name of a slab cache".into()),
            ("refs", "") => Err("refs= takes an address or the name of a slab cache".into()),
            // No name has white space (`kmem_cache_sanity_check`, mm/slab_common.c); a line of help has.
            ("alloc_calls" | "refs", cache) if cache.contains(char::is_whitespace) => {
                Err(format!("{name}= takes the name of one slab cache, not {}", quote(cache)))
            }
            ("alloc_calls", cache) => Ok(Self::AllocCalls(cache.to_owned())),
            ("refs", value) => Ok(match kernel_address(value) {
                Some(address) => Self::Refs(address),
                None => Self::RefsOf(value.to_owned()),
            }),
            _ if COMMANDS.iter().any(|entry| entry.name == name) => Err(format!("{name} takes no value")),
            _ => Err(unknown(name)),
        }
    }
}

/// Hexadecimal address, with or without `0x`.
fn parse_address(text: &str) -> Option<Va> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text);
    let all_hex = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
    all_hex.then(|| u64::from_str_radix(digits, 16).ok().map(Va)).flatten()
}

/// A hexadecimal address where a name could be: with `0x`, or one of the upper half of the address space in full.
fn kernel_address(text: &str) -> Option<Va> {
    let whole = text.len() == 16 && text.starts_with("ffff");
    if whole || text.starts_with("0x") { parse_address(text) } else { None }
}

/// Unsigned decimal; `u64::from_str` would take a leading plus sign.
fn decimal(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

fn find_entry(name: &str) -> Result<&'static Entry, String> {
    COMMANDS
        .iter()
        .find(|entry| entry.name == name)
        .or_else(|| COMMANDS.iter().find(|entry| entry.name == name.trim_end_matches('=')))
        .ok_or_else(|| unknown(name))
}

fn unknown(name: &str) -> String {
    let wanted = name.to_lowercase();
    let alike = COMMANDS.iter().map(|entry| (strsim::jaro(&wanted, entry.name), entry.name));
    // As alike as clap's own subcommands have to be.
    let best = alike.filter(|(alike, _)| *alike > 0.7).max_by(|a, b| a.0.total_cmp(&b.0));
    let meant = best.map(|(_, meant)| format!(", did you mean {meant}")).unwrap_or_default();
    format!("unknown command {}{meant}: try help", quote(name))
}

/// `text` between quotes, shortened and without control characters: it may come from the guest.
fn quote(text: &str) -> String {
    const SHOWN: usize = 40;
    let short: String = text.chars().take(SHOWN).collect();
    let dots = if short.len() < text.len() { "..." } else { "" };
    format!("\"{}{dots}\"", short.escape_debug())
}
