//! Random numbers for the guest's KASLR.

use anyhow::ensure;

/// From `seed`, so that a boot can be repeated, else from the host.
///
/// # Errors
/// The host gives none.
pub(super) fn random(seed: Option<u64>) -> anyhow::Result<u64> {
    seed.map_or_else(entropy, |seed| Ok(mix(seed)))
}

fn entropy() -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    // SAFETY: the buffer is 8 bytes long.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    ensure!(got == bytes.len() as isize, "The host gives no random numbers for KASLR");
    Ok(u64::from_le_bytes(bytes))
}

/// Spreads a small seed over all bits: the finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom
/// number generators).
pub(super) fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}
