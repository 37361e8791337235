//! A virtio device over memory-mapped registers (Virtual I/O Device 1.2, 4.2) with one queue. Requests are carried out on the
//! thread of the vCPU that notifies: while a machine is paused none is under way, and memory stands still.

mod disk;
#[cfg(test)]
mod tests;

pub use disk::Disk;

use crate::machine::GuestRam;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_mmio::*;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of registers.
pub const REGISTERS: u64 = 0x1000;
/// "virt", little endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// No vendor.
const VENDOR: u32 = 0;
/// Entries of the queue, at most.
const QUEUE_SIZE: u16 = 128;
/// Device status DRIVER_OK (2.1), and the first of the device's own registers.
const DRIVER_OK: u32 = 4;
const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;

/// A disk as the guest sees it.
pub struct VirtioDisk {
    disk: Disk,
    ram: GuestRam,
    interrupt: EventFd,
    state: Mutex<State>,
}

/// What the driver set.
struct State {
    queue: Queue,
    queue_selected: u32,
    device_features_selected: u32,
    status: u32,
    interrupts: u32,
}

impl State {
    fn new() -> Self {
        Self {
            queue: Queue::new(QUEUE_SIZE).expect("a power of two"),
            queue_selected: 0,
            device_features_selected: 0,
            status: 0,
            interrupts: 0,
        }
    }
}

impl VirtioDisk {
    /// `disk` for the guest with this memory; `interrupt` is raised when requests are done.
    pub fn new(disk: Disk, ram: GuestRam, interrupt: EventFd) -> Arc<Self> {
        Arc::new(Self { disk, ram, interrupt, state: Mutex::new(State::new()) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn features(&self) -> u64 {
        let read_only = if self.disk.read_only() { 1 << VIRTIO_BLK_F_RO } else { 0 };
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX | read_only
    }

    /// The guest reads a register; what is none reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG {
            return self.disk.config(offset - CONFIG, data);
        }
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.register(offset as u32).to_le_bytes();
        }
    }

    fn register(&self, offset: u32) -> u32 {
        let state = self.state();
        let first = state.queue_selected == 0;
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => VIRTIO_ID_BLOCK,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match state.device_features_selected {
                0 => self.features() as u32,
                1 => (self.features() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX if first => u32::from(QUEUE_SIZE),
            VIRTIO_MMIO_QUEUE_READY if first => state.queue.ready().into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => state.interrupts,
            VIRTIO_MMIO_STATUS => state.status,
            _ => 0,
        }
    }

    /// The guest writes a register.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        let mut state = self.state();
        let state = &mut *state;
        let first = state.queue_selected == 0;
        match offset as u32 {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => state.device_features_selected = value,
            VIRTIO_MMIO_QUEUE_SEL => state.queue_selected = value,
            VIRTIO_MMIO_INTERRUPT_ACK => state.interrupts &= !value,
            // A write of zero resets the device.
            VIRTIO_MMIO_STATUS if value == 0 => *state = State::new(),
            VIRTIO_MMIO_STATUS => state.status = value,
            VIRTIO_MMIO_QUEUE_NOTIFY if value == 0 => self.serve(state),
            _ if !first => {}
            // Sizes that are none are left out, and a queue that is not valid is not served.
            VIRTIO_MMIO_QUEUE_NUM => state.queue.set_size(u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_READY => state.queue.set_ready(value == 1),
            VIRTIO_MMIO_QUEUE_DESC_LOW => state.queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => state.queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => state.queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => state.queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => state.queue.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => state.queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// Carries out the requests in the queue: as many as it has entries, at most, whatever the guest adds meanwhile.
    fn serve(&self, state: &mut State) {
        if state.status & DRIVER_OK == 0 {
            return;
        }
        let done = self.ram.with_mappings(|memory| {
            if !state.queue.is_valid(memory) {
                return false;
            }
            let mut done = false;
            for _ in 0..QUEUE_SIZE {
                let Some(chain) = state.queue.pop_descriptor_chain(memory) else { break };
                let head = chain.head_index();
                // Indirect tables, which are not offered, could be longer.
                let fits = chain.clone().take(usize::from(QUEUE_SIZE) + 1).count() <= usize::from(QUEUE_SIZE);
                let written = if fits { self.disk.serve(memory, chain) } else { 0 };
                // A used ring that is not in memory takes nothing.
                done |= state.queue.add_used(memory, head, written).is_ok();
            }
            done && state.queue.needs_notification(memory).unwrap_or(true)
        });
        if done {
            state.interrupts |= VIRTIO_MMIO_INT_VRING;
            // The counter of an event is never full here: KVM takes each at once.
            let _ = self.interrupt.write(1);
        }
    }
}
