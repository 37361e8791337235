//! arm64: no ring yet.

pub mod ring;
