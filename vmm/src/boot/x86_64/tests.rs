//! Placement of everything, on synthetic images.

use super::*;
use crate::arch::layout;
use introspect::arch::AddressSpace;
use introspect::image::{Format, KernelImage, Relocations, Segment};
use introspect::memory::{PhysicalMemory, Va};

const MIB: u64 = 1 << 20;

fn image() -> KernelImage {
    KernelImage {
        format: Format::Elf,
        elf: vec![0x90; 4096],
        segments: vec![Segment {
            va: Va(0xffff_ffff_8100_0000),
            pa: Pa(16 * MIB),
            file: 0..4096,
            mem_size: 40 * MIB,
        }],
        sections: Vec::new(),
        entry: Pa(16 * MIB),
        relocations: None,
        packed: Vec::new(),
        banner: String::new(),
    }
}

fn attempt(image: &KernelImage, change: impl FnOnce(&mut Config<'_>)) -> anyhow::Result<(GuestRam, Loaded)> {
    let mut config = Config::new(image);
    config.mem_bytes = 128 * MIB;
    change(&mut config);
    let ram = GuestRam::new(layout::ram(config.mem_bytes))?;
    let loaded = load(&ram, &config, 4)?;
    Ok((ram, loaded))
}

fn refusal(change: impl FnOnce(&mut Config<'_>)) -> String {
    format!("{:#}", attempt(&image(), change).err().expect("refused"))
}

#[test]
fn a_vmlinux_gets_a_header_and_stays_where_it_is_linked() {
    let (ram, loaded) = attempt(&image(), |_| {}).unwrap();
    let mut magic = [0; 4];
    ram.read(loaded.boot_params + 0x202, &mut magic).unwrap();
    assert_eq!(&magic, b"HdrS");
    assert_eq!(loaded.placement, Placement { slide: 0, phys_base: 0, levels: 4 });
    assert_eq!(ram.read_u64(loaded.entry).unwrap(), 0x9090_9090_9090_9090);
}

#[test]
fn the_initramfs_lies_at_the_top_of_low_memory() {
    let (ram, loaded) = attempt(&image(), |c| c.initrd = Some(vec![7; 5000])).unwrap();
    let start = ram.read_u64(loaded.boot_params + 0x218).unwrap() & 0xffff_ffff;
    assert_eq!(start, 128 * MIB - 8192);
    assert_eq!(ram.read_u64(Pa(start)).unwrap(), 0x0707_0707_0707_0707);
}

#[test]
fn what_does_not_fit_is_named() {
    assert!(
        refusal(|c| c.initrd = Some(vec![0; 80 << 20])).starts_with("The initramfs does not fit: it has 80")
    );
    assert!(refusal(|c| c.cmdline = "x".repeat(2048)).contains("has 2048 bytes, this kernel takes 2047"));
    assert!(refusal(|c| c.cmdline = "a\0b".to_owned()).contains("NUL"));
    assert!(refusal(|c| c.kaslr = true).contains("no relocations"));
    let mut large = image();
    large.segments[0].mem_size = 200 * MIB;
    let error = attempt(&large, |_| {}).err().unwrap().to_string();
    assert!(error.contains("needs memory up to 216 MiB, the guest has 128 MiB"), "{error}");
    let mut odd = image();
    odd.entry = Pa(0x1000);
    assert!(attempt(&odd, |_| {}).is_err());
}

#[test]
fn a_seed_repeats_the_place() {
    let mut image = image();
    image.relocations = Some(Relocations::default());
    let slide = |seed| {
        let kaslr = |c: &mut Config<'_>| (c.kaslr, c.kaslr_seed) = (true, seed);
        attempt(&image, kaslr).unwrap().1.placement.slide
    };
    assert_eq!(slide(Some(1)), slide(Some(1)));
    assert_ne!(slide(Some(1)), slide(Some(2)));
    assert_eq!(slide(None) % (2 * MIB), 0);
}

#[test]
fn four_gigabytes_are_mapped_to_themselves() {
    for levels in [4, 5] {
        let image = image();
        let config = Config::new(&image);
        let ram = GuestRam::new(layout::ram(128 * MIB)).unwrap();
        let loaded = load(&ram, &config, levels).unwrap();
        let space = AddressSpace { root: loaded.page_tables, levels };
        for pa in [0, 0x1234, 128 * MIB, 0xffff_ffff] {
            assert_eq!(space.translate(&ram, Va(pa)).unwrap(), Pa(pa), "{levels} levels");
        }
        assert!(space.translate(&ram, Va(1 << 32)).is_err());
        assert_eq!(loaded.placement.levels, levels);
    }
}
