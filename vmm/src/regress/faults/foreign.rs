//! Kernels that say which they are, and modules that are for another. The images are x86-64's.

use super::*;

const RELEASE: &str = "6.1.0-test-amd64";

/// Writes fields of these sizes one behind the other.
fn packed(fields: &[(u64, usize)]) -> Vec<u8> {
    fields.iter().flat_map(|&(value, size)| value.to_le_bytes()[..size].to_vec()).collect()
}

/// The header of an ELF file of this type for x86-64 (System V ABI, "ELF Header"): program headers behind it, `sections`
/// section headers at `table`, the last for their names.
fn header(kind: u64, segments: u64, table: u64, sections: u64) -> Vec<u8> {
    let places = [(kind, 2), (62, 2), (1, 4), (0x100_0000, 8), (64, 8), (table, 8), (0, 4)];
    let sizes = [(64, 2), (56, 2), (segments, 2), (64, 2), (sections, 2), (sections.saturating_sub(1), 2)];
    [b"\x7fELF\x02\x01\x01".to_vec(), vec![0; 9], packed(&places), packed(&sizes)].concat()
}

/// A vmlinux that says of itself which release it is, and nothing else.
fn vmlinux(release: &str) -> Vec<u8> {
    const AT: u64 = 0x1000;
    let text = format!("Linux version {release} (cc) #1 SMP\n\0");
    let size = (text.len() as u64, 8);
    let place = [(1, 4), (5, 4), (AT, 8), (0xffff_ffff_8100_0000, 8), (0x100_0000, 8)];
    let mut file = [header(2, 1, 0, 0), packed(&place), packed(&[size, size, (AT, 8)])].concat();
    file.resize(AT as usize, 0);
    [file, text.into_bytes()].concat()
}

/// A module for a kernel of this release, without code.
fn module(name: &str, release: &str) -> Vec<u8> {
    let names = b"\0.modinfo\0.shstrtab\0";
    let says = format!("name={name}\0vermagic={release} SMP mod_unload \0depends=\0");
    let (says_at, names_at) = (64, 64 + says.len() as u64);
    let section = |name, kind, at, size: usize| {
        packed(&[(name, 4), (kind, 4), (0, 8), (0, 8), (at, 8), (size as u64, 8), (0, 8), (1, 8), (0, 8)])
    };
    let table = names_at + names.len() as u64;
    let header = header(1, 0, table, 3);
    let sections = [section(1, 1, says_at, says.len()), section(10, 3, names_at, names.len())].concat();
    [header, says.clone().into_bytes(), names.to_vec(), vec![0; 64], sections].concat()
}

/// With a kernel of [`RELEASE`], and modules for it and for another.
fn case(tail: &str) -> Case {
    let case = Case::new(&format!("boot_timeout_s = 20\n[[kernel]]\npath = \"good\"\n{tail}"));
    let files = [
        ("good", vmlinux(RELEASE)),
        ("own.ko", module("own", RELEASE)),
        ("other.ko", module("other", "6.2.0")),
    ];
    files.iter().for_each(|(name, content)| fs::write(case.folder.join(name), content).unwrap());
    case
}

#[test]
fn a_module_for_another_kernel_fails_its_test_before_the_boot() {
    let mut case = case(
        "[[test]]\nname = \"own\"\nmodules = [\"own.ko\"]\n[[test]]\nname = \"other\"\nmodules = [\"other.ko\"]\n\
         [[test]]\nname = \"script\"\nmodules = [\"worker\"]\n[[test]]\nname = \"leak\"\nrun = \"leak a 1\"\n",
    );
    let results = case.run();
    let (passed, failed) = (Outcome::Passed, Outcome::Failed);
    let wanted = [("own", passed), ("other", failed), ("script", failed), ("leak", Outcome::Leaked)];
    assert_eq!(outcomes(&results), wanted);
    let path = case.folder.join("other.ko");
    let why = format!(
        "Module other does not fit kernel {RELEASE}: its vermagic is \"6.2.0 SMP mod_unload\" (hint: {} must be built \
         against the headers of this kernel)",
        path.display()
    );
    assert_eq!(results.tests[1].message, why);
    assert!(results.tests[2].message.contains("no ELF file"), "{}", results.tests[2].message);
    case.options.only = vec!["other".to_owned()];
    let alone = case.run();
    assert_eq!((alone.boots.len(), alone.exit_code()), (0, ExitCode::Guest), "it was booted");
}

#[test]
fn a_guests_module_for_another_kernel_keeps_its_boots_only() {
    let guests = "[[guest]]\nname = \"own\"\nmodules = [\"own.ko\"]\n[[guest]]\nname = \"other\"\nmodules = [\"other.ko\"]\n";
    let results = case(&format!("{guests}[[test]]\nname = \"t\"\nrun = \"exit 0\"\n")).run();
    let of: Vec<_> = results.tests.iter().map(|test| (test.guest.as_str(), test.outcome)).collect();
    assert_eq!(of, [("own", Outcome::Passed), ("other", Outcome::NotBooted)]);
    assert!(results.tests[1].message.contains("its vermagic is"), "{}", results.tests[1].message);
    assert_eq!((results.boots.len(), results.exit_code()), (1, ExitCode::Guest));
}

#[test]
fn results_say_which_release_a_kernel_is_also_when_merged() {
    let tail = "[[kernel]]\npath = \"dead\"\n[[kernel]]\npath = \"absent\"\n[[test]]\nname = \"t\"\n[[test]]\nname = \"u\"\n";
    let mut case = case(tail);
    let of = |results: &Results| -> Vec<_> {
        results.tests.iter().map(|test| (test.id.clone(), test.release.clone())).collect()
    };
    let whole = case.run();
    let wanted = [("good", Some(RELEASE)), ("dead", None), ("absent", None)];
    let of_tests = wanted.iter().flat_map(|(kernel, release)| {
        ["t", "u"].map(|test| (format!("{kernel}/default/{test}"), release.map(str::to_owned)))
    });
    assert_eq!(of(&whole), of_tests.collect::<Vec<_>>());
    assert_eq!(whole.tests[0].outcome, Outcome::Passed);
    let json = serde_json::to_value(&whole).unwrap();
    assert_eq!((&json["tests"][0]["release"], &json["tests"][2]["release"]), (&json!(RELEASE), &json!(null)));
    let files = ["t", "u"].map(|test| {
        case.options.only = vec![format!("/{test}")];
        case.run();
        let file = case.folder.join(format!("{test}.json"));
        fs::rename(case.folder.join("results.json"), &file).unwrap();
        file
    });
    let joined = merge(&files, &Outputs::default()).unwrap().results;
    assert_eq!(of(&joined), of(&whole));
    let text = write::text(&joined);
    let lines =
        format!("kernel good: {RELEASE}\nkernel dead: release unknown\nkernel absent: release unknown\n");
    assert!(text.contains(&lines), "{text}");
}
