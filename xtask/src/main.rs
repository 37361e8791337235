//! `cargo xtask`: demo, tests, images, release builds.

mod accuracy;
mod bench;
mod build;
mod cross;
mod demo;
mod images;
mod setup;
mod test;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Options {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Plant leaks in a stock kernel and find them
    Demo,
    /// Run every test, boots of real kernels included
    Test(test::Options),
    /// Compare with the in-kernel kmemleak, case by case, and write docs/accuracy.md
    Accuracy,
    /// Measure registry, scan and tracing, and write docs/performance.md
    Bench(bench::Options),
    /// Prepare guest images: kernels, modules, initramfs
    Images(images::Options),
    /// Build the static release binary and print where it is
    Build(build::Options),
    /// Run clippy, for this machine and for arm64
    Lint,
}

fn main() -> ExitCode {
    let result = match Options::parse().task {
        Task::Demo => demo::run(),
        Task::Test(options) => test::run(&options),
        Task::Accuracy => accuracy::run(),
        Task::Bench(options) => bench::run(&options),
        Task::Images(options) => images::run(&options),
        Task::Build(options) => build::run(&options),
        Task::Lint => cross::lint(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
