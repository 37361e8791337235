//! What must be installed on a Debian-like host to prepare the images, in one place. Whether it is can be told by a
//! tool on the PATH.

use std::path::Path;

/// A Debian package and what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPackage {
    /// Its name.
    pub name: &'static str,
    /// Programs that are there when it is installed.
    pub tools: &'static [&'static str],
    /// Files that are there when it is installed.
    pub files: &'static [&'static str],
    /// Why it is needed.
    pub reason: &'static str,
    /// What it is needed for.
    pub purpose: Purpose,
}

/// What a package is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Booting a guest with the leaky module.
    Guests,
    /// Building the oracle kernel.
    Oracle,
    /// Tests.
    Tests,
    /// Long tests.
    LongTests,
    /// Building for arm64 on another machine.
    Arm64,
}

/// All of them.
pub const ALL: &[HostPackage] = &[
    package("busybox-static", &["busybox"], "shell and tools of the guest", Purpose::Guests),
    package(
        "qemu-system-x86",
        &["qemu-system-x86_64"],
        "the lab, on hosts without usable KVM",
        Purpose::Guests,
    ),
    package("gcc-12", &["gcc-12"], "the compiler of Debian's kernels, for modules", Purpose::Guests),
    package("make", &["make"], "the kernel's build system, for modules", Purpose::Guests),
    package("binutils", &["strip", "nm"], "linking and stripping modules", Purpose::Guests),
    package("xz-utils", &["xz"], "unpacking modules and kernel sources", Purpose::Guests),
    HostPackage {
        files: &["/usr/include/stdio.h"],
        ..package("libc6-dev", &[], "static programs for the guest", Purpose::Guests)
    },
    package("e2fsprogs", &["mkfs.ext4", "e2fsck", "debugfs"], "a file system on a disk", Purpose::Tests),
    package("valgrind", &["valgrind"], "counting the instructions of hot loops", Purpose::Tests),
    package("tmux", &["tmux"], "a terminal to test the live view in", Purpose::Tests),
    package("gdb", &["gdb"], "debugging a guest", Purpose::Tests),
    package("libxml2-utils", &["xmllint"], "checking JUnit results by their schema", Purpose::Tests),
    HostPackage {
        files: &["/usr/lib/python3/dist-packages/jsonschema/__init__.py"],
        ..package("python3-jsonschema", &[], "checking SARIF results by their schema", Purpose::Tests)
    },
    package(
        "slurm-wlm",
        &["sbatch", "slurmctld", "slurmd", "munged", "hostname"],
        "a job array of one node",
        Purpose::LongTests,
    ),
    package("crash", &["crash"], "opening a saved machine", Purpose::LongTests),
    HostPackage {
        files: &["/usr/lib/python3/dist-packages/drgn/__init__.py"],
        ..package("python3-drgn", &[], "opening a saved machine", Purpose::LongTests)
    },
    package("chromium", &["chromium"], "looking at the page of results", Purpose::LongTests),
    package("bochs", &["bochs-bin"], "the lab vmx", Purpose::LongTests),
    HostPackage {
        files: &["/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so"],
        ..package("bochs-term", &[], "the lab vmx", Purpose::LongTests)
    },
    HostPackage {
        files: &["/usr/share/bochs/BIOS-bochs-latest"],
        ..package("bochsbios", &[], "the lab vmx", Purpose::LongTests)
    },
    HostPackage {
        files: &["/usr/share/vgabios/vgabios.bin"],
        ..package("vgabios", &[], "the lab vmx", Purpose::LongTests)
    },
    HostPackage {
        files: &["/usr/lib/ISOLINUX/isolinux.bin"],
        ..package("isolinux", &[], "starting the lab vmx", Purpose::LongTests)
    },
    HostPackage {
        files: &["/usr/lib/syslinux/modules/bios/ldlinux.c32"],
        ..package("syslinux-common", &[], "starting the lab vmx", Purpose::LongTests)
    },
    package("xorriso", &["xorriso"], "starting the lab vmx", Purpose::LongTests),
    HostPackage {
        files: &["/usr/lib/rustlib/etc", "/usr/bin/rustc"],
        ..package("rustc-web", &[], "a compiler with arm64's standard library", Purpose::Arm64)
    },
    HostPackage {
        files: &["/usr/lib/rustlib/aarch64-unknown-linux-gnu"],
        ..package("libstd-rust-web-dev:arm64", &[], "arm64's standard library", Purpose::Arm64)
    },
    HostPackage {
        files: &["/usr/bin/cargo-clippy"],
        ..package("rust-web-clippy", &[], "lints for arm64", Purpose::Arm64)
    },
    package("gcc-aarch64-linux-gnu", &["aarch64-linux-gnu-gcc"], "linking for arm64", Purpose::Arm64),
    package(
        "gcc-12-aarch64-linux-gnu",
        &["aarch64-linux-gnu-gcc-12"],
        "the compiler of Debian's kernels, for modules",
        Purpose::Arm64,
    ),
    HostPackage {
        files: &["/usr/aarch64-linux-gnu/lib/libc.a"],
        ..package("libc6-dev-arm64-cross", &[], "linking for arm64", Purpose::Arm64)
    },
    package("qemu-system-arm", &["qemu-system-aarch64"], "the lab arm", Purpose::Arm64),
    package("bc", &["bc"], "building a kernel", Purpose::Oracle),
    package("bison", &["bison"], "building a kernel", Purpose::Oracle),
    package("flex", &["flex"], "building a kernel", Purpose::Oracle),
    HostPackage {
        files: &["/usr/include/libelf.h"],
        ..package("libelf-dev", &[], "objtool, which makes the kernel's ORC tables", Purpose::Oracle)
    },
    package("dwarves", &["pahole"], "the kernel's type information (BTF)", Purpose::Oracle),
    package("gcc", &["gcc"], "host tools of the kernel's build", Purpose::Oracle),
];

const fn package(
    name: &'static str,
    tools: &'static [&'static str],
    reason: &'static str,
    purpose: Purpose,
) -> HostPackage {
    HostPackage { name, tools, files: &[], reason, purpose }
}

impl HostPackage {
    /// Whether what it brings is there, from it or from elsewhere.
    pub fn is_installed(&self) -> bool {
        self.tools.iter().all(|tool| on_path(tool)) && self.files.iter().all(|file| Path::new(file).exists())
    }
}

fn on_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(tool).is_file())
}
