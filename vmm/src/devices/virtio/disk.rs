//! A file as a block device (Virtual I/O Device 1.2, 5.2).

use super::QUEUE_SIZE;
use crate::machine::Mappings;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::{DescriptorChain, Reader, Writer};
use vm_memory::bitmap::BitmapSlice;

/// Bytes of a sector, whatever the device's own blocks are.
const SECTOR: u64 = 512;
/// Bytes that are copied at once.
const CHUNK: usize = 64 << 10;
/// Bytes of a request, at most: a vCPU is busy with it and cannot be paused. Linux asks for less.
const LARGEST: usize = 4 << 20;
/// Bytes of a device's name.
const ID: usize = 20;

/// A disk image, or a block device of the host.
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl Disk {
    /// Opens an image; what is beyond its last whole sector is not seen.
    ///
    /// # Errors
    /// It cannot be opened that way.
    pub fn open(path: &Path, read_only: bool) -> io::Result<Self> {
        let mut file = File::options().read(true).write(!read_only).open(path)?;
        // Of a block device metadata say nothing.
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR;
        Ok(Self { file, sectors, read_only })
    }

    /// True when the guest may not write.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The device's registers (`struct virtio_blk_config`): capacity in sectors, `size_max`, which is not offered, `seg_max`:
    /// buffers of a request, which has two descriptors more.
    pub(super) fn config(&self, offset: u64, data: &mut [u8]) {
        let segments = u32::from(QUEUE_SIZE) - 2;
        let config = [&self.sectors.to_le_bytes()[..], &[0; 4], &segments.to_le_bytes()].concat();
        for (place, byte) in data.iter_mut().zip(config.iter().skip(offset.min(16) as usize)) {
            *place = *byte;
        }
    }

    /// Carries out one request; how many bytes were written to the guest, the status among them.
    pub(super) fn serve(&self, memory: &Mappings, chain: DescriptorChain<&Mappings>) -> u32 {
        let (Ok(mut reader), Ok(mut writer)) = (chain.clone().reader(memory), chain.writer(memory)) else {
            return 0;
        };
        // The last byte is the status.
        let Some(mut status) =
            writer.available_bytes().checked_sub(1).and_then(|data| writer.split_at(data).ok())
        else {
            return 0;
        };
        let code = match self.request(&mut reader, &mut writer) {
            Ok(code) => code,
            Err(_) => VIRTIO_BLK_S_IOERR,
        };
        let written = writer.bytes_written() as u32;
        match status.write_all(&[code as u8]) {
            Ok(()) => written + 1,
            Err(_) => written,
        }
    }

    /// The status of a request.
    fn request<B: BitmapSlice>(
        &self,
        reader: &mut Reader<'_, B>,
        writer: &mut Writer<'_, B>,
    ) -> io::Result<u32> {
        let mut header = [0; 16];
        reader.read_exact(&mut header)?;
        let kind = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
        match kind {
            VIRTIO_BLK_T_IN => {
                let (mut at, mut left) = self.place(sector, writer.available_bytes())?;
                let mut buffer = vec![0; CHUNK.min(left)];
                while left > 0 {
                    let chunk = &mut buffer[..CHUNK.min(left)];
                    self.file.read_exact_at(chunk, at)?;
                    writer.write_all(chunk)?;
                    at += chunk.len() as u64;
                    left -= chunk.len();
                }
            }
            VIRTIO_BLK_T_OUT if self.read_only => return Ok(VIRTIO_BLK_S_IOERR),
            VIRTIO_BLK_T_OUT => {
                let (mut at, mut left) = self.place(sector, reader.available_bytes())?;
                let mut buffer = vec![0; CHUNK.min(left)];
                while left > 0 {
                    let chunk = &mut buffer[..CHUNK.min(left)];
                    reader.read_exact(chunk)?;
                    self.file.write_all_at(chunk, at)?;
                    at += chunk.len() as u64;
                    left -= chunk.len();
                }
            }
            VIRTIO_BLK_T_FLUSH => self.file.sync_data()?,
            VIRTIO_BLK_T_GET_ID => {
                let mut id = *b"kleak-vmm\0\0\0\0\0\0\0\0\0\0\0";
                let len = writer.available_bytes().min(ID);
                writer.write_all(&id.as_mut_slice()[..len])?;
            }
            _ => return Ok(VIRTIO_BLK_S_UNSUPP),
        }
        Ok(VIRTIO_BLK_S_OK)
    }

    /// Where `len` bytes from a sector on are in the file.
    ///
    /// Fails when they are not all on the disk, or too many.
    fn place(&self, sector: u64, len: usize) -> io::Result<(u64, usize)> {
        let sectors = (len as u64).div_ceil(SECTOR);
        match sector.checked_add(sectors) {
            Some(end) if end <= self.sectors && len <= LARGEST => Ok((sector * SECTOR, len)),
            _ => Err(io::Error::other("beyond the end of the disk")),
        }
    }
}
