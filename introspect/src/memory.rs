//! Guest addresses and the two ways to read guest memory.
//!
//! [`PhysicalMemory`] copies out of memory that the guest may be writing at the same time;
//! [`FrozenMemory`] lends slices, which only a paused machine or a snapshot can do soundly.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::{Add, Sub};

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
        impl Add<u64> for $name {
            type Output = Self;
            #[inline]
            fn add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }
        }
        impl Sub<u64> for $name {
            type Output = Self;
            #[inline]
            fn sub(self, bytes: u64) -> Self {
                Self(self.0.wrapping_sub(bytes))
            }
        }
        impl Sub for $name {
            type Output = u64;
            #[inline]
            fn sub(self, other: Self) -> u64 {
                self.0.wrapping_sub(other.0)
            }
        }
    };
}

address! {
    /// Guest virtual address. Arithmetic wraps, as the guest's does.
    Va
}
address! {
    /// Guest physical address.
    Pa
}

/// log2 of the page size (4 KiB on every guest handled so far).
pub const PAGE_SHIFT: u32 = 12;
/// Page size in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// Why guest memory could not be read; always carries the faulting address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryError {
    /// No guest RAM behind this physical range.
    Unbacked {
        /// First address that is not RAM.
        pa: Pa,
    },
    /// The page tables map nothing at this virtual address.
    NotMapped {
        /// The address looked up.
        va: Va,
    },
    /// A structure of the guest is not what it must be (a list that does not end, a size out of range).
    Corrupt {
        /// Where the structure is.
        va: Va,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unbacked { pa } => write!(f, "No guest RAM at physical address {pa}"),
            Self::NotMapped { va } => write!(f, "Nothing mapped at guest address {va}"),
            Self::Corrupt { va, what } => write!(f, "Guest structure at {va}: {what}"),
        }
    }
}

impl std::error::Error for MemoryError {}

/// A contiguous range of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// First address.
    pub start: Pa,
    /// Length in bytes.
    pub len: u64,
}

/// Guest physical memory, possibly changing under the reader.
pub trait PhysicalMemory: Sync {
    /// RAM, ascending and disjoint.
    fn ranges(&self) -> &[RamRange];

    /// Copies `buf.len()` bytes from `pa`. Aligned 8-byte reads are not torn.
    fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<(), MemoryError>;

    /// Reads a little-endian word.
    fn read_u64(&self, pa: Pa) -> Result<u64, MemoryError> {
        let mut b = [0; 8];
        self.read(pa, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }
}

/// Guest memory that cannot change while the value is borrowed: a snapshot, or a machine
/// whose pause is proven by the value itself.
pub trait FrozenMemory: PhysicalMemory {
    /// Lends `len` bytes at `pa`; they must lie in one RAM range.
    fn slice(&self, pa: Pa, len: usize) -> Result<&[u8], MemoryError>;
}

/// RAM held in one buffer from physical address 0: what tests and flat dumps use.
pub struct FlatMemory {
    bytes: Vec<u8>,
    ranges: [RamRange; 1],
}

impl FlatMemory {
    /// RAM from physical address 0 to `bytes.len()`.
    pub fn new(bytes: Vec<u8>) -> Self {
        let len = bytes.len() as u64;
        Self { bytes, ranges: [RamRange { start: Pa(0), len }] }
    }
}

impl PhysicalMemory for FlatMemory {
    fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<(), MemoryError> {
        buf.copy_from_slice(self.slice(pa, buf.len())?);
        Ok(())
    }
}

impl FrozenMemory for FlatMemory {
    fn slice(&self, pa: Pa, len: usize) -> Result<&[u8], MemoryError> {
        let start = usize::try_from(pa.0).map_err(|_| MemoryError::Unbacked { pa })?;
        let end = start.checked_add(len).ok_or(MemoryError::Unbacked { pa })?;
        self.bytes.get(start..end).ok_or(MemoryError::Unbacked { pa })
    }
}
