//! What makes two leaks the same leak.

use super::{Frame, Group, Leak, Order};
use crate::registry::Kind;
use rustc_hash::{FxHashMap, FxHashSet};

/// FNV-1a, 64 bits (Fowler, Noll, Vo): offset basis and prime.
const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// [`Group::id`] of an allocation. Hashed are, each followed by a zero byte: the kind, the size class in decimal,
/// then per frame the function without the suffix of a compiler's clone, and the module. A frame without a name is "?".
pub(super) fn id(kind: Kind, size: u64, backtrace: &[Frame]) -> String {
    let class = size.max(1).checked_next_power_of_two().unwrap_or(size).to_string();
    let mut hash = FNV_BASIS;
    let mut add = |text: &str| {
        for &byte in text.as_bytes().iter().chain(&[0]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(FNV_PRIME);
        }
    };
    add(kind.name());
    add(&class);
    for frame in backtrace {
        let name = frame.symbol.as_deref().unwrap_or("?");
        add(name.split_once('.').map_or(name, |(plain, _)| plain));
        add(frame.module.as_deref().unwrap_or_default());
    }
    format!("{hash:016x}")
}

/// Groups leaks; `components[i]` is the cycle that leak i belongs to.
pub(super) fn group(leaks: &[Leak], components: &[u32], order: Order) -> Vec<Group> {
    let mut places: FxHashMap<&str, usize> = FxHashMap::default();
    let mut groups: Vec<Group> = Vec::new();
    let mut counted = FxHashSet::default();
    for (leak, &component) in leaks.iter().zip(components) {
        let place = *places.entry(&leak.group).or_insert_with(|| {
            groups.push(Group {
                id: leak.group.clone(),
                count: 0,
                direct: 0,
                bytes: 0,
                retained_bytes: 0,
                kind: leak.kind,
                cache: leak.cache.clone(),
                backtrace: leak.backtrace.clone(),
            });
            groups.len() - 1
        });
        let group = &mut groups[place];
        group.count += 1;
        group.bytes += leak.size;
        if leak.direct {
            group.direct += 1;
            if counted.insert((place, component)) {
                group.retained_bytes += leak.retained_bytes;
            }
        }
    }
    // Stable: groups that keep the same amount stay in allocation order.
    if order == Order::Retained {
        groups.sort_by_key(|g| std::cmp::Reverse(g.retained_bytes));
    }
    groups
}
