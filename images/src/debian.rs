//! Debian packages as files: downloaded with `apt-get` and unpacked into a cache folder, never installed.
//!
//! Nothing here needs root. Packages come through package lists kept in the cache, not the machine's own: those of a
//! container image are months old and name files the mirror no longer has, and they know no foreign architecture.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{self, AtomicU32};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::cache::lock_file;

/// Architecture of packages that name none.
pub const DEFAULT_ARCH: &str = "amd64";

/// Package lists older than this are fetched anew before they are asked.
const LISTS_MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// A package by name, with an optional architecture and version: `NAME[:ARCH][=VERSION]`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PackageSpec {
    name: String,
    arch: Option<String>,
    version: Option<String>,
}

impl PackageSpec {
    /// Errors on characters Debian's policy (5.6.1, 5.6.12) has not, so that a name can be part of a path.
    fn parse(text: &str) -> Result<Self> {
        let (rest, version) = match text.split_once('=') {
            Some((rest, version)) => (rest, Some(version.to_owned())),
            None => (text, None),
        };
        let (name, arch) = match rest.split_once(':') {
            Some((name, arch)) => (name, Some(arch.to_owned())),
            None => (rest, None),
        };
        let fits = |part: &str, extra: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part.chars().all(|c| c.is_ascii_alphanumeric() || extra.contains(c))
        };
        ensure!(
            fits(name, "+-.")
                && arch.as_deref().is_none_or(|arch| fits(arch, "-"))
                && version.as_deref().is_none_or(|version| fits(version, "+-.~:")),
            "`{text}` is no Debian package (NAME[:ARCH][=VERSION])"
        );
        Ok(Self { name: name.to_owned(), arch, version })
    }

    /// As `apt-get` takes it.
    fn apt_argument(&self) -> String {
        let mut argument = self.name.clone();
        if let Some(arch) = &self.arch {
            argument.push(':');
            argument.push_str(arch);
        }
        if let Some(version) = &self.version {
            argument.push('=');
            argument.push_str(version);
        }
        argument
    }

    /// The folder a package file of this name is unpacked to, `NAME_VERSION_ARCH`, fits.
    fn matches(&self, folder: &str) -> bool {
        let mut parts = folder.split('_');
        let (Some(name), Some(version), Some(arch), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return false;
        };
        name == self.name
            && self.version.as_ref().is_none_or(|wanted| wanted == version)
            && (arch == "all" || arch == self.arch.as_deref().unwrap_or(DEFAULT_ARCH))
    }
}

/// A folder of unpacked packages, `NAME_VERSION_ARCH/` each. Several processes may use one at a time: a package
/// appears by a rename, whole or not at all.
#[derive(Debug, Clone)]
pub struct PackageCache {
    folder: PathBuf,
}

impl PackageCache {
    /// A cache in `folder`, which is created when first needed.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The folder in which `package` (`NAME[:ARCH][=VERSION]`) is unpacked, from the cache or from the mirror.
    /// Without a version any cached one will do.
    ///
    /// Errors when the machine has no `apt-get` or `dpkg`, or the mirror has no such package.
    pub fn fetch(&self, package: &str) -> Result<PathBuf> {
        let spec = PackageSpec::parse(package)?;
        if let Some(found) = self.cached(&spec) {
            return Ok(found);
        }
        fs::create_dir_all(&self.folder).with_context(|| format!("creating {}", self.folder.display()))?;
        let work = WorkFolder::new(&self.folder)?;
        let file = self.download(&spec, &work.0)?;
        self.unpack(&file, &work.0)
    }

    /// The newest package whose name starts with `prefix` and ends with `suffix`, as in
    /// `newest("linux-image-6.12.", "-cloud-amd64")`, and no letters between them (`-cloud` or `-rt` before `-amd64`
    /// is another line): by the numbers in the names, as the mirror or, when that cannot be asked, the cache has them.
    pub fn newest(&self, prefix: &str, suffix: &str) -> Result<String> {
        PackageSpec::parse(prefix)?;
        let pick = |names: Vec<String>| {
            let fitting = names.into_iter().filter(|name| {
                let middle = name.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(suffix));
                middle.is_some_and(is_version)
            });
            fitting.max_by(|a, b| compare_numbered(a, b))
        };
        let reason = match self.refresh_lists(LISTS_MAX_AGE) {
            Ok(()) => match pick(lines(&self.apt("apt-cache", &["pkgnames", prefix], None)?)) {
                Some(found) => return Ok(found),
                None => anyhow::anyhow!("the mirror has none"),
            },
            Err(error) => error,
        };
        let cached = self.folders().into_iter().filter_map(|name| Some(name.split_once('_')?.0.to_owned()));
        pick(cached.collect()).ok_or(reason).with_context(|| format!("no package {prefix}*{suffix}"))
    }

    /// Folders of the cache, unfinished ones excepted.
    fn folders(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.folder) else { return Vec::new() };
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    fn cached(&self, spec: &PackageSpec) -> Option<PathBuf> {
        let fitting = self.folders().into_iter().filter(|name| spec.matches(name));
        fitting.max_by(|a, b| compare_numbered(a, b)).map(|name| self.folder.join(name))
    }

    /// Downloads into `work`; the package file.
    fn download(&self, spec: &PackageSpec, work: &Path) -> Result<PathBuf> {
        let argument = spec.apt_argument();
        let attempt = || self.apt("apt-get", &["download", &argument], Some(work));
        self.refresh_lists(LISTS_MAX_AGE)?;
        if let Err(first) = attempt() {
            // The mirror may have moved on since.
            self.refresh_lists(Duration::ZERO).with_context(|| format!("{first:#}"))?;
            attempt()?;
        }
        let entries = fs::read_dir(work).with_context(|| format!("reading {}", work.display()))?;
        let mut files = entries.flatten().map(|entry| entry.path());
        files
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("`apt-get download {argument}` left no package file"))
    }

    /// Unpacks `file` and moves the result into the cache.
    fn unpack(&self, file: &Path, work: &Path) -> Result<PathBuf> {
        let stem =
            file.file_stem().and_then(|stem| stem.to_str()).context("a package file without a name")?;
        // apt writes the colon of an epoch as %3a.
        let target = self.folder.join(stem.replace("%3a", ":"));
        let tree = work.join("tree");
        let mut command = Command::new("dpkg");
        command.arg("-x").arg(file).arg(&tree);
        run(&mut command)?;
        match fs::rename(&tree, &target) {
            // Another process was faster.
            Err(_) if target.is_dir() => {}
            other => other.with_context(|| format!("moving a package to {}", target.display()))?,
        }
        Ok(target)
    }

    /// The package lists of this cache, in the layout apt wants.
    fn lists_folder(&self) -> PathBuf {
        self.folder.join("lists")
    }

    /// Fetches the package lists, foreign architectures included, unless they are at most `max_age` old.
    ///
    /// Errors when they cannot be fetched and there are none from before.
    fn refresh_lists(&self, max_age: Duration) -> Result<()> {
        let folder = self.lists_folder();
        let stamp = folder.join("fetched");
        if age_of(&stamp).is_some_and(|age| age < max_age) {
            return Ok(());
        }
        for sub in ["partial", "archives/partial"] {
            let sub = folder.join(sub);
            fs::create_dir_all(&sub).with_context(|| format!("creating {}", sub.display()))?;
        }
        let _lock = lock_file(&folder.join("fetching"))?;
        if age_of(&stamp).is_some_and(|age| age < max_age) {
            // Whoever held the lock has fetched them.
            return Ok(());
        }
        // One unreachable third-party source fails the whole command although Debian's own lists came.
        let outcome = self.apt("apt-get", &["update"], None);
        let names = self.apt("apt-cache", &["pkgnames", "linux-image-"], None)?;
        if lines(&names).is_empty() {
            outcome?;
            bail!("the package lists name no linux-image: is this a Debian machine?");
        }
        fs::write(&stamp, "").with_context(|| format!("writing {}", stamp.display()))
    }

    /// Runs a tool of apt; its standard output.
    fn apt(&self, tool: &str, arguments: &[&str], folder: Option<&Path>) -> Result<String> {
        let mut command = Command::new(tool);
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        for option in ["APT::Sandbox::User=root", "Acquire::Retries=3", "Acquire::http::Timeout=30"] {
            command.args(["-o", option]);
        }
        let lists = std::path::absolute(self.lists_folder()).context("the folder for package lists")?;
        command.arg("-o").arg(format!("Dir::State::lists={}", lists.display()));
        command.arg("-o").arg(format!("Dir::Cache={}", lists.display()));
        for arch in ["amd64", "arm64"] {
            command.args(["-o", &format!("APT::Architectures::={arch}")]);
        }
        command.args(arguments);
        if let Some(folder) = folder {
            command.current_dir(folder);
        }
        Ok(String::from_utf8_lossy(&run(&mut command)?.stdout).into_owned())
    }
}

/// How long ago a file was written; None when it does not exist.
fn age_of(path: &Path) -> Option<Duration> {
    fs::metadata(path).and_then(|meta| meta.modified()).ok()?.elapsed().ok()
}

/// A folder beside the packages for what is not whole yet; gone with the value.
struct WorkFolder(PathBuf);

impl WorkFolder {
    fn new(cache: &Path) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, atomic::Ordering::Relaxed);
        let path = fs::canonicalize(cache)
            .with_context(|| format!("opening {}", cache.display()))?
            .join(format!(".work-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn lines(output: &str) -> Vec<String> {
    output.lines().map(|line| line.trim().to_owned()).collect()
}

/// Runs `command`; an error names it and carries the last line it wrote that says why.
fn run(command: &mut Command) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = match command.output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!(
                "`{program}` is not on this machine: guest kernels come from Debian's mirror, by way of apt"
            )
        }
        other => other.with_context(|| format!("running {program}"))?,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let why =
            said.lines().rev().find(|line| line.starts_with("E:")).or(said.lines().last()).unwrap_or("");
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
        let tail =
            arguments.iter().rev().take(2).rev().map(|part| part.as_ref()).collect::<Vec<_>>().join(" ");
        bail!("`{program} {tail}` failed ({}): {}", output.status, why.trim());
    }
    Ok(output)
}

/// Whether the middle of a package name is a version such as `0-56` or `117+deb12`, and no flavour.
fn is_version(middle: &str) -> bool {
    let (number, rebuild) = middle.split_once('+').unwrap_or((middle, ""));
    number.starts_with(|c: char| c.is_ascii_digit())
        && number.chars().all(|c| c.is_ascii_digit() || "-.".contains(c))
        && rebuild.chars().all(|c| c.is_ascii_alphanumeric())
}

/// Orders names by their parts, numbers as numbers: 6.1.0-9 before 6.1.0-10.
fn compare_numbered(a: &str, b: &str) -> Ordering {
    let (a, b) = (parts(a), parts(b));
    for (left, right) in a.iter().zip(&b) {
        let order = match (left.parse::<u64>(), right.parse::<u64>()) {
            (Ok(left), Ok(right)) => left.cmp(&right),
            _ => left.cmp(right),
        };
        if order != Ordering::Equal {
            return order;
        }
    }
    a.len().cmp(&b.len())
}

/// Splits a name where digits begin and end.
fn parts(name: &str) -> Vec<&str> {
    name.as_bytes()
        .chunk_by(|a, b| a.is_ascii_digit() == b.is_ascii_digit())
        .filter_map(|chunk| std::str::from_utf8(chunk).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_specs() {
        let spec = PackageSpec::parse("linux-image-cloud-arm64:arm64=6.1.170-3").unwrap();
        assert_eq!((spec.name.as_str(), spec.arch.as_deref()), ("linux-image-cloud-arm64", Some("arm64")));
        assert_eq!(spec.version.as_deref(), Some("6.1.170-3"));
        assert_eq!(spec.apt_argument(), "linux-image-cloud-arm64:arm64=6.1.170-3");
        for bad in ["", "../x", "a/b", "a=", "a:", "-o=x", "a b"] {
            assert!(PackageSpec::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn matches_cache_folders() {
        let any = PackageSpec::parse("busybox-static").unwrap();
        assert!(any.matches("busybox-static_1:1.35.0-4_amd64"));
        assert!(any.matches("busybox-static_1:1.35.0-4_all"));
        assert!(!any.matches("busybox-static_1:1.35.0-4_arm64"));
        assert!(!any.matches("busybox_1:1.35.0-4_amd64"));
        assert!(!any.matches(".work-1-0"));
        let pinned = PackageSpec::parse("busybox-static=2").unwrap();
        assert!(!pinned.matches("busybox-static_1_amd64"));
        assert!(pinned.matches("busybox-static_2_amd64"));
    }

    #[test]
    fn tells_versions_from_flavours() {
        assert!(["117+deb12", "0-56", "9"].into_iter().all(is_version));
        assert!(
            ["0-56-cloud", "117+deb12-rt", "", "-", "cloud"].into_iter().all(|middle| !is_version(middle))
        );
    }

    #[test]
    fn orders_kernel_names() {
        let newer = |a, b| assert_eq!(compare_numbered(a, b), Ordering::Greater, "{a} {b}");
        newer("linux-image-6.12.117+deb12-cloud-amd64", "linux-image-6.12.99+deb12-cloud-amd64");
        newer("linux-image-6.1.0-56-cloud-amd64", "linux-image-6.1.0-9-cloud-amd64");
        newer("linux-image-6.12.1", "linux-image-6.2.1");
    }
}
