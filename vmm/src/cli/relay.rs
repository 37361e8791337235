//! Options of `run`, written as a command line again: for the run inside the lab, whose files lie elsewhere.

use super::options::{ReportFormat, RunOptions};
use super::values::format_size;
use crate::gdb::Address;
use crate::run::next_number;
use clap::ValueEnum;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// What a path of the options is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathUse {
    /// A file or directory that is read.
    Input,
    /// A file or directory that is written, or a socket.
    Output,
    /// A disk of the guest; true: it is not written to.
    Disk(bool),
}

impl RunOptions {
    /// The arguments behind `kleak-vmm run` that parse to these options, each path as `map` says. Defaults are
    /// written out; a report on standard output (`-`) is not mapped.
    pub fn to_args(&self, mut map: impl FnMut(&Path, PathUse) -> PathBuf) -> Vec<OsString> {
        use PathUse::{Disk, Input, Output};
        let mut line = Line::default();
        let paths = [
            ("--kernel", &self.kernel, Input),
            ("--initrd", &self.initrd, Input),
            ("--module-dir", &self.module_dir, Input),
            ("--types", &self.types, Input),
            ("--profile", &self.profile, Input),
            ("--report-dir", &self.report_dir, Output),
            ("--events", &self.events, Output),
            ("--snapshot-on-leak", &self.snapshot_on_leak, Output),
            ("--control", &self.control, Output),
        ];
        for (name, path, usage) in paths {
            if let Some(path) = path {
                line.option(name, map(path, usage));
            }
        }
        if let Some(dir) = &self.report_dir {
            // The directory inside is another one, and empty.
            let number = self.report_number.unwrap_or_else(|| next_number(dir));
            line.option("--report-number", number.to_string());
        }
        if let Some(gdb) = &self.gdb {
            let mut value = match &gdb.address {
                Address::Unix(path) => map(path, Output).into_os_string(),
                tcp => tcp.to_string().into(),
            };
            value.push(if gdb.wait { ",wait" } else { "" });
            line.option("--gdb", value);
        }
        for file in &self.suppressions {
            line.option("--suppressions", map(file, Input));
        }
        for module in &self.modules {
            let mut value = map(&module.path, Input).into_os_string();
            module.params.iter().for_each(|param| value.push(format!(",{param}")));
            line.option("--module", value);
        }
        for disk in &self.disks {
            let mut value = map(&disk.path, Disk(disk.read_only)).into_os_string();
            value.push(if disk.read_only { ",ro" } else { "" });
            line.option("--disk", value);
        }
        for file in &self.files {
            let mut value = map(&file.host, Input).into_os_string();
            value.push(":");
            value.push(&file.guest);
            line.option("--file", value);
        }
        for report in &self.reports.0 {
            let to_stdout = report.path == Path::new("-");
            line.option("--report", if to_stdout { report.path.clone() } else { map(&report.path, Output) });
            line.option("--format", name::<ReportFormat>(report.format));
        }
        self.plain_args(&mut line);
        line.0
    }

    /// Everything that is no path.
    fn plain_args(&self, line: &mut Line) {
        if let Some(exec) = &self.exec {
            line.option("--exec", exec);
        }
        if let Some(kaslr) = self.kaslr {
            line.option("--kaslr", on_off(kaslr));
        }
        if let Some(timeout) = self.timeout_s {
            line.option("--timeout", timeout.to_string());
        }
        line.option("--cmdline", &self.cmdline);
        line.option("--mem", format_size(self.mem_bytes));
        line.option("--cpus", self.cpus.to_string());
        line.option("--paging", name(self.paging));
        line.option("--tracer", name(self.tracer));
        line.option("--track", self.track.iter().map(|what| what.name()).collect::<Vec<_>>().join(","));
        line.option("--trap", name(self.trap));
        line.option("--scan-period", self.scan_period_s.to_string());
        line.option("--min-age", self.min_age_ms.to_string());
        line.option("--stack", on_off(self.stack));
        line.option("--typed", on_off(self.typed));
        line.option("--scan-at-exit", if self.scan_at_exit { "yes" } else { "no" });
        line.option("--scan-on", self.scan_on.iter().map(|when| name(*when)).collect::<Vec<_>>().join(","));
        line.option("--sort", name(self.sort));
        line.option("--lab", name(self.lab));
        line.flag("--clear-after-scan", self.clear_after_scan);
        line.flag("--notice-on-console", self.notice_on_console);
        line.flag("--fail-on-leak", self.fail_on_leak);
        line.flag("--quiet", self.quiet);
        (0..self.verbose).for_each(|_| line.flag("--verbose", true));
    }
}

/// A command line; values are joined to their options, so that one that begins with a dash stays a value.
#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn option(&mut self, name: &str, value: impl AsRef<OsStr>) {
        let mut word = OsString::from(format!("{name}="));
        word.push(value);
        self.0.push(word);
    }

    fn flag(&mut self, name: &str, given: bool) {
        if given {
            self.0.push(name.into());
        }
    }
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

fn name<T: ValueEnum>(value: T) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}
