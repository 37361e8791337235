//! Who keeps the guest's memory alive: how many bytes would be out of reach without the objects of one origin.
//!
//! Every chain of references from the roots to an object leads through its dominators, so what an object dominates is freed
//! with it. An origin, such as an allocation site, retains what its objects dominate; what only two origins hold together
//! neither retains.

use super::graph::Graph;
use super::{Frozen, ScanInput, each_reference, mark_all};
use crate::memory::FrozenMemory;
use crate::registry::Object;
use rustc_hash::FxHashMap;
use std::hash::Hash;

/// What the objects of one origin keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retained {
    /// Objects of this origin that are in use.
    pub objects: u64,
    /// Bytes that would be out of reach without them, themselves included.
    pub bytes: u64,
}

/// By origin, of all objects in use; `origin` tells that of an object.
///
/// # Errors
/// As [`super::scan`].
pub fn retained<M: FrozenMemory, K: Hash + Eq + Clone>(
    input: &ScanInput<'_, M>,
    mut origin: impl FnMut(&Object) -> K,
) -> anyhow::Result<FxHashMap<K, Retained>> {
    let (frozen, slots) = Frozen::collect(input)?;
    let (mut marker, treated) = frozen.marker(input, &slots, ())?;
    mark_all(input, &frozen, &mut marker, &treated);
    // Node 0 is all that is no object.
    let (mut sizes, mut origins, mut nodes) = (vec![0], Vec::new(), FxHashMap::default());
    for object in frozen.objects(input.registry).filter(|object| marker.is_reached(object.address.0)) {
        let node = sizes.len() as u32;
        nodes.extend(frozen.pages.blocks_of(&object).map(|start| (start, node)));
        sizes.push(object.size);
        origins.push(origin(&object));
    }
    let mut edges: Vec<(u32, u32)> = Vec::new();
    let held = treated.gray.iter().chain(&treated.young).filter_map(|start| Some((0, *nodes.get(start)?)));
    edges.extend(held);
    each_reference(input, &frozen, &marker, |source, r| {
        let from = source.map_or(Some(0), |start| nodes.get(&start).copied());
        edges.extend(from.zip(nodes.get(&r.target.start).copied()));
    });
    Ok(by_origin(&sizes, &origins, &Dominators::new(sizes.len(), &edges)))
}

/// Adds up what the nodes behind 0 retain; of a node below another one of its origin that is in the other's sum already.
fn by_origin<K: Hash + Eq + Clone>(
    sizes: &[u64],
    origins: &[K],
    dominators: &Dominators,
) -> FxHashMap<K, Retained> {
    let mut retained = sizes.to_vec();
    // What dominates a node comes before it in this order.
    for &node in dominators.order.iter().skip(1).rev() {
        let above = dominators.above[node as usize] as usize;
        retained[above] = retained[above].saturating_add(retained[node as usize]);
    }
    let mut below = vec![Vec::new(); sizes.len()];
    for &node in dominators.order.iter().skip(1) {
        below[dominators.above[node as usize] as usize].push(node);
    }
    let mut sums: FxHashMap<K, (Retained, u64)> = FxHashMap::default();
    // Nodes to enter, and to leave again: chains are too long for recursion.
    let mut path: Vec<(u32, bool)> = below[0].iter().map(|&node| (node, true)).collect();
    while let Some((node, enters)) = path.pop() {
        let (sum, around) = sums.entry(origins[node as usize - 1].clone()).or_default();
        if !enters {
            *around -= 1;
            continue;
        }
        sum.objects += 1;
        if *around == 0 {
            sum.bytes = sum.bytes.saturating_add(retained[node as usize]);
        }
        *around += 1;
        path.push((node, false));
        path.extend(below[node as usize].iter().map(|&node| (node, true)));
    }
    sums.into_iter().map(|(origin, (sum, _))| (origin, sum)).collect()
}

/// The immediate dominators of the nodes that can be reached from node 0 (Cooper, Harvey and Kennedy, "A simple, fast
/// dominance algorithm", 2001).
struct Dominators {
    /// By node; of others than those in `order` without meaning.
    above: Vec<u32>,
    /// Nodes in reverse postorder.
    order: Vec<u32>,
}

impl Dominators {
    fn new(count: usize, edges: &[(u32, u32)]) -> Self {
        const NONE: u32 = u32::MAX;
        let order = reverse_postorder(count, &Graph::new(count, edges));
        let mut place = vec![NONE; count];
        for (n, &node) in order.iter().enumerate() {
            place[node as usize] = n as u32;
        }
        let backwards: Vec<(u32, u32)> = edges.iter().map(|&(from, to)| (to, from)).collect();
        let sources = Graph::new(count, &backwards);
        let mut above = vec![NONE; count];
        above[0] = 0;
        let mut changed = true;
        while changed {
            changed = false;
            for &node in &order[1..] {
                let known =
                    sources.targets(node).iter().copied().filter(|&from| above[from as usize] != NONE);
                let common = known.reduce(|mut a, mut b| {
                    while a != b {
                        if place[a as usize] > place[b as usize] {
                            a = above[a as usize];
                        } else {
                            b = above[b as usize];
                        }
                    }
                    a
                });
                let common = common.unwrap_or(0);
                changed |= above[node as usize] != common;
                above[node as usize] = common;
            }
        }
        Self { above, order }
    }
}

/// Nodes that can be reached from node 0.
fn reverse_postorder(count: usize, graph: &Graph) -> Vec<u32> {
    let mut seen = vec![false; count];
    let mut order = Vec::new();
    seen[0] = true;
    let mut path = vec![(0_u32, 0)];
    while let Some((node, edge)) = path.pop() {
        let Some(&to) = graph.targets(node).get(edge) else {
            order.push(node);
            continue;
        };
        path.push((node, edge + 1));
        if !std::mem::replace(&mut seen[to as usize], true) {
            path.push((to, 0));
        }
    }
    order.reverse();
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn retained_by(sizes: &[u64], origins: &[u8], edges: &[(u32, u32)]) -> FxHashMap<u8, Retained> {
        by_origin(sizes, origins, &Dominators::new(sizes.len(), edges))
    }

    /// Bytes out of reach when the nodes that `gone` names are not there.
    fn lost(sizes: &[u64], edges: &[(u32, u32)], gone: impl Fn(u32) -> bool) -> u64 {
        let reached = |gone: &dyn Fn(u32) -> bool| {
            let (mut seen, mut todo) = (vec![false; sizes.len()], vec![0]);
            seen[0] = true;
            while let Some(node) = todo.pop() {
                for &(_, to) in edges.iter().filter(|&&(from, to)| from == node && !gone(to)) {
                    if !std::mem::replace(&mut seen[to as usize], true) {
                        todo.push(to);
                    }
                }
            }
            sizes.iter().zip(seen).filter(|&(_, seen)| seen).map(|(size, _)| size).sum::<u64>()
        };
        reached(&|_| false) - reached(&gone)
    }

    #[test]
    fn a_list_is_retained_by_its_head_and_counted_once() {
        let edges: Vec<(u32, u32)> = (0..1000).map(|n| (n, n + 1)).collect();
        let origins = [&[1_u8][..], &[2; 999]].concat();
        let found = retained_by(&[&[0][..], &[8; 1000]].concat(), &origins, &edges);
        assert_eq!(found[&1], Retained { objects: 1, bytes: 8000 });
        assert_eq!(found[&2], Retained { objects: 999, bytes: 7992 });
    }

    #[test]
    fn what_two_hold_is_retained_by_what_holds_both() {
        // 0 -> 1 -> {2, 3} -> 4, and 4 -> 1 closes a cycle.
        let edges = [(0, 1), (1, 2), (1, 3), (2, 4), (3, 4), (4, 1)];
        let found = retained_by(&[0, 1, 10, 100, 1000], &[1, 2, 3, 4], &edges);
        let bytes: Vec<u64> = (1..=4).map(|origin| found[&origin].bytes).collect();
        assert_eq!(bytes, [1111, 10, 100, 1000]);
    }

    proptest! {
        #[test]
        fn it_is_what_is_lost_with_one_object(
            edges in prop::collection::vec((0..12_u32, 1..12_u32), 0..40),
            sizes in prop::collection::vec(1..100_u64, 11),
        ) {
            let sizes = [&[0][..], &sizes].concat();
            // Each an origin of its own.
            let origins: Vec<u8> = (1..12).collect();
            let found = retained_by(&sizes, &origins, &edges);
            for node in 1..12 {
                let bytes = found.get(&(node as u8)).map_or(0, |found| found.bytes);
                prop_assert_eq!(bytes, lost(&sizes, &edges, |other| other == node), "{}", node);
            }
        }
    }
}
