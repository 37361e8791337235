//! The `kleak-vmm` binary.

fn main() -> std::process::ExitCode {
    kleak_vmm::cli::main(std::env::args_os()).into()
}
