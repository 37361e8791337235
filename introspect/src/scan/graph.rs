//! The graph over unreachable objects: which of them were lost, and which are only held by those.
//!
//! Strongly connected components (Tarjan, "Depth-first search and linear graph algorithms", 1972) make it acyclic.
//! An object is *direct* when no unreachable object outside its own component refers to it. A component *retains* itself and
//! everything that it dominates: what every chain from the direct components leads to through it, and would be freed with
//! it. What two of them share neither retains.

mod dominators;

use dominators::Tree;

/// Where one unreachable object stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Not referenced from outside its component.
    pub direct: bool,
    /// Number of its component; objects of one cycle share it.
    pub component: u32,
    /// Bytes that its component retains, itself included.
    pub retained: u64,
}

/// Classifies objects 0..n of the given sizes; `edges` are references (from, to) in any order, repeats and
/// self-references allowed.
pub fn classify(sizes: &[u64], edges: &[(u32, u32)]) -> Vec<Standing> {
    let graph = Graph::new(sizes.len(), edges);
    let component = graph.components();
    let count = component.iter().map(|&c| c as usize + 1).max().unwrap_or(0);
    let mut members = vec![Vec::new(); count];
    let mut retained = vec![0_u64; count];
    for (node, &c) in component.iter().enumerate() {
        members[c as usize].push(node as u32);
        retained[c as usize] = retained[c as usize].saturating_add(sizes[node]);
    }
    let mut tree = Tree::new(count);
    let mut direct = vec![false; count];
    // Tarjan numbers a component after all that it reaches: descending numbers are a topological order.
    for c in (0..count).rev() {
        direct[c] = tree.add(c);
        for &target in members[c].iter().flat_map(|&node| graph.targets(node)) {
            let t = component[target as usize] as usize;
            if t != c {
                tree.refer(c, t);
            }
        }
    }
    // What a component dominates has a lower number.
    for c in 0..count {
        if let Some(above) = tree.above(c) {
            retained[above] = retained[above].saturating_add(retained[c]);
        }
    }
    let standing =
        |&c: &u32| Standing { direct: direct[c as usize], component: c, retained: retained[c as usize] };
    component.iter().map(standing).collect()
}

/// Edges by source.
pub(super) struct Graph {
    starts: Vec<usize>,
    targets: Vec<u32>,
}

impl Graph {
    pub fn new(nodes: usize, edges: &[(u32, u32)]) -> Self {
        let mut edges = edges.to_vec();
        edges.sort_unstable();
        edges.dedup();
        let mut starts = vec![0; nodes + 1];
        for &(from, _) in &edges {
            starts[from as usize + 1] += 1;
        }
        for node in 0..nodes {
            starts[node + 1] += starts[node];
        }
        Self { starts, targets: edges.into_iter().map(|(_, to)| to).collect() }
    }

    pub fn targets(&self, node: u32) -> &[u32] {
        &self.targets[self.starts[node as usize]..self.starts[node as usize + 1]]
    }

    /// Component of every node, numbered so that every edge leads to a lower or the same number. Tarjan's
    /// algorithm with its recursion kept in a vector: leaked lists are long.
    fn components(&self) -> Vec<u32> {
        const UNSEEN: u32 = u32::MAX;
        let nodes = self.starts.len() - 1;
        let mut order = vec![UNSEEN; nodes];
        let mut low = vec![0; nodes];
        let mut component = vec![UNSEEN; nodes];
        let (mut stack, mut path) = (Vec::new(), Vec::new());
        let (mut seen, mut count) = (0, 0);
        for root in 0..nodes as u32 {
            if order[root as usize] != UNSEEN {
                continue;
            }
            path.push((root, 0));
            while let Some((node, edge)) = path.pop() {
                let n = node as usize;
                if edge == 0 {
                    order[n] = seen;
                    low[n] = seen;
                    seen += 1;
                    stack.push(node);
                }
                let Some(&target) = self.targets(node).get(edge) else {
                    if low[n] == order[n] {
                        while let Some(member) = stack.pop() {
                            component[member as usize] = count;
                            if member == node {
                                break;
                            }
                        }
                        count += 1;
                    }
                    if let Some(&(parent, _)) = path.last() {
                        low[parent as usize] = low[parent as usize].min(low[n]);
                    }
                    continue;
                };
                path.push((node, edge + 1));
                let t = target as usize;
                if order[t] == UNSEEN {
                    path.push((target, 0));
                } else if component[t] == UNSEEN {
                    low[n] = low[n].min(order[t]);
                }
            }
        }
        component
    }
}
