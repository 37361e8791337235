//! A chain of references as text and as JSON.

use super::path::{Hop, Path, Start};
use super::places::{Owner, Place};
use serde_json::{Value, json};
use std::fmt::Write;

impl Path {
    /// What the chain begins with, then one line per object.
    pub fn text(&self) -> String {
        let mut text = match &self.start {
            Start::Root(place) => format!("{place}\n"),
            Start::Register(cpu) => format!("root register of vCPU {cpu}\n"),
            Start::Gray(why) => format!("root gray object: {why}\n"),
            Start::Black(why) => format!("unknown: no references to it are looked for: {why}\n"),
            Start::Young if self.is_alone() => {
                "unreachable: not referenced; too young to be reported\n".to_owned()
            }
            Start::Young => "unreachable: from a young object that is not referenced\n".to_owned(),
            Start::Lost(1) if self.is_alone() => "unreachable: not referenced, lost\n".to_owned(),
            Start::Lost(n) if self.is_alone() => {
                format!("unreachable: only referenced from within its cycle of {n} objects, lost\n")
            }
            Start::Lost(1) => "unreachable: from a lost object that is not referenced\n".to_owned(),
            Start::Lost(n) => format!("unreachable: from a lost cycle of {n} objects\n"),
        };
        let (first, last) = self.hops.split_at(match self.omitted {
            0 => self.hops.len(),
            _ => self.hops.len() / 2,
        });
        text.extend(first.iter().map(Hop::line));
        if self.omitted > 0 {
            let _ = writeln!(text, "  ... {} objects more", self.omitted);
        }
        text.extend(last.iter().map(Hop::line));
        text
    }

    /// The same for programs. Addresses are strings; what is not known, or does not apply, is null.
    pub fn json(&self) -> Value {
        let (state, why) = match &self.start {
            Start::Root(_) | Start::Register(_) => ("referenced", None),
            Start::Gray(why) => ("gray", Some(why)),
            Start::Black(why) => ("black", Some(why)),
            Start::Young => ("young", None),
            Start::Lost(_) if self.is_alone() => ("lost", None),
            Start::Lost(_) => ("indirect", None),
        };
        let root = match &self.start {
            Start::Root(place) => place.json(),
            Start::Register(cpu) => json!({ "region": "registers", "cpu": cpu }),
            _ => Value::Null,
        };
        let cycle = match self.start {
            Start::Lost(n) => Some(n),
            _ => None,
        };
        let chain: Vec<Value> = self.hops.iter().map(Hop::json).collect();
        json!({ "path": {
            "state": state, "reason": why, "root": root, "cycle": cycle, "chain": chain, "omitted": self.omitted,
        } })
    }

    /// The chain is the object that was asked for.
    fn is_alone(&self) -> bool {
        self.hops.len() == 1
    }
}

impl Hop {
    /// Where in the object the word points that refers to it.
    fn entry(&self) -> Option<u64> {
        let start = self.object.address.0;
        self.word.and_then(|word| word.checked_sub(start)).filter(|&inside| inside < self.object.size)
    }

    /// The word that refers to it when it points elsewhere: to the `vm_struct` that stands for the object.
    fn via(&self) -> Option<u64> {
        self.word.filter(|_| self.entry().is_none())
    }

    fn line(&self) -> String {
        let Self { object, cache, structure, next, member, .. } = self;
        let entry = self.entry().map_or_else(String::new, |entry| format!("+{entry:#x}"));
        let mut line =
            format!("  -> {:#018x}{entry} (size {}): {}", object.address.0, object.size, object.kind.name());
        if let Some(cache) = cache {
            // Escaped: a module chooses it.
            let _ = write!(line, ", cache {}", cache.escape_debug());
        }
        if let Some(structure) = structure {
            let _ = write!(line, ", struct {structure}");
        }
        if let Some(via) = self.via() {
            let _ = write!(line, ", through its vm_struct {via:#x}");
        }
        if let Some(next) = next {
            let _ = write!(line, "; its word at +{next:#x}");
        }
        if let Some(member) = member {
            let _ = write!(line, ", {member}");
        }
        line.push('\n');
        line
    }

    fn json(&self) -> Value {
        let hex = |word: u64| format!("{word:#x}");
        json!({
            "address": hex(self.object.address.0), "size": self.object.size, "kind": self.object.kind,
            "cache": self.cache, "type": self.structure, "entry": self.entry(), "via": self.via().map(hex),
            "word": self.next, "member": self.member,
        })
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { region, pa, va, owner } = self;
        write!(f, "root {}: word at {va}", region.escape_debug())?;
        if let Some(owner) = owner {
            write!(f, ", {owner}")?;
        }
        write!(f, ", physical address {pa}")
    }
}

impl Place {
    pub(super) fn json(&self) -> Value {
        let (mut symbol, mut task, mut cpu, mut frame) = (None, None, None, None);
        match &self.owner {
            Some(Owner::Variable { name, offset, size, module, cpu: copy }) => {
                symbol = Some(json!({ "symbol": name, "offset": offset, "size": size, "module": module }));
                cpu = *copy;
            }
            Some(Owner::Task { comm, pid }) => task = Some(json!({ "comm": comm, "pid": pid })),
            Some(Owner::PerCpu { cpu: copy }) => cpu = Some(*copy),
            Some(Owner::Page { frame: number }) => frame = Some(*number),
            None => {}
        }
        json!({
            "region": self.region, "address": self.va.to_string(), "physical_address": self.pa.to_string(),
            "variable": symbol, "task": task, "cpu": cpu, "frame": frame,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Pa, Va};
    use crate::registry::Object;

    fn hop(address: u64, word: Option<u64>, next: Option<u64>) -> Hop {
        let object = Object { address: Va(address), ..Object::sample() };
        Hop {
            object,
            cache: Some("a\nquit".into()),
            structure: Some("file".into()),
            word,
            next,
            member: next.map(|_| "f_op".into()),
        }
    }

    #[test]
    fn a_chain_is_one_line_per_object() {
        let owner = Owner::Task { comm: "sh\nquit".into(), pid: 7 };
        let place = Place {
            region: "task stacks".into(),
            pa: Pa(0x3e48),
            va: Va(0xffff_c900_0000_3e48),
            owner: Some(owner),
        };
        let hops = vec![
            hop(0xffff_8880_0000_1000, Some(0xffff_8880_0000_1008), Some(0x18)),
            hop(0xffff_8880_0000_2000, Some(0xffff_8880_0000_9000), None),
        ];
        let path = Path { start: Start::Root(place), hops, omitted: 3 };
        assert_eq!(
            path.text(),
            "root task stacks: word at 0xffffc90000003e48, stack of \"sh\\nquit\", pid 7, physical address 0x3e48\n  \
             -> 0xffff888000001000+0x8 (size 96): slab, cache a\\nquit, struct file; its word at +0x18, f_op\n  \
             ... 3 objects more\n  \
             -> 0xffff888000002000 (size 96): slab, cache a\\nquit, struct file, through its vm_struct 0xffff888000009000\n"
        );
        let json = path.json();
        assert_eq!(json["path"]["root"]["task"], json!({ "comm": "sh\nquit", "pid": 7 }));
        assert_eq!(json["path"]["chain"][0]["entry"], 8);
        assert_eq!(json["path"]["chain"][0]["member"], "f_op");
        assert_eq!(json["path"]["chain"][1]["via"], "0xffff888000009000");
    }

    #[test]
    fn what_is_not_reached_from_a_root_says_so() {
        let table = [
            (Start::Lost(1), 1, "unreachable: not referenced, lost", "lost"),
            (
                Start::Lost(2),
                1,
                "unreachable: only referenced from within its cycle of 2 objects, lost",
                "lost",
            ),
            (Start::Lost(1), 2, "unreachable: from a lost object that is not referenced", "indirect"),
            (Start::Young, 1, "unreachable: not referenced; too young to be reported", "young"),
            (Start::Gray("why".into()), 1, "root gray object: why", "gray"),
            (Start::Black("why".into()), 1, "unknown: no references to it are looked for: why", "black"),
            (Start::Register(1), 1, "root register of vCPU 1", "referenced"),
        ];
        for (start, hops, line, state) in table {
            let hops = vec![hop(0x1000, None, None); hops];
            let path = Path { start, hops, omitted: 0 };
            assert_eq!(path.text().lines().next(), Some(line));
            assert_eq!(path.json()["path"]["state"], state);
        }
    }
}
