//! Memory of the host that a guest could have.

use std::fs;

/// Bytes available without swapping: what the kernel says is available, or what the control group leaves, if that is
/// less. None where neither can be read.
pub fn available_memory_bytes() -> Option<u64> {
    let system = fs::read_to_string("/proc/meminfo").ok().and_then(|text| meminfo(&text, "MemAvailable:"));
    // The root of a container's own view of its control group (cgroup v2).
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let group =
        read("memory.max").zip(read("memory.current")).and_then(|(max, current)| left(&max, &current));
    match (system, group) {
        (Some(system), Some(group)) => Some(system.min(group)),
        (system, group) => system.or(group),
    }
}

/// A field of /proc/meminfo (proc(5)), in bytes.
fn meminfo(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(field))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
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
    fn reads_both_sources() {
        assert_eq!(meminfo("MemFree: 1 kB\nMemAvailable:    3 kB\n", "MemAvailable:"), Some(3072));
        assert_eq!(meminfo("", "MemAvailable:"), None);
        assert_eq!(left("100\n", "30\n"), Some(70));
        assert_eq!(left("100", "300"), Some(0));
        assert_eq!(left("max\n", "30"), None);
    }
}
