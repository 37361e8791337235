//! Debian's own kernels, unmodified, and the headers to build modules for them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cache::Cache;
use crate::command::run;
use crate::debian::DEFAULT_ARCH;

/// The lines of stock kernels that the tests boot, by the names [`KernelPackage::fetch`] takes.
pub const LINES: &[&str] = &["6.1-cloud", "6.1", "6.1-rt", "6.12-cloud", "6.12", "6.12-rt"];
/// The same of arm64.
pub const ARM64_LINES: &[&str] = &["6.1-cloud-arm64", "6.12-cloud-arm64"];

/// A kernel package, unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelPackage {
    /// `uname -r` in it, such as `6.1.0-47-cloud-amd64`.
    pub release: String,
    /// The bzImage; on arm64 the Image.
    pub vmlinuz: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
    /// Its modules: `/lib/modules/RELEASE`.
    pub modules_dir: PathBuf,
}

impl KernelPackage {
    /// A kernel from Debian's mirror: the newest of a line (`6.1-cloud`; see [`LINES`]), or an exact one
    /// (`6.1.0-47-cloud`). Names that end in `-arm64` are for that architecture.
    ///
    /// # Errors
    /// The mirror has none of that name, or cannot be reached and it is not in the cache.
    pub fn fetch(cache: &Cache, name: &str) -> Result<Self> {
        let packages = cache.packages();
        let (base, arch) = architecture(name);
        let package = match line(base) {
            Some((version, flavour)) => {
                packages.newest(&format!("linux-image-{version}."), &format!("{flavour}-{arch}"))
            }
            None => Ok(format!("linux-image-{base}-{arch}")),
        };
        let fetched = package.and_then(|package| Ok((packages.fetch(&of_its_own(&package))?, package)));
        let (root, package) = fetched.with_context(|| format!("Cannot get the kernel {name}"))?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        let kernel = Self {
            vmlinuz: root.join(format!("boot/vmlinuz-{release}")),
            config: root.join(format!("boot/config-{release}")),
            modules_dir: root.join(format!("lib/modules/{release}")),
            release,
        };
        ensure!(kernel.vmlinuz.is_file(), "The package {package} has no {}", kernel.vmlinuz.display());
        Ok(kernel)
    }

    /// Whether it is for arm64.
    pub fn is_arm64(&self) -> bool {
        is_arm64(&self.release)
    }

    /// Its vmlinux with debug information, which crash and drgn want: 300 MB to fetch, 1.8 GB unpacked.
    ///
    /// # Errors
    /// The mirror has it no longer, or cannot be reached.
    pub fn debug_vmlinux(&self, cache: &Cache) -> Result<PathBuf> {
        let wrong = || format!("Cannot get the debug information of {}", self.release);
        let package = format!("linux-image-{}-dbg:{}", self.release, architecture(&self.release).1);
        let root = cache.packages().fetch(&package).with_context(wrong)?;
        Ok(root.join(format!("usr/lib/debug/boot/vmlinux-{}", self.release)))
    }
}

/// A name without its architecture, and that.
fn architecture(name: &str) -> (&str, &str) {
    match name.strip_suffix("-arm64") {
        Some(base) => (base, "arm64"),
        None => (name.trim_end_matches("-amd64"), DEFAULT_ARCH),
    }
}

fn is_arm64(release: &str) -> bool {
    architecture(release).1 == "arm64"
}

/// The package with the architecture its name ends with.
fn of_its_own(package: &str) -> String {
    format!("{package}:{}", architecture(package).1)
}

/// Version and flavour when `name` is a line and no exact release: `6.1-cloud` is `6.1` and `-cloud`.
fn line(name: &str) -> Option<(&str, &str)> {
    let (version, flavour) = name.split_at(name.find('-').unwrap_or(name.len()));
    let numbers = version.split('.').filter(|part| part.parse::<u32>().is_ok()).count();
    (numbers == 2 && version.split('.').count() == 2 && flavour.parse::<i32>().is_err())
        .then_some((version, flavour))
}

/// What `make` needs to build a module for a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Headers {
    /// The folder with the kernel's configuration and `Module.symvers`; `make -C` goes here.
    pub build: PathBuf,
    /// The Makefile of its source tree; `make -f` takes this.
    pub makefile: PathBuf,
    /// `uname -r` of the kernel.
    pub release: String,
}

impl Headers {
    /// Whether the kernel is for arm64.
    pub fn is_arm64(&self) -> bool {
        is_arm64(&self.release)
    }

    /// What the names of the compiler and its tools for the kernel's architecture begin with.
    pub(crate) fn tools(&self) -> &'static str {
        if self.is_arm64() { "aarch64-linux-gnu-" } else { "" }
    }

    /// The headers of a stock kernel: its `linux-headers` package, the common one beside it and `linux-kbuild`, in
    /// one tree. Nothing is installed.
    ///
    /// # Errors
    /// The mirror has them no longer (it keeps only some versions), or cannot be reached.
    pub fn fetch(cache: &Cache, kernel: &KernelPackage) -> Result<Self> {
        let release = &kernel.release;
        let wrong = || format!("Cannot get the headers of {release}");
        let packages = cache.packages();
        // The build tools are the host's.
        let own = packages.fetch(&of_its_own(&format!("linux-headers-{release}"))).with_context(wrong)?;
        let flavour = Path::new("usr/src").join(format!("linux-headers-{release}"));
        let common = common_name(&own.join(&flavour)).with_context(wrong)?;
        let kbuild = kbuild_name(&own.join(&flavour)).with_context(wrong)?;
        let mut parts = vec![own.clone()];
        for package in [&common, &kbuild] {
            parts.push(packages.fetch(package).with_context(wrong)?);
        }
        let tree = cache.entry(&format!("headers-{release}"), &parts, |tree| {
            for part in &parts {
                // Hard links: the packages stay in the cache anyway.
                run(Command::new("cp").arg("-al").arg(part.join("usr")).arg(tree))?;
            }
            // With it the build wants to make BTF for the module, and a tool for that.
            let vmlinux = tree.join(&flavour).join("vmlinux");
            if vmlinux.exists() {
                fs::remove_file(&vmlinux).with_context(|| format!("Cannot remove {}", vmlinux.display()))?;
            }
            Ok(())
        })?;
        Ok(Self {
            build: tree.join(&flavour),
            makefile: tree.join("usr/src").join(common).join("Makefile"),
            release: release.clone(),
        })
    }
}

/// The common package, from the one line of the flavour's Makefile: `include /usr/src/linux-headers-...-common/Makefile`.
fn common_name(flavour: &Path) -> Result<String> {
    let path = flavour.join("Makefile");
    let text = fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))?;
    let name = text.trim().strip_prefix("include /usr/src/").and_then(|rest| rest.strip_suffix("/Makefile"));
    Ok(name.with_context(|| format!("{} is not as expected", path.display()))?.to_owned())
}

/// The package with the build tools, from a link of the flavour: `scripts -> ../../lib/linux-kbuild-.../scripts`.
fn kbuild_name(flavour: &Path) -> Result<String> {
    let path = flavour.join("scripts");
    let target = fs::read_link(&path).with_context(|| format!("Cannot read {}", path.display()))?;
    let name = target.parent().and_then(Path::file_name).and_then(|name| name.to_str());
    Ok(name.with_context(|| format!("{} is not as expected", path.display()))?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_exact_releases() {
        assert_eq!(line("6.1-cloud"), Some(("6.1", "-cloud")));
        assert_eq!(line("6.12"), Some(("6.12", "")));
        assert_eq!(line("6.12-rt"), Some(("6.12", "-rt")));
        for exact in ["6.1.0-47-cloud", "6.1.0-47", "6.12.117+deb12-cloud", "6.12.117+deb12"] {
            assert_eq!(line(exact), None, "{exact}");
        }
        assert!(LINES.iter().chain(ARM64_LINES).all(|name| line(architecture(name).0).is_some()));
    }

    #[test]
    fn names_may_end_with_an_architecture() {
        assert_eq!(architecture("6.1-cloud"), ("6.1-cloud", "amd64"));
        assert_eq!(architecture("6.1.0-47-cloud-amd64"), ("6.1.0-47-cloud", "amd64"));
        assert_eq!(architecture("6.1-cloud-arm64"), ("6.1-cloud", "arm64"));
        assert_eq!(
            of_its_own("linux-image-6.12.117+deb12-cloud-arm64"),
            "linux-image-6.12.117+deb12-cloud-arm64:arm64"
        );
    }
}
