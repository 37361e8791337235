//! What a failure looks like to the user: one line, a hint, an exit code.
//!
//! A [`Failure`] travels through `anyhow` like any error, as the root or as a context; [`report`] prints the whole
//! chain once, at the end of `main`.

use std::fmt;
use std::io::Write;

/// Exit codes of the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Did what was asked.
    Success = 0,
    /// Leaks, where the caller asked to fail on them.
    Leaks = 1,
    /// Bad flag, unreadable or unknown image.
    Usage = 2,
    /// The guest panicked, crashed, hung or ran out of time.
    Guest = 3,
    /// No usable KVM and no lab, not enough memory, no permission.
    Host = 4,
    /// What `git bisect run` takes for "cannot be tested", where it was asked for.
    Untested = 125,
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}

/// An error that knows its exit code and what the user can do. As a context with an empty text it adds only these
/// to an error that says enough by itself.
///
/// ```
/// # use anyhow::Context;
/// # use kleak_vmm::cli::{ExitCode, Failure, failure};
/// let opened: anyhow::Result<()> = Err(std::io::Error::from_raw_os_error(13))
///     .context(Failure::host("Cannot open /dev/kvm").hint("add yourself to the group kvm"));
/// let error = opened.unwrap_err();
/// assert_eq!(failure::exit_code(&error), ExitCode::Host);
/// ```
#[derive(Debug)]
pub struct Failure {
    code: ExitCode,
    what: String,
    hint: Option<String>,
}

impl Failure {
    /// A usage or input error: exit 2.
    pub fn usage(what: impl Into<String>) -> Self {
        Self { code: ExitCode::Usage, what: what.into(), hint: None }
    }

    /// The guest's failure: exit 3.
    pub fn guest(what: impl Into<String>) -> Self {
        Self { code: ExitCode::Guest, what: what.into(), hint: None }
    }

    /// What this host cannot: exit 4.
    pub fn host(what: impl Into<String>) -> Self {
        Self { code: ExitCode::Host, what: what.into(), hint: None }
    }

    /// Adds what to do, printed behind `hint: `.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// What the user can do, where it is known.
    pub fn what_to_do(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

/// The code of the outermost [`Failure`] in the chain; without one, [`ExitCode::Host`]: something did not work
/// that nobody could have typed better.
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    error.downcast_ref::<Failure>().map_or(ExitCode::Host, |failure| failure.code)
}

/// The lines printed for an error: `kleak-vmm: error: WHAT: WHY` and, where known, `hint: WHAT TO DO`.
pub fn render(error: &anyhow::Error) -> String {
    let mut text = format!("kleak-vmm: error: {}\n", chain(error));
    if let Some(hint) = hint(error) {
        text.push_str(&format!("hint: {hint}\n"));
    }
    text
}

/// The same as part of a line: `WHAT: WHY (hint: WHAT TO DO)`.
pub fn sentence(error: &anyhow::Error) -> String {
    hint(error).map_or_else(|| chain(error), |hint| format!("{} (hint: {hint})", chain(error)))
}

fn chain(error: &anyhow::Error) -> String {
    let mut levels: Vec<String> = Vec::new();
    for level in error.chain().map(ToString::to_string) {
        // Some libraries repeat their source in their own message.
        if !level.is_empty() && !levels.iter().any(|outer| outer.contains(&level)) {
            levels.push(level);
        }
    }
    one_line(&levels.join(": "))
}

fn hint(error: &anyhow::Error) -> Option<String> {
    error.downcast_ref::<Failure>().and_then(Failure::what_to_do).map(one_line)
}

/// Prints the error on standard error and returns its exit code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    // Nobody is left to tell when standard error is gone.
    let _ = std::io::stderr().write_all(render(error).as_bytes());
    exit_code(error)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// From now on a panic, which is a defect of this program, ends the process with one line and exit code 4,
/// after the terminal was restored.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        crate::console::terminal::restore();
        let payload = info.payload();
        let message = payload.downcast_ref::<&str>().copied();
        let message =
            message.or(payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
        let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
        let text = format!(
            "kleak-vmm: error: internal error{place}: {}\nhint: this is a defect of kleak-vmm; please report it with the command line\n",
            one_line(message)
        );
        let _ = std::io::stderr().write_all(text.as_bytes());
        std::process::exit(ExitCode::Host as i32);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    fn denied() -> anyhow::Result<()> {
        Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, "Permission denied"))
            .context("open failed")
    }

    #[test]
    fn the_chain_is_one_line_and_the_hint_another() {
        let error = denied()
            .context(Failure::host("Cannot open /dev/kvm").hint("add yourself\nto the group kvm"))
            .context("Starting the machine")
            .unwrap_err();
        assert_eq!(
            render(&error),
            "kleak-vmm: error: Starting the machine: Cannot open /dev/kvm: open failed: Permission denied\n\
             hint: add yourself to the group kvm\n"
        );
        assert_eq!(exit_code(&error), ExitCode::Host);
        assert_eq!(
            sentence(&error),
            "Starting the machine: Cannot open /dev/kvm: open failed: Permission denied (hint: add yourself to the group kvm)"
        );
        assert_eq!(
            sentence(&denied().context(Failure::usage("")).unwrap_err()),
            "open failed: Permission denied"
        );
    }

    #[test]
    fn the_outermost_failure_decides() {
        let error = denied().context(Failure::host("inner")).context(Failure::usage("outer")).unwrap_err();
        assert_eq!(exit_code(&error), ExitCode::Usage);
        let error = anyhow::Error::from(Failure::guest("The guest panicked")).context("Running");
        assert_eq!(exit_code(&error), ExitCode::Guest);
        assert_eq!(exit_code(&anyhow::anyhow!("plain")), ExitCode::Host);
    }

    #[test]
    fn a_level_that_repeats_its_source_is_printed_once() {
        let error = anyhow::anyhow!("No such file").context("Cannot read x: No such file");
        let error = error.context(Failure::usage(""));
        assert_eq!(render(&error), "kleak-vmm: error: Cannot read x: No such file\n");
    }
}
