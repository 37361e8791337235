//! The text form: kmemleak's records (mm/kmemleak.c, `print_unreferenced`), then what kmemleak has not.

use super::{Frame, Leak, Report};
use crate::registry::Kind;
use std::fmt::{self, Display, Write};

/// Bytes per row of the hex dump (kmemleak's HEX_ROW_SIZE).
const ROW: usize = 16;

/// What differs between the records of kernel versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextStyle {
    /// `(age 1.234s)` behind jiffies.
    pub age: bool,
    /// `(crc 1a2b3c4d)` behind "backtrace".
    pub checksum: bool,
    /// `[<ffffffff81234567>]` before each symbol.
    pub pointer: bool,
    /// ` on cpu 0` behind the number of bytes of a per-CPU object's hex dump. kmemleak prints the copy of the CPU that it
    /// runs on.
    pub copy: bool,
}

impl TextStyle {
    /// The style of a kernel's own kmemleak. This is the one place that looks at a version: a kernel without
    /// kmemleak has nothing in its image that could be probed instead. 6.1 stable dropped the age (seen in 6.1.192),
    /// 6.8 added the checksum, 6.11 dropped the pointer, 6.12 reports per-CPU objects; a release that cannot be read
    /// counts as new.
    pub fn of_release(release: &str) -> Self {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
        let version = match (numbers.next(), numbers.next()) {
            (Some(major), Some(minor)) if major != 0 => (major, minor),
            _ => (u32::MAX, 0),
        };
        Self {
            age: version < (6, 1),
            checksum: version >= (6, 8),
            pointer: version < (6, 11),
            copy: version >= (6, 12),
        }
    }
}

impl Report {
    /// The text form. Empty when there is nothing to tell, as kmemleak's is. The pointers before symbols are not
    /// hashed, unlike those of `%p`: nobody outside the guest gains from hiding them.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for leak in &self.leaks {
            record(&mut out, leak, self.style);
        }
        if !self.leaks.is_empty() || !self.suppressed.is_empty() {
            summary(&mut out, self);
        }
        out
    }
}

/// Appends a formatted line.
macro_rules! line {
    ($out:expr, $($argument:tt)*) => {
        // Writing to a String does not fail.
        let _ = writeln!($out, $($argument)*);
    };
}

fn record(out: &mut String, leak: &Leak, style: TextStyle) {
    // "0x%08lx": at least eight digits.
    line!(out, "unreferenced object 0x{:08x} (size {}):", leak.address.0, leak.size);
    let age = if style.age {
        format!(" (age {}.{:03}s)", leak.age_ms / 1000, leak.age_ms % 1000)
    } else {
        String::new()
    };
    line!(out, "  comm \"{}\", pid {}, jiffies {}{age}", leak.comm, leak.pid, leak.jiffies);
    let place = if style.copy && leak.kind == Kind::Percpu { " on cpu 0" } else { "" };
    line!(out, "  hex dump (first {} bytes{place}):", leak.head.len());
    for row in leak.head.chunks(ROW) {
        line!(out, "    {}", HexRow(row));
    }
    if style.checksum {
        line!(out, "  backtrace (crc {:x}):", leak.checksum);
    } else {
        line!(out, "  backtrace:");
    }
    for frame in &leak.backtrace {
        if style.pointer {
            line!(out, "    [<{:016x}>] {frame}", frame.ip.0);
        } else {
            line!(out, "    {frame}");
        }
    }
}

/// Groups, direct and indirect leaks, retained bytes, suppressions: all behind "#", which no kmemleak record has.
fn summary(out: &mut String, report: &Report) {
    let (count, groups) = (report.leaks.len() as u64, report.groups.len() as u64);
    let direct = report.leaks.iter().filter(|l| l.direct).count();
    let bytes: u64 = report.leaks.iter().map(|l| l.size).sum();
    if count != 0 {
        out.push('\n');
    }
    line!(
        out,
        "# scan {}: {count} leaked object{} of {bytes} bytes ({direct} direct, {} indirect) in {groups} group{}",
        report.scan.number,
        plural(count),
        count - direct as u64,
        plural(groups)
    );
    for group in &report.groups {
        let cache = group.cache.as_ref().map(|c| format!(" {c}")).unwrap_or_default();
        line!(
            out,
            "# group {}: {} object{}, {} direct, {} bytes, retains {} bytes, {}{cache}",
            group.id,
            group.count,
            plural(group.count),
            group.direct,
            group.bytes,
            group.retained_bytes,
            group.kind.name()
        );
        for frame in &group.backtrace {
            line!(out, "#     {frame}");
        }
    }
    if !report.suppressed.is_empty() {
        line!(out, "# suppressions used:");
        line!(out, "#     objects       bytes  name");
    }
    for used in &report.suppressed {
        line!(out, "# {:>11} {:>11}  {:?} ({})", used.count, used.bytes, used.name, used.place);
    }
}

/// What makes a plural of a regular noun behind this number.
pub fn plural(count: u64) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// As `%pS` prints it: `name+0xOFF/0xSIZE [module]`, or the bare address.
impl Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(symbol) = &self.symbol else { return write!(f, "{:#x}", self.ip.0) };
        write!(f, "{symbol}+{:#x}/{:#x}", self.offset, self.size)?;
        match &self.module {
            Some(module) => write!(f, " [{module}]"),
            None => Ok(()),
        }
    }
}

/// One row of lib/hexdump.c, `hex_dump_to_buffer` with groups of one byte: digits, and ASCII from column 49 on.
struct HexRow<'a>(&'a [u8]);

impl Display for HexRow<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits: Vec<String> = self.0.iter().map(|b| format!("{b:02x}")).collect();
        let printable = |&b: &u8| if b.is_ascii_graphic() || b == b' ' { char::from(b) } else { '.' };
        let ascii: String = self.0.iter().map(printable).collect();
        write!(f, "{:width$}{ascii}", digits.join(" "), width = ROW * 3 + 1)
    }
}
