//! Kernels built from Debian's source, whose vmlinux is kept: the oracle, with the in-kernel kmemleak and a symbol table to
//! compare with, and one as people build them who need neither ORC nor BTF.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::cache::Cache;
use crate::command::run;
use crate::kernel::Headers;
use crate::source;

/// The oracle's configuration, on top of `allnoconfig`.
const ORACLE: &str = include_str!("../kernels/oracle.config");
/// What the kernel with frame pointers has otherwise.
const FRAME_POINTERS: &str = include_str!("../kernels/frame-pointers.config");
/// Changes whenever the recipe does.
const RECIPE: u32 = 1;
/// Debian builds its 6.1 kernels with it.
const COMPILER: &str = "gcc-12";
/// Structure layouts of a kernel without BTF, in its folder.
const TYPES: &str = "types.btf";

/// A built kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// `uname -r` in it.
    pub release: String,
    /// The bzImage.
    pub bzimage: PathBuf,
    /// The ELF file it was made from, with its symbol table.
    pub vmlinux: PathBuf,
    /// Structure layouts, which it has not in it.
    pub types: Option<PathBuf>,
    /// To build modules for it.
    pub headers: Headers,
}

impl Built {
    /// The oracle, built where it is not in the cache: about six minutes on two cores.
    ///
    /// # Errors
    /// The source cannot be fetched, a tool is missing, or the build fails.
    pub fn oracle(cache: &Cache) -> Result<Self> {
        Self::build(cache, "oracle", ORACLE)
    }

    /// The kernel with frame pointers.
    ///
    /// # Errors
    /// As [`Self::oracle`].
    pub fn frame_pointers(cache: &Cache) -> Result<Self> {
        Self::build(cache, "frame-pointers", &changed(ORACLE, FRAME_POINTERS))
    }

    fn build(cache: &Cache, name: &str, config: &str) -> Result<Self> {
        let source = source::tree(cache)?;
        let entry = format!("{name}-{}", source::VERSION);
        let build = cache.entry(&entry, (RECIPE, config, &source), |folder| {
            make_kernel(&source, folder, config)
                .with_context(|| format!("Cannot build the kernel {name}"))?;
            if !config.lines().any(|line| line == "CONFIG_DEBUG_INFO_BTF=y") {
                let mut pahole = Command::new("pahole");
                pahole.arg("--btf_encode_detached").arg(folder.join(TYPES)).arg(folder.join("vmlinux"));
                run(&mut pahole).with_context(|| format!("Cannot make the types of the kernel {name}"))?;
            }
            prune(folder).context("Cannot tidy up behind the kernel's build")
        })?;
        let release_file = build.join("include/config/kernel.release");
        let release = fs::read_to_string(&release_file)
            .with_context(|| format!("Cannot read {}", release_file.display()))?
            .trim()
            .to_owned();
        Ok(Self {
            bzimage: build.join("arch/x86/boot/bzImage"),
            vmlinux: build.join("vmlinux"),
            types: Some(build.join(TYPES)).filter(|types| types.is_file()),
            headers: Headers { build, makefile: source.join("Makefile"), release: release.clone() },
            release,
        })
    }
}

/// A configuration with other settings for some of its options.
fn changed(config: &str, changes: &str) -> String {
    let other: Vec<&str> = changes.lines().filter_map(option).collect();
    let kept = config.lines().filter(|line| option(line).is_none_or(|name| !other.contains(&name)));
    kept.chain(changes.lines()).map(|line| format!("{line}\n")).collect()
}

/// The option that a line is about.
fn option(line: &str) -> Option<&str> {
    match line.strip_prefix("# CONFIG_") {
        Some(rest) => rest.strip_suffix(" is not set"),
        None => Some(line.strip_prefix("CONFIG_")?.split_once('=')?.0),
    }
}

fn make_kernel(source: &Path, folder: &Path, config: &str) -> Result<()> {
    let wanted = folder.join("wanted.config");
    fs::write(&wanted, config).with_context(|| format!("Cannot write {}", wanted.display()))?;
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let make = |targets: &[&str]| {
        let mut command = Command::new("make");
        command.arg("-C").arg(source).arg(format!("O={}", folder.display())).arg(format!("-j{jobs}"));
        command.arg(format!("CC={COMPILER}")).arg("--silent").args(targets).env("KCONFIG_ALLCONFIG", &wanted);
        for variable in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARCH", "CROSS_COMPILE", "KBUILD_OUTPUT"] {
            command.env_remove(variable);
        }
        run(&mut command).map(drop)
    };
    make(&["allnoconfig"])?;
    check_config(folder, config)?;
    make(&["bzImage", "modules"])
}

/// Kconfig drops what a dependency forbids without a word.
fn check_config(folder: &Path, config: &str) -> Result<()> {
    let path = folder.join(".config");
    let got = fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))?;
    let dropped: Vec<&str> = config
        .lines()
        .filter(|line| line.starts_with("CONFIG_") && !got.lines().any(|other| other == *line))
        .collect();
    ensure!(dropped.is_empty(), "Kconfig did not take {}", dropped.join(", "));
    Ok(())
}

/// Removes what only another build of the kernel would need, nine tenths of the folder.
fn prune(folder: &Path) -> Result<()> {
    run(Command::new("strip").arg("--strip-debug").arg(folder.join("vmlinux")))?;
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("Cannot read {}", folder.display()))? {
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() && path.extension().is_some_and(|end| end == "o" || end == "a") {
                fs::remove_file(&path).with_context(|| format!("Cannot remove {}", path.display()))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_win() {
        let config = changed(
            "# a comment\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=16\n",
            "# CONFIG_A is not set\nCONFIG_B=y\n",
        );
        assert_eq!(config, "# a comment\nCONFIG_C=16\n# CONFIG_A is not set\nCONFIG_B=y\n");
    }
}
