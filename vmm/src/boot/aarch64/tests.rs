use super::*;

fn image(text_offset: u64, image_size: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes[8..16].copy_from_slice(&text_offset.to_le_bytes());
    bytes[16..24].copy_from_slice(&image_size.to_le_bytes());
    bytes[56..60].copy_from_slice(b"ARM\x64");
    bytes
}

#[test]
fn headers_are_read_and_nonsense_is_refused() {
    let header = Header::of(&image(0x8_0000, 0x123_4000)).unwrap();
    assert_eq!((header.text_offset, header.image_size), (0x8_0000, 0x123_4000));
    assert!(Header::of(&image(2 << 20, 1)).is_err(), "behind the place for it");
    assert!(Header::of(&image(0, 1)[..63]).is_ok() && Header::of(&image(0, 1)[..59]).is_err());
    let mut other = image(0, 1);
    other[56] = b'X';
    assert!(Header::of(&other).is_err());
}
