//! arm64 has no ring.

use libtest_mimic::Trial;

/// None.
pub fn trials() -> Vec<Trial> {
    Vec::new()
}
