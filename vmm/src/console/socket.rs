//! The control socket: a Unix stream, one command per line.
//!
//! A reply in text ends with a line that holds only EOT (0x04), which no reply contains; a reply in JSON is exactly
//! one line with nothing behind it. So `socat - UNIX-CONNECT:SOCK` works by hand and a script knows the end.
//! The file has mode 0600 in a directory of mode 0700: whoever can open it may drive the virtual machine.

use super::command::Request;
use super::execute::{Commands, Reply};
use crate::cli::Failure;
use anyhow::Context;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

/// Ends a reply in text.
pub const END_OF_REPLY: &str = "\x04\n";
/// Longest command line taken, newline included.
pub const MAX_LINE: usize = 4096;
/// Clients served at a time.
const MAX_CLIENTS: usize = 64;
/// A client that takes nothing of its reply for this long is dropped.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Directory of the sockets that have no path of their own: `$XDG_RUNTIME_DIR/kleak-vmm`, else
/// `/run/user/UID/kleak-vmm`, else `/tmp/kleak-vmm-UID`.
pub fn runtime_dir() -> PathBuf {
    // SAFETY: geteuid cannot fail and touches no memory.
    let uid = unsafe { libc::geteuid() };
    let run_user = PathBuf::from(format!("/run/user/{uid}"));
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if Path::new(&dir).is_absolute() => PathBuf::from(dir).join("kleak-vmm"),
        _ if run_user.is_dir() => run_user.join("kleak-vmm"),
        _ => format!("/tmp/kleak-vmm-{uid}").into(),
    }
}

/// The socket of a virtual machine that was given none: `PID.sock` in [`runtime_dir`], created for this user alone.
///
/// # Errors
/// The directory cannot be created, or belongs to someone else or is open to others (in /tmp, anyone may have
/// made it first).
pub fn default_path() -> anyhow::Result<PathBuf> {
    let dir = runtime_dir();
    private_dir(&dir)?;
    Ok(dir.join(format!("{}.sock", std::process::id())))
}

pub(super) fn private_dir(dir: &Path) -> anyhow::Result<()> {
    let failure = || {
        Failure::host(format!("Cannot use {} for control sockets", dir.display()))
            .hint("give a path with --control, or set XDG_RUNTIME_DIR to a directory of your own")
    };
    match fs::DirBuilder::new().recursive(false).mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(failure);
        }
        _ => {}
    }
    // Not following a link: it could point to a directory that passes the checks below.
    let metadata = fs::symlink_metadata(dir).with_context(failure)?;
    // SAFETY: geteuid cannot fail and touches no memory.
    let ours = metadata.is_dir() && metadata.uid() == unsafe { libc::geteuid() };
    if !ours || metadata.mode() & 0o077 != 0 {
        let why = "it is not a directory that only this user can enter";
        return Err(anyhow::anyhow!(why).context(failure()));
    }
    Ok(())
}

/// Sockets in [`runtime_dir`] that a virtual machine answers on, sorted.
pub fn live_sockets(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut sockets: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sock"))
        .filter(|path| UnixStream::connect(path).is_ok())
        .collect();
    sockets.sort();
    sockets
}

/// A bound control socket; dropping it removes the file and ends the serving.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
    listener: UnixListener,
    stop: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Binds a socket of mode 0600. One that nobody listens on any more, left behind by a killed process, is
    /// replaced.
    ///
    /// # Errors
    /// Usage errors: another process listens there, a file that is no socket is in the way, or the path is too long
    /// or cannot be written to.
    pub fn bind(path: &Path) -> anyhow::Result<Self> {
        let failure = |hint: &str| {
            Failure::usage(format!("Cannot create control socket {}", path.display())).hint(hint)
        };
        match fs::symlink_metadata(path) {
            Ok(metadata) if !std::os::unix::fs::FileTypeExt::is_socket(&metadata.file_type()) => {
                let hint = "give the path of a socket with --control, or remove the file";
                return Err(anyhow::anyhow!("A file that is no socket is in the way").context(failure(hint)));
            }
            Ok(_) if UnixStream::connect(path).is_ok() => {
                let hint = "another kleak-vmm answers on it; give this one a path of its own with --control";
                return Err(anyhow::anyhow!("The socket is in use").context(failure(hint)));
            }
            Ok(_) => fs::remove_file(path).with_context(|| failure("remove the stale socket"))?,
            Err(_) => {}
        }
        let listener = bind_private(path).with_context(|| failure("check --control"))?;
        Ok(Self { path: path.to_owned(), listener, stop: Arc::default(), acceptor: None })
    }

    /// Where it is bound.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves clients from now on, each on a thread of its own.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn serve(&mut self, commands: Arc<dyn Commands>) -> anyhow::Result<()> {
        self.serve_streams(move |stream| {
            // A client that vanishes in the middle of its reply is its own business.
            let _ = serve_stream(&stream, &stream, commands.as_ref());
        })
    }

    /// Hands each client's stream to `client`, on a thread of its own.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn serve_streams(
        &mut self,
        client: impl Fn(UnixStream) + Send + Sync + 'static,
    ) -> anyhow::Result<()> {
        let listener = self.listener.try_clone().context("Cannot serve the control socket")?;
        let stop = Arc::clone(&self.stop);
        let client = Arc::new(client);
        let accept = move || accept_clients(&listener, &client, &stop);
        let acceptor = std::thread::Builder::new().name("control".into()).spawn(accept);
        self.acceptor = Some(acceptor.context("Cannot serve the control socket")?);
        Ok(())
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        // Wakes the acceptor; before the file goes, since that is the way in.
        if self.acceptor.is_some() {
            let _ = UnixStream::connect(&self.path);
        }
        // Best effort: a socket that stays is replaced by the next user of the path.
        let _ = fs::remove_file(&self.path);
    }
}

/// Binds under a temporary name and moves the socket into place once its mode is right, so that at no time others
/// can connect; the umask, being of the whole process, is left alone.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let _ = fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)?;
    let placed = fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))
        .and_then(|()| fs::rename(&temporary, path));
    if placed.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    placed.map(|()| listener)
}

fn accept_clients(
    listener: &UnixListener,
    client: &Arc<impl Fn(UnixStream) + Send + Sync + 'static>,
    stop: &AtomicBool,
) {
    let clients = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        if stop.load(SeqCst) {
            return;
        }
        let Ok(stream) = stream else {
            // Out of descriptors, most likely: the clients being served will give some back.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        if stream.set_write_timeout(Some(WRITE_TIMEOUT)).is_err() {
            continue;
        }
        if clients.load(SeqCst) >= MAX_CLIENTS {
            let refusal = Reply::error(&format!("too many clients: {MAX_CLIENTS} at most"), false);
            // It may have gone again.
            let _ = (&stream).write_all(frame(&refusal.body, false).as_bytes());
            continue;
        }
        clients.fetch_add(1, SeqCst);
        let (client, count) = (Arc::clone(client), Arc::clone(&clients));
        let serve = move || {
            client(stream);
            count.fetch_sub(1, SeqCst);
        };
        if std::thread::Builder::new().name("control client".into()).spawn(serve).is_err() {
            clients.fetch_sub(1, SeqCst);
        }
    }
}

/// Answers the lines of `input` on `output` until one of them ends: the protocol of the control socket on any
/// stream.
///
/// # Errors
/// Input or output fails, or a line is longer than [`MAX_LINE`].
pub fn serve_stream(input: impl Read, mut output: impl Write, commands: &dyn Commands) -> io::Result<()> {
    let mut input = BufReader::new(input);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut input).take(MAX_LINE as u64).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(());
        }
        if read == MAX_LINE && !line.ends_with(b"\n") {
            let json = Request::parse(&String::from_utf8_lossy(&line)).json;
            let refusal = Reply::error(&format!("line longer than {MAX_LINE} bytes"), json);
            output.write_all(frame(&refusal.body, json).as_bytes())?;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "line too long"));
        }
        let text = String::from_utf8_lossy(&line);
        let reply = commands.answer(&text);
        output.write_all(frame(&reply.body, Request::parse(&text).json).as_bytes())?;
        output.flush()?;
        if reply.quit {
            commands.quit();
        }
    }
}

fn frame(body: &str, json: bool) -> String {
    if json { body.to_owned() } else { format!("{body}{END_OF_REPLY}") }
}
