//! The job as a process: its streams are pipes, or a terminal where the host's are one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use super::wire::{JobSpec, Stream};

/// A started job.
pub struct JobProcess {
    /// The process.
    pub child: Child,
    /// Its streams.
    pub streams: Streams,
    /// The controlling side of its terminal.
    pub terminal: Option<File>,
}

/// Our ends of a job's streams.
pub struct Streams {
    /// Standard input.
    pub stdin: Option<Box<dyn Write + Send>>,
    /// Standard output and error; one of them for both where they are the same terminal.
    pub outputs: Vec<(Stream, Box<dyn Read + Send>)>,
}

/// Starts `program` as `spec` says.
pub fn spawn(spec: &JobSpec, program: &Path) -> Result<JobProcess> {
    let terminal =
        if spec.tty.contains(&true) { Some(Terminal::open().context("making a terminal")?) } else { None };
    let mut command = Command::new(program);
    let mut arguments = spec.argv.iter();
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    command.args(arguments).env_clear().envs(spec.env.iter().map(|(name, value)| (name, value)));
    command.current_dir(&spec.cwd);
    let stdio = |is_terminal: bool| match &terminal {
        Some(terminal) if is_terminal => terminal.user.try_clone().map(Stdio::from),
        _ => Ok(Stdio::piped()),
    };
    command.stdin(stdio(spec.tty[0])?).stdout(stdio(spec.tty[1])?).stderr(stdio(spec.tty[2])?);
    if let Some(terminal) = &terminal {
        let user = terminal.user.as_raw_fd();
        // SAFETY: the closure makes system calls only; the descriptor is open until the child has started.
        unsafe {
            command.pre_exec(move || {
                if libc::setsid() < 0 || libc::ioctl(user, libc::TIOCSCTTY, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
    }
    let mut child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
    // The command holds the terminal's user side, which would keep it from ever reading as ended.
    drop(command);
    let streams = streams(&mut child, spec, terminal.as_ref())?;
    Ok(JobProcess { child, streams, terminal: terminal.map(|terminal| terminal.controller) })
}

fn streams(child: &mut Child, spec: &JobSpec, terminal: Option<&Terminal>) -> Result<Streams> {
    let mut outputs: Vec<(Stream, Box<dyn Read + Send>)> = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        outputs.push((Stream::STDOUT, Box::new(stdout)));
    }
    if let Some(stderr) = child.stderr.take() {
        outputs.push((Stream::STDERR, Box::new(stderr)));
    }
    let mut stdin = child.stdin.take().map(|stdin| Box::new(stdin) as Box<dyn Write + Send>);
    if let Some(terminal) = terminal {
        // With standard input alone a terminal, what it echoes goes where messages go.
        let stream = if spec.tty[1] { Stream::STDOUT } else { Stream::STDERR };
        if spec.tty[1] || spec.tty[2] {
            outputs.push((stream, Box::new(terminal.controller.try_clone()?)));
        }
        if spec.tty[0] {
            stdin = Some(Box::new(terminal.controller.try_clone()?));
        }
    }
    Ok(Streams { stdin, outputs })
}

/// A pseudo terminal.
pub struct Terminal {
    /// The side that plays the device.
    pub controller: File,
    /// The side that takes it for one.
    pub user: OwnedFd,
}

impl Terminal {
    /// One that leaves output as it is: the host's terminal does what is to be done with it.
    pub fn open() -> io::Result<Self> {
        let (mut controller, mut user) = (-1, -1);
        // SAFETY: openpty writes two descriptors; the other arguments may be null.
        let result = unsafe {
            libc::openpty(
                &raw mut controller,
                &raw mut user,
                std::ptr::null_mut(),
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: both descriptors are open and ours.
        let this =
            unsafe { Self { controller: File::from_raw_fd(controller), user: OwnedFd::from_raw_fd(user) } };
        for fd in [controller, user] {
            // SAFETY: plain system call on an open descriptor.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
        let mut modes = std::mem::MaybeUninit::<libc::termios>::uninit();
        // SAFETY: tcgetattr fills the structure when it returns 0, and only then it is used.
        unsafe {
            if libc::tcgetattr(user, modes.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            let mut modes = modes.assume_init();
            modes.c_oflag &= !libc::OPOST;
            if libc::tcsetattr(user, libc::TCSANOW, &raw const modes) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, tty: [bool; 3]) -> JobProcess {
        let spec = JobSpec {
            argv: vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()],
            env: vec![("PATH".to_owned(), "/bin:/usr/bin".to_owned())],
            cwd: "/".to_owned(),
            tty,
            ..JobSpec::default()
        };
        spawn(&spec, Path::new("/bin/sh")).unwrap()
    }

    fn read(source: &mut dyn Read) -> String {
        let mut bytes = Vec::new();
        // A terminal ends in an error.
        let _ = source.read_to_end(&mut bytes);
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn pipes_stay_apart() {
        let mut job = shell("cat; echo bad >&2; exit 7", [false; 3]);
        job.streams.stdin.take().unwrap().write_all(b"in\n").unwrap();
        let texts: Vec<_> =
            job.streams.outputs.iter_mut().map(|(stream, source)| (*stream, read(source))).collect();
        assert_eq!(texts, [(Stream::STDOUT, "in\n".to_owned()), (Stream::STDERR, "bad\n".to_owned())]);
        assert_eq!(job.child.wait().unwrap().code(), Some(7));
    }

    #[test]
    fn a_terminal_is_one() {
        let mut job = shell("test -t 0 && test -t 1 && test -t 2 && read x && echo got $x", [true; 3]);
        let stdin = job.streams.stdin.as_mut().unwrap();
        stdin.write_all(b"key\n").unwrap();
        let [(stream, source)] = &mut job.streams.outputs[..] else { panic!("one terminal") };
        assert_eq!(*stream, Stream::STDOUT);
        let text = read(source);
        assert!(text.ends_with("got key\n"), "{text:?}");
        assert!(job.child.wait().unwrap().success());
    }

    #[test]
    fn terminals_and_pipes_mix() {
        let mut job = shell(
            "test -t 0 || test -t 1 || { test -t 2 && echo out && echo err >&2; }",
            [false, false, true],
        );
        drop(job.streams.stdin.take());
        let texts: Vec<_> =
            job.streams.outputs.iter_mut().map(|(stream, source)| (*stream, read(source))).collect();
        assert_eq!(texts, [(Stream::STDOUT, "out\n".to_owned()), (Stream::STDERR, "err\n".to_owned())]);
    }
}
