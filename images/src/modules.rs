//! Kernel modules, built for a kernel: our own under `images/modules`, and upstream's kmemleak test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, workspace};
use crate::command::run;
use crate::kernel::Headers;
use crate::source;

/// Builds the module `name` (as in its Kbuild's `obj-m`) of the folder `source` for the kernel of `headers`; the
/// `.ko`, without debug information.
///
/// # Errors
/// It does not compile; or a tool is missing.
pub fn build(cache: &Cache, headers: &Headers, source: &Path, name: &str) -> Result<PathBuf> {
    build_files(cache, headers, &read_sources(source)?, name)
}

fn build_files(cache: &Cache, headers: &Headers, files: &[(String, Vec<u8>)], name: &str) -> Result<PathBuf> {
    let entry = format!("module-{name}-{}", headers.release);
    let built = cache.entry(&entry, (files, &headers.build), |folder| {
        for (file, content) in files {
            fs::write(folder.join(file), content).with_context(|| format!("Cannot write {file}"))?;
        }
        make(headers, folder).with_context(|| format!("Cannot build {name} for {}", headers.release))?;
        let strip = format!("{}strip", headers.tools());
        run(Command::new(strip).arg("--strip-debug").arg(folder.join(format!("{name}.ko")))).map(drop)
    })?;
    Ok(built.join(format!("{name}.ko")))
}

/// Our own modules.
pub const OWN: [&str; 8] = ["annotated", "breaking", "churn", "clean", "growing", "leaky", "patch", "storm"];
/// Those of them that make page table entries of x86-64.
const X86_64_ONLY: [&str; 1] = ["breaking"];

/// Those of [`OWN`] that there are for a kernel.
pub fn of(headers: &Headers) -> impl Iterator<Item = &'static str> {
    let all = !headers.is_arm64();
    OWN.into_iter().filter(move |name| all || !X86_64_ONLY.contains(name))
}

/// One of [`OWN`].
///
/// # Errors
/// As [`build`].
pub fn own(cache: &Cache, headers: &Headers, name: &str) -> Result<PathBuf> {
    build(cache, headers, &workspace().join("images/modules").join(name), name)
}

/// Upstream's module that leaks for kmemleak to find, built for a kernel. The source is 6.1's for all kernels: later
/// ones also leak a per-CPU area.
///
/// # Errors
/// The source cannot be fetched, or the module does not compile.
pub fn kmemleak_test(cache: &Cache, headers: &Headers) -> Result<PathBuf> {
    const NAME: &str = "kmemleak-test";
    let source = source::files(cache, NAME, &["samples/kmemleak/kmemleak-test.c"])?;
    let mut files = read_sources(&source)?;
    files.push(("Kbuild".to_owned(), format!("obj-m := {NAME}.o\n").into_bytes()));
    build_files(cache, headers, &files, NAME)
}

/// The folder's files, by name.
fn read_sources(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let wrong = || format!("Cannot read the module's source {}", folder.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(wrong)? {
        let entry = entry.with_context(wrong)?;
        let Ok(name) = entry.file_name().into_string() else {
            bail!("a strange file name in {}", folder.display())
        };
        files.push((name, fs::read(entry.path()).with_context(wrong)?));
    }
    files.sort();
    Ok(files)
}

/// The kernel's build system on `folder`. Called with the source tree's own Makefile: the one that Debian's
/// package has for this works only under `/usr/src`.
fn make(headers: &Headers, folder: &Path) -> Result<()> {
    let folder = fs::canonicalize(folder).with_context(|| format!("Cannot open {}", folder.display()))?;
    let absolute =
        |path: &Path| fs::canonicalize(path).with_context(|| format!("Cannot open {}", path.display()));
    let mut command = Command::new("make");
    command.arg("-C").arg(absolute(&headers.build)?).arg("-f").arg(absolute(&headers.makefile)?);
    command.arg(format!("M={}", folder.display())).arg("modules");
    // Settings of an outer make or cargo must not reach the kernel's.
    for variable in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARCH", "CROSS_COMPILE", "KBUILD_OUTPUT"] {
        command.env_remove(variable);
    }
    if headers.is_arm64() {
        command.arg("ARCH=arm64").arg(format!("CROSS_COMPILE={}", headers.tools()));
    }
    run(&mut command).map(drop)
}
