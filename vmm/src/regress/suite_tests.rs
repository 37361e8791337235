//! Suite files: what is read, and what is said of the rest, with its line.

use super::*;

const FULL: &str = r#"
name = "drivers"
boot = "per-test"
boot_timeout_s = 120
settle_ms = 3000
profile = "known.toml"
suppressions = ["a.supp", "/b.supp"]
baseline = "/abs/baseline.json"

[[kernel]]
path = "build/bzImage"

[[kernel]]
name = "stock"
recipe = "6.1-cloud"

[[guest]]
name = "small"
mem = "256M"
cpus = 2
cmdline = "loglevel=5"
initramfs = "base.cpio.gz"
files = ["tools/x:/bin/x"]
disks = ["fs.img", "data.img,ro"]
modules = ["base.ko"]

[[test]]
name = "boot"

[[test]]
name = "all"
script = "t.sh"
setup = "mkdir /tmp/a"
files = ["recipe:io_uring_setup:/io"]
modules = ["{kernel}/my.ko,a=1", "recipe:leaky,case=list"]
repeat = 3
timeout_s = 10
status = 2
leaks = 4
functions = ["my_probe"]
kernels = ["stock"]
guests = ["small"]
"#;

fn parsed(text: &str) -> Result<Suite, Wrong> {
    parse(text, Path::new("/suites"), "file")
}

#[test]
fn every_key_is_taken_and_paths_are_the_suites() {
    let suite = parsed(FULL).unwrap();
    assert_eq!((suite.name.as_str(), suite.boot), ("drivers", BootMode::PerTest));
    assert_eq!((suite.boot_timeout_s, suite.settle_ms), (120, Some(3000)));
    assert_eq!(suite.profile, Some("/suites/known.toml".into()));
    assert_eq!(suite.suppressions, [Path::new("/suites/a.supp"), Path::new("/b.supp")]);
    assert_eq!(suite.baseline, Some("/abs/baseline.json".into()));
    assert_eq!(suite.kernels[0].name, "bzImage");
    assert_eq!(suite.kernels[0].source, KernelSource::File("/suites/build/bzImage".into()));
    assert_eq!(suite.kernels[1].source, KernelSource::Recipe("6.1-cloud".into()));
    let guest = &suite.guests[0];
    assert_eq!((guest.mem_bytes, guest.cpus, guest.cmdline.as_str()), (256 << 20, 2, "loglevel=5"));
    assert_eq!(guest.initramfs, Some("/suites/base.cpio.gz".into()));
    assert_eq!(guest.files[0].host, Path::new("/suites/tools/x"));
    let disks: Vec<_> =
        guest.disks.iter().map(|disk| (disk.path.to_str().unwrap(), disk.read_only)).collect();
    assert_eq!(disks, [("/suites/fs.img", false), ("/suites/data.img", true)]);
    assert_eq!(suite.tests[0].action, Action::Nothing);
    let test = &suite.tests[1];
    assert_eq!(test.action, Action::Script("/suites/t.sh".into()));
    assert_eq!(test.files[0].host, Path::new("recipe:io_uring_setup"));
    let modules: Vec<_> = test.modules.iter().map(|m| m.path.to_str().unwrap()).collect();
    assert_eq!(modules, ["/suites/{kernel}/my.ko", "recipe:leaky"]);
    assert_eq!((test.repeat, test.timeout_s, test.status), (3, 10, 2));
    assert_eq!(test.expected, Expected { count: Some(4), functions: vec!["my_probe".into()] });
}

#[test]
fn little_is_needed() {
    let suite = parsed("[[kernel]]\npath = \"k\"\n[[test]]\nname = \"t\"\nrun = \"true\"\n").unwrap();
    assert_eq!((suite.name.as_str(), suite.boot, suite.boot_timeout_s), ("file", BootMode::Shared, 300));
    assert_eq!(suite.guests, [default_guest()]);
    assert_eq!((suite.tests[0].repeat, suite.tests[0].timeout_s), (1, 60));
    assert_eq!(suite.tests[0].expected, Expected::default());
}

#[test]
fn what_is_wrong_is_said_with_its_line() {
    let base = "[[kernel]]\npath = \"k\"\n[[test]]\nname = \"t\"\n";
    let line = |text: &str| {
        let wrong = parsed(text).unwrap_err();
        (text[..wrong.at].matches('\n').count() + 1, wrong.what)
    };
    let table = [
        ("tset = 1\n", 5, "unknown field `tset`"),
        ("name = 3\n", 5, "duplicate key"),
        ("timeout_s = 0\n", 5, "timeout_s = 0 is not within 1 and 86400"),
        ("repeat = 100001\n", 5, "repeat"),
        ("run = \"a\"\nscript = \"b\"\n", 3, "not both"),
        ("\nfiles = [\"x\"]\n", 6, "HOST:GUEST"),
        ("modules = [\"a.ko\",\n\",\"]\n", 6, "FILE.ko"),
        ("status = 256\n", 5, "status = 256 is not within 0 and 255"),
        ("\nstatus = -1\n", 6, "status = -1"),
        ("functions = [\"f\"]\nleaks = 0\n", 6, "leaks = 0, but functions"),
        ("kernels = [\"other\"]\n", 5, "no kernel \"other\""),
        ("run = \"unclosed\n", 5, ""),
        ("[[test]]\nname = \"t\"\n", 5, "two of the name"),
        ("[[test]]\nname = \"a/b\"\n", 5, "slash"),
        ("[[test]]\nrun = \"x\"\n", 5, "name"),
        ("[[kernel]]\n", 5, "either path or recipe"),
        ("[[kernel]]\npath = \"\"\n", 5, "path \"\" names no file"),
        ("[[kernel]]\nname = \"x\"\npath = \"..\"\n", 5, "path \"..\" names no file"),
        ("modules = \"x.ko\"\n", 5, "string \"x.ko\", expected a list, as [\"...\"]"),
        ("[guest]\nmem = \"1G\"\n", 5, "a table, expected a list of tables, which begin with [[...]]"),
        ("[[guest]]\nmem = \"64M\"\n", 6, "mem is not within 128M and 8G"),
        ("[[guest]]\nmem = \"big\"\n", 6, "512M"),
        ("[[guest]]\ncpus = 9\n", 6, "cpus = 9"),
        ("[[guest]]\n\ninitramfs = 1\n", 7, "expected path"),
    ];
    for (more, at, what) in table {
        let (found, said) = line(&format!("{base}{more}"));
        assert_eq!(found, at, "{more:?}: {said}");
        assert!(said.contains(what), "{more:?}: {said}");
    }
    assert!(line(&format!("settle_ms = 100\n{base}")).1.starts_with("settle_ms = 100 is not within 2000"));
    assert_eq!(line("[[test]]\nname = \"t\"\n").1, "no [[kernel]]");
    assert_eq!(line("[[kernel]]\npath = \"k\"\n").1, "no [[test]]");
}

#[test]
fn two_files_for_one_path_need_two_boots() {
    let two = |head: &str, first: &str, second: &str| {
        let test = |name: &str, keys: &str| format!("[[test]]\nname = \"{name}\"\n{keys}\n");
        let text = format!(
            "{head}\n[[kernel]]\npath = \"k\"\n[[kernel]]\npath = \"l\"\n{}{}",
            test("one", first),
            test("two", second)
        );
        parsed(&text).map(drop).map_err(|wrong| (text[..wrong.at].matches('\n').count() + 1, wrong.what))
    };
    let (a, b) = ("files = [\"a:/x\"]", "files = [\"b:/x\"]");
    let (line, what) = two("", a, b).unwrap_err();
    assert_eq!(line, 9);
    assert!(what.contains("\"one\"") && what.contains("/x"), "{what}");
    assert_eq!(two("", a, a), Ok(()));
    assert_eq!(two("", a, "files = [\"b:/y\"]"), Ok(()));
    assert_eq!(two("boot = \"per-test\"", a, b), Ok(()));
    assert_eq!(two("", &format!("{a}\nkernels = [\"k\"]"), &format!("{b}\nkernels = [\"l\"]")), Ok(()));
    assert_eq!(two("", &format!("{a}\nkernels = [\"k\"]"), b).unwrap_err().0, 10);
    let both = "files = [\"a:/x\", \"b:/x\"]";
    assert_eq!(two("", both, "").unwrap_err().0, 6);
    assert_eq!(two("boot = \"per-test\"", "", both).unwrap_err().0, 9);
}

#[test]
fn a_guests_file_is_there_for_all_of_its_tests() {
    let said = |guest: &str, test: &str| {
        let text = format!(
            "boot = \"per-test\"\n[[kernel]]\npath = \"k\"\n[[guest]]\nname = \"g\"\n{guest}\n[[guest]]\nname = \"h\"\n\
             [[test]]\nname = \"t\"\n{test}\n"
        );
        parsed(&text).map(drop).map_err(|wrong| (text[..wrong.at].matches('\n').count() + 1, wrong.what))
    };
    let (a, b) = ("files = [\"a:/x\"]", "files = [\"b:/x\"]");
    let (line, what) = said(a, b).unwrap_err();
    assert_eq!(line, 9);
    assert!(what.contains("guest \"g\" has another file for /x"), "{what}");
    assert_eq!(said(a, a), Ok(()));
    assert_eq!(said(a, &format!("{b}\nguests = [\"h\"]")), Ok(()));
    assert_eq!(said("files = [\"a:/x\", \"b:/x\"]", "").unwrap_err().0, 4);
}

#[test]
fn the_error_of_a_file_is_one_line() {
    let path = std::env::temp_dir().join(format!("kleak-suite-{}.toml", std::process::id()));
    std::fs::write(&path, "[[kernel]]\npath = \"k\"\n\n[[test]]\nnaem = \"t\"\n").unwrap();
    let error = read(&path).unwrap_err();
    assert_eq!(crate::cli::failure::exit_code(&error), crate::cli::ExitCode::Usage);
    let text = crate::cli::failure::render(&error);
    assert!(text.contains(&format!("{}:5: unknown field `naem`", path.display())), "{text}");
    assert_eq!(text.lines().count(), 2, "{text}");
    std::fs::remove_file(&path).unwrap();
    assert!(crate::cli::failure::render(&read(&path).unwrap_err()).contains("Cannot read suite"));
}
