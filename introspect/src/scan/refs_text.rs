//! Reference counts and references as text and as JSON.

use super::refs::{CacheRefs, Counted, Held, HeldBy, ObjectRefs};
use crate::accounting::{Cell, Column, Role, Table};
use serde_json::{Value, json};
use std::fmt::Write;

impl ObjectRefs {
    /// The object, its count, and a line for each reference.
    pub fn text(&self) -> String {
        let mut text = self.heading();
        match &self.counted {
            Ok((counter, counted)) => {
                let _ = writeln!(text, ", struct {}", counter.structure);
                let _ = writeln!(
                    text,
                    "  {} is {}; references found: {}; words that point into the middle: {}",
                    counter.member, counted.count, counted.found, counted.inside
                );
                if counted.own > 0 {
                    let _ =
                        writeln!(text, "  counted without a pointer: {}. {}", counted.own, counter.reason);
                }
                if counted.excess() > 0 {
                    let _ = writeln!(text, "  counted and not there: {}", counted.excess());
                }
            }
            Err(why) => {
                let _ = writeln!(text, "\n  no count: {why}");
            }
        }
        text.push_str(&self.referenced_by());
        text
    }

    /// The beginning of the first line: the object, and its cache.
    pub fn heading(&self) -> String {
        let object = &self.object;
        let mut text =
            format!("object {:#018x} (size {}): {}", object.address.0, object.size, object.kind.name());
        if let Some(cache) = &self.cache {
            // Escaped: a module chooses it.
            let _ = write!(text, ", cache {}", cache.escape_debug());
        }
        text
    }

    /// The last lines: who refers to it.
    pub fn referenced_by(&self) -> String {
        let mut text = "  referenced by:\n".to_owned();
        text.extend(self.references.iter().map(|held| format!("    {}\n", held.line())));
        if self.omitted > 0 {
            let _ = writeln!(text, "    and {} more", self.omitted);
        } else if self.references.is_empty() {
            text.push_str("    nothing\n");
        }
        text
    }

    /// The same for programs: one object for each reference listed.
    pub fn references_json(&self) -> Value {
        self.references.iter().map(Held::json).collect()
    }

    /// The same for programs. Addresses are strings; what is not known is null.
    pub fn json(&self) -> Value {
        let known = self.counted.as_ref().ok();
        let counted = known.map(|(_, counted)| counted);
        let counter = known.map(|(counter, _)| counter);
        json!({ "refs": {
            "address": format!("{:#x}", self.object.address.0), "size": self.object.size,
            "kind": self.object.kind, "cache": self.cache,
            "type": counter.map(|c| c.structure.as_str()), "member": counter.map(|c| c.member.as_str()),
            "count": counted.map(|c| c.count), "own": counted.map(|c| c.own),
            "found": counted.map(|c| c.found), "inside": counted.map(|c| c.inside),
            "excess": counted.map(Counted::excess), "why_no_count": self.counted.as_ref().err(),
            "references": self.references_json(), "omitted": self.omitted,
        } })
    }
}

impl Held {
    fn line(&self) -> String {
        let mut line = match &self.by {
            HeldBy::Root(place) => place.to_string(),
            HeldBy::Register(cpu) => format!("register of vCPU {cpu}"),
            HeldBy::Object { object, cache, structure, member, offset } => {
                let mut line =
                    format!("{:#018x} (size {}): {}", object.address.0, object.size, object.kind.name());
                if let Some(cache) = cache {
                    let _ = write!(line, ", cache {}", cache.escape_debug());
                }
                if let Some(structure) = structure {
                    let _ = write!(line, ", struct {structure}");
                }
                let _ = write!(line, "; its word at +{offset:#x}");
                if let Some(member) = member {
                    let _ = write!(line, ", {member}");
                }
                line
            }
        };
        if !self.counts {
            let _ = write!(line, "; to its middle, +{:#x}", self.to);
        }
        line
    }

    fn json(&self) -> Value {
        let mut json = match &self.by {
            HeldBy::Root(place) => json!({ "root": place.json() }),
            HeldBy::Register(cpu) => json!({ "root": { "region": "registers", "cpu": cpu } }),
            HeldBy::Object { object, cache, structure, member, offset } => json!({ "object": {
                "address": format!("{:#x}", object.address.0), "size": object.size, "kind": object.kind,
                "cache": cache, "type": structure, "member": member, "offset": offset,
            } }),
        };
        json["to"] = self.to.into();
        json["counts"] = self.counts.into();
        json
    }
}

impl CacheRefs {
    /// One row per object that counts more than is found; `site` names where an object was allocated.
    pub fn table(&self, site: &dyn Fn(&Counted) -> String) -> Table {
        let columns = vec![
            Column::new("excess", Role::Amount),
            Column::new("count", Role::Amount),
            Column::new("found", Role::Amount),
            Column::new("inside", Role::Amount),
            Column::new("object", Role::Key),
            Column::new("pid", Role::Fact),
            Column::new("site", Role::Fact),
        ];
        let mut table = Table::new(columns, 0);
        for counted in &self.exceeding {
            table.rows.push(vec![
                Cell::Number(counted.excess()),
                Cell::Number(counted.count),
                counted.found.into(),
                counted.inside.into(),
                Cell::Text(format!("{:#018x}", counted.object.address.0)),
                Cell::Number(counted.object.pid.into()),
                Cell::Text(site(counted)),
            ]);
        }
        table
    }

    /// One line on all of them.
    pub fn summary(&self) -> String {
        let Self { counter, objects, exceeding } = self;
        format!(
            "# objects of {} that count more references in {} of struct {} than are found: {} of {objects}",
            counter.cache.escape_debug(),
            counter.member,
            counter.structure,
            exceeding.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::places::Place;
    use super::super::refs::tests::{counted, counter};
    use super::*;
    use crate::memory::{Pa, Va};

    fn refs() -> ObjectRefs {
        let one = Counted { own: 1, found: 1, inside: 1, ..counted(0xffff_8880_0000_1000, 5) };
        let holder = counted(0xffff_8880_0000_2000, 0);
        let by = HeldBy::Object {
            object: holder.object,
            cache: Some("a\nquit".into()),
            structure: Some("file".into()),
            member: Some("f_path".into()),
            offset: 0x10,
        };
        let place =
            Place { region: "data".into(), pa: Pa(0x3e48), va: Va(0xffff_ffff_8100_3e48), owner: None };
        let references =
            vec![Held { by, to: 0, counts: true }, Held { by: HeldBy::Root(place), to: 0x20, counts: false }];
        let counted = Ok((counter("It is linked."), one));
        ObjectRefs { object: holder.object, cache: Some("dentry".into()), counted, references, omitted: 0 }
    }

    #[test]
    fn an_object_has_its_count_and_a_line_for_each_reference() {
        let text = "\
object 0xffff888000002000 (size 96): slab, cache dentry, struct outer
  users is 5; references found: 1; words that point into the middle: 1
  counted without a pointer: 1. It is linked.
  counted and not there: 3
  referenced by:
    0xffff888000002000 (size 96): slab, cache a\\nquit, struct file; its word at +0x10, f_path
    root data: word at 0xffffffff81003e48, physical address 0x3e48; to its middle, +0x20
";
        let refs = refs();
        assert_eq!(refs.text(), text);
        let json = &refs.json()["refs"];
        assert_eq!(
            (&json["count"], &json["excess"], &json["why_no_count"]),
            (&json!(5), &json!(3), &Value::Null)
        );
        assert_eq!(json["references"][0]["object"]["member"], "f_path");
        assert_eq!(json["references"][1]["root"]["physical_address"], "0x3e48");
        let unknown = ObjectRefs { counted: Err("why".into()), references: vec![], ..refs };
        let text = "object 0xffff888000002000 (size 96): slab, cache dentry\n  no count: why\n  referenced by:\n    nothing\n";
        assert_eq!(unknown.text(), text);
        assert_eq!(unknown.json()["refs"]["why_no_count"], "why");
    }

    #[test]
    fn a_cache_has_a_row_for_each_object_that_counts_too_much() {
        let exceeding = vec![Counted { found: 1, inside: 4, ..counted(0xffff_8880_0000_1000, 3) }];
        let refs = CacheRefs { counter: counter(""), objects: 20, exceeding };
        let text = "\
excess  count  found  inside  object              pid  site
     2      3      1       4  0xffff888000001000    7  here+0x1/0x2
";
        assert_eq!(refs.table(&|_| "here+0x1/0x2".to_owned()).text(), text);
        let line =
            "# objects of c that count more references in users of struct outer than are found: 1 of 20";
        assert_eq!(refs.summary(), line);
    }
}
