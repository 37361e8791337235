use super::synthetic::Builder;
use super::*;
use crate::image::synthetic::{self, Block};
use proptest::prelude::*;

/// A task in miniature: anonymous nesting, arrays, bit fields, a typedef, a function, per-CPU variables.
fn builder() -> Builder {
    let mut b = Builder::new();
    let int = b.int("int", 4);
    let long = b.int("unsigned long", 8);
    let forward = b.add(7, false, "task_struct", 0, 0, &[]);
    let forward_pointer = b.pointer(forward);
    let list = b.structure("list_head", 16, &[("next", 0, 0, 0), ("prev", forward_pointer, 64, 0)]);
    let qualified = b.add(10, false, "", long, 0, &[]);
    let word_t = b.typedef("word_t", qualified);
    let inner = b.union("", 8, &[("counter", word_t, 0, 0), ("raw", long, 0, 0)]);
    let anonymous = b.structure("", 24, &[("links", list, 0, 0), ("", inner, 128, 0)]);
    let rows = b.array(int, 3);
    let table = b.array(rows, 2);
    let lists = b.array(list, 0);
    let flags = b.structure("flags", 8, &[("low", int, 0, 3), ("high", int, 3, 7), ("whole", int, 32, 0)]);
    let task = b.structure(
        "task_struct",
        80,
        &[("state", long, 0, 0), ("", anonymous, 64, 0), ("table", table, 256, 0), ("flags", flags, 448, 0)],
    );
    b.structure("task_struct", 1, &[("other", int, 0, 0)]);
    b.structure("tail", 8, &[("count", int, 0, 0), ("items", lists, 64, 0)]);
    b.typedef("task_t", task);
    let (a, c) = (b.string("task"), b.string("flags"));
    let task_pointer = b.pointer(task);
    let prototype = b.add(13, false, "", int, 2, &[a, task_pointer, c, word_t]);
    b.add(12, false, "wake_up", prototype, 0, &[]);
    let (low, high) = (b.string("BELOW"), b.string("ABOVE"));
    b.add(6, true, "sign", 4, 2, &[low, -5i32 as u32, high, 7]);
    let big = b.string("BIG");
    b.add(19, false, "wide", 8, 1, &[big, 1, 2]);
    let variable = b.add(14, false, "current_task", task_pointer, 0, &[1]);
    b.add(15, false, ".data..percpu", 0x100, 1, &[variable, 0x40, 8]);
    b
}

fn btf() -> Btf {
    Btf::parse(&builder().bytes()).expect("well-formed")
}

#[test]
fn members_are_found_by_path() {
    let btf = btf();
    let whole = |offset, size| Some(Field { offset, size, bits: (0, 0) });
    for (path, expected) in [
        ("state", whole(0, 8)),
        ("links", whole(8, 16)),
        ("links.prev", whole(16, 8)),
        ("counter", whole(24, 8)),
        ("raw", whole(24, 8)),
        ("table", whole(32, 24)),
        ("table[1]", whole(44, 12)),
        ("table[1][2]", whole(52, 4)),
        ("flags.high", Some(Field { offset: 56, size: 4, bits: (3, 7) })),
        ("flags.whole", whole(60, 4)),
        ("", None),
        ("other", None),
        ("links.next.prev", None),
        ("table[2]", None),
        ("table[1][3]", None),
        ("table[x]", None),
        ("table[1", None),
        ("table1]", None),
        ("state[0]", None),
        ("state.", None),
    ] {
        assert_eq!(btf.field("task_struct", path), expected, "{path}");
    }
    assert_eq!(btf.field("tail", "items[9].prev"), whole(8 + 9 * 16 + 8, 8), "flexible arrays have no end");
    assert_eq!(btf.offset("task_t", "links.prev"), Some(16), "through a typedef");
    assert_eq!(btf.field("nothing", "state"), None);
    // A member without a size: void.
    assert_eq!(btf.field("list_head", "next"), None);
}

#[test]
fn the_first_definition_of_a_name_wins() {
    let btf = btf();
    assert_eq!(btf.size_of("task_struct"), Some(80));
    assert_eq!(btf.size_of("task_t"), Some(80));
    assert_eq!(btf.size_of("word_t"), Some(8));
    assert_eq!(btf.size_of("int"), None, "not a structure");
    assert_eq!(btf.type_count(), 24);
}

#[test]
fn enumerators_functions_and_percpu_variables() {
    let btf = btf();
    assert_eq!(btf.enumerator("BELOW"), Some(-5));
    assert_eq!(btf.enumerator("ABOVE"), Some(7));
    assert_eq!(btf.enumerator("BIG"), Some(0x2_0000_0001));
    assert_eq!(btf.enumerator("BI"), None);
    let pair = |name: &str, ty: &str| (name.to_owned(), ty.to_owned());
    assert_eq!(
        btf.parameters("wake_up"),
        Some(vec![pair("task", "struct task_struct *"), pair("flags", "word_t")])
    );
    assert_eq!(btf.parameters("task_struct"), None);
    assert_eq!(btf.percpu_offset("current_task"), Some(0x40));
    assert_eq!(btf.percpu_offset("current"), None);
}

#[test]
fn members_are_listed_with_their_types() {
    let btf = btf();
    let members = btf.members("task_struct").expect("it is there");
    let listed: Vec<_> =
        members.iter().map(|m| (m.name, m.field.offset, m.kind, m.type_name.as_str())).collect();
    assert_eq!(
        listed,
        [
            ("state", 0, Kind::Int, "unsigned long"),
            ("links", 8, Kind::Struct, "struct list_head"),
            ("counter", 24, Kind::Int, "word_t"),
            ("raw", 24, Kind::Int, "unsigned long"),
            ("table", 32, Kind::Array, "int[2][3]"),
            ("flags", 56, Kind::Struct, "struct flags"),
        ]
    );
    assert_eq!(btf.members_of(members[1].ty).len(), 1, "void members have no place");
    let (row, rows) = btf.elements_of(members[4].ty).expect("an array");
    assert_eq!((rows, btf.elements_of(row).map(|(_, n)| n)), (2, Some(3)));
    assert_eq!(btf.elements_of(members[0].ty), None);
}

#[test]
fn pointers_and_arrays_are_named_as_in_c() {
    let mut b = Builder::new();
    let int = b.int("int", 4);
    let volatile = b.add(9, false, "", int, 0, &[]);
    let pointer = b.pointer(volatile);
    let twice = b.pointer(pointer);
    let pointers = b.array(twice, 4);
    let prototype = b.add(13, false, "", 0, 0, &[]);
    let function = b.pointer(prototype);
    let parts = [("a", pointer, 0, 0), ("b", pointers, 64, 0), ("c", function, 320, 0)];
    b.structure("s", 48, &parts);
    let btf = Btf::parse(&b.bytes()).expect("well-formed");
    let members = btf.members("s").expect("it is there");
    let names: Vec<_> = members.iter().map(|m| m.type_name.as_str()).collect();
    assert_eq!(names, ["int *", "int **[4]", "fn *"]);
}

#[test]
fn circles_end() {
    let mut b = Builder::new();
    // Each of the two anonymous members leads back to its own structure, twice.
    b.structure("ring", 8, &[("", 1, 0, 0), ("", 1, 0, 0), ("here", 2, 8, 0)]);
    b.typedef("loop", 3);
    b.typedef("loop2", 2);
    b.array(4, u32::MAX);
    b.structure("s", 8, &[("endless", 4, 0, 0), ("typed", 2, 0, 0)]);
    let btf = Btf::parse(&b.bytes()).expect("well-formed");
    assert_eq!(btf.field("ring", "missing"), None);
    assert_eq!(btf.field("s", "endless"), None);
    assert_eq!(btf.field("s", "endless[0][0]"), None);
    assert_eq!(btf.size_of("loop"), None);
    assert!(btf.members("ring").is_some_and(|m| m.is_empty()));
    assert!(btf.members("s").is_some_and(|m| m.is_empty()));
}

#[test]
fn damage_is_named() {
    let good = builder().bytes();
    for (bytes, said) in [
        (&good[..10], "less than its header"),
        (&b"\x7fELF                    "[..], "unknown magic"),
        (&good[..good.len() - 1], "strings reach behind its end"),
        (&good[..200], "types reach behind its end"),
    ] {
        let error = Btf::parse(bytes).err().map(|e| format!("{e:#}")).unwrap_or_default();
        assert!(error.contains(said), "{error:?} does not say {said:?}");
    }
    let mut unknown = good.clone();
    unknown[24 + 7] = 31;
    let error = Btf::parse(&unknown).err().map(|e| format!("{e:#}"));
    assert_eq!(error.as_deref(), Some("BTF type 1 is damaged: It is of unknown kind 31"));
}

#[test]
fn an_images_btf_is_found_by_section_or_by_its_magic() {
    let small = builder().bytes();
    let mut b = builder();
    for n in 0..MIN_TYPES {
        b.typedef(&format!("filler_{n}"), 1);
    }
    let large = b.bytes();
    let image = |name, bytes: &[u8]| synthetic::image(&[Block { name, at: 0x123, bytes: bytes.to_vec() }]);
    let count =
        |image: &KernelImage| Btf::recover(image).map(|b| b.type_count()).map_err(|e| format!("{e:#}"));
    assert_eq!(count(&image(".BTF", &small)), Ok(24));
    // Without its section: a false magic before it, another BTF too small to be the kernel's behind it.
    let hidden = [&MAGIC[..], &[24, 0, 0, 0], &large, &small].concat();
    assert_eq!(count(&image(".rodata", &hidden)), Ok(24 + MIN_TYPES));
    let none = "The kernel image has no BTF (CONFIG_DEBUG_INFO_BTF)";
    assert_eq!(count(&image(".rodata", &small)), Err(none.to_owned()));
    let damaged = count(&image(".BTF", &small[..100]));
    assert!(
        damaged
            .is_err_and(|e| e.starts_with("The image's section .BTF cannot be used: The BTF is truncated"))
    );
}

/// Asks everything that can be asked.
fn exercise(btf: &Btf) {
    for name in ["task_struct", "list_head", "flags", "tail", "task_t", "word_t", "s"] {
        btf.size_of(name);
        for path in ["state", "links.prev", "counter", "table[1][2]", "flags.high", "items[9].prev"] {
            btf.field(name, path);
        }
        for member in btf.members(name).unwrap_or_default() {
            btf.members_of(member.ty);
            btf.elements_of(member.ty);
        }
    }
    for name in ["BELOW", "BIG", "none"] {
        btf.enumerator(name);
    }
    btf.parameters("wake_up");
    btf.percpu_offset("current_task");
}

proptest! {
    #[test]
    fn mutated_btf_neither_panics_nor_hangs(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        keep in any::<prop::sample::Index>(),
        cut in any::<bool>(),
    ) {
        let mut bytes = builder().bytes();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if cut {
            bytes.truncate(keep.index(bytes.len()));
        }
        if let Ok(btf) = Btf::parse(&bytes) {
            exercise(&btf);
        }
    }

    #[test]
    fn any_references_end(
        records in prop::collection::vec((1u32..20, 0u32..24, prop::collection::vec(0u32..24, 12)), 1..24),
    ) {
        let mut b = Builder::new();
        for (kind, value, tail) in records {
            // Names hit and miss: offset 0 is anonymous, the others may lie inside other names.
            let (count, words) = match kind {
                1 | 14 | 17 => (0, 1),
                3 => (0, 3),
                4 | 5 | 15 | 19 => (4, 12),
                6 | 13 => (4, 8),
                _ => (0, 0),
            };
            b.add(kind, value % 2 == 0, ["s", "task_struct", ""][value as usize % 3], value, count, &tail[..words]);
        }
        let btf = Btf::parse(&b.bytes()).expect("well-formed");
        exercise(&btf);
    }
}
