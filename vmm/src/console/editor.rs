//! The monitor's line editor: bytes of a raw terminal in, lines and terminal output out.
//!
//! Keys as in a shell: arrows, Home, End, Delete, Ctrl-b/f/e/k/u/w/l, Up and Down or Ctrl-p/n for the history, Tab
//! for completion. Ctrl-c drops the line; Ctrl-d on an empty one leaves. It does no I/O, so that the mux can run it
//! on the same bytes it watches for its own keys.

use std::mem;

/// Lines kept.
const HISTORY: usize = 100;
/// Longest line.
const MAX_LINE: usize = 1024;

/// What a key came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Edit {
    /// A finished line, not empty.
    Line(String),
    /// End of the session.
    Leave,
}

/// Position in an escape sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escape {
    None,
    /// Behind ESC.
    Start,
    /// Behind `ESC [` or `ESC O`, with the number read so far.
    Sequence(u32),
}

/// See the module.
pub struct LineEditor {
    prompt: &'static str,
    complete: fn(&str) -> Vec<String>,
    line: Vec<char>,
    cursor: usize,
    history: Vec<String>,
    /// Place in the history; its length is the line being written.
    at: usize,
    /// The line being written, while the history is shown.
    draft: Vec<char>,
    escape: Escape,
    /// Bytes of a character not complete yet.
    partial: Vec<u8>,
    /// Columns of the terminal.
    width: usize,
    out: Vec<u8>,
}

impl LineEditor {
    /// An editor with an empty history.
    pub fn new(prompt: &'static str, complete: fn(&str) -> Vec<String>) -> Self {
        Self {
            prompt,
            complete,
            line: Vec::new(),
            cursor: 0,
            history: Vec::new(),
            at: 0,
            draft: Vec::new(),
            escape: Escape::None,
            partial: Vec::new(),
            width: 80,
            out: Vec::new(),
        }
    }

    /// Starts a session: shows the prompt on a terminal of `width` columns.
    pub fn start(&mut self, width: usize) {
        self.width = width;
        self.partial.clear();
        self.escape = Escape::None;
        self.redraw();
    }

    /// What the terminal is to be sent.
    pub fn take_output(&mut self) -> Vec<u8> {
        mem::take(&mut self.out)
    }

    /// Takes a byte from the terminal.
    pub fn feed(&mut self, byte: u8) -> Option<Edit> {
        match mem::replace(&mut self.escape, Escape::None) {
            Escape::None => return self.key(byte),
            Escape::Start if matches!(byte, b'[' | b'O') => self.escape = Escape::Sequence(0),
            Escape::Start => {}
            Escape::Sequence(number) => self.sequence(number, byte),
        }
        None
    }

    /// A byte of a control sequence: digits, then the letter that ends it (ECMA-48, 5.4).
    fn sequence(&mut self, number: u32, byte: u8) {
        match (byte, number) {
            (b'0'..=b'9', _) => {
                self.escape =
                    Escape::Sequence(number.saturating_mul(10).saturating_add(u32::from(byte - b'0')));
            }
            // Parameters behind the first are modifiers: no key of ours has one.
            (b';' | 0x20..=0x2f, _) => self.escape = Escape::Sequence(u32::MAX),
            (b'A', 0) => self.recall(-1),
            (b'B', 0) => self.recall(1),
            (b'C', 0) => self.move_to(self.cursor + 1),
            (b'D', 0) => self.move_to(self.cursor.saturating_sub(1)),
            (b'H', 0) | (b'~', 1 | 7) => self.move_to(0),
            (b'F', 0) | (b'~', 4 | 8) => self.move_to(self.line.len()),
            (b'~', 3) => self.delete(),
            _ => {}
        }
    }

    fn key(&mut self, byte: u8) -> Option<Edit> {
        const fn ctrl(letter: u8) -> u8 {
            letter & 0x1f
        }
        match byte {
            b'\r' | b'\n' => return self.finish(),
            b'\t' => self.tab(),
            0x1b => self.escape = Escape::Start,
            0x7f | 0x08 if self.cursor > 0 => {
                self.cursor -= 1;
                self.delete();
            }
            _ if byte == ctrl(b'a') => self.move_to(0),
            _ if byte == ctrl(b'e') => self.move_to(self.line.len()),
            _ if byte == ctrl(b'b') => self.move_to(self.cursor.saturating_sub(1)),
            _ if byte == ctrl(b'f') => self.move_to(self.cursor + 1),
            _ if byte == ctrl(b'p') => self.recall(-1),
            _ if byte == ctrl(b'n') => self.recall(1),
            _ if byte == ctrl(b'k') => self.replace(self.cursor..self.line.len(), ""),
            _ if byte == ctrl(b'u') => self.replace(0..self.cursor, ""),
            _ if byte == ctrl(b'w') => self.replace(self.word_start()..self.cursor, ""),
            _ if byte == ctrl(b'c') => {
                self.out.extend_from_slice(b"^C\r\n");
                self.set_line(String::new());
                self.at = self.history.len();
            }
            _ if byte == ctrl(b'l') => {
                self.out.extend_from_slice(b"\x1b[H\x1b[2J");
                self.redraw();
            }
            _ if byte == ctrl(b'd') && self.line.is_empty() => {
                self.out.extend_from_slice(b"\r\n");
                return Some(Edit::Leave);
            }
            _ if byte == ctrl(b'd') => self.delete(),
            0x20.. => self.character(byte),
            _ => {}
        }
        None
    }

    /// A printable byte; characters of several bytes are put in once whole.
    fn character(&mut self, byte: u8) {
        self.partial.push(byte);
        match std::str::from_utf8(&self.partial) {
            Ok(text) => {
                let text = text.to_owned();
                self.partial.clear();
                if self.line.len() < MAX_LINE && !text.contains(char::is_control) {
                    self.replace(self.cursor..self.cursor, &text);
                }
            }
            Err(error) if error.error_len().is_some() => self.partial.clear(),
            Err(_) => {}
        }
    }

    fn finish(&mut self) -> Option<Edit> {
        self.move_to(self.line.len());
        self.out.extend_from_slice(b"\r\n");
        let text: String = mem::take(&mut self.line).into_iter().collect();
        self.cursor = 0;
        if text.trim().is_empty() {
            self.redraw();
            return None;
        }
        if self.history.last() != Some(&text) {
            self.history.push(text.clone());
            if self.history.len() > HISTORY {
                self.history.remove(0);
            }
        }
        self.at = self.history.len();
        Some(Edit::Line(text))
    }

    fn recall(&mut self, step: isize) {
        let Some(at) = self.at.checked_add_signed(step).filter(|&at| at <= self.history.len()) else {
            return;
        };
        if self.at == self.history.len() {
            self.draft = self.line.clone();
        }
        self.at = at;
        let text = self.history.get(at).cloned().unwrap_or_else(|| self.draft.iter().collect());
        self.set_line(text);
    }

    fn set_line(&mut self, text: String) {
        self.line = text.chars().collect();
        self.cursor = self.line.len();
        self.redraw();
    }

    fn replace(&mut self, range: std::ops::Range<usize>, text: &str) {
        let start = range.start;
        self.line.splice(range, text.chars());
        self.cursor = start + text.chars().count();
        self.redraw();
    }

    fn delete(&mut self) {
        if self.cursor < self.line.len() {
            self.line.remove(self.cursor);
        }
        self.redraw();
    }

    fn move_to(&mut self, cursor: usize) {
        self.cursor = cursor.min(self.line.len());
        self.redraw();
    }

    fn word_start(&self) -> usize {
        let before = &self.line[..self.cursor];
        let word_end = before.iter().rposition(|c| !c.is_whitespace()).map_or(0, |at| at + 1);
        before[..word_end].iter().rposition(|c| c.is_whitespace()).map_or(0, |at| at + 1)
    }

    /// Completes as far as the candidates agree; when that is nowhere, lists them.
    fn tab(&mut self) {
        let prefix: String = self.line[..self.cursor].iter().collect();
        let candidates = (self.complete)(&prefix);
        let Some(first) = candidates.first() else { return };
        let agreed = candidates.iter().skip(1).fold(first.as_str(), |agreed, other| {
            let common = agreed.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
            &agreed[..common]
        });
        if agreed.len() > prefix.trim_start().len() {
            let agreed = agreed.to_owned();
            self.replace(0..self.cursor, &agreed);
        } else if candidates.len() > 1 {
            self.out.extend_from_slice(format!("\r\n{}\r\n", candidates.join("  ")).as_bytes());
            self.redraw();
        }
    }

    /// Draws prompt and line on the terminal's last line; a line too long for it is shown around the cursor.
    fn redraw(&mut self) {
        let room = self.width.saturating_sub(self.prompt.len() + 1).max(8);
        let first = (self.cursor + 1).saturating_sub(room);
        let shown: String = self.line.iter().skip(first).take(room).collect();
        let column = self.prompt.len() + self.cursor - first;
        self.out.extend_from_slice(format!("\r{}{shown}\x1b[K\r\x1b[{column}C", self.prompt).as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::super::command::complete;
    use super::*;

    /// Feeds `keys` and returns the finished lines; a dash for leaving.
    fn lines(keys: &str) -> Vec<String> {
        let mut editor = LineEditor::new("> ", complete);
        editor.start(80);
        let edits = keys.bytes().filter_map(|byte| editor.feed(byte));
        let lines = edits.map(|edit| if let Edit::Line(line) = edit { line } else { "-".into() }).collect();
        assert!(editor.out.iter().all(|byte| *byte != 0));
        lines
    }

    #[test]
    fn keys_edit_the_line() {
        let table = [
            ("scan\r", "scan"),
            ("scam\x7fn\r", "scan"),
            ("can\x01s\r", "scan"),
            ("can\x1b[Hs\x1b[Ft\r", "scant"),
            ("an\x1b[1~c\x1b[Ds\x1b[4~!\r", "scan!"),
            ("scan\x1b[D\x1b[D\x1b[3~\x1b[C\r", "scn"),
            ("one two three\x17\x17\r", "one "),
            ("abcdef\x02\x02\x0b\r", "abcd"),
            ("abcdef\x02\x02\x15\r", "ef"),
            ("junk\x03scan\r", "scan"),
            ("a\x1b[1;5Cb\x1bxc\x1b[99zd\r", "abcd"),
            ("sc\x04an\x01\x04\r", "can"),
            ("gr\u{fc}n\u{20ac}\x7f\r", "gr\u{fc}n"),
        ];
        for (keys, line) in table {
            assert_eq!(lines(keys), [line], "{keys:?}");
        }
        assert_eq!(lines("\r  \r\n"), Vec::<String>::new());
        assert_eq!(lines("x\x7f\x04"), ["-"]);
    }

    #[test]
    fn history_goes_back_and_keeps_the_draft() {
        assert_eq!(lines("scan\rstatus\r\x1b[A\x1b[A\r"), ["scan", "status", "scan"]);
        assert_eq!(lines("scan\rstatus\rdr\x10\x10\x10\x0e\x0e\x0eaft\r"), ["scan", "status", "draft"]);
        assert_eq!(lines("scan\rscan\rclear\r\x10\x10\x10\r").last().unwrap(), "scan");
    }

    #[test]
    fn tab_completes_as_far_as_candidates_agree() {
        assert_eq!(lines("cl\t\r"), ["clear"]);
        assert_eq!(lines("du\t10\r"), ["dump=10"]);
        assert_eq!(lines("json aud\t\r"), ["json audit"]);
        assert_eq!(lines("sta\t\t\r"), ["sta"]);
        assert_eq!(lines("xyz\t\r"), ["xyz"]);
        let mut editor = LineEditor::new("> ", complete);
        let _ = "sta\t".bytes().filter_map(|byte| editor.feed(byte)).count();
        assert!(String::from_utf8(editor.take_output()).unwrap().contains("stack=off  stack=on  status"));
    }

    #[test]
    fn a_long_line_scrolls_inside_the_terminal() {
        let mut editor = LineEditor::new("> ", complete);
        editor.start(20);
        editor.take_output();
        for byte in [b'x'; 3000] {
            editor.feed(byte);
        }
        let out = String::from_utf8(editor.take_output()).unwrap();
        let longest = out.split('\r').map(|part| part.trim_end_matches("\x1b[K").len()).max().unwrap();
        assert!(longest < 20, "{longest}");
        assert_eq!(editor.line.len(), MAX_LINE);
        assert!(out.ends_with("\x1b[18C"), "the cursor stays on the line");
    }

    #[test]
    fn any_bytes_are_survived() {
        let mut editor = LineEditor::new("> ", complete);
        let mut state = 1u32;
        for _ in 0..100_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            editor.feed((state >> 24) as u8);
            editor.take_output();
        }
        assert!(editor.cursor <= editor.line.len());
    }
}
