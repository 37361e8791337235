//! The oracle: a small kernel with the in-kernel kmemleak, built from Debian's source, whose vmlinux is kept. What our
//! recovery and our scan find is compared with its `nm` and its kmemleak.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::cache::Cache;
use crate::command::run;
use crate::kernel::Headers;
use crate::source;

/// Its configuration, on top of `allnoconfig`.
const CONFIG: &str = include_str!("../kernels/oracle.config");
/// Changes whenever this recipe does.
const RECIPE: u32 = 1;
/// Debian builds its 6.1 kernels with it.
const COMPILER: &str = "gcc-12";

/// The built kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Oracle {
    /// `uname -r` in it.
    pub release: String,
    /// The bzImage.
    pub bzimage: PathBuf,
    /// The ELF file it was made from, with its symbol table.
    pub vmlinux: PathBuf,
    /// To build modules for it.
    pub headers: Headers,
}

impl Oracle {
    /// Builds it where it is not in the cache: about six minutes on two cores.
    ///
    /// # Errors
    /// The source cannot be fetched, a tool is missing, or the build fails.
    pub fn build(cache: &Cache) -> Result<Self> {
        let source = source::tree(cache)?;
        let name = format!("oracle-{}", source::VERSION);
        let build = cache.entry(&name, (RECIPE, CONFIG, &source), |folder| {
            make_kernel(&source, folder).context("Cannot build the oracle kernel")?;
            prune(folder).context("Cannot tidy up behind the oracle kernel's build")
        })?;
        let release_file = build.join("include/config/kernel.release");
        let release = fs::read_to_string(&release_file)
            .with_context(|| format!("Cannot read {}", release_file.display()))?
            .trim()
            .to_owned();
        Ok(Self {
            bzimage: build.join("arch/x86/boot/bzImage"),
            vmlinux: build.join("vmlinux"),
            headers: Headers { build, makefile: source.join("Makefile"), release: release.clone() },
            release,
        })
    }
}

fn make_kernel(source: &Path, folder: &Path) -> Result<()> {
    let wanted = folder.join("wanted.config");
    fs::write(&wanted, CONFIG).with_context(|| format!("Cannot write {}", wanted.display()))?;
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
    check_config(folder)?;
    make(&["bzImage", "modules"])
}

/// Kconfig drops what a dependency forbids without a word.
fn check_config(folder: &Path) -> Result<()> {
    let path = folder.join(".config");
    let got = fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))?;
    let dropped: Vec<&str> = CONFIG
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
