//! QEMU as the lab's machine: emulated in software, with AMD's SVM. The line is a virtio serial port.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use images::lab::Lab;

use super::emulator::{Emulator, Machine, Program, find};
use super::kernel_arguments;
use crate::arch::counter_khz;

/// The program.
pub const PROGRAM: Program =
    Program { name: "QEMU", file: "qemu-system-x86_64", packages: "qemu-system-x86" };
/// A firmware that does nothing but start a kernel, half a second faster than the default.
const FIRMWARE: &str = "/usr/share/qemu/qboot.rom";
/// The CPU: everything QEMU can, but no XSAVE, which makes each exit from a guest a tenth longer.
const CPU: &str = "max,-xsave";
/// The same without five-level page tables, which make each walk longer. The helper itself has four in any case.
const CPU_OF_FOUR_LEVELS: &str = "max,-xsave,la57=off";

/// The device node of a disk in the machine.
pub fn disk_node(index: usize) -> String {
    // There are 8 at most.
    format!("/dev/vd{}", char::from(b'a' + index as u8))
}

/// First line of what QEMU says of its version.
pub fn version() -> Option<String> {
    let output = Command::new(find(PROGRAM.file)?).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(str::to_owned)
}

/// Starts the machine; also the host's end of its serial port.
pub fn start(program: &Path, machine: &Machine<'_>) -> Result<(Emulator, File)> {
    let (here, there) = UnixStream::pair().context("making the lab's line")?;
    // Two for the job at least, so that the guest need not wait for its monitor, and the one it keeps off.
    let cpus = machine.cpus.max(2) + 1;
    let cpu = if machine.five_levels { CPU } else { CPU_OF_FOUR_LEVELS };
    let mut command = Command::new(program);
    command
        .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", cpu])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .args(["-smp", &cpus.to_string()])
        .args(["-m", &format!("{}M", machine.mem_bytes.div_ceil(1 << 20))])
        .arg("-kernel")
        .arg(&machine.files.kernel)
        .args(["-initrd", &format!("/proc/self/fd/{}", machine.initrd.as_raw_fd())])
        // The helper would measure that wrongly on a loaded machine.
        .args(["-append", &kernel_arguments(Lab::Svm, counter_khz())])
        .args(["-device", "virtio-serial-pci"])
        .args(["-chardev", &format!("socket,id=line,fd={}", there.as_raw_fd())])
        .args(["-device", "virtserialport,chardev=line,name=kleak"])
        .args(machine.disks.iter().enumerate().flat_map(|(index, disk)| drive(index, disk)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    if Path::new(FIRMWARE).exists() {
        command.args(["-bios", FIRMWARE]);
    }
    let inherited = vec![machine.initrd.as_raw_fd(), there.as_raw_fd()];
    let qemu = Emulator::spawn(PROGRAM.name, command, inherited)?;
    Ok((qemu, File::from(OwnedFd::from(here))))
}

/// The options for a disk. QEMU wants commas in names twice.
fn drive(index: usize, (path, read_only): &(PathBuf, bool)) -> [OsString; 4] {
    let mut drive = OsString::from("file=");
    let name = path.as_os_str().as_bytes();
    drive.push(OsStr::from_bytes(&name.split(|&b| b == b',').collect::<Vec<_>>().join(&b",,"[..])));
    let access = if *read_only { "on" } else { "off" };
    drive.push(format!(",format=raw,if=none,id=disk{index},readonly={access}"));
    ["-drive".into(), drive, "-device".into(), format!("virtio-blk-pci,drive=disk{index}").into()]
}
