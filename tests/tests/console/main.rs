//! Console commands on real guests: all of them on every surface, what grows, what processes map, what is said of damaged
//! structures; and the live view. (Accounting against the guest's other files in /proc is in a test of its own.)

mod growth;
mod processes;
mod robust;
mod surfaces;
mod top;

use std::process::ExitCode;

fn main() -> ExitCode {
    let trials = [growth::trials(), processes::trials(), robust::trials(), surfaces::trials()];
    tests::main(trials.into_iter().flatten().collect())
}
