//! Which of the lab's CPUs a job may use: all but the first.
//!
//! QEMU's TCG keeps "nested paging is on" and the FPU's IGNNE# line in one word of a CPU's state, and *any* CPU that
//! loads FPU state (`cpu_set_fpus` in its `target/i386/tcg/fpu_helper.c`) rewrites that word of the *first* CPU, with
//! no lock and no atomic operation. When the first CPU enters or leaves a guest at that moment the change is lost: the
//! guest runs without nested paging and triple faults on its next fetch, or the host's own state is stored as the
//! guest's and the guest hangs. Seen once in five boots with QEMU 7.2 on a slow host, never on other CPUs.

use std::fs;
use std::io;
use std::mem;

/// Where the kernel shows its CPUs.
const CPUS: &str = "/sys/devices/system/cpu";

/// Starts the CPUs that the helper kernel left alone while it booted, so that none of them runs code that another
/// patches (see [`super::idle_vm`]).
pub fn start_other_cpus() -> io::Result<()> {
    for entry in fs::read_dir(CPUS)? {
        let online = entry?.path().join("online");
        if fs::read_to_string(&online).is_ok_and(|state| state.trim() == "0") {
            fs::write(&online, "1")?;
        }
    }
    Ok(())
}

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

/// Calls `start` on this thread with the first CPU out of bounds, unless it is the only one; what it starts inherits that.
pub fn off_first_cpu<T>(start: impl FnOnce() -> T) -> io::Result<T> {
    let all = CpuSet::current()?;
    let mut others = CpuSet(all.0);
    // SAFETY: 0 is within every cpu_set_t.
    unsafe { libc::CPU_CLR(0, &mut others.0) };
    // SAFETY: as above.
    if unsafe { libc::CPU_COUNT(&others.0) } == 0 {
        return Ok(start());
    }
    others.apply()?;
    let started = start();
    all.apply()?;
    Ok(started)
}
