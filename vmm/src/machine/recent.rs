//! The last few things that happened, equal ones in a row counted instead of repeated.

use std::collections::VecDeque;
use std::fmt::Display;

/// See the module.
#[derive(Debug)]
pub(super) struct Recent<T> {
    items: VecDeque<(T, u64)>,
    limit: usize,
}

impl<T: PartialEq + Display> Recent<T> {
    /// Keeps `limit` different items in a row; older ones are dropped.
    pub fn new(limit: usize) -> Self {
        Self { items: VecDeque::with_capacity(limit), limit }
    }

    /// Adds one.
    pub fn push(&mut self, item: T) {
        if let Some((last, count)) = self.items.back_mut()
            && *last == item
        {
            *count += 1;
            return;
        }
        if self.items.len() == self.limit {
            self.items.pop_front();
        }
        self.items.push_back((item, 1));
    }

    /// As text, oldest first: `item`, or `item x COUNT`.
    pub fn describe(&self) -> Vec<String> {
        let text = |(item, count): &(T, u64)| match count {
            1 => item.to_string(),
            _ => format!("{item} x {count}"),
        };
        self.items.iter().map(text).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_are_counted_and_old_items_dropped() {
        let mut recent = Recent::new(3);
        for item in [1, 2, 2, 2, 3, 4, 4] {
            recent.push(item);
        }
        assert_eq!(recent.describe(), ["2 x 3", "3", "4 x 2"]);
    }
}
