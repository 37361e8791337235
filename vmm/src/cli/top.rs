//! `kleak-vmm top`.

use super::ctl::socket;
use super::{ExitCode, TopOptions};
use std::time::Duration;

/// Opens the live view.
///
/// # Errors
/// As [`crate::top::top`]; and no machine runs, or several do.
pub fn top(options: &TopOptions) -> anyhow::Result<ExitCode> {
    crate::top::top(&socket(options.control.as_deref())?, Duration::from_secs(options.every_s))
}
