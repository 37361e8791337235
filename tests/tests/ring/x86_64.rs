//! x86-64 has the ring.

use crate::{guests, stubs};
use libtest_mimic::Trial;
use tests::{kernel, long_test, test};

/// All.
pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for line in ["6.1-cloud", "6.12-cloud"] {
        trials.push(test(format!("stubs_{line}"), move || stubs::of_kernel(&kernel(line)?.vmlinuz)));
        trials.push(test(format!("clean_{line}_2cpu"), move || guests::clean(line, 2)));
        trials.push(test(format!("as_by_traps_{line}"), move || guests::as_by_traps(line)));
        trials.push(long_test(format!("clean_{line}_1cpu"), move || guests::clean(line, 1)));
        trials.push(long_test(format!("clean_{line}_4cpu"), move || guests::clean(line, 4)));
        trials.push(long_test(format!("floods_{line}"), move || guests::floods(line, 1)));
        trials.push(long_test(format!("audits_{line}"), move || guests::audits(line, 2)));
        trials.push(long_test(format!("upstream_{line}"), move || guests::upstream(line)));
    }
    for line in ["6.1", "6.1-rt", "6.12", "6.12-rt"] {
        trials.push(long_test(format!("stubs_{line}"), move || stubs::of_kernel(&kernel(line)?.vmlinuz)));
        trials.push(long_test(format!("clean_{line}_2cpu"), move || guests::clean(line, 2)));
    }
    // `run` does not offer the ring yet.
    let offered = |trial: &Trial| trial.name().starts_with("stubs_");
    let trials = trials.into_iter().map(|trial| match offered(&trial) {
        true => trial,
        false => trial.with_kind("needs --tracer ring").with_ignored_flag(true),
    });
    trials.collect()
}
