//! QEMU as the lab's machine: emulated in software, with AMD's SVM or arm64's EL2. The line is a virtio serial port.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use images::lab::Lab;

use super::emulator::{Emulator, Machine, Program, find, program};
use super::kernel_arguments;
use crate::arch::counter_khz;

/// The program.
pub const PROGRAM: Program =
    Program { name: "QEMU", file: "qemu-system-x86_64", packages: "qemu-system-x86" };
/// The program for `arm`.
pub const ARM_PROGRAM: Program =
    Program { name: "QEMU", file: "qemu-system-aarch64", packages: "qemu-system-arm" };
/// A firmware that does nothing but start a kernel, half a second faster than the default.
const FIRMWARE: &str = "/usr/share/qemu/qboot.rom";
/// The CPU: everything QEMU can, but no XSAVE, which makes each exit from a guest a tenth longer, and no CMPXCHG16B, behind
/// which QEMU before 8.0 can have anything in the flags: its helper takes the operands of an earlier instruction for them
/// (`gen_cmpxchg16b` without an up-to-date `cc_op`). An interrupt that comes then restores that, and the guest single-steps
/// or faults. Loaded hosts see it once in some hundred boots, and the kernel's allocator does without.
const CPU: &str = "max,-xsave,-cx16";
/// The same without five-level page tables, which make each walk longer. The helper itself has four in any case.
const CPU_OF_FOUR_LEVELS: &str = "max,-xsave,-cx16,la57=off";
/// The same for `arm`: no pointer authentication by a cipher that takes hundreds of host instructions, no 52-bit addresses,
/// no SVE, whose registers are long.
const ARM_CPU: &str = "max,pauth-impdef=on,lpa2=off,sve=off,sme=off";

/// What differs between the machines.
struct Board {
    /// Options for the machine and its CPUs.
    options: &'static [&'static str],
    /// The helper's CPUs for a job with so many.
    cpus: u8,
    /// How fast the host's counter is, where the helper would measure that wrongly on a loaded machine.
    counter_khz: Option<u64>,
}

impl Board {
    fn of(lab: Lab, job_cpus: u8, five_levels: bool) -> Self {
        // Two for the job at least, so that the guest need not wait for its monitor.
        let cpus = job_cpus.max(2);
        match lab {
            Lab::Arm => Self {
                options: &["-M", "virt,virtualization=on,gic-version=3", "-cpu", ARM_CPU],
                cpus,
                counter_khz: None,
            },
            // And the one that the job keeps off.
            Lab::Svm | Lab::Vmx => Self {
                options: if five_levels {
                    &["-M", "q35", "-cpu", CPU]
                } else {
                    &["-M", "q35", "-cpu", CPU_OF_FOUR_LEVELS]
                },
                cpus: cpus + 1,
                counter_khz: Some(counter_khz()),
            },
        }
    }
}

/// The device node of a disk in the machine.
pub fn disk_node(index: usize) -> String {
    // There are 8 at most.
    format!("/dev/vd{}", char::from(b'a' + index as u8))
}

/// First line of what the QEMU of a lab says of its version.
pub fn version(lab: Lab) -> Option<String> {
    let output =
        Command::new(find(program(lab).file)?).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(str::to_owned)
}

/// Starts the machine; also the host's end of its serial port.
pub fn start(lab: Lab, program: &Path, machine: &Machine<'_>) -> Result<(Emulator, File)> {
    let (here, there) = UnixStream::pair().context("making the lab's line")?;
    let board = Board::of(lab, machine.cpus, machine.five_levels);
    let mut command = Command::new(program);
    command
        .args(board.options)
        .args(["-accel", "tcg,thread=multi"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .args(["-smp", &board.cpus.to_string()])
        .args(["-m", &format!("{}M", machine.mem_bytes.div_ceil(1 << 20))])
        .arg("-kernel")
        .arg(&machine.files.kernel)
        .args(["-initrd", &format!("/proc/self/fd/{}", machine.initrd.as_raw_fd())])
        .args(["-append", &kernel_arguments(lab, board.counter_khz)])
        .args(["-device", "virtio-serial-pci"])
        .args(["-chardev", &format!("socket,id=line,fd={}", there.as_raw_fd())])
        .args(["-device", "virtserialport,chardev=line,name=kleak"])
        .args(machine.disks.iter().enumerate().flat_map(|(index, disk)| drive(index, disk)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    if lab == Lab::Svm && Path::new(FIRMWARE).exists() {
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
