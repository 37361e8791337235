//! What the labs boot: a helper Linux with KVM, from Debian's newest 6.12 cloud kernel of the lab's architecture.

use std::fmt;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result};
use introspect::image::KernelImage;

use crate::Cache;
use crate::cpio::CpioWriter;
use crate::module_file::{WantedModule, resolve};

/// Changes whenever this recipe does, so that what an older one made is made anew.
const RECIPE: u32 = 3;
/// The kernel line: its cloud flavour has what the labs need built in (virtio over PCI, serial ports).
const KERNEL_PREFIX: &str = "linux-image-6.12.";
/// Where the modules are in the archive; they are to be loaded in the order of their names.
const MODULE_FOLDER: &str = "lib/kleak";

/// An emulated machine with KVM, by the virtualisation it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lab {
    /// AMD's, emulated by QEMU.
    Svm,
    /// Intel's, emulated by Bochs.
    Vmx,
    /// arm64's, emulated by QEMU.
    Arm,
}

impl Lab {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Svm, Self::Vmx, Self::Arm];

    /// Its name, on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Svm => "svm",
            Self::Vmx => "vmx",
            Self::Arm => "arm",
        }
    }

    /// The architecture of its machine, as Rust names it.
    pub const fn arch(self) -> &'static str {
        match self {
            Self::Svm | Self::Vmx => "x86_64",
            Self::Arm => "aarch64",
        }
    }

    /// The same as Debian names it.
    const fn debian_arch(self) -> &'static str {
        match self {
            Self::Svm | Self::Vmx => "amd64",
            Self::Arm => "arm64",
        }
    }

    /// The module the lab is for, whose file name the kernel's build derives from its source folder (arm64 has KVM built in);
    /// and the driver of disks.
    const fn module_files(self) -> &'static [&'static str] {
        match self {
            Self::Svm => &["kvm-amd.ko", "virtio_blk.ko"],
            Self::Vmx => &["kvm-intel.ko"],
            Self::Arm => &["virtio_blk.ko"],
        }
    }
}

impl fmt::Display for Lab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Lab {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|lab| lab.name() == name);
        known.with_context(|| format!("there is no lab {name:?}"))
    }
}

/// The files of a prepared lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabFiles {
    /// The kernel. For QEMU a vmlinux, which it starts at its PVH entry: that saves the decompressor's second. For Bochs the
    /// bzImage, as boot loaders take it; for arm64 that is the Image.
    pub kernel: PathBuf,
    /// An initramfs archive with the modules; where the host's busybox is of another architecture, also with one.
    pub modules: PathBuf,
}

impl LabFiles {
    fn within(lab: Lab, folder: &Path) -> Self {
        let kernel = match lab {
            Lab::Svm => "vmlinux",
            Lab::Vmx | Lab::Arm => "vmlinuz",
        };
        Self { kernel: folder.join(kernel), modules: folder.join("modules.cpio") }
    }
}

/// The files of `lab` prepared in `folder`, if they are there.
pub fn prepared(lab: Lab, folder: &Path) -> Option<LabFiles> {
    Cache::new(folder).find(lab.name(), RECIPE).map(|place| LabFiles::within(lab, &place))
}

/// Prepares `lab` in `folder`, unless it is there already. Downloads about 60 MB, package lists included, from Debian's mirror.
///
/// # Errors
/// apt or the mirror cannot be reached, or the folder cannot be written to.
pub fn prepare(lab: Lab, folder: &Path) -> Result<LabFiles> {
    let place = Cache::new(folder).entry(lab.name(), RECIPE, |work| make(lab, work))?;
    Ok(LabFiles::within(lab, &place))
}

/// Makes the lab in `work`.
fn make(lab: Lab, work: &Path) -> Result<()> {
    let download = Cache::new(work.join("download"));
    let packages = download.packages();
    let arch = lab.debian_arch();
    let package = packages.newest(KERNEL_PREFIX, &format!("-cloud-{arch}"))?;
    let tree = packages.fetch(&format!("{package}:{arch}"))?;
    let files = LabFiles::within(lab, work);
    let packed = find(&tree.join("boot"), |name| name.starts_with("vmlinuz-"), 1)?;
    let kernel = match lab {
        Lab::Svm => KernelImage::open(&packed)?.elf,
        Lab::Vmx | Lab::Arm => {
            fs::read(&packed).with_context(|| format!("Cannot read {}", packed.display()))?
        }
    };
    fs::write(&files.kernel, &kernel).with_context(|| format!("Cannot write {}", files.kernel.display()))?;
    let busybox = match lab {
        Lab::Svm | Lab::Vmx => None,
        Lab::Arm => Some(packages.fetch("busybox-static:arm64")?.join("bin/busybox")),
    };
    write_modules(lab, &tree.join("lib/modules"), busybox.as_deref(), &files.modules)
        .with_context(|| format!("Cannot unpack the modules of {package}"))?;
    fs::remove_dir_all(download.folder())
        .with_context(|| format!("Cannot remove {}", download.folder().display()))
}

/// Writes the archive of the lab's modules and all they need, and the busybox for its guests.
fn write_modules(lab: Lab, tree: &Path, busybox: Option<&Path>, archive: &Path) -> Result<()> {
    let wanted = lab.module_files().iter().map(|file| {
        let path = find(tree, |name| name.starts_with(file), 10)?;
        Ok(WantedModule { path, parameters: String::new() })
    });
    let modules = resolve(&wanted.collect::<Result<Vec<_>>>()?, Some(tree))?;
    let file = File::create(archive).with_context(|| format!("Cannot create {}", archive.display()))?;
    let mut cpio = CpioWriter::new(BufWriter::new(file));
    for (index, (module, _)) in modules.iter().enumerate() {
        let mut content = module.content[..unsigned_len(&module.content)].to_vec();
        hide_type_information(&mut content);
        cpio.file(&format!("{MODULE_FOLDER}/{index:02}-{}.ko", module.info.name), 0o644, &content)?;
    }
    if let Some(busybox) = busybox {
        let content = fs::read(busybox).with_context(|| format!("Cannot read {}", busybox.display()))?;
        cpio.file("bin/busybox", 0o755, &content)?;
    }
    cpio.finish()?;
    Ok(())
}

/// Renames the section `.BTF`: a kernel that loads a module with one parses its own type information first, which
/// takes the lab a third of a second and serves only BPF.
fn hide_type_information(module: &mut [u8]) {
    const NAME: &[u8] = b"\0.BTF\0";
    if let Some(at) = module.windows(NAME.len()).rposition(|window| window == NAME) {
        module[at + 2] = b'-';
    }
}

/// The first file below `folder` whose name fits.
fn find(folder: &Path, fits: impl Fn(&str) -> bool + Copy, depth: usize) -> Result<PathBuf> {
    search(folder, fits, depth).with_context(|| format!("Cannot find it in {}", folder.display()))
}

fn search(folder: &Path, fits: impl Fn(&str) -> bool + Copy, depth: usize) -> Option<PathBuf> {
    let mut folders = Vec::new();
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let kind = entry.file_type().ok()?;
        if kind.is_dir() {
            folders.push(entry.path());
        } else if entry.file_name().to_str().is_some_and(fits) {
            return Some(entry.path());
        }
    }
    let depth = depth.checked_sub(1)?;
    folders.into_iter().find_map(|folder| search(&folder, fits, depth))
}

/// Length of a module without an appended signature, which takes the lab a while to check (Linux, `include/linux/module_signature.h`: a structure of 12
/// bytes, the last four of them the length of the signature, big endian, and a marker).
fn unsigned_len(bytes: &[u8]) -> usize {
    const MARKER: &[u8] = b"~Module signature appended~\n";
    let signed = bytes.strip_suffix(MARKER).and_then(|rest| {
        let (rest, length) = rest.split_last_chunk::<4>()?;
        let signature = u32::from_be_bytes(*length) as usize;
        rest.len().checked_sub(8)?.checked_sub(signature)
    });
    signed.unwrap_or(bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_off_what_costs_time() {
        let mut module = b"body".to_vec();
        assert_eq!(unsigned_len(&module), 4);
        module.extend([7; 5]);
        module.extend([0; 8]);
        module.extend(5_u32.to_be_bytes());
        module.extend(b"~Module signature appended~\n");
        assert_eq!(unsigned_len(&module), 4);
        let mut named = b".text\0.BTF_ids\0.BTF\0.data\0".to_vec();
        hide_type_information(&mut named);
        assert_eq!(named, b".text\0.BTF_ids\0.-TF\0.data\0");
        let mut lying = b"\xff\xff\xff\xff".to_vec();
        lying.extend(b"~Module signature appended~\n");
        assert_eq!(unsigned_len(&lying), lying.len());
    }
}
