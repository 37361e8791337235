use super::*;
use crate::arch::{CpuState, Registers};
use crate::linux::Placement;
use crate::memory::{PAGE_SIZE, Pa, RamRange, Va};
use proptest::prelude::*;
use std::io::Cursor;

fn range(start: u64, pages: u64) -> RamRange {
    RamRange { start: Pa(start), len: pages * PAGE_SIZE }
}

fn cpu(index: usize) -> CpuState {
    let registers =
        Registers { rip: 0xffff_ffff_8100_0000, rsp: 7, rdi: 8, r15: 9, rflags: 2, ..Registers::default() };
    CpuState { index, registers, gs_base: 5, online: true, ..CpuState::default() }
}

const ATTACHED: Attached = Attached { format: 0x5678, crc: 0x1234, offset: 0, len: 10, kernel_len: 20 };

/// A core of two ranges with something attached, and the file around its head.
fn core() -> Vec<u8> {
    let ranges = [range(0, 3), range(0x1_0000_0000, 1)];
    let cpus = [
        (cpu(0), 1),
        (CpuState { online: false, ..cpu(1) }, 0),
        (CpuState { user_mode: true, ..cpu(2) }, 77),
    ];
    let content = Content {
        ranges: &ranges,
        direct_map: Some(Va(0xffff_8880_0000_0000)),
        image: (Va(0xffff_ffff_9b00_0000), range(PAGE_SIZE, 2)),
        cpus: &cpus,
        vmcoreinfo: Some("OSRELEASE=6.1.0\nKERNELOFFSET=1a000000\nNUMBER(phys_base)=-4096\n"),
        attached: Some(ATTACHED),
    };
    let head = Head::new(&content).unwrap();
    assert_eq!(head.file_len, head.bytes.len() as u64 + 4 * PAGE_SIZE + 30);
    let mut file = head.bytes;
    file.resize(head.file_len as usize, 0xab);
    file
}

fn read(file: &[u8]) -> anyhow::Result<Vmcore> {
    Vmcore::read(&mut Cursor::new(file), file.len() as u64)
}

#[test]
fn what_is_laid_out_is_read() {
    let file = core();
    let core = read(&file).unwrap();
    let start = file.len() as u64 - 30 - 4 * PAGE_SIZE;
    let piece = |range: RamRange, offset| Piece { range, offset, file_len: range.len };
    assert_eq!(
        core.pieces,
        [piece(range(0, 3), start), piece(range(0x1_0000_0000, 1), start + 3 * PAGE_SIZE)]
    );
    // Those that are online, numbered in their order: all that a note says.
    assert_eq!(core.cpus, [cpu(0), CpuState { user_mode: true, ..cpu(1) }]);
    assert!(start.is_multiple_of(PAGE_SIZE));
    let attached = Attached { offset: file.len() as u64 - 30, ..ATTACHED };
    assert_eq!(core.attached, Some(attached));
    let placed = Placement::from_vmcoreinfo(&core.vmcoreinfo.unwrap()).unwrap();
    assert_eq!(placed, Placement { slide: 0x1a00_0000, phys_base: 0x19ff_f000, levels: 4 });
}

#[test]
fn a_note_of_another_version_is_refused_with_what_to_do() {
    let mut file = core();
    let note = file.windows(9).position(|bytes| bytes == b"kleak-vmm").expect("the note");
    // Behind the name, which is padded to 12 bytes.
    file[note + 12] += 1;
    let error = read(&file).map(|_| ()).expect_err("an error").to_string();
    assert!(error.contains("another version") && error.contains("analyze it with"), "{error}");
}

#[test]
fn memory_that_is_there_twice_counts_once() {
    let mut file = core();
    // The second segment now begins within the first, and its file part is shorter than its memory.
    let second = EHDR + 3 * PHDR;
    file[second + 24..second + 32].copy_from_slice(&(2 * PAGE_SIZE).to_le_bytes());
    file[second + 32..second + 40].copy_from_slice(&PAGE_SIZE.to_le_bytes());
    file[second + 40..second + 48].copy_from_slice(&(3 * PAGE_SIZE).to_le_bytes());
    let core = read(&file).unwrap();
    assert_eq!(core.pieces[1].range, range(3 * PAGE_SIZE, 2));
    assert_eq!(core.pieces[1].file_len, 0);
}

#[test]
fn other_files_are_named() {
    let message = |file: &[u8]| format!("{:#}", read(file).unwrap_err());
    assert!(message(b"x").contains("too short"));
    assert!(message(&[b'x'; 100]).contains("no ELF core"));
    assert!(message(&[b"KDUMP   ".as_slice(), &[0; 100]].concat()).contains("compressed"));
    assert!(message(&[b"makedumpfile".as_slice(), &[0; 100]].concat()).contains("flattened"));
    let mut executable = core();
    executable[16] = 2;
    assert!(message(&executable).contains("no core"));
    let mut arm = core();
    arm[18] = 0xb7;
    assert!(message(&arm).contains("type 183"));
    let whole = core();
    assert!(message(&whole[..whole.len() - 31]).contains("cut off"));
}

#[test]
fn a_kernel_that_says_too_little_is_refused() {
    assert!(Placement::from_vmcoreinfo("OSRELEASE=6.1").is_err());
    assert!(Placement::from_vmcoreinfo("NUMBER(phys_base)=0\nKERNELOFFSET=x").is_err());
    let five = Placement::from_vmcoreinfo("NUMBER(phys_base)=0\nNUMBER(pgtable_l5_enabled)=1").unwrap();
    assert_eq!(five, Placement { slide: 0, phys_base: 0, levels: 5 });
}

proptest! {
    #[test]
    fn damaged_files_are_read_or_refused(
        changes in prop::collection::vec((0..600_usize, any::<u8>()), 1..8),
        cut in prop::option::of(0..17_000_usize),
    ) {
        let mut file = core();
        for (at, value) in changes {
            file[at] = value;
        }
        file.truncate(cut.unwrap_or(file.len()));
        if let Ok(core) = read(&file) {
            for pair in core.pieces.windows(2) {
                prop_assert!(pair[0].range.start + pair[0].range.len <= pair[1].range.start);
            }
            for piece in &core.pieces {
                prop_assert!(piece.offset + piece.file_len <= file.len() as u64);
                prop_assert!(piece.file_len <= piece.range.len);
            }
        }
    }
}
