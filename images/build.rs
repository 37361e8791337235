//! Builds the guest's init, which the library carries inside it (`images::initramfs`).

use std::path::PathBuf;
use std::process::Command;
use std::{env, process};

fn main() {
    println!("cargo::rerun-if-changed=init");
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name: &str| env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let output = PathBuf::from(variable("OUT_DIR")).join("kleak-init");
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--edition", "2024", "--crate-name", "kleak_init", "--target"]).arg(variable("TARGET"));
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        let mut option = std::ffi::OsString::from("linker=");
        option.push(linker);
        rustc.arg("-C").arg(option);
    }
    let codegen = ["panic=abort", "opt-level=s", "lto=fat", "codegen-units=1", "strip=symbols"];
    // Neither libc nor the usual start files: the init is all of its process.
    let freestanding = [
        "relocation-model=static",
        "target-feature=+crt-static",
        "link-args=-nostartfiles -nostdlib -static -Wl,--build-id=none",
    ];
    rustc.args(codegen.iter().chain(&freestanding).flat_map(|option| ["-C", option]));
    rustc.arg("-Dwarnings").arg("init/main.rs").arg("-o").arg(&output);
    match rustc.status() {
        Ok(status) if status.success() => {}
        Ok(status) => {
            eprintln!("building init/main.rs: {status}");
            process::exit(1);
        }
        Err(error) => {
            eprintln!("running rustc for init/main.rs: {error}");
            process::exit(1);
        }
    }
}
