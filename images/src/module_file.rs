//! What a kernel module file says of itself, read without a kernel: its name, what it depends on, which kernel it was
//! made for; and the modules it needs, found and ordered.
//!
//! A `.ko` is a relocatable ELF file whose section `.modinfo` is a list of NUL-terminated `key=value` strings
//! (include/linux/moduleparam.h, scripts/mod/modpost.c). Distributions compress them.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::initramfs::GuestModule;

/// A module larger than this is none; the largest of a distribution (amdgpu, with debug information) has 400 MiB.
const MAX_SIZE: u64 = 1 << 30;
/// Most files looked at in search of dependencies; a distribution has about 5000 modules.
const MAX_FILES: usize = 100_000;
/// `kernel/drivers/net/ethernet/...` is less than half as deep.
const MAX_DEPTH: usize = 16;
/// Endings of module files.
const SUFFIXES: [&str; 4] = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"];
/// Memory for the dictionary of an xz file, in KiB; the kernel's build uses 2 MiB (scripts/Makefile.modinst).
const XZ_MEMORY_KIB: u32 = 256 << 10;

/// What a module says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModuleInfo {
    /// What the kernel will call it.
    pub name: String,
    /// The kernel it was made for: release and build options.
    pub vermagic: String,
    /// Names of the modules it needs.
    pub depends: Vec<String>,
    /// Names of its parameters.
    pub parameters: Vec<String>,
    /// It carries the checksums of the symbols it uses, by which a kernel with `modversions` can tell whether it fits.
    pub has_versions: bool,
}

/// Why a module does not fit a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misfit {
    /// The module.
    pub module: String,
    /// What it was made for.
    pub vermagic: String,
    /// Release of the kernel.
    pub release: String,
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { module, vermagic, release } = self;
        write!(f, "Module {module} does not fit kernel {release}: its vermagic is {vermagic:?}")
    }
}

impl std::error::Error for Misfit {}

impl ModuleInfo {
    /// Reads the content of an uncompressed `.ko`.
    ///
    /// # Errors
    /// It is no relocatable 64-bit little-endian ELF file, is cut off, or has no `.modinfo`.
    pub fn parse(content: &[u8]) -> Result<Self> {
        let sections = sections(content)?;
        let section = |name: &[u8]| sections.iter().find(|section| section.name == name);
        let text = section(b".modinfo").context("it has no section .modinfo: not a kernel module")?.content;
        let mut info = Self::default();
        for entry in text.split(|byte| *byte == 0) {
            let entry = String::from_utf8_lossy(entry);
            let Some((key, value)) = entry.split_once('=') else { continue };
            match key {
                "name" => info.name = value.to_owned(),
                "vermagic" => info.vermagic = value.trim().to_owned(),
                "depends" => {
                    info.depends = value.split(',').filter(|n| !n.is_empty()).map(canonical).collect()
                }
                "parm" => info.parameters.push(value.split(':').next().unwrap_or_default().to_owned()),
                _ => {}
            }
        }
        ensure!(!info.vermagic.is_empty(), "it does not say which kernel it was made for (vermagic)");
        info.has_versions = section(b"__versions").is_some() || section(b"__version_ext_crcs").is_some();
        Ok(info)
    }

    /// Whether a kernel of this release takes the module, as far as that can be told without the kernel's own
    /// symbol checksums.
    ///
    /// The kernel compares the words of its vermagic with the module's, the release excepted if it has `modversions`
    /// and the module checksums (`same_magic` in kernel/module/version.c). Another version in the base numbers
    /// (6.1, 6.12) never fits then either, as no checksum of `struct module` outlives that.
    ///
    /// # Errors
    /// It does not fit.
    pub fn check_fits(&self, release: &str) -> Result<(), Misfit> {
        let own = self.vermagic.split_whitespace().next().unwrap_or_default();
        let by_checksum = self.has_versions && self.vermagic.contains(" modversions");
        if own == release || (by_checksum && base_version(own) == base_version(release)) {
            return Ok(());
        }
        Err(Misfit {
            module: self.name.clone(),
            vermagic: self.vermagic.clone(),
            release: release.to_owned(),
        })
    }
}

/// The first two numbers: `6.1` of `6.1.0-56-cloud-amd64`.
fn base_version(release: &str) -> Vec<&str> {
    release.split(['.', '-', '+']).take(2).collect()
}

/// As the kernel writes it: hyphens in file names are underscores in names.
fn canonical(name: &str) -> String {
    name.trim().replace('-', "_")
}

/// A section of an ELF file.
struct Section<'a> {
    name: &'a [u8],
    content: &'a [u8],
}

/// The sections of a relocatable ELF file (System V ABI, chapter 4), those without content left out.
fn sections(file: &[u8]) -> Result<Vec<Section<'_>>> {
    const ET_REL: u16 = 1;
    const SHT_NOBITS: u32 = 8;
    ensure!(file.starts_with(b"\x7fELF"), "it is no ELF file");
    // EI_CLASS and EI_DATA: 64 bits, little-endian.
    ensure!(file.get(4..6) == Some(&[2, 1]), "it is no 64-bit little-endian ELF file");
    let cut_off = || anyhow!("it is cut off");
    let half = |at: usize| bytes(file, at).map(u16::from_le_bytes);
    ensure!(half(16).ok_or_else(cut_off)? == ET_REL, "it is an ELF file, but not a relocatable one");
    let table = bytes(file, 40).map(u64::from_le_bytes).ok_or_else(cut_off)?;
    let (entry_size, count, names) = (half(58), half(60), half(62));
    let (Some(entry_size), Some(count), Some(names)) = (entry_size, count, names) else { bail!(cut_off()) };
    let header = |index: u16| -> Option<(usize, &[u8])> {
        let at = usize::try_from(table).ok()?.checked_add(usize::from(index) * usize::from(entry_size))?;
        let header = file.get(at..at.checked_add(64)?)?;
        let name = u32::from_le_bytes(bytes(header, 0)?) as usize;
        let kind = u32::from_le_bytes(bytes(header, 4)?);
        let offset = usize::try_from(u64::from_le_bytes(bytes(header, 24)?)).ok()?;
        let size = usize::try_from(u64::from_le_bytes(bytes(header, 32)?)).ok()?;
        let content = if kind == SHT_NOBITS { &[][..] } else { file.get(offset..offset.checked_add(size)?)? };
        Some((name, content))
    };
    let (_, names) = header(names).ok_or_else(cut_off)?;
    (0..count)
        .map(|index| {
            let (name, content) = header(index)?;
            let name = names.get(name..)?.split(|byte| *byte == 0).next()?;
            Some(Section { name, content })
        })
        .collect::<Option<Vec<_>>>()
        .ok_or_else(cut_off)
}

fn bytes<const N: usize>(file: &[u8], at: usize) -> Option<[u8; N]> {
    file.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// A module file, read and uncompressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleFile {
    /// Where it is.
    pub path: PathBuf,
    /// What it says of itself.
    pub info: ModuleInfo,
    /// The uncompressed `.ko`.
    pub content: Vec<u8>,
}

impl ModuleFile {
    /// Reads `FILE.ko`, `.ko.xz`, `.ko.zst` or `.ko.gz`.
    ///
    /// # Errors
    /// It cannot be read, or is no module; the error names it.
    pub fn read(path: &Path) -> Result<Self> {
        let wrong = || format!("Cannot use module {}", path.display());
        let content = File::open(path).map_err(Into::into).and_then(unpack).with_context(wrong)?;
        let mut info = ModuleInfo::parse(&content).with_context(wrong)?;
        if info.name.is_empty() {
            // Before Linux 4.13 the file's name was all there was.
            info.name = module_name(path).unwrap_or_default();
        }
        Ok(Self { path: path.to_owned(), info, content })
    }
}

/// The module's name according to the file's; None if it is no module.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix)).map(canonical)
}

/// Reads a module file, packed or not: what it is shows at its beginning.
fn unpack(file: File) -> Result<Vec<u8>> {
    let mut packed = Vec::new();
    file.take(MAX_SIZE).read_to_end(&mut packed)?;
    let mut content = Vec::new();
    if packed.starts_with(b"\xfd7zXZ\0") {
        let reader = lzma_rust2::XzReader::new_mem_limit(&packed[..], false, XZ_MEMORY_KIB);
        reader.take(MAX_SIZE).read_to_end(&mut content)?;
    } else if packed.starts_with(b"\x28\xb5\x2f\xfd") {
        let reader = ruzstd::decoding::StreamingDecoder::new(&packed[..])?;
        reader.take(MAX_SIZE).read_to_end(&mut content)?;
    } else if packed.starts_with(b"\x1f\x8b") {
        flate2::read::GzDecoder::new(&packed[..]).take(MAX_SIZE).read_to_end(&mut content)?;
    } else {
        return Ok(packed);
    }
    Ok(content)
}

/// A module the user asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedModule {
    /// The file.
    pub path: PathBuf,
    /// Parameters as `insmod` takes them, separated by spaces.
    pub parameters: String,
}

/// The modules asked for and those they need, each behind what it needs and otherwise in the order given.
///
/// A module is looked for among those given, then beside the one that needs it, then in `folder` and below.
///
/// # Errors
/// A file is no module, a needed one is nowhere, or modules need each other in a circle.
pub fn resolve(wanted: &[WantedModule], folder: Option<&Path>) -> Result<Vec<(ModuleFile, String)>> {
    let mut resolver = Resolver { given: BTreeMap::new(), below: None, folder, found: Vec::new() };
    let mut names = Vec::new();
    for module in wanted {
        let file = ModuleFile::read(&module.path)?;
        let name = file.info.name.clone();
        if resolver.given.insert(name.clone(), (file, module.parameters.clone())).is_some() {
            bail!("Module {name} is given twice");
        }
        names.push(name);
    }
    for name in names {
        // One that another needed is in already.
        if let Some((file, parameters)) = resolver.given.remove(&name) {
            resolver.add(file, parameters, &mut Vec::new())?;
        }
    }
    Ok(resolver.found)
}

struct Resolver<'a> {
    /// Modules the user gave that are not in the result yet.
    given: BTreeMap<String, (ModuleFile, String)>,
    /// Modules in `folder`, by name; searched when first needed.
    below: Option<BTreeMap<String, PathBuf>>,
    folder: Option<&'a Path>,
    /// The result so far.
    found: Vec<(ModuleFile, String)>,
}

impl Resolver<'_> {
    /// Adds `file` behind what it needs. `chain` has the names of those on whose behalf.
    fn add(&mut self, file: ModuleFile, parameters: String, chain: &mut Vec<String>) -> Result<()> {
        chain.push(file.info.name.clone());
        for name in &file.info.depends {
            if self.found.iter().any(|(found, _)| found.info.name == *name) {
                continue;
            }
            if chain.contains(name) {
                bail!("Modules {} need each other in a circle", chain.join(", "));
            }
            let (needed, parameters) = match self.given.remove(name) {
                Some(given) => given,
                None => (ModuleFile::read(&self.find(name, &file)?)?, String::new()),
            };
            self.add(needed, parameters, chain)?;
        }
        chain.pop();
        self.found.push((file, parameters));
        Ok(())
    }

    fn find(&mut self, name: &str, needed_by: &ModuleFile) -> Result<PathBuf> {
        let beside = needed_by.path.parent().unwrap_or(Path::new("."));
        let mut files = BTreeMap::new();
        collect(beside, 1, &mut files);
        if let Some(path) = files.remove(name) {
            return Ok(path);
        }
        let below = self.below.get_or_insert_with(|| {
            let mut files = BTreeMap::new();
            if let Some(folder) = self.folder {
                collect(folder, MAX_DEPTH, &mut files);
            }
            files
        });
        below.get(name).cloned().with_context(|| {
            let whose = &needed_by.info.name;
            format!("Module {whose} needs module {name}, which is neither beside it nor in --module-dir")
        })
    }
}

/// The file of the module of this name in `folder` or below.
pub fn find(name: &str, folder: &Path) -> Option<PathBuf> {
    let mut files = BTreeMap::new();
    collect(folder, MAX_DEPTH, &mut files);
    files.remove(name)
}

/// Modules in `folder` and `depth - 1` levels below, by name. Links to folders are not followed.
fn collect(folder: &Path, depth: usize, files: &mut BTreeMap<String, PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if files.len() >= MAX_FILES {
            return;
        }
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if depth > 1 {
                collect(&path, depth - 1, files);
            }
        } else if let Some(name) = module_name(&path) {
            files.entry(name).or_insert(path);
        }
    }
}

impl From<(ModuleFile, String)> for GuestModule {
    fn from((file, parameters): (ModuleFile, String)) -> Self {
        Self { name: file.info.name, content: file.content, parameters, kept: false }
    }
}

#[cfg(test)]
#[path = "module_file_tests.rs"]
mod tests;
