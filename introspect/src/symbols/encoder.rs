//! Writes kallsyms tables for tests, as scripts/kallsyms.c lays them out.

use super::Symbol;
use super::kallsyms::Layout;

/// Texts that get a token of their own; the real tool finds them by frequency.
const MERGED: [&str; 8] = ["__pfx_", "kmalloc", "_alloc", "__", "free", "tcp_", "T", "init_"];

/// How addresses are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offsets {
    /// Distance from the base; no symbol may lie below it.
    Plain,
    /// CONFIG_KALLSYMS_ABSOLUTE_PERCPU: addresses below the base stand for themselves.
    AbsolutePercpu,
}

/// The tables as the newest kernels have them, for tests of other rooms.
pub(crate) fn tables(symbols: &[Symbol], base: u64) -> Vec<u8> {
    encode(symbols, Layout::B, Offsets::AbsolutePercpu, base)
}

/// All tables of `symbols`, which must ascend; starts at an 8-aligned address.
pub(super) fn encode(symbols: &[Symbol], layout: Layout, offsets: Offsets, base: u64) -> Vec<u8> {
    let mut out = Writer(Vec::new());
    let tokens = tokens();
    if layout != Layout::B {
        out.offsets(symbols, offsets, base);
    }
    out.words([symbols.len() as u32]);
    out.names(symbols, &tokens);
    if layout == Layout::A2 {
        out.seqs(symbols);
    }
    out.tokens(&tokens);
    if layout == Layout::B {
        out.offsets(symbols, offsets, base);
        out.seqs(symbols);
    }
    out.0
}

/// Every ASCII character that names are made of, at its own number, and some merged ones.
fn tokens() -> Vec<String> {
    let mut tokens: Vec<String> = (0..256u32)
        .map(|n| match char::from_u32(n) {
            Some(c) if c.is_ascii_alphanumeric() || c == '_' || c == '.' || c == '$' => c.to_string(),
            _ => String::new(),
        })
        .collect();
    for (n, text) in MERGED.iter().enumerate() {
        tokens[128 + n] = (*text).to_owned();
    }
    tokens
}

struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(8), 0);
    }

    fn words(&mut self, words: impl IntoIterator<Item = u32>) {
        self.0.extend(words.into_iter().flat_map(u32::to_le_bytes));
        self.align();
    }

    fn offsets(&mut self, symbols: &[Symbol], offsets: Offsets, base: u64) {
        self.words(symbols.iter().map(|symbol| match offsets {
            Offsets::AbsolutePercpu if symbol.va.0 < base => symbol.va.0 as u32,
            Offsets::AbsolutePercpu => base.wrapping_sub(symbol.va.0).wrapping_sub(1) as u32,
            Offsets::Plain => (symbol.va.0 - base) as u32,
        }));
        self.0.extend(base.to_le_bytes());
    }

    fn names(&mut self, symbols: &[Symbol], tokens: &[String]) {
        let start = self.0.len();
        let mut markers = Vec::new();
        for (n, symbol) in symbols.iter().enumerate() {
            if n % 256 == 0 {
                markers.push((self.0.len() - start) as u32);
            }
            let numbers = pack(&format!("{}{}", symbol.kind, symbol.name), tokens);
            if numbers.len() < 0x80 {
                self.0.push(numbers.len() as u8);
            } else {
                self.0.extend([(numbers.len() & 0x7f) as u8 | 0x80, (numbers.len() >> 7) as u8]);
            }
            self.0.extend(numbers);
        }
        self.align();
        self.words(markers);
    }

    fn seqs(&mut self, symbols: &[Symbol]) {
        let mut order: Vec<usize> = (0..symbols.len()).collect();
        order.sort_by_key(|&n| &symbols[n].name);
        self.0.extend(order.into_iter().flat_map(|n| (n as u32).to_be_bytes().into_iter().skip(1)));
        self.align();
    }

    fn tokens(&mut self, tokens: &[String]) {
        let mut index = Vec::new();
        let start = self.0.len();
        for token in tokens {
            index.push((self.0.len() - start) as u16);
            self.0.extend(token.as_bytes());
            self.0.push(0);
        }
        self.align();
        self.0.extend(index.into_iter().flat_map(u16::to_le_bytes));
        self.align();
    }
}

/// The token numbers of a text, longest token first.
fn pack(mut text: &str, tokens: &[String]) -> Vec<u8> {
    let mut numbers = Vec::new();
    while !text.is_empty() {
        let fitting =
            tokens.iter().enumerate().filter(|(_, t)| !t.is_empty() && text.starts_with(t.as_str()));
        let (number, token) =
            fitting.max_by_key(|(_, t)| t.len()).expect("names are made of known characters");
        numbers.push(number as u8);
        text = &text[token.len()..];
    }
    numbers
}
