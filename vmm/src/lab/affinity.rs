//! Which of the lab's CPUs a job may use: all but the first.
//!
//! QEMU's TCG keeps "nested paging is on" and the FPU's IGNNE# line in one word of a CPU's state, and *any* CPU that
//! loads FPU state (`cpu_set_fpus` in its `target/i386/tcg/fpu_helper.c`) rewrites that word of the *first* CPU, with
//! no lock and no atomic operation. When the first CPU enters or leaves a guest at that moment the change is lost: the
//! guest runs without nested paging and triple faults on its next fetch, or the host's own state is stored as the
//! guest's and the guest hangs. Seen once in five boots with QEMU 7.2 on a slow host, never on other CPUs.

use std::io;
use std::mem;

/// The CPUs a thread may run on.
struct CpuSet(libc::cpu_set_t);

impl CpuSet {
    fn current() -> io::Result<Self> {
        // SAFETY: a cpu_set_t is plain bits; the kernel fills in what it knows.
        let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
        // SAFETY: the size is that of the set.
        match unsafe { libc::sched_getaffinity(0, mem::size_of_val(&set), &raw mut set) } {
            0 => Ok(Self(set)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn apply(&self) -> io::Result<()> {
        // SAFETY: as above; the kernel only reads.
        match unsafe { libc::sched_setaffinity(0, mem::size_of_val(&self.0), &raw const self.0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Calls `start` on this thread with the first CPU out of bounds; what it starts inherits that.
pub fn off_first_cpu<T>(start: impl FnOnce() -> T) -> io::Result<T> {
    let all = CpuSet::current()?;
    let mut others = CpuSet(all.0);
    // SAFETY: 0 is within every cpu_set_t.
    unsafe { libc::CPU_CLR(0, &mut others.0) };
    others.apply()?;
    let started = start();
    all.apply()?;
    Ok(started)
}
