//! Reports, byte for byte.

use super::*;
use crate::registry::{AllocEvent, Backtrace, Registry};
use crate::scan::{self, ScanResult};
use crate::symbols::Resolved;
use guest_profiles::annotations::{Suppression, parse};
use std::time::Duration;

const LEAF: Va = Va(0xffff_ffff_8133_a2b5);
const CALLER: Va = Va(0xffff_ffff_c000_1010);
const NOWHERE: Va = Va(0x1234);

fn symbolize<'a>(ip: Va, sequence: u64) -> Option<Resolved<'a>> {
    match (ip, sequence) {
        (LEAF, _) => Some(Resolved { name: "kmalloc_trace.isra.0", offset: 0x25, size: 0x90, module: None }),
        (CALLER, 1..) => Some(Resolved { name: "leaky_init", offset: 0, size: 0x40, module: Some("leaky") }),
        _ => None,
    }
}

/// A registry with two objects of 96 and 20 bytes and the scan that found both lost: the second one holds on to
/// nothing, the first to the second.
fn scanned() -> (Registry, ScanResult) {
    let mut registry = Registry::default();
    let event = AllocEvent {
        address: Va(0xffff_8880_0123_4500),
        size: 96,
        kind: Kind::Slab,
        cache: Va(1),
        comm: *b"ins\x1bmod\0garbage\0",
        pid: 77,
        jiffies: 4_294_892_296,
        stack: Backtrace::Frames(&[LEAF, CALLER, NOWHERE]),
    };
    registry.alloc(&event);
    let second = AllocEvent { address: Va(0xffff_8880_0123_4600), size: 20, kind: Kind::Large, ..event };
    registry.alloc(&second);
    registry.set_reported(second.address);
    let leak = |address, direct, component, retained, head: &[u8]| scan::Leak {
        object: registry.get(address).unwrap(),
        cache: Some("kmalloc-96".into()),
        direct,
        component,
        retained,
        head: head.to_vec(),
        checksum: 0x0a1b_2c3d,
    };
    let head: Vec<u8> = (0x30..0x50).collect();
    let leaks = vec![
        leak(event.address, true, 1, 116, &head),
        leak(second.address, false, 0, 20, b"ab\0\xff c789012345678xy"),
    ];
    let result = ScanResult {
        leaks,
        jiffies: event.jiffies + 309,
        objects: 500,
        object_bytes: 64_000,
        bytes_scanned: 1 << 20,
        mark: Duration::from_micros(12_700),
        ..ScanResult::default()
    };
    (registry, result)
}

fn report(release: &str, suppressions: &[Suppression]) -> Report {
    let (registry, result) = scanned();
    let guest = GuestInfo {
        release: release.into(),
        version: "Linux version".into(),
        arch: "x86_64".into(),
        cpus: 2,
        mem_bytes: 512 << 20,
        kaslr_offset: 0x1a00_0000,
    };
    Report::new(ReportInput {
        guest,
        host: HostInfo { kvm: "kvm".into(), tracer: "breakpoint".into(), trap: "int3".into(), lab: None },
        number: 3,
        order: Order::Retained,
        pause_ms: 14,
        result: &result,
        registry: &registry,
        hz: 250,
        audit: Some(Audit { tracked: 498, ..Audit::default() }),
        suppressions,
        symbolize: &symbolize,
    })
}

const RECORDS_6_1: &str = r#"unreferenced object 0xffff888001234500 (size 96):
  comm "ins?mod", pid 77, jiffies 4294892296
  hex dump (first 32 bytes):
    30 31 32 33 34 35 36 37 38 39 3a 3b 3c 3d 3e 3f  0123456789:;<=>?
    40 41 42 43 44 45 46 47 48 49 4a 4b 4c 4d 4e 4f  @ABCDEFGHIJKLMNO
  backtrace:
    [<ffffffff8133a2b5>] kmalloc_trace.isra.0+0x25/0x90
    [<ffffffffc0001010>] leaky_init+0x0/0x40 [leaky]
    [<0000000000001234>] 0x1234
unreferenced object 0xffff888001234600 (size 20):
  comm "ins?mod", pid 77, jiffies 4294892296
  hex dump (first 20 bytes):
    61 62 00 ff 20 63 37 38 39 30 31 32 33 34 35 36  ab.. c7890123456
    37 38 78 79                                      78xy
  backtrace:
    [<ffffffff8133a2b5>] kmalloc_trace.isra.0+0x25/0x90
    [<ffffffffc0001010>] leaky_init+0x0/0x40 [leaky]
    [<0000000000001234>] 0x1234
"#;

const SUMMARY: &str = r"
# scan 3: 2 leaked objects of 116 bytes (1 direct, 1 indirect) in 2 groups
# group GROUP_A: 1 object, 1 direct, 96 bytes, retains 116 bytes, slab kmalloc-96
#     kmalloc_trace.isra.0+0x25/0x90
#     leaky_init+0x0/0x40 [leaky]
#     0x1234
# group GROUP_B: 1 object, 0 direct, 20 bytes, retains 0 bytes, large kmalloc-96
#     kmalloc_trace.isra.0+0x25/0x90
#     leaky_init+0x0/0x40 [leaky]
#     0x1234
";

#[test]
fn text_of_6_1() {
    let report = report("6.1.0-56-cloud-amd64", &[]);
    let summary =
        SUMMARY.replace("GROUP_A", &report.leaks[0].group).replace("GROUP_B", &report.leaks[1].group);
    assert_eq!(report.text(), format!("{RECORDS_6_1}{summary}"));
}

#[test]
fn text_of_other_kernels() {
    let new = report("6.12.117+deb12-amd64", &[]).text();
    assert!(new.contains("jiffies 4294892296\n"), "{new}");
    assert!(new.contains("  backtrace (crc a1b2c3d):\n    kmalloc_trace.isra.0+0x25/0x90\n"), "{new}");
    let between = report("6.9.2", &[]).text();
    assert!(between.contains("  backtrace (crc a1b2c3d):\n    [<ffffffff8133a2b5>] kmalloc"), "{between}");
    let old = report("5.10.0-30-amd64", &[]).text();
    assert!(old.contains("jiffies 4294892296 (age 1.236s)\n"), "{old}");
    assert_eq!(TextStyle::of_release("unknown"), TextStyle::of_release("7.0-rc1"));
}

#[test]
fn text_of_a_per_cpu_object() {
    let mut report = report("6.12.117+deb12-amd64", &[]);
    report.leaks.truncate(1);
    (report.leaks[0].kind, report.leaks[0].address) = (Kind::Percpu, Va(0x607f_c021_0da0));
    let text = report.text();
    assert!(text.starts_with("unreferenced object 0x607fc0210da0 (size 96):\n"), "{text}");
    assert!(text.contains("  hex dump (first 32 bytes on cpu 0):\n"), "{text}");
    report.style = TextStyle::of_release("6.1.0-56-amd64");
    assert!(report.text().contains("  hex dump (first 32 bytes):\n"), "kmemleak of 6.1 knows no copies");
    assert_eq!(serde_json::to_value(&report).unwrap()["leaks"][0]["kind"], "percpu");
}

#[test]
fn json_has_the_fields_of_the_contract() {
    let json: serde_json::Value =
        serde_json::from_str(&report("6.1.0-56-cloud-amd64", &[]).json().unwrap()).unwrap();
    assert_eq!(json["schema"], "kleak-report/1");
    assert_eq!(json["guest"]["kaslr_offset"], "0x1a000000");
    assert_eq!(json["host"]["lab"], serde_json::Value::Null);
    assert_eq!(json["audit"], serde_json::json!({"tracked": 498, "missing": 0, "stale": 0}));
    let scan = &json["scan"];
    let numbers = ["number", "jiffies", "pause_ms", "scan_ms", "objects", "white", "gray", "events_alloc"];
    let values: Vec<_> = numbers.iter().map(|n| scan[n].as_u64().unwrap()).collect();
    assert_eq!(values, [3, 4_294_892_605, 14, 12, 500, 2, 498, 2]);
    let leak = &json["leaks"][0];
    assert_eq!(leak["address"], "0xffff888001234500");
    assert_eq!((&leak["kind"], &leak["cache"]), (&"slab".into(), &"kmalloc-96".into()));
    assert_eq!(leak["hex"].as_str().map(str::len), Some(64));
    assert_eq!(
        (&leak["age_ms"], &leak["direct"], &leak["retained_bytes"]),
        (&1236.into(), &true.into(), &116.into())
    );
    assert_eq!((&leak["new"], &json["leaks"][1]["new"]), (&true.into(), &false.into()));
    assert_eq!(
        leak["backtrace"][1],
        serde_json::json!({"ip": "0xffffffffc0001010", "symbol": "leaky_init", "offset": 0, "size": 64, "module": "leaky"})
    );
    assert_eq!(leak["backtrace"][2]["symbol"], serde_json::Value::Null);
    assert_eq!(json["groups"][0]["id"], leak["group"]);
    assert_eq!(json["groups"][0]["retained_bytes"], 116);
}

#[test]
fn group_ids_are_stable() {
    let frame = |symbol: &str, offset, module: Option<&str>| Frame {
        ip: Va(offset * 3),
        symbol: Some(symbol.into()),
        offset,
        size: 1,
        module: module.map(Into::into),
    };
    let id = |size, backtrace: &[Frame]| group::id(Kind::Slab, size, backtrace);
    let stack = [frame("kmalloc_trace.isra.0", 5, None), frame("f", 9, Some("m"))];
    let rebuilt = [frame("kmalloc_trace", 7, None), frame("f", 1, Some("m"))];
    assert_eq!(id(96, &stack), id(100, &rebuilt));
    assert_ne!(id(96, &stack), id(129, &stack));
    assert_ne!(id(96, &stack), id(96, &stack[..1]));
    assert_ne!(id(96, &stack), group::id(Kind::Large, 96, &stack));
    // Baselines hold these: a change of the hash is a change of the format. FNV-1a of "slab\0" "128\0".
    assert_eq!(id(96, &[]), format!("{:016x}", fnv(b"slab\x00128\0")));
}

/// FNV-1a, written down once more.
fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(14_695_981_039_346_656_037, |h: u64, &b| (h ^ u64::from(b)).wrapping_mul(1_099_511_628_211))
}

#[test]
fn suppressed_leaks_are_counted_not_shown() {
    let rules = "[[suppress]]\nname='known'\nmodule='leaky'\ncache='kmalloc-*'\n";
    let report = report("6.1", &parse(rules).unwrap().suppressions);
    assert!(report.leaks.is_empty() && report.groups.is_empty());
    assert_eq!(report.scan.white, 2);
    let text = "# scan 3: 0 leaked objects of 0 bytes (0 direct, 0 indirect) in 0 groups\n\
                # suppressions used:\n\
                #     objects       bytes  name\n\
                #           2         116  \"known\" (1)\n";
    assert_eq!(report.text(), text);
}

#[test]
fn nothing_found_is_an_empty_text() {
    let mut empty = report("6.1", &[]);
    assert_eq!(empty.new_leaks(), 1);
    empty.leaks.clear();
    assert_eq!(empty.text(), "");
}
