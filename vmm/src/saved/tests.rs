//! Cores without a guest: what is checked before one is looked at.

/// The first bytes of an ELF core of 64 bits.
pub fn core_header() -> Vec<u8> {
    let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    bytes.resize(64, 0);
    bytes[16] = 4;
    bytes
}
