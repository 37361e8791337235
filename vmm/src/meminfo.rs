//! What the host's /proc/meminfo (proc(5)) says.

/// The file; None where it cannot be read.
pub fn read() -> Option<String> {
    std::fs::read_to_string("/proc/meminfo").ok()
}

/// A field, with its colon as in `MemFree:`, in bytes.
pub fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::field;

    #[test]
    fn fields_are_in_bytes() {
        let text = "MemTotal:       100 kB\nMemAvailable:     7 kB\n";
        assert_eq!(field(text, "MemAvailable:"), Some(7168));
        assert_eq!(field(text, "SwapFree:"), None);
        assert_eq!(field("MemFree: 1 kB\nMemAvailable:    3 kB\n", "MemAvailable:"), Some(3072));
        assert_eq!(field("", "MemAvailable:"), None);
    }
}
