//! The suite file: kernels, guests and tests, in TOML. `docs/regress.md` has every key.
//!
//! Relative paths are relative to the suite file's folder. An error names the file and the line.

use crate::cli::Failure;
use crate::cli::values::{self, DiskSpec, FileSpec, ModuleSpec};
use crate::machine::{MAX_DISKS, MEMORY_LIMITS};
use anyhow::{Context, Result};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;

/// Begins a path that is no path but a recipe of the `images` crate.
pub const RECIPE: &str = "recipe:";
/// Stands in paths for the name of the kernel.
pub const KERNEL_PLACE: &str = "{kernel}";
/// Longest time a test, a boot or settling may be given: a day.
const MAX_SECONDS: u64 = 24 * 3600;
/// The canary, which is planted when settling begins, must be old enough to be reported.
const MIN_SETTLE_MS: u64 = 2000;
/// Largest exit status of a process (wait(2)).
const MAX_STATUS: i32 = 255;
/// Most times a test is repeated.
const MAX_REPEAT: u32 = 100_000;

/// How tests are spread over boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootMode {
    /// All tests of a kernel and a guest one after the other in one boot.
    Shared,
    /// A boot for each.
    PerTest,
}

/// A valid suite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suite {
    /// For results.
    pub name: String,
    /// How tests are spread over boots.
    pub boot: BootMode,
    /// Longest time from power-on until the first test may begin, seconds.
    pub boot_timeout_s: u64,
    /// How long the guest settles before a scan, milliseconds; None: by what the test did.
    pub settle_ms: Option<u64>,
    /// Annotations and suppressions, as `run --profile` takes.
    pub profile: Option<PathBuf>,
    /// Known leaks, as `run --suppressions` takes.
    pub suppressions: Vec<PathBuf>,
    /// Leaks that are known.
    pub baseline: Option<PathBuf>,
    /// In the file's order.
    pub kernels: Vec<Kernel>,
    /// In the file's order; at least one.
    pub guests: Vec<Guest>,
    /// In the file's order.
    pub tests: Vec<Test>,
}

/// A kernel to test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// For results and for tests that are not for all kernels.
    pub name: String,
    /// Where it comes from.
    pub source: KernelSource,
}

/// Where a kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelSource {
    /// An image on this host.
    File(PathBuf),
    /// A stock kernel that the `images` crate fetches, such as `6.1-cloud`.
    Recipe(String),
}

/// A machine to test on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// For results and for tests that are not for all guests.
    pub name: String,
    /// Memory, bytes.
    pub mem_bytes: u64,
    /// vCPUs.
    pub cpus: u8,
    /// Added to the kernel's command line.
    pub cmdline: String,
    /// An initramfs that ours is laid over.
    pub initramfs: Option<PathBuf>,
    /// Files laid over both.
    pub files: Vec<FileSpec>,
    /// Its disks; each boot writes to copies of its own.
    pub disks: Vec<DiskSpec>,
    /// Modules loaded for the whole boot.
    pub modules: Vec<ModuleSpec>,
}

/// What runs in a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Test {
    /// For results.
    pub name: String,
    /// What it does.
    pub action: Action,
    /// Shell commands before it.
    pub setup: Option<String>,
    /// Files it needs in the guest.
    pub files: Vec<FileSpec>,
    /// Modules loaded before it and unloaded after it, before the scan.
    pub modules: Vec<ModuleSpec>,
    /// How often it runs before the scan.
    pub repeat: u32,
    /// Longest time of one run, seconds.
    pub timeout_s: u64,
    /// Exit status wanted.
    pub status: i32,
    /// What it is meant to leak.
    pub expected: Expected,
    /// Names of the kernels it is for; None: all.
    pub kernels: Option<Vec<String>>,
    /// Names of the guests it is for; None: all.
    pub guests: Option<Vec<String>>,
}

/// What a test does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Nothing: what the boot itself and the test's modules leak.
    Nothing,
    /// Shell commands.
    Run(String),
    /// A program or script of this host.
    Script(PathBuf),
}

/// Leaks that a test is meant to make.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected {
    /// How many.
    pub count: Option<u64>,
    /// Functions in their backtraces; empty: any.
    pub functions: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: Option<String>,
    boot: Option<BootMode>,
    boot_timeout_s: Option<Spanned<u64>>,
    settle_ms: Option<Spanned<u64>>,
    profile: Option<PathBuf>,
    #[serde(default)]
    suppressions: Vec<PathBuf>,
    baseline: Option<PathBuf>,
    #[serde(default, rename = "kernel")]
    kernels: Vec<Spanned<KernelTable>>,
    #[serde(default, rename = "guest")]
    guests: Vec<Spanned<GuestTable>>,
    #[serde(default, rename = "test")]
    tests: Vec<Spanned<TestTable>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KernelTable {
    name: Option<String>,
    path: Option<PathBuf>,
    recipe: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GuestTable {
    name: Option<String>,
    mem: Option<Spanned<String>>,
    cpus: Option<Spanned<u8>>,
    cmdline: Option<String>,
    initramfs: Option<PathBuf>,
    #[serde(default)]
    files: Vec<Spanned<String>>,
    #[serde(default)]
    disks: Vec<Spanned<String>>,
    #[serde(default)]
    modules: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TestTable {
    name: String,
    run: Option<String>,
    script: Option<PathBuf>,
    setup: Option<String>,
    #[serde(default)]
    files: Vec<Spanned<String>>,
    #[serde(default)]
    modules: Vec<Spanned<String>>,
    repeat: Option<Spanned<u32>>,
    timeout_s: Option<Spanned<u64>>,
    status: Option<Spanned<i32>>,
    leaks: Option<Spanned<u64>>,
    #[serde(default)]
    functions: Vec<String>,
    kernels: Option<Vec<Spanned<String>>>,
    guests: Option<Vec<Spanned<String>>>,
}

/// Reads a suite file.
///
/// # Errors
/// Exit code 2: it cannot be read, or says something that makes no sense; with the line.
pub fn read(path: &Path) -> Result<Suite> {
    let text = std::fs::read_to_string(path).with_context(|| {
        Failure::usage(format!("Cannot read suite {}", path.display())).hint("docs/regress.md has an example")
    })?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    parse(&text, folder, &name).map_err(|wrong| {
        let line = text[..wrong.at.min(text.len())].matches('\n').count() + 1;
        Failure::usage(format!("{}:{line}: {}", path.display(), wrong.what))
            .hint("docs/regress.md has every key and its values")
            .into()
    })
}

/// What is wrong, and where in the text.
#[derive(Debug, PartialEq, Eq)]
struct Wrong {
    at: usize,
    what: String,
}

fn wrong<T>(span: &Range<usize>, what: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong { at: span.start, what: what.into() })
}

fn parse(text: &str, folder: &Path, default_name: &str) -> Result<Suite, Wrong> {
    let file: File = toml::from_str(text).map_err(|error| Wrong {
        at: error.span().map_or(0, |span| span.start),
        // In TOML's own words instead of serde's.
        what: error
            .message()
            .replace('\n', " ")
            .replace(
                "map, expected a sequence",
                "a table, expected a list of tables, which begin with [[...]]",
            )
            .replace("expected a sequence", "expected a list, as [\"...\"]"),
    })?;
    let reader = Reader { folder };
    if file.kernels.is_empty() {
        return wrong(&(0..0), "no [[kernel]]");
    }
    if file.tests.is_empty() {
        return wrong(&(0..0), "no [[test]]");
    }
    let kernels = each(file.kernels, |table, span| reader.kernel(table, span))?;
    let mut guests = each(file.guests, |table, span| reader.guest(table, span))?;
    if guests.is_empty() {
        guests.push((default_guest(), 0..0));
    }
    let tests = each(file.tests, |table, span| reader.test(table, span, &kernels, &guests))?;
    let boot = file.boot.unwrap_or(BootMode::Shared);
    one_file_a_path(&guests, &tests, boot)?;
    let kernels = unique(kernels, "kernel", |kernel| &kernel.name)?;
    let guests = unique(guests, "guest", |guest| &guest.name)?;
    let tests = unique(tests, "test", |test| &test.name)?;
    let settle_ms =
        file.settle_ms.map(|ms| within(ms, MIN_SETTLE_MS..=MAX_SECONDS * 1000, "settle_ms")).transpose()?;
    Ok(Suite {
        name: file.name.unwrap_or_else(|| default_name.to_owned()),
        boot,
        boot_timeout_s: seconds(file.boot_timeout_s, "boot_timeout_s", 300)?,
        settle_ms,
        profile: file.profile.map(|path| folder.join(path)),
        suppressions: file.suppressions.iter().map(|path| folder.join(path)).collect(),
        baseline: file.baseline.map(|path| folder.join(path)),
        kernels,
        guests,
        tests,
    })
}

fn default_guest() -> Guest {
    let (name, mem_bytes) = ("default".to_owned(), 512 << 20);
    let (cmdline, files, disks, modules) = (String::new(), Vec::new(), Vec::new(), Vec::new());
    Guest { name, mem_bytes, cpus: 1, cmdline, initramfs: None, files, disks, modules }
}

/// Rows with the place of each.
type Placed<T> = Vec<(T, Range<usize>)>;

fn each<T, U>(
    rows: Vec<Spanned<T>>,
    mut read: impl FnMut(T, &Range<usize>) -> Result<U, Wrong>,
) -> Result<Placed<U>, Wrong> {
    let place = |row: Spanned<T>| {
        let span = row.span();
        Ok((read(row.into_inner(), &span)?, span))
    };
    rows.into_iter().map(place).collect()
}

fn unique<T>(rows: Placed<T>, what: &str, name: impl Fn(&T) -> &String) -> Result<Vec<T>, Wrong> {
    let mut seen = BTreeSet::new();
    for (row, span) in &rows {
        let name = name(row);
        if name.is_empty() || name.contains('/') || name.chars().any(char::is_control) {
            return wrong(span, format!("{what} name {name:?} is empty or has a slash or control character"));
        }
        if !seen.insert(name.clone()) {
            return wrong(span, format!("two of the name {name:?} for a {what}"));
        }
    }
    Ok(rows.into_iter().map(|(row, _)| row).collect())
}

/// Files are in the guest from the start of the boot: of two for the same path, all would get the last.
fn one_file_a_path(guests: &Placed<Guest>, tests: &Placed<Test>, boot: BootMode) -> Result<(), Wrong> {
    let check = |span: &Range<usize>, files: &[FileSpec], whose: String, others: &[FileSpec]| {
        let differs = |file: &&FileSpec| others.iter().any(|o| o.guest == file.guest && o.host != file.host);
        match files.iter().find(differs) {
            Some(file) => {
                let place = file.guest.display();
                wrong(span, format!("{whose} has another file for {place} in the same boot"))
            }
            None => Ok(()),
        }
    };
    let is_for = |test: &Test, guest: &Guest| test.guests.as_ref().is_none_or(|g| g.contains(&guest.name));
    for (guest, span) in guests {
        check(span, &guest.files, format!("guest {:?}", guest.name), &guest.files)?;
    }
    let meet = |a: &Option<Vec<String>>, b: &Option<Vec<String>>| match (a, b) {
        (Some(a), Some(b)) => a.iter().any(|name| b.contains(name)),
        _ => true,
    };
    for (at, (test, span)) in tests.iter().enumerate() {
        for (guest, _) in guests.iter().filter(|(guest, _)| is_for(test, guest)) {
            check(span, &test.files, format!("guest {:?}", guest.name), &guest.files)?;
        }
        let first = if boot == BootMode::Shared { 0 } else { at };
        let same_boot =
            |other: &&Test| meet(&test.kernels, &other.kernels) && meet(&test.guests, &other.guests);
        for other in tests[first..=at].iter().map(|(other, _)| other).filter(same_boot) {
            check(span, &test.files, format!("test {:?}", other.name), &other.files)?;
        }
    }
    Ok(())
}

fn within<T: PartialOrd + std::fmt::Display + Copy>(
    value: Spanned<T>,
    range: std::ops::RangeInclusive<T>,
    key: &str,
) -> Result<T, Wrong> {
    let number = *value.get_ref();
    if range.contains(&number) {
        return Ok(number);
    }
    wrong(&value.span(), format!("{key} = {number} is not within {} and {}", range.start(), range.end()))
}

fn seconds(value: Option<Spanned<u64>>, key: &str, default: u64) -> Result<u64, Wrong> {
    value.map_or(Ok(default), |value| within(value, 1..=MAX_SECONDS, key))
}

struct Reader<'a> {
    folder: &'a Path,
}

impl Reader<'_> {
    fn kernel(&self, table: KernelTable, span: &Range<usize>) -> Result<Kernel, Wrong> {
        let (source, name) = match (table.path, table.recipe) {
            (Some(path), None) => match path.file_name().map(|name| name.to_string_lossy().into_owned()) {
                Some(name) => (KernelSource::File(self.folder.join(path)), name),
                None => {
                    return wrong(
                        span,
                        format!("the kernel's path {:?} names no file", path.display().to_string()),
                    );
                }
            },
            (None, Some(recipe)) => (KernelSource::Recipe(recipe.clone()), recipe),
            _ => return wrong(span, "a kernel takes either path or recipe"),
        };
        Ok(Kernel { name: table.name.unwrap_or(name), source })
    }

    fn guest(&self, table: GuestTable, _: &Range<usize>) -> Result<Guest, Wrong> {
        let default = default_guest();
        let mem_bytes = match table.mem {
            None => default.mem_bytes,
            Some(text) => {
                let span = text.span();
                let (least, most) = MEMORY_LIMITS;
                let bytes =
                    values::size(text.get_ref()).or_else(|what| wrong(&span, format!("mem: {what}")))?;
                if !(least..=most).contains(&bytes) || bytes % 4096 != 0 {
                    let limits = [least, most].map(values::format_size);
                    return wrong(&span, format!("mem is not within {} and {}", limits[0], limits[1]));
                }
                bytes
            }
        };
        let cpus = table.cpus.map_or(Ok(default.cpus), |cpus| within(cpus, 1..=8, "cpus"))?;
        let name = table.name.unwrap_or(default.name);
        let cmdline = table.cmdline.unwrap_or_default();
        Ok(Guest {
            name,
            mem_bytes,
            cpus,
            cmdline,
            initramfs: table.initramfs.map(|path| self.folder.join(path)),
            files: self.files(table.files)?,
            disks: self.disks(table.disks)?,
            modules: self.modules(table.modules)?,
        })
    }

    fn test(
        &self,
        table: TestTable,
        span: &Range<usize>,
        kernels: &Placed<Kernel>,
        guests: &Placed<Guest>,
    ) -> Result<Test, Wrong> {
        let action = match (table.run, table.script) {
            (None, None) => Action::Nothing,
            (Some(commands), None) => Action::Run(commands),
            (None, Some(path)) => Action::Script(self.folder.join(path)),
            (Some(_), Some(_)) => return wrong(span, "a test takes run or script, not both"),
        };
        let text = [table.setup.as_deref(), if let Action::Run(text) = &action { Some(text) } else { None }];
        if text.into_iter().flatten().any(|text| text.contains('\0')) {
            return wrong(span, "a NUL character in run or setup");
        }
        if table.functions.iter().any(String::is_empty) {
            return wrong(span, "functions has an empty name");
        }
        if let Some(none) = table.leaks.as_ref().filter(|count| *count.get_ref() == 0)
            && !table.functions.is_empty()
        {
            return wrong(&none.span(), "leaks = 0, but functions says who makes them");
        }
        Ok(Test {
            name: table.name,
            action,
            setup: table.setup,
            files: self.files(table.files)?,
            modules: self.modules(table.modules)?,
            repeat: table.repeat.map_or(Ok(1), |repeat| within(repeat, 1..=MAX_REPEAT, "repeat"))?,
            timeout_s: seconds(table.timeout_s, "timeout_s", 60)?,
            status: table.status.map_or(Ok(0), |status| within(status, 0..=MAX_STATUS, "status"))?,
            expected: Expected { count: table.leaks.map(Spanned::into_inner), functions: table.functions },
            kernels: known(table.kernels, "kernel", kernels.iter().map(|(kernel, _)| kernel.name.as_str()))?,
            guests: known(table.guests, "guest", guests.iter().map(|(guest, _)| guest.name.as_str()))?,
        })
    }

    fn disks(&self, rows: Vec<Spanned<String>>) -> Result<Vec<DiskSpec>, Wrong> {
        if let Some(row) = rows.get(MAX_DISKS) {
            return wrong(&row.span(), format!("a guest has {MAX_DISKS} disks at most"));
        }
        let read = |row: &Spanned<String>| {
            let disk =
                values::disk(row.get_ref()).or_else(|what| wrong(&row.span(), format!("disks: {what}")))?;
            Ok(DiskSpec { path: self.folder.join(disk.path), ..disk })
        };
        rows.iter().map(read).collect()
    }

    fn files(&self, rows: Vec<Spanned<String>>) -> Result<Vec<FileSpec>, Wrong> {
        let read = |row: &Spanned<String>| {
            let file =
                values::file(row.get_ref()).or_else(|what| wrong(&row.span(), format!("files: {what}")))?;
            Ok(FileSpec { host: self.path(file.host), ..file })
        };
        rows.iter().map(read).collect()
    }

    fn modules(&self, rows: Vec<Spanned<String>>) -> Result<Vec<ModuleSpec>, Wrong> {
        let read = |row: &Spanned<String>| {
            let module = values::module(row.get_ref())
                .or_else(|what| wrong(&row.span(), format!("modules: {what}")))?;
            Ok(ModuleSpec { path: self.path(module.path), ..module })
        };
        rows.iter().map(read).collect()
    }

    /// A recipe stays as it is.
    fn path(&self, path: PathBuf) -> PathBuf {
        if path.to_string_lossy().starts_with(RECIPE) { path } else { self.folder.join(path) }
    }
}

/// The names, each of which must be one of `all`.
fn known<'a>(
    names: Option<Vec<Spanned<String>>>,
    what: &str,
    all: impl Iterator<Item = &'a str> + Clone,
) -> Result<Option<Vec<String>>, Wrong> {
    let Some(names) = names else { return Ok(None) };
    for name in &names {
        if !all.clone().any(|known| known == name.get_ref()) {
            return wrong(&name.span(), format!("there is no {what} {:?}", name.get_ref()));
        }
    }
    Ok(Some(names.into_iter().map(Spanned::into_inner).collect()))
}

#[cfg(test)]
#[path = "suite_tests.rs"]
mod tests;
