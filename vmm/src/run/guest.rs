//! What the guest is made of: kernel, initramfs, command line, rules.

use crate::arch::{CONSOLE, GUEST_PORT, KERNELS};
use crate::cli::Failure;
use crate::cli::options::RunOptions;
use crate::cli::values::{FileSpec, ModuleSpec};
use crate::lab;
use anyhow::{Context, Result};
use images::initramfs::{self, GuestFile, GuestModule, InitramfsSpec};
use images::module_file::{self, ModuleFile, WantedModule};
use introspect::image::KernelImage;
use introspect::kernel::Kernel;
use std::path::{Path, PathBuf};

/// The image's own error says which file and what is wrong with it; this adds the exit code.
fn unusable() -> Failure {
    Failure::usage("").hint(format!(
        "give {KERNELS} with kallsyms and BTF in it (types of one without BTF: --types); `kleak-vmm inspect` says what an image holds"
    ))
}

/// Opens and unpacks the kernel.
pub fn image(options: &RunOptions) -> Result<KernelImage> {
    KernelImage::open(&options.kernel_path()).with_context(unusable)
}

/// The file of `--types`.
pub fn types_file(path: Option<&Path>) -> Result<Option<Vec<u8>>> {
    path.map(|path| read(path, "types")).transpose()
}

/// Recovers what is in it, and in the file of its types.
pub fn recover(image: KernelImage, types: Option<Vec<u8>>) -> Result<Kernel> {
    let of_file = types.is_some();
    Kernel::recover_with(image, types).with_context(|| match of_file {
        true => Failure::usage("Cannot use the types of --types")
            .hint("make them of this build's vmlinux: pahole --btf_encode_detached FILE vmlinux"),
        false => unusable(),
    })
}

/// The kernel command line: ours first, so that the user's words win. A kernel that panicked waits: the machine is ended
/// there, so that each vCPU is still where it was; only a panic before there is a console gets as far as its restart.
pub fn cmdline(options: &RunOptions) -> String {
    let mut line = format!("console={CONSOLE} panic=30 random.trust_cpu=on");
    if !options.kaslr_enabled() && !options.cmdline.split_whitespace().any(|w| w == "nokaslr") {
        line.push_str(" nokaslr");
    }
    if !options.cmdline.is_empty() {
        line.push(' ');
        line.push_str(&options.cmdline);
    }
    line
}

/// How long the embedded init lets the guest settle before the scan it asks for: RCU callbacks and delayed work that
/// free what the modules left (kfree_rcu is batched for 5 s since 6.7), and the minimum age of what is reported.
pub const SETTLE_MS: u64 = 2000;
/// The same when modules were unloaded.
pub const SETTLE_WITH_MODULES_MS: u64 = 6000;

/// The initramfs: the user's, or the embedded one with modules, files and command, laid over the user's if there is one.
pub fn initrd(options: &RunOptions, release: &str, drivers: &[WantedModule]) -> Result<Vec<u8>> {
    let base = match options.initrd.as_ref().map(|path| read(path, "initrd")).transpose()? {
        Some(initrd) if !options.embedded_init() => return Ok(initrd),
        base => base,
    };
    let file = |spec: &FileSpec| GuestFile { host: spec.host.clone(), guest: spec.guest.clone() };
    let settle = if options.modules.is_empty() { SETTLE_MS } else { SETTLE_WITH_MODULES_MS };
    let busybox = initramfs::find_busybox();
    if busybox.is_none() && !options.quiet && lab::inside().is_none() {
        eprintln!(
            "kleak-vmm: warning: No static busybox on this host, so the guest has no shell; apt-get install busybox-static"
        );
    }
    let spec = InitramfsSpec {
        base,
        busybox,
        files: options.files.iter().map(file).collect(),
        modules: modules(options, release, drivers)?,
        exec: options.exec.clone(),
        // SAFETY: isatty takes a plain number.
        interactive: unsafe { libc::isatty(libc::STDIN_FILENO) } == 1,
        settle_ms: settle.max(options.min_age_ms + 500),
        scan_port: options.guest_port_enabled().then(|| GUEST_PORT.to_owned()),
    };
    initramfs::build(&spec).context("Cannot build the initramfs")
}

/// Drivers of disks, by the kernel's name of the module and of the driver in it, in the order of loading.
const DISK_DRIVERS: [(&str, &[u8]); 2] = [("virtio_mmio", b"virtio-mmio\0"), ("virtio_blk", b"virtio_blk\0")];

/// The modules by which our init drives the disks: those of the kernel's that are not built in.
pub fn drivers(options: &RunOptions, image: &KernelImage) -> Result<Vec<WantedModule>> {
    if options.disks.is_empty() || !options.embedded_init() {
        return Ok(Vec::new());
    }
    let modules = Path::new("lib/modules").join(image.release());
    // Where packages have it: boot/vmlinuz and lib/modules side by side.
    let kernel = options.kernel_path();
    let beside = kernel.parent().and_then(Path::parent).map(|root| root.join(&modules));
    let folders: Vec<PathBuf> =
        options.module_dir.iter().cloned().chain(beside).chain([Path::new("/").join(&modules)]).collect();
    let mut drivers = Vec::new();
    for (name, driver) in DISK_DRIVERS {
        let path = folders.iter().find_map(|folder| module_file::find(name, folder));
        match path {
            Some(path) => drivers.push(WantedModule { path, parameters: String::new() }),
            None if memchr::memmem::find(&image.elf, driver).is_some() => {}
            None => {
                let what = format!(
                    "The kernel has no driver {name} built in, which disks need, and it is no module"
                );
                let hint = format!("name the folder of the modules of {} with --module-dir", image.release());
                return Err(Failure::usage(what).hint(hint).into());
            }
        }
    }
    Ok(drivers)
}

/// The modules asked for and those they need, in the order of loading, behind the drivers. `release` is the kernel's.
fn modules(options: &RunOptions, release: &str, drivers: &[WantedModule]) -> Result<Vec<GuestModule>> {
    let wanted =
        |spec: &ModuleSpec| WantedModule { path: spec.path.clone(), parameters: spec.params.join(" ") };
    let asked: Vec<_> = options.modules.iter().map(wanted).collect();
    let resolve = |wanted: &[WantedModule]| {
        module_file::resolve(wanted, options.module_dir.as_deref()).with_context(|| {
            Failure::usage("")
                .hint("modules that others need are looked for beside those and in --module-dir")
        })
    };
    let kept: Vec<String> = resolve(drivers)?.into_iter().map(|(file, _)| file.info.name).collect();
    // A driver that was asked for, too, has its parameters from there.
    let given = |driver: &&WantedModule| !asked.iter().any(|module| module.path == driver.path);
    let wanted: Vec<_> = drivers.iter().filter(given).chain(&asked).cloned().collect();
    let found = resolve(&wanted)?;
    check_fit(&found, release)?;
    let module = |found: (ModuleFile, String)| {
        let kept = kept.contains(&found.0.info.name);
        GuestModule { kept, ..found.into() }
    };
    Ok(found.into_iter().map(module).collect())
}

/// Whether a kernel of this release takes the modules.
///
/// # Errors
/// Exit code 2: names one that it does not take.
pub fn check_fit(modules: &[(ModuleFile, String)], release: &str) -> Result<()> {
    for (file, _) in modules {
        let hint = format!("{} must be built against the headers of this kernel", file.path.display());
        file.info.check_fits(release).with_context(|| Failure::usage("").hint(hint))?;
    }
    Ok(())
}

fn read(path: &Path, what: &str) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| Failure::usage(format!("Cannot read {what} {}", path.display())))
}
