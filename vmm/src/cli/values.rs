//! Values of options: sizes, switches, modules, files.

use crate::gdb::Address;
use guest_profiles::hooks::Tracked;
use std::path::PathBuf;

/// A kernel module to load, `FILE.ko[,PARAM=VALUE...]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleSpec {
    /// The file on the host.
    pub path: PathBuf,
    /// Parameters as `insmod` takes them.
    pub params: Vec<String>,
}

/// A host file to copy into the guest, `HOST:GUEST`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSpec {
    /// Where it is.
    pub host: PathBuf,
    /// Where it goes, absolute.
    pub guest: PathBuf,
}

/// Parses a size in bytes with an optional suffix K, M or G (powers of 1024).
///
/// # Errors
/// One sentence for anything else, and for sizes over 2^64.
pub fn size(text: &str) -> Result<u64, String> {
    let expected = || format!("expected a number with K, M or G behind it, such as 512M, not {text:?}");
    let (digits, shift) = match text.char_indices().next_back() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(expected());
    }
    let number: u64 = digits.parse().map_err(|_| expected())?;
    number.checked_mul(1 << shift).ok_or_else(expected)
}

/// Parses a number of seconds, 1 at least.
///
/// # Errors
/// One sentence for anything else.
pub fn seconds(text: &str) -> Result<u64, String> {
    let number = text.parse().ok().filter(|&seconds| seconds > 0);
    number.ok_or_else(|| format!("expected a whole number of seconds, 1 at least, not {text:?}"))
}

/// Writes a size as [`size`] reads it.
pub fn format_size(bytes: u64) -> String {
    [(30, 'G'), (20, 'M'), (10, 'K')]
        .iter()
        .find(|(shift, _)| bytes != 0 && bytes.is_multiple_of(1 << shift))
        .map_or_else(|| bytes.to_string(), |(shift, suffix)| format!("{}{suffix}", bytes >> shift))
}

/// One of what `--track` takes.
///
/// # Errors
/// Anything else.
pub fn tracked(text: &str) -> Result<Tracked, String> {
    let found = Tracked::ALL.into_iter().find(|what| what.name() == text);
    found.ok_or_else(|| format!("expected {}, not {text:?}", Tracked::ALL.map(Tracked::name).join(", ")))
}

/// `on` or `off`.
///
/// # Errors
/// Anything else.
pub fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("expected on or off, not {text:?}")),
    }
}

/// `yes` or `no`.
///
/// # Errors
/// Anything else.
pub fn yes_no(text: &str) -> Result<bool, String> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err(format!("expected yes or no, not {text:?}")),
    }
}

/// Parses `FILE.ko[,PARAM=VALUE...]`. A piece without `=` behind a parameter that has one continues its value, so
/// that array parameters (`ids=1,2`) can be written.
///
/// # Errors
/// An empty file name or parameter.
pub fn module(text: &str) -> Result<ModuleSpec, String> {
    let mut pieces = text.split(',');
    let path = pieces.next().unwrap_or_default();
    if path.is_empty() {
        return Err(format!("expected FILE.ko[,PARAM=VALUE...], not {text:?}"));
    }
    let mut params: Vec<String> = Vec::new();
    for piece in pieces {
        match params.last_mut() {
            Some(last) if last.contains('=') && !piece.contains('=') => {
                last.push(',');
                last.push_str(piece);
            }
            _ if piece.is_empty() || piece.starts_with('=') => {
                return Err(format!("parameter without a name in {text:?}"));
            }
            _ => params.push(piece.to_owned()),
        }
    }
    Ok(ModuleSpec { path: path.into(), params })
}

/// A disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// Image, or block device of the host.
    pub path: PathBuf,
    /// The guest may not write.
    pub read_only: bool,
}

/// Parses `PATH[,ro]`.
///
/// # Errors
/// No path.
pub fn disk(text: &str) -> Result<DiskSpec, String> {
    let (path, read_only) = text.strip_suffix(",ro").map_or((text, false), |path| (path, true));
    if path.is_empty() {
        return Err(format!("expected PATH[,ro], not {text:?}"));
    }
    Ok(DiskSpec { path: path.into(), read_only })
}

/// Where a debugger may come in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GdbSpec {
    /// The address.
    pub address: Address,
    /// The guest does not start before the debugger says so.
    pub wait: bool,
}

/// Parses `ADDR[,wait]`.
///
/// # Errors
/// No address.
pub fn gdb(text: &str) -> Result<GdbSpec, String> {
    let (address, wait) = text.strip_suffix(",wait").map_or((text, false), |address| (address, true));
    Address::parse(address).map(|address| GdbSpec { address, wait })
}

/// Parses `HOST:GUEST`; GUEST is absolute.
///
/// # Errors
/// No colon before an absolute guest path.
pub fn file(text: &str) -> Result<FileSpec, String> {
    match text.rfind(":/") {
        Some(colon) if colon > 0 && text.len() > colon + 2 => {
            Ok(FileSpec { host: text[..colon].into(), guest: text[colon + 1..].into() })
        }
        _ => Err(format!(
            "expected HOST:GUEST with an absolute GUEST, such as ./test.sh:/test.sh, not {text:?}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let table = [("0", 0), ("4096", 4096), ("64k", 64 << 10), ("512M", 512 << 20), ("8G", 8 << 30)];
        for (text, bytes) in table {
            assert_eq!(size(text), Ok(bytes), "{text}");
            assert_eq!(size(&format_size(bytes)), Ok(bytes), "{text}");
        }
        for text in
            ["", "M", "-1", "+1M", "1T", "512 M", "1.5G", "0x10", "17179869184G", "99999999999999999999", "é"]
        {
            assert!(size(text).unwrap_err().contains("such as 512M"), "{text}");
        }
    }

    #[test]
    fn modules() {
        let module = |text| module(text).map(|m| (m.path.display().to_string(), m.params.join("|")));
        let ok = |path: &str, params: &str| Ok((path.to_owned(), params.to_owned()));
        assert_eq!(module("a.ko"), ok("a.ko", ""));
        assert_eq!(module("dir/a.ko,case=list,n=3"), ok("dir/a.ko", "case=list|n=3"));
        assert_eq!(module("a.ko,debug,ids=1,2,3,x=y"), ok("a.ko", "debug|ids=1,2,3|x=y"));
        assert_eq!(module("a.ko,s=a=b,"), ok("a.ko", "s=a=b,"));
        for text in ["", ",x=1", "a.ko,", "a.ko,=1"] {
            assert!(module(text).is_err(), "{text}");
        }
    }

    #[test]
    fn disks() {
        let spec = |path: &str, read_only| Ok(DiskSpec { path: path.into(), read_only });
        assert_eq!((disk("a.img"), disk("b,c,ro")), (spec("a.img", false), spec("b,c", true)));
        assert!(disk("").is_err() && disk(",ro").is_err());
    }

    #[test]
    fn debuggers() {
        let spec = |text| gdb(text).map(|gdb| (gdb.address.to_string(), gdb.wait));
        assert_eq!(spec(":1234,wait"), Ok(("127.0.0.1:1234".to_owned(), true)));
        assert_eq!(spec("/tmp/gdb,wait"), Ok(("/tmp/gdb".to_owned(), true)));
        assert_eq!(spec("[::1]:9"), Ok(("[::1]:9".to_owned(), false)));
        assert!(spec(",wait").is_err() && spec(":1,halt").is_err());
    }

    #[test]
    fn files() {
        assert_eq!(file("./t.sh:/t.sh"), Ok(FileSpec { host: "./t.sh".into(), guest: "/t.sh".into() }));
        assert_eq!(file("a:b/c:/d/e"), Ok(FileSpec { host: "a:b/c".into(), guest: "/d/e".into() }));
        for text in ["", "a", "a:b", ":/x", "a:/"] {
            assert!(file(text).unwrap_err().contains("HOST:GUEST"), "{text}");
        }
    }

    #[test]
    fn switches() {
        assert_eq!((on_off("on"), on_off("off")), (Ok(true), Ok(false)));
        assert_eq!((yes_no("yes"), yes_no("no")), (Ok(true), Ok(false)));
        assert!(on_off("yes").is_err() && yes_no("on").is_err() && on_off("").is_err());
    }
}
