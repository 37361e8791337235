//! A driver for the device, in a memory of its own.

use super::*;
use introspect::memory::{Pa, PhysicalMemory, RamRange};
use proptest::prelude::*;
use std::path::PathBuf;

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFER: u64 = 0x8000;
const MEMORY: u64 = 1 << 20;
const SECTORS: u64 = 64;
/// Descriptor flags (2.7.5): another one follows; the device writes it.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const IN: u32 = 0;
const OUT: u32 = 1;

struct Driver {
    device: Arc<VirtioDisk>,
    ram: GuestRam,
    interrupt: EventFd,
    requests: u16,
    path: PathBuf,
}

impl Driver {
    fn new(name: &str, read_only: bool) -> Self {
        let path = std::env::temp_dir().join(format!("kleak-disk-{name}-{}", std::process::id()));
        let content: Vec<u8> = (0..SECTORS * 512 + 100).map(|k| (k / 512) as u8).collect();
        std::fs::write(&path, content).unwrap();
        let ram = GuestRam::new(vec![RamRange { start: Pa(0), len: MEMORY }]).unwrap();
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let disk = Disk::open(&path, read_only).unwrap();
        let device = VirtioDisk::new(disk, ram.clone(), interrupt.try_clone().unwrap());
        Self { device, ram, interrupt, requests: 0, path }
    }

    fn set(&self, register: u32, value: u32) {
        self.device.write(register.into(), &value.to_le_bytes());
    }

    fn get(&self, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// As a driver sets a device up (3.1.1).
    fn start(&self) {
        self.set(VIRTIO_MMIO_STATUS, 0);
        self.set(VIRTIO_MMIO_STATUS, 3);
        self.set(VIRTIO_MMIO_QUEUE_SEL, 0);
        assert_eq!(self.get(VIRTIO_MMIO_QUEUE_NUM_MAX), u32::from(QUEUE_SIZE));
        self.set(VIRTIO_MMIO_QUEUE_NUM, 8);
        self.set(VIRTIO_MMIO_QUEUE_DESC_LOW, DESC as u32);
        self.set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAIL as u32);
        self.set(VIRTIO_MMIO_QUEUE_USED_LOW, USED as u32);
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
        self.set(VIRTIO_MMIO_STATUS, 3 | DRIVER_OK);
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.write(Pa(at), bytes).unwrap();
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read(Pa(at), &mut bytes).unwrap();
        bytes
    }

    fn descriptor(&self, n: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(DESC + n * 16, &bytes);
    }

    /// Makes the chain at descriptor 0 available, and tells.
    fn submit(&mut self) {
        self.put(AVAIL + 4 + u64::from(self.requests % 8) * 2, &0_u16.to_le_bytes());
        self.requests += 1;
        self.put(AVAIL + 2, &self.requests.to_le_bytes());
        self.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    }

    fn used(&self) -> u16 {
        u16::from_le_bytes(self.bytes(USED + 2, 2).try_into().unwrap())
    }

    /// The status of a request for `len` bytes.
    fn request(&mut self, kind: u32, sector: u64, len: u32) -> u8 {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.put(0x7000, &header);
        self.put(0x7100, &[0xee]);
        self.descriptor(0, 0x7000, 16, NEXT, 1);
        self.descriptor(1, BUFFER, len, NEXT | if kind == OUT { 0 } else { WRITE }, 2);
        self.descriptor(2, 0x7100, 1, WRITE, 0);
        let before = self.used();
        self.submit();
        assert_eq!(self.used(), before.wrapping_add(1));
        assert_eq!(self.interrupt.read().unwrap(), 1);
        assert_eq!(self.get(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
        self.set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(self.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
        self.bytes(0x7100, 1)[0]
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[test]
fn what_is_written_is_read_and_in_the_file() {
    let mut driver = Driver::new("rw", false);
    assert_eq!([driver.get(0), driver.get(4), driver.get(8)], [MAGIC, VERSION, VIRTIO_ID_BLOCK]);
    let mut capacity = [0; 8];
    driver.device.read(CONFIG, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
    driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), 1, "version 1");
    driver.start();
    assert_eq!(driver.request(IN, 3, 1024), 0);
    assert_eq!(driver.bytes(BUFFER, 1024), [[3; 512], [4; 512]].concat());
    driver.put(BUFFER, &[0x5a; 512]);
    assert_eq!(driver.request(OUT, SECTORS - 1, 512), 0);
    assert_eq!(driver.request(VIRTIO_BLK_T_FLUSH, 0, 0), 0);
    let file = std::fs::read(&driver.path).unwrap();
    assert_eq!(file[(SECTORS as usize - 1) * 512..][..512], [0x5a; 512]);
    assert_eq!(driver.request(VIRTIO_BLK_T_GET_ID, 0, 20), 0);
    assert_eq!(driver.bytes(BUFFER, 9), b"kleak-vmm");
    assert_eq!(driver.request(99, 0, 512), VIRTIO_BLK_S_UNSUPP as u8);
}

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
};

#[test]
fn what_is_not_on_the_disk_or_not_to_be_written_is_an_error() {
    let mut driver = Driver::new("ro", true);
    driver.start();
    driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
    assert_ne!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES) & 1 << VIRTIO_BLK_F_RO, 0);
    let error = VIRTIO_BLK_S_IOERR as u8;
    assert_eq!(driver.request(OUT, 0, 512), error);
    assert_eq!(driver.request(IN, SECTORS, 512), error);
    assert_eq!(driver.request(IN, SECTORS - 1, 1024), error);
    assert_eq!(driver.request(IN, u64::MAX, 512), error);
    let mut segments = [0; 4];
    driver.device.read(CONFIG + 12, &mut segments);
    assert_eq!(u32::from_le_bytes(segments), u32::from(QUEUE_SIZE) - 2);
    assert_eq!(driver.request(IN, SECTORS - 1, 512), 0);
}

#[test]
fn a_device_that_is_not_set_up_does_nothing() {
    let mut driver = Driver::new("early", false);
    driver.submit();
    driver.set(VIRTIO_MMIO_STATUS, 3 | DRIVER_OK);
    driver.submit();
    assert!(driver.interrupt.read().is_err(), "no interrupt");
}

proptest! {
    /// Whatever a guest writes: an answer, and nothing outside of its memory.
    #[test]
    fn hostile_drivers_are_survived(
        writes in prop::collection::vec((0..0x110_u32, any::<u32>()), 0..12),
        ring in prop::collection::vec((0..0x30_u64, any::<u8>()), 0..6),
        header in prop::collection::vec((0..16_u64, any::<u8>()), 0..3),
        rings in prop::collection::vec((0..0x2000_u64, any::<u8>()), 0..4),
        small in prop::collection::vec((0..0xb0_u32, 0..0x9000_u32), 0..8),
    ) {
        let mut driver = Driver::new("hostile", false);
        driver.start();
        // A request that is good but for a few bytes.
        prop_assert_eq!(driver.request(IN, 1, 512), 0);
        for (at, value) in ring {
            driver.put(DESC + at, &[value]);
        }
        for (at, value) in header {
            driver.put(0x7000 + at, &[value]);
        }
        driver.submit();
        for (at, value) in rings {
            driver.put(AVAIL + at, &[value]);
        }
        driver.submit();
        for (register, value) in writes.into_iter().chain(small) {
            driver.set(register, value);
            driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        }
    }
}
