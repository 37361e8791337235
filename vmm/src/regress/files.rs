//! Files and disks of a boot.

use super::driver;
use super::suite::{Action, Test};
use crate::cli::values::{DiskSpec, FileSpec};
use crate::files::WholeFile;
use anyhow::{Context, Result};
use images::initramfs::GuestModule;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What `run --disk` takes for a disk of this boot alone: a copy, unless nothing writes to it.
///
/// # Errors
/// It cannot be copied.
pub(super) fn own_disk(folder: &Path, index: usize, disk: &DiskSpec) -> Result<OsString> {
    if disk.read_only {
        let mut value = disk.path.clone().into_os_string();
        value.push(",ro");
        return Ok(value);
    }
    let copy = folder.join(format!("disk{index}"));
    let copied = (|| {
        let mut to = WholeFile::create(&copy)?;
        io::copy(&mut File::open(&disk.path)?, &mut to)?;
        to.place()
    })();
    copied.with_context(|| format!("Cannot copy disk {}", disk.path.display()))?;
    Ok(copy.into())
}

/// Files of a boot on their way to the guest.
pub(super) struct Files {
    /// Where on the host they are written.
    pub folder: PathBuf,
    /// Those that are to be in the guest.
    pub list: Vec<FileSpec>,
}

impl Files {
    /// What the driver runs and loads for the test at `index` of the boot.
    ///
    /// # Errors
    /// Its script cannot be read, or a file not be written.
    pub fn of_test(&mut self, index: usize, test: &Test, modules: &[GuestModule]) -> Result<()> {
        let host = |name: &str| format!("{index}-{name}");
        let guest = |name: &str| format!("{index}/{name}");
        let shell = |text: &str| format!("#!/kleak/bin/sh\n{text}\n").into_bytes();
        if let Some(setup) = &test.setup {
            self.write(&host("setup"), &guest("setup"), &shell(setup))?;
        }
        match &test.action {
            Action::Nothing => {}
            Action::Run(text) => self.write(&host("test"), &guest("test"), &shell(text))?,
            Action::Script(path) => {
                let content =
                    fs::read(path).with_context(|| format!("Cannot read script {}", path.display()))?;
                self.write(&host("test"), &guest("test"), &content)?;
            }
        }
        for (at, module) in modules.iter().enumerate() {
            let name = format!("{at}.ko");
            self.write(&host(&name), &guest(&name), &module.content)?;
        }
        Ok(())
    }

    /// A module for the whole boot, as `run --module` takes it.
    ///
    /// # Errors
    /// Its file cannot be written.
    pub fn of_guest(&self, index: usize, module: &GuestModule) -> Result<OsString> {
        // A folder for each: files are named after their modules.
        let place = self.folder.join(format!("guest-{index}"));
        let path = place.join(format!("{}.ko", module.name));
        let written = fs::create_dir_all(&place).and_then(|()| fs::write(&path, &module.content));
        written.with_context(|| format!("Cannot write {}", path.display()))?;
        let mut value = path.into_os_string();
        module.parameters.split_whitespace().for_each(|parameter| value.push(format!(",{parameter}")));
        Ok(value)
    }

    /// An executable file: `host` in the folder, and `guest` in the driver's.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&mut self, host: &str, guest: &str, content: &[u8]) -> Result<()> {
        let path = self.folder.join(host);
        let written = fs::write(&path, content)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)));
        written.with_context(|| format!("Cannot write {}", path.display()))?;
        self.list.push(FileSpec { host: path, guest: Path::new(driver::FOLDER).join(guest) });
        Ok(())
    }
}
