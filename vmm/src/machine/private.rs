//! Memory that the guest's processors reach and the guest knows nothing of: no RAM in its map, never scanned, never saved.

use anyhow::{Context, bail};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

/// A huge page of the host's, where it has them; else an alignment like any other.
const HUGE: usize = 2 << 20;
/// The smallest page of a host.
const PAGE: usize = 4096;

/// Pages of the host, zero at first. They are all there from the beginning, in huge pages if possible: the guest's first
/// touch of a page that the host has to find costs an exit, in the midst of an event.
pub struct PrivatePages {
    host: NonNull<u8>,
    len: usize,
    /// What was mapped around it.
    mapped: (NonNull<libc::c_void>, usize),
}

// SAFETY: the mapping lives as long as the value and is accessed through atomics only.
unsafe impl Send for PrivatePages {}
// SAFETY: as above.
unsafe impl Sync for PrivatePages {}

impl PrivatePages {
    /// `len` bytes, whole pages.
    ///
    /// # Errors
    /// The host has no memory.
    pub fn new(len: usize) -> anyhow::Result<Self> {
        let (flags, room) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, len + HUGE);
        // SAFETY: a new anonymous mapping touches nothing that is there.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), room, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).context("Cannot map memory for the tracer");
        }
        let Some(start) = NonNull::new(start) else { bail!("Memory for the tracer is mapped at address 0") };
        // The guest's addresses of it are aligned, too, as a huge page needs.
        // SAFETY: there is that much more room than `len`.
        let host = unsafe { start.cast::<u8>().add(start.cast::<u8>().align_offset(HUGE)) };
        // SAFETY: advice on the mapping just made; a host without huge pages refuses it.
        unsafe { libc::madvise(host.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        let pages = Self { host, len, mapped: (start, room) };
        (0..len).step_by(PAGE).for_each(|offset| pages.word(offset).store(0, Relaxed));
        Ok(pages)
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where it is mapped here.
    pub(super) fn host(&self) -> u64 {
        self.host.as_ptr() as u64
    }

    /// The aligned word at `offset`.
    ///
    /// # Panics
    /// Outside the mapping, or not aligned.
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len, "no word at {offset:#x}");
        // SAFETY: inside the mapping and aligned.
        unsafe { AtomicU64::from_ptr(self.host.as_ptr().add(offset).cast()) }
    }

    /// `N` aligned words from `offset` on.
    ///
    /// # Panics
    /// As [`PrivatePages::word`].
    pub fn words<const N: usize>(&self, offset: usize) -> &[AtomicU64; N] {
        let is_inside = offset <= self.len && 8 * N <= self.len - offset;
        assert!(offset.is_multiple_of(8) && is_inside, "no words at {offset:#x}");
        // SAFETY: inside the mapping and aligned.
        unsafe { &*self.host.as_ptr().add(offset).cast::<[AtomicU64; N]>() }
    }

    /// Copies to `offset`, byte by byte.
    ///
    /// # Panics
    /// Outside the mapping.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset <= self.len && bytes.len() <= self.len - offset, "no room at {offset:#x}");
        for (k, &byte) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping.
            unsafe { AtomicU8::from_ptr(self.host.as_ptr().add(offset + k)) }.store(byte, Relaxed);
        }
    }
}

impl Drop for PrivatePages {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody borrows it any more.
        unsafe { libc::munmap(self.mapped.0.as_ptr(), self.mapped.1) };
    }
}
