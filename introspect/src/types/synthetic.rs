//! Builds small BTFs for tests. Types are numbered from 1 in the order they are added.

use super::raw::MAGIC;

/// A BTF under construction.
pub(crate) struct Builder {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

/// One member: name, type, offset in bits, width in bits (0 when not a bit field).
pub(crate) type Part<'a> = (&'a str, u32, u32, u32);

impl Builder {
    pub(crate) fn new() -> Self {
        Self { types: Vec::new(), strings: vec![0], count: 0 }
    }

    /// Adds a record; returns its number.
    pub(crate) fn add(
        &mut self,
        kind: u32,
        flag: bool,
        name: &str,
        value: u32,
        count: u32,
        tail: &[u32],
    ) -> u32 {
        let name = self.string(name);
        let info = kind << 24 | u32::from(flag) << 31 | count;
        for word in [name, info, value].iter().chain(tail) {
            self.types.extend(word.to_le_bytes());
        }
        self.count += 1;
        self.count
    }

    pub(crate) fn int(&mut self, name: &str, bytes: u32) -> u32 {
        self.add(1, false, name, bytes, 0, &[bytes * 8])
    }

    pub(crate) fn pointer(&mut self, to: u32) -> u32 {
        self.add(2, false, "", to, 0, &[])
    }

    pub(crate) fn array(&mut self, element: u32, count: u32) -> u32 {
        self.add(3, false, "", 0, 0, &[element, 1, count])
    }

    pub(crate) fn structure(&mut self, name: &str, bytes: u32, parts: &[Part<'_>]) -> u32 {
        self.aggregate(4, name, bytes, parts)
    }

    pub(crate) fn union(&mut self, name: &str, bytes: u32, parts: &[Part<'_>]) -> u32 {
        self.aggregate(5, name, bytes, parts)
    }

    pub(crate) fn typedef(&mut self, name: &str, of: u32) -> u32 {
        self.add(8, false, name, of, 0, &[])
    }

    fn aggregate(&mut self, kind: u32, name: &str, bytes: u32, parts: &[Part<'_>]) -> u32 {
        let fields = parts.iter().any(|part| part.3 != 0);
        let mut tail = Vec::new();
        for &(name, ty, bit, width) in parts {
            tail.extend([self.string(name), ty, width << 24 | bit]);
        }
        self.add(kind, fields, name, bytes, parts.len() as u32, &tail)
    }

    /// Offset of a string, added when it is new.
    pub(crate) fn string(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return 0;
        }
        let at = self.strings.len() as u32;
        self.strings.extend(text.bytes().chain([0]));
        at
    }

    /// Header, types, strings.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        let mut bytes = MAGIC.to_vec();
        for word in [24, 0, types, types, strings] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(&self.types);
        bytes.extend(&self.strings);
        bytes
    }
}
