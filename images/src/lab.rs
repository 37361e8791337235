//! What the lab `svm` boots: a helper Linux with KVM modules, from Debian's newest 6.12 cloud kernel.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use introspect::image::KernelImage;

use crate::Cache;
use crate::cpio::CpioWriter;
use crate::module_file::{WantedModule, resolve};

/// Name of the lab's cache entry.
const ENTRY: &str = "svm";
/// Changes whenever this recipe does, so that what an older one made is made anew.
const RECIPE: u32 = 3;
/// The kernel line: its cloud flavour has what the lab needs built in (virtio over PCI, its serial ports).
const KERNEL_PREFIX: &str = "linux-image-6.12.";
const KERNEL_SUFFIX: &str = "-cloud-amd64";
/// The module the lab is for, whose file name the kernel's build derives from its source folder; and the driver of disks.
const MODULE_FILES: [&str; 2] = ["kvm-amd.ko", "virtio_blk.ko"];
/// Where the modules are in the archive; they are to be loaded in the order of their names.
const MODULE_FOLDER: &str = "lib/kleak";

/// The files of a prepared lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SvmLab {
    /// The kernel, unpacked: QEMU starts it at its PVH entry, which saves the decompressor's second.
    pub kernel: PathBuf,
    /// An initramfs archive with the modules.
    pub modules: PathBuf,
}

impl SvmLab {
    fn within(folder: &Path) -> Self {
        Self { kernel: folder.join("vmlinux"), modules: folder.join("modules.cpio") }
    }
}

/// The lab prepared in `folder`, if there is one.
pub fn prepared_svm(folder: &Path) -> Option<SvmLab> {
    Cache::new(folder).find(ENTRY, RECIPE).map(|place| SvmLab::within(&place))
}

/// Prepares the lab in `folder`, unless it is there already. Downloads about 60 MB, package lists included, from Debian's mirror.
///
/// # Errors
/// apt or the mirror cannot be reached, or the folder cannot be written to.
pub fn prepare_svm(folder: &Path) -> Result<SvmLab> {
    let place = Cache::new(folder).entry(ENTRY, RECIPE, make)?;
    Ok(SvmLab::within(&place))
}

/// Makes the lab in `work`.
fn make(work: &Path) -> Result<()> {
    let download = Cache::new(work.join("download"));
    let packages = download.packages();
    let package = packages.newest(KERNEL_PREFIX, KERNEL_SUFFIX)?;
    let tree = packages.fetch(&package)?;
    let lab = SvmLab::within(work);
    let kernel = find(&tree.join("boot"), |name| name.starts_with("vmlinuz-"), 1)?;
    let kernel = KernelImage::open(&kernel)?;
    fs::write(&lab.kernel, &kernel.elf).with_context(|| format!("Cannot write {}", lab.kernel.display()))?;
    write_modules(&tree.join("lib/modules"), &lab.modules)
        .with_context(|| format!("Cannot unpack the modules of {package}"))?;
    fs::remove_dir_all(download.folder())
        .with_context(|| format!("Cannot remove {}", download.folder().display()))
}

/// Writes the archive of [`MODULE_FILES`] and all they need.
fn write_modules(tree: &Path, archive: &Path) -> Result<()> {
    let wanted = MODULE_FILES.map(|file| {
        let path = find(tree, |name| name.starts_with(file), 10)?;
        Ok(WantedModule { path, parameters: String::new() })
    });
    let modules = resolve(&wanted.into_iter().collect::<Result<Vec<_>>>()?, Some(tree))?;
    let file = File::create(archive).with_context(|| format!("Cannot create {}", archive.display()))?;
    let mut cpio = CpioWriter::new(BufWriter::new(file));
    for (index, (module, _)) in modules.iter().enumerate() {
        let mut content = module.content[..unsigned_len(&module.content)].to_vec();
        hide_type_information(&mut content);
        cpio.file(&format!("{MODULE_FOLDER}/{index:02}-{}.ko", module.info.name), 0o644, &content)?;
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
