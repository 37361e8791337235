//! Console commands on real guests: what grows, what processes map, what is said of damaged lists; and the live view. (Accounting against the
//! guest's other files in /proc is in a test of its own.)

mod growth;
mod processes;
mod robust;
mod top;

use std::process::ExitCode;

fn main() -> ExitCode {
    tests::main([growth::trials(), processes::trials(), robust::trials()].into_iter().flatten().collect())
}
