//! Usage: what parses to what, and what is said of the rest.

use super::options::{LabChoice, ReportFormat, ScanTrigger, TracerChoice, TrapChoice};
use super::*;
use clap::CommandFactory;

fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once(&"kleak-vmm").chain(args))
}

/// What may be the subcommand.
fn first(args: &[&str]) -> Option<OsString> {
    args.first().map(OsString::from)
}

fn run_options(args: &[&str]) -> RunOptions {
    match parse(&[&["run"], args].concat()).unwrap().command {
        Action::Run(options) => *options,
        other => panic!("{other:?}"),
    }
}

fn refusal(args: &[&str]) -> String {
    let failure = usage_failure(&parse(args).unwrap_err(), first(args).as_ref());
    let text = failure::render(&failure.into());
    assert_eq!(text.lines().count(), 2, "{text}");
    text
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn defaults_are_the_contracts() {
    let options = run_options(&[]);
    assert_eq!(options.mem_bytes, 512 << 20);
    assert_eq!((options.cpus, options.scan_period_s, options.min_age_ms), (1, 600, 1000));
    assert_eq!(
        (options.tracer, options.trap, options.lab),
        (TracerChoice::Auto, TrapChoice::Auto, LabChoice::Auto)
    );
    assert!(
        options.stack
            && options.typed
            && options.scan_at_exit
            && !options.fail_on_leak
            && !options.clear_after_scan
    );
    assert_eq!(options.scan_on, [ScanTrigger::Exit, ScanTrigger::Panic]);
    assert_eq!((options.kaslr, options.timeout_s, options.control.clone()), (None, None, None));
    assert!(options.kernel_path().starts_with("/boot"));
    assert!(options.guest_port_enabled() && options.kaslr_enabled() && options.scans_at_exit());
}

const FULL: &str = "--kernel k --initrd i --module a.ko,x=1 --module b.ko --module-dir d --exec ./t.sh --file h:/g \
                --mem 1G --cpus 4 --paging 5 --types t --profile p --suppressions s1 --suppressions s2 --tracer breakpoint --trap pio \
                --kaslr off --scan-period 0 --min-age 5 --stack off --typed off --sort allocation --control s --report r \
                --scan-at-exit no --fail-on-leak --timeout 9 --scan-on oom,exit \
                --report-dir rd --report-number 7 --disk d,ro --disk e --snapshot-on-leak f --events ev --clear-after-scan --notice-on-console --lab never -vv";

#[test]
fn every_option_is_taken() {
    let options = run_options(&FULL.split_whitespace().collect::<Vec<_>>());
    assert_eq!(options.modules.len(), 2);
    assert_eq!((options.mem_bytes, options.cpus, options.verbose), (1 << 30, 4, 2));
    assert_eq!((options.kaslr, options.stack, options.scan_at_exit), (Some(false), false, false));
    assert!(!options.typed);
    assert_eq!(options.scan_on, [ScanTrigger::Oom, ScanTrigger::Exit]);
    assert_eq!(options.timeout_s, Some(9));
    assert!(!options.scans_at_exit() && !options.kaslr_enabled());
}

#[test]
fn options_survive_being_written_out() {
    use super::relay::PathUse;
    let words = |line: &str| run_options(&line.split_whitespace().collect::<Vec<_>>());
    let mut odd = words("--report - --format json --report=-x.json -q --module=-m.ko,a=1,2,b --scan-on exit");
    odd.cmdline = "-a \"b c\"".into();
    odd.exec = Some("--help; echo 'x y'".into());
    for options in [words(""), words(FULL), odd] {
        let args = options.to_args(|path, _| path.to_owned());
        let args: Vec<&str> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
        assert_eq!(run_options(&args), options, "{args:?}");
    }
    let mapped = words(FULL).to_args(|path, usage| match usage {
        PathUse::Input => PathBuf::from("/in").join(path),
        PathUse::Output => PathBuf::from("/out").join(path),
        PathUse::Disk(read_only) => PathBuf::from(if read_only { "/ro" } else { "/rw" }).join(path),
    });
    let line = mapped.iter().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" ");
    for expected in [
        "--kernel=/in/k ",
        "--module=/in/a.ko,x=1 ",
        "--file=/in/h:/g ",
        "--report=/out/r ",
        "--control=/out/s ",
        "--disk=/ro/d,ro ",
        "--disk=/rw/e ",
        "--snapshot-on-leak=/out/f ",
        "--events=/out/ev ",
    ] {
        assert!(line.contains(expected), "{expected} in {line}");
    }
}

#[test]
fn words_of_the_command_line_count_too() {
    assert!(!run_options(&["--cmdline", "quiet kleak.console=off"]).guest_port_enabled());
    assert!(run_options(&["--cmdline", "kleak.console=off kleak.console=on"]).guest_port_enabled());
    assert!(!run_options(&["--cmdline", "nokaslr"]).kaslr_enabled());
    assert!(run_options(&["--cmdline", "nokaslr", "--kaslr", "on"]).kaslr_enabled());
}

#[test]
fn a_format_belongs_to_the_report_before_it() {
    use ReportFormat::{Html, Json, Junit, Sarif, Text};
    let formats = |line: &str| {
        let options = run_options(&line.split_whitespace().collect::<Vec<_>>());
        options
            .reports
            .0
            .iter()
            .map(|report| (report.path.display().to_string(), report.format))
            .collect::<Vec<_>>()
    };
    assert_eq!(formats("--report a --format json"), [("a".into(), Json)]);
    assert_eq!(formats("--report a --report b --format json"), [("a".into(), Text), ("b".into(), Json)]);
    assert_eq!(formats("--report a.json --report b.txt"), [("a.json".into(), Json), ("b.txt".into(), Text)]);
    let named = formats("--report a.xml --report a.sarif --report a.html --report a.xml --format html");
    assert_eq!(named.iter().map(|(_, format)| *format).collect::<Vec<_>>(), [Junit, Sarif, Html, Html]);
    assert_eq!(
        formats("--report a.json --format text --cpus 2 --report -"),
        [("a.json".into(), Text), ("-".into(), Text)]
    );
    for line in
        ["run --format json", "run --format json --report a", "run --report a --format json --format text"]
    {
        assert!(refusal(&line.split_whitespace().collect::<Vec<_>>()).contains("--report"), "{line}");
    }
}

#[test]
fn a_usage_error_is_one_line_and_a_hint() {
    let table = [
        (&["run", "--kernal", "x"][..], "'--kernal'", "did you mean --kernel?"),
        (&["rum"], "'rum'", "did you mean run?"),
        (&["run", "--mem", "big"], "512M", "kleak-vmm run --help"),
        (&["run", "--cpus", "9"], "9 is not in 1..=8", "--help"),
        (&["run", "--timeout", "0"], "1 at least", "--help"),
        (&["run", "--timeout", "abc"], "seconds", "--help"),
        (&["run", "--kaslr", "maybe"], "expected on or off", "--help"),
        (&["run", "--trap", "int4"], "'int4'", "hint:"),
        (&["run", "stray"], "'stray'", "--help"),
        (&["run", "-v", "-q"], "--quiet", "--help"),
        (&["ctl"], "<COMMAND>", "kleak-vmm ctl --help"),
        (&["inspect"], "<KERNEL>", "kleak-vmm inspect --help"),
        (&["--quiet"], "'--quiet'", "kleak-vmm help"),
    ];
    for (args, what, hint) in table {
        let text = refusal(args);
        assert!(text.starts_with("kleak-vmm: error: ") && text.contains(what), "{args:?}: {text}");
        assert!(text.contains(hint), "{args:?}: {text}");
        assert_eq!(usage(&parse(args).unwrap_err(), first(args).as_ref()), ExitCode::Usage);
    }
}

#[test]
fn ctl_takes_the_rest_of_the_line() {
    match parse(&["ctl", "--control", "s", "json", "scan=on"]).unwrap().command {
        Action::Ctl(options) => assert_eq!(options.command.join(" "), "json scan=on"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn help_is_no_error() {
    for args in [&["--help"][..], &["help", "run"], &["run", "--help"], &["--version"]] {
        assert_eq!(usage(&parse(args).unwrap_err(), first(args).as_ref()), ExitCode::Success);
    }
    assert_eq!(usage(&parse(&[]).unwrap_err(), None), ExitCode::Usage);
}
