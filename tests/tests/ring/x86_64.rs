//! x86-64 has the ring.

use crate::{guests, inside, stubs};
use libtest_mimic::Trial;
use tests::{kernel, long_test, test};

/// All.
pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    let clean = |line: &'static str, cpus, words: &'static str| {
        let name = format!("clean_{line}_{cpus}cpu{}", words.replace([' ', '='], "_"));
        (name, move || guests::clean(line, cpus, words))
    };
    let long = |(name, body)| long_test(name, body);
    for line in ["6.1-cloud", "6.12-cloud"] {
        trials.push(test(format!("stubs_{line}"), move || stubs::of_kernel(&kernel(line)?.vmlinuz)));
        let (name, body) = clean(line, 2, "");
        let as_by_traps = format!("as_by_traps_{line}");
        // One half of both always.
        if line == "6.1-cloud" {
            trials.push(test(name, body));
            trials.push(long_test(as_by_traps, move || guests::as_by_traps(line)));
        } else {
            trials.push(long_test(name, body));
            trials.push(test(as_by_traps, move || guests::as_by_traps(line)));
        }
        for (cpus, words) in [(1, ""), (4, ""), (8, ""), (2, " pti=on"), (2, " nopti mitigations=off")] {
            trials.push(long(clean(line, cpus, words)));
        }
        trials.push(long_test(format!("floods_{line}"), move || guests::floods(line, 1)));
        trials.push(long_test(format!("inside_{line}"), move || inside::backtraces(line)));
        let audits = |tracked: &'static str| move || guests::audits(line, 2, tracked);
        trials.push(long_test(format!("audits_{line}"), audits("slab,vmalloc,percpu")));
        trials
            .push(long_test(format!("audits_and_pages_{line}"), audits("slab,vmalloc,percpu,pages,ioremap")));
        trials.push(long_test(format!("upstream_{line}"), move || guests::upstream(line)));
    }
    for line in ["6.1", "6.1-rt", "6.12", "6.12-rt"] {
        trials.push(long_test(format!("stubs_{line}"), move || stubs::of_kernel(&kernel(line)?.vmlinuz)));
        trials.push(long(clean(line, 2, "")));
    }
    trials
}
