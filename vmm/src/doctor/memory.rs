//! Memory of the host that a guest could have.

use std::fs;

use crate::meminfo;

/// Bytes available without swapping: what the kernel says is available, or what the control group leaves, if that is
/// less. None where neither can be read.
pub fn available_memory_bytes() -> Option<u64> {
    let system = meminfo::read().and_then(|text| meminfo::field(&text, "MemAvailable:"));
    // The root of a container's own view of its control group (cgroup v2).
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let group =
        read("memory.max").zip(read("memory.current")).and_then(|(max, current)| left(&max, &current));
    match (system, group) {
        (Some(system), Some(group)) => Some(system.min(group)),
        (system, group) => system.or(group),
    }
}

/// What a control group's limit leaves; None where there is no limit.
fn left(max: &str, current: &str) -> Option<u64> {
    let max: u64 = max.trim().parse().ok()?;
    Some(max.saturating_sub(current.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_group_leaves_its_limit_less_what_is_used() {
        assert_eq!(left("100\n", "30\n"), Some(70));
        assert_eq!(left("100", "300"), Some(0));
        assert_eq!(left("max\n", "30"), None);
    }
}
