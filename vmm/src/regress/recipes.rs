//! Where the suite's kernels, modules and programs are on this host: paths as they stand, or made by the `images` crate.

use super::suite::{KERNEL_PLACE, Kernel, KernelSource, RECIPE};
use crate::cli::values::ModuleSpec;
use crate::cli::{Failure, check};
use crate::lab;
use crate::run::check_fit;
use anyhow::{Context, Result};
use images::initramfs::GuestModule;
use images::kernel::Headers;
use images::module_file::{self, WantedModule};
use images::{Cache, KernelPackage, cache, modules, programs};
use introspect::image::KernelImage;
use std::path::{Path, PathBuf};

/// What to do about a file that cannot be read.
pub const PATH_HINT: &str = "check its path in the suite";

/// A kernel that is there.
#[derive(Debug, Clone)]
pub struct Ready {
    /// The image.
    pub path: PathBuf,
    /// `uname -r`; None where its file does not say so to this program, which knows its own architecture's kernels only.
    pub release: Option<String>,
    /// Architecture of its guests, as Rust names it.
    arch: &'static str,
    /// Its name in the suite.
    name: String,
    /// The package it is from.
    package: Option<KernelPackage>,
}

/// The images' cache: the one that is named, else beside the lab's files.
fn store() -> Result<Cache> {
    if std::env::var_os(cache::FOLDER_VARIABLE).is_some_and(|folder| !folder.is_empty()) {
        return Ok(Cache::of_workspace());
    }
    Ok(Cache::new(lab::folder()?.with_file_name("images")))
}

/// Makes sure that the kernel is there. It is for guests of the architecture `arch`.
///
/// # Errors
/// It is not, and cannot be fetched.
pub fn kernel(kernel: &Kernel, arch: &'static str) -> Result<Ready> {
    let (path, release, package) = match &kernel.source {
        KernelSource::File(path) => {
            check::input_file(path, "kernel", PATH_HINT)?;
            let image = KernelImage::open(path).ok();
            (path.clone(), image.map(|image| image.release().to_owned()), None)
        }
        KernelSource::Recipe(name) => {
            let hint = "check the network, and the recipe: the name of a Debian kernel, such as 6.1-cloud or 6.1.0-47-cloud";
            let package =
                KernelPackage::fetch(&store()?, name).with_context(|| Failure::host("").hint(hint))?;
            (package.vmlinuz.clone(), Some(package.release.clone()), Some(package))
        }
    };
    Ok(Ready { path, release, arch, name: kernel.name.clone(), package })
}

impl Ready {
    /// The modules asked for and those they need, in the order of loading.
    ///
    /// # Errors
    /// One of them is not there, cannot be built, or is for another kernel.
    pub fn modules(&self, wanted: &[ModuleSpec]) -> Result<Vec<GuestModule>> {
        let find = |spec: &ModuleSpec| {
            let path = self.module(&spec.path)?;
            check::check_module(&path, self.arch, PATH_HINT)?;
            Ok(WantedModule { path, parameters: spec.params.join(" ") })
        };
        let wanted: Vec<_> = wanted.iter().map(find).collect::<Result<_>>()?;
        let folder = self.package.as_ref().map(|package| package.modules_dir.as_path());
        let found = module_file::resolve(&wanted, folder)?;
        if let Some(release) = &self.release {
            check_fit(&found, release)?;
        }
        Ok(found.into_iter().map(GuestModule::from).collect())
    }

    fn module(&self, path: &Path) -> Result<PathBuf> {
        let Some(name) = recipe(path) else {
            return Ok(self.placed(path));
        };
        let package = self.package.as_ref();
        let package =
            package.with_context(|| format!("{RECIPE}{name} is built for kernels that are recipes, too"))?;
        let cache = store()?;
        let headers = Headers::fetch(&cache, package)?;
        match name {
            "kmemleak-test" => modules::kmemleak_test(&cache, &headers),
            own => modules::own(&cache, &headers, own),
        }
    }

    /// A path of the suite for this kernel.
    fn placed(&self, path: &Path) -> PathBuf {
        path.to_string_lossy().replace(KERNEL_PLACE, &self.name).into()
    }

    /// A file for the guest.
    ///
    /// # Errors
    /// It is not there, or cannot be built.
    pub fn file(&self, path: &Path) -> Result<PathBuf> {
        let path = match recipe(path) {
            Some(name) => programs::build(&store()?, name)?,
            None => self.placed(path),
        };
        check::input_file(&path, "file", PATH_HINT)?;
        Ok(path)
    }
}

fn recipe(path: &Path) -> Option<&str> {
    path.to_str()?.strip_prefix(RECIPE)
}
