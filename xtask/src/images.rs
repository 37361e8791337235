//! `cargo xtask images`: prepares or lists guest images.

use crate::{build, setup};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use images::host_packages::Purpose;
use images::kernel::{ARM64_LINES, Headers, LINES};
use images::{Built, Cache, KernelPackage, modules, programs};
use std::path::Path;
use std::process::{Command, Stdio};

/// See the module.
#[derive(Args)]
pub struct Options {
    /// What to prepare [default: everything the tests need]
    #[arg(value_name = "NAME")]
    names: Vec<String>,

    /// List the names and what each stands for
    #[arg(long)]
    list: bool,
}

/// Names beside the kernels', and what they stand for.
const OTHERS: [(&str, &str); 4] = [
    ("programs", "programs that the tests run in guests"),
    ("lab", "the helper Linux for hosts without usable KVM"),
    ("oracle", "a kernel with the in-kernel kmemleak, built from source; takes minutes"),
    ("frame-pointers", "a kernel without ORC and BTF, built from source; takes minutes"),
];

/// Prepares the images and prints where they are.
pub fn run(options: &Options) -> Result<()> {
    if options.list {
        for line in LINES {
            println!("{line:<12} Debian's newest kernel of that line, and test modules for it");
        }
        for line in ARM64_LINES {
            println!("{line:<16} the same of arm64");
        }
        println!("{:<12} the same of an exact release, such as 6.1.0-47-cloud", "RELEASE");
        for (name, what) in OTHERS {
            println!("{name:<12} {what}");
        }
        return Ok(());
    }
    let names: Vec<&str> = if options.names.is_empty() {
        let kernels = LINES.iter().chain(ARM64_LINES).copied().chain(["6.1.0-47-cloud"]);
        kernels.chain(OTHERS.map(|(name, _)| name)).collect()
    } else {
        options.names.iter().map(String::as_str).collect()
    };
    if let Some(name) = names.iter().find(|name| !is_known(name)) {
        bail!("There is no image {name}; --list lists them");
    }
    setup::install(&[Purpose::Guests])?;
    if names.iter().any(|name| name.ends_with("-arm64")) {
        setup::install(&[Purpose::Arm64])?;
    }
    let cache = Cache::of_workspace();
    for name in names {
        match name {
            "programs" => {
                for name in programs::ALL {
                    line("program", &programs::build(&cache, name)?);
                }
            }
            "lab" => prepare_lab(&cache)?,
            "oracle" => prepare_built(&cache, name, Built::oracle)?,
            "frame-pointers" => prepare_built(&cache, name, Built::frame_pointers)?,
            kernel => prepare_kernel(&cache, kernel)?,
        }
    }
    Ok(())
}

/// Whether it is one of the names, or may be a kernel's release.
fn is_known(name: &str) -> bool {
    let is_release = name.starts_with(|c: char| c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || ".-+".contains(c));
    is_release || OTHERS.iter().any(|(other, _)| *other == name)
}

fn line(what: &str, path: &Path) {
    println!("{what:<9} {}", path.display());
}

fn prepare_kernel(cache: &Cache, name: &str) -> Result<()> {
    let kernel = KernelPackage::fetch(cache, name)?;
    let headers = Headers::fetch(cache, &kernel)?;
    println!("{name}: {}", kernel.release);
    line("kernel", &kernel.vmlinuz);
    line("modules", &kernel.modules_dir);
    line("headers", &headers.build);
    prepare_modules(cache, &headers)
}

/// The binary does that itself, at the latest when it first needs the lab.
fn prepare_lab(cache: &Cache) -> Result<()> {
    let folder = cache.folder().join("lab");
    let mut doctor = Command::new(build::binary()?);
    doctor.args(["doctor", "--prepare-lab"]).env("KLEAK_LAB_DIR", &folder).stdout(Stdio::null());
    // That no guest runs here even so, exit code 4, is for the doctor to say.
    let status = doctor.status().context("Cannot run kleak-vmm")?;
    ensure!(matches!(status.code(), Some(0 | 4)), "kleak-vmm doctor --prepare-lab ended with {status}");
    line("lab", &folder);
    Ok(())
}

fn prepare_built(cache: &Cache, name: &str, build: impl Fn(&Cache) -> Result<Built>) -> Result<()> {
    setup::install(&[Purpose::Oracle])?;
    let kernel = build(cache)?;
    println!("{name}: {}", kernel.release);
    line("kernel", &kernel.bzimage);
    line("vmlinux", &kernel.vmlinux);
    if let Some(types) = &kernel.types {
        line("types", types);
    }
    prepare_modules(cache, &kernel.headers)
}

fn prepare_modules(cache: &Cache, headers: &Headers) -> Result<()> {
    for module in modules::of(headers) {
        line("module", &modules::own(cache, headers, module)?);
    }
    line("module", &modules::kmemleak_test(cache, headers)?);
    let (build, makefile) = (headers.build.display(), headers.makefile.display());
    let cross = if headers.is_arm64() { " ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu-" } else { "" };
    println!("  your own: make -C {build} -f {makefile}{cross} M=$PWD modules");
    Ok(())
}
