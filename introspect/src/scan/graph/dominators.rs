//! The dominator tree of an acyclic graph whose nodes come in topological order: the immediate dominator of a node is the
//! nearest common ancestor of all that refer to it (Aho, Hopcroft and Ullman, "On finding lowest common ancestors in
//! trees", 1976). Ancestors are found by jump pointers (Myers, "An applicative random-access stack", 1983), so that long
//! chains take logarithmic time.

/// The tree under construction. Its root stands for everything that refers to a direct node.
pub(super) struct Tree {
    /// By node; the last is the root.
    nodes: Vec<Node>,
}

#[derive(Clone, Copy)]
struct Node {
    /// Immediate dominator, of what referred to it so far; None before anything did.
    parent: Option<u32>,
    /// An ancestor further up.
    jump: u32,
    depth: u32,
}

impl Tree {
    /// Of nodes 0..`count`.
    pub fn new(count: usize) -> Self {
        let root = count as u32;
        let node = Node { parent: None, jump: root, depth: 0 };
        Self { nodes: vec![node; count + 1] }
    }

    /// Takes a node up, all that refers to it having been; true when that is nothing.
    pub fn add(&mut self, node: usize) -> bool {
        let root = self.root();
        let parent = self.nodes[node].parent;
        let direct = parent.is_none();
        let above = parent.unwrap_or(root);
        let Node { jump, depth, .. } = self.nodes[above as usize];
        let further = self.nodes[jump as usize];
        let even = depth - further.depth == further.depth - self.nodes[further.jump as usize].depth;
        let jump = if even { further.jump } else { above };
        self.nodes[node] = Node { parent: Some(above), jump, depth: depth + 1 };
        direct
    }

    /// `from`, which was taken up, refers to `to`, which was not yet.
    pub fn refer(&mut self, from: usize, to: usize) {
        let from = from as u32;
        let common = self.nodes[to].parent.map_or(from, |before| self.common(before, from));
        self.nodes[to].parent = Some(common);
    }

    /// Immediate dominator; None for the root.
    pub fn above(&self, node: usize) -> Option<usize> {
        self.nodes[node].parent.filter(|&above| above != self.root()).map(|above| above as usize)
    }

    fn root(&self) -> u32 {
        (self.nodes.len() - 1) as u32
    }

    fn common(&self, mut a: u32, mut b: u32) -> u32 {
        if self.depth(a) < self.depth(b) {
            std::mem::swap(&mut a, &mut b);
        }
        while self.depth(a) > self.depth(b) {
            let jump = self.nodes[a as usize].jump;
            a = if self.depth(jump) >= self.depth(b) { jump } else { self.parent(a) };
        }
        while a != b {
            let (one, other) = (self.nodes[a as usize].jump, self.nodes[b as usize].jump);
            (a, b) = if one == other { (self.parent(a), self.parent(b)) } else { (one, other) };
        }
        a
    }

    fn depth(&self, node: u32) -> u32 {
        self.nodes[node as usize].depth
    }

    fn parent(&self, node: u32) -> u32 {
        self.nodes[node as usize].parent.unwrap_or(self.root())
    }
}
