//! What init has to do, `/kleak/job`: NUL-terminated strings, each record a key and its values, so that nothing
//! needs quoting and every string can go to the kernel as it is.
//!
//! | record | meaning |
//! | --- | --- |
//! | `module` PATH NAME PARAMETERS | load a kernel module; NAME is what the kernel will call it |
//! | `driver` PATH NAME PARAMETERS | the same, and never unload it |
//! | `exec` COMMAND | run a command once the modules are loaded |
//! | `shell` | give a shell on the console |
//! | `settle` MILLISECONDS | wait this long before the scan |
//! | `scan` TTY | ask the detector on this terminal for a scan |
//!
//! Also compiled into the `images` crate, whose tests feed it what the builder writes.

use core::ffi::CStr;

/// More modules than any test has; their dependencies count.
pub const MAX_MODULES: usize = 64;

/// A kernel module to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module<'a> {
    /// The file.
    pub path: &'a CStr,
    /// What the kernel calls it.
    pub name: &'a CStr,
    /// As `finit_module(2)` takes them.
    pub parameters: &'a CStr,
    /// It stays.
    pub kept: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Job<'a> {
    modules: [Option<Module<'a>>; MAX_MODULES],
    count: usize,
    /// Command to run.
    pub exec: Option<&'a CStr>,
    /// Give a shell.
    pub shell: bool,
    /// Wait before the scan.
    pub settle_ms: u64,
    /// Where the detector listens.
    pub scan: Option<&'a CStr>,
}

impl<'a> Job<'a> {
    /// Modules in the order of loading.
    pub fn modules(&self) -> impl DoubleEndedIterator<Item = Module<'a>> {
        self.modules[..self.count].iter().flatten().copied()
    }

    /// Reads a job; the error says what is wrong with it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, &'static str> {
        let mut job = Self {
            modules: [None; MAX_MODULES],
            count: 0,
            exec: None,
            shell: false,
            settle_ms: 0,
            scan: None,
        };
        let mut words = Words(bytes);
        while !words.0.is_empty() {
            match words.next()?.to_bytes() {
                word @ (b"module" | b"driver") => {
                    let kept = word == b"driver";
                    let (path, name, parameters) = (words.next()?, words.next()?, words.next()?);
                    let module = Module { path, name, parameters, kept };
                    *job.modules.get_mut(job.count).ok_or("too many modules")? = Some(module);
                    job.count += 1;
                }
                b"exec" => job.exec = Some(words.next()?),
                b"shell" => job.shell = true,
                b"settle" => {
                    let number = words.next()?.to_str().ok().and_then(|text| text.parse().ok());
                    job.settle_ms = number.ok_or("settle is no number")?;
                }
                b"scan" => job.scan = Some(words.next()?),
                _ => return Err("unknown record"),
            }
        }
        Ok(job)
    }
}

/// The strings not read yet.
struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    fn next(&mut self) -> Result<&'a CStr, &'static str> {
        let word = CStr::from_bytes_until_nul(self.0).map_err(|_| "cut off")?;
        self.0 = &self.0[word.count_bytes() + 1..];
        Ok(word)
    }
}
