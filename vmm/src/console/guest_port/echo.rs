//! The guest's terminal echoes our replies back to us; they must not be taken for commands.
//!
//! By default a Linux tty echoes its input: each byte as it came, newline as `\r\n`, control characters as `^X`, and
//! EOT, being canonical mode's end of file, not at all (drivers/tty/n_tty.c, `n_tty_receive_char_special`). When
//! the echo cannot be sent as fast as input comes, the tty drops part of it (`__process_echoes`), so the echo is
//! matched line by line and may have holes. Programs that switch echo off send none.

use super::protocol::Time;
use std::collections::VecDeque;
use std::time::Duration;

/// Replies whose echo is still waited for while none was ever seen: a terminal that echoes does so within one or two.
const UNSEEN_REPLIES: u64 = 8;
/// The same once echo was seen: as many as a program may let pile up before it reads.
const SEEN_REPLIES: u64 = 256;
/// The echo of a line goes on within this time: a program may have switched echo off since.
const PATIENCE: Duration = Duration::from_secs(5);

/// Lines whose echo may still come.
#[derive(Debug, Default)]
pub struct Echo {
    /// Each with the number of its reply.
    expected: VecDeque<(u64, Vec<u8>)>,
    replies: u64,
    /// A line of this session came back: echo is on.
    seen: bool,
    /// When something was sent, or came back, for the last time.
    last: Time,
}

impl Echo {
    /// The port was opened: nothing sent before comes back.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// `text` was sent to the guest.
    pub fn sent(&mut self, now: Time, text: &str) {
        self.replies += 1;
        self.last = now;
        let kept = if self.seen { SEEN_REPLIES } else { UNSEEN_REPLIES };
        let oldest = self.replies.saturating_sub(kept);
        self.expected.retain(|(reply, _)| *reply > oldest);
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        self.expected.extend(lines.map(|line| (self.replies, line.as_bytes().to_vec())));
    }

    /// Whether `line`, trimmed, is the echo of something sent. Lines before it fell into a hole.
    pub fn swallow(&mut self, now: Time, line: &[u8]) -> bool {
        let found = self.expected.iter().position(|(_, expected)| expected == line);
        if let Some(at) = found {
            self.expected.drain(..=at);
            self.seen = true;
            self.last = now;
        }
        found.is_some()
    }

    /// Whether a line that is no command may be what a hole made of the lines still expected.
    pub fn is_under_way(&self, now: Time) -> bool {
        self.seen && !self.expected.is_empty() && now.saturating_sub(self.last) < PATIENCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_what_was_sent_is_swallowed_once() {
        let mut echo = Echo::default();
        echo.sent(Time::ZERO, "kmemleak: 3 new\n  hex dump:\n");
        assert!(echo.swallow(Time::ZERO, b"kmemleak: 3 new"));
        assert!(!echo.swallow(Time::ZERO, b"kmemleak: 3 new"));
        assert!(!echo.swallow(Time::ZERO, b"scan"));
        assert!(echo.swallow(Time::ZERO, b"hex dump:"));
        assert!(!echo.swallow(Time::ZERO, b"hex dump:"));
    }

    #[test]
    fn a_hole_in_the_echo_is_passed_over() {
        let mut echo = Echo::default();
        echo.sent(Time::ZERO, "first line\nsecond line of it\nthird line\nfourth line\n");
        assert!(echo.swallow(Time::ZERO, b"first line"));
        assert!(echo.is_under_way(Time::ZERO));
        assert!(!echo.swallow(Time::ZERO, b"second lird line"), "from the second into the third");
        assert!(echo.swallow(Time::ZERO, b"fourth line"));
        assert!(!echo.is_under_way(Time::ZERO));
    }

    #[test]
    fn without_echo_nothing_is_explained_away_and_nothing_piles_up() {
        let mut echo = Echo::default();
        for i in 0..1000 {
            echo.sent(Time::ZERO, &format!("tracking {i}\n"));
            assert!(!echo.is_under_way(Time::ZERO));
        }
        assert_eq!(echo.expected.len() as u64, UNSEEN_REPLIES);
    }

    #[test]
    fn echo_that_was_switched_off_is_not_waited_for() {
        let mut echo = Echo::default();
        echo.sent(Time::ZERO, "one\n");
        assert!(echo.swallow(Time::ZERO, b"one"));
        for i in 0..1000 {
            echo.sent(Time::ZERO, &format!("tracking {i}\n"));
        }
        assert!(echo.is_under_way(PATIENCE / 2) && !echo.is_under_way(PATIENCE));
        assert_eq!(echo.expected.len() as u64, SEEN_REPLIES);
    }

    #[test]
    fn replies_sent_together_come_back_together() {
        let mut echo = Echo::default();
        echo.sent(Time::ZERO, "one\n");
        echo.sent(Time::ZERO, "two\n");
        assert!(echo.swallow(Time::ZERO, b"one") && echo.swallow(Time::ZERO, b"two"));
    }
}
