//! Which pages of guest memory were written: by the guest, which KVM notes once it is asked to, and from here, which the
//! mappings note.

use super::memory::GuestRam;
use super::{kvm_error, lock, map};
use anyhow::Context;
use introspect::memory::PAGE_SHIFT;
use introspect::scan::Written;
use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::VmFd;
use std::sync::{Arc, Mutex};

/// See the module.
pub(super) struct DirtyLog {
    vm: Arc<VmFd>,
    /// KVM notes what the guest writes.
    on: Mutex<bool>,
}

impl DirtyLog {
    /// Nothing is noted before it is asked for.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, on: Mutex::new(false) }
    }

    /// The pages written since this was last asked; None the first time. The machine stands still.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn take(&self, ram: &GuestRam) -> anyhow::Result<Option<Written>> {
        let mut on = lock(&self.on);
        let from_here = ram.take_written();
        if !*on {
            for (slot, (range, host)) in ram.mappings().enumerate() {
                // SAFETY: the slot has this mapping already, which outlives the machine.
                unsafe { map(&self.vm, slot, range, host, KVM_MEM_LOG_DIRTY_PAGES)? };
            }
            *on = true;
            return Ok(None);
        }
        let mut written = Written::default();
        for ((slot, (range, _)), from_here) in ram.mappings().enumerate().zip(from_here) {
            let log = self.vm.get_dirty_log(slot as u32, range.len as usize);
            let log = log.map_err(kvm_error("Cannot ask KVM which pages were written"))?;
            let first = (range.start.0 >> PAGE_SHIFT) as usize;
            add(&mut written, first, &log)?;
            add(&mut written, first, &from_here)?;
        }
        Ok(Some(written))
    }
}

/// Adds the pages of a range whose first frame is `first`. The host's may be larger than frames.
fn add(written: &mut Written, first: usize, pages: &[u64]) -> anyhow::Result<()> {
    // SAFETY: it takes no pointer.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let frames = usize::try_from(size).context("The host does not know the size of its pages")? >> PAGE_SHIFT;
    for (number, &bits) in pages.iter().enumerate() {
        for page in (0..64).filter(|bit| bits >> bit & 1 != 0).map(|bit| number * 64 + bit) {
            written.add(first + page * frames..first + (page + 1) * frames);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_a_range_are_frames_behind_its_first() {
        let mut written = Written::default();
        add(&mut written, 0x100, &[0b101, 1 << 63]).unwrap();
        let mut same = Written::default();
        let frames = written.count() as usize / 3;
        for page in [0, 2, 127] {
            same.add(0x100 + page * frames..0x100 + (page + 1) * frames);
        }
        assert_eq!(written, same);
    }
}
