//! Where a debugger comes in: `HOST:PORT`, `:PORT` of this host, or the path of a Unix socket.

use crate::cli::Failure;
use anyhow::Context;
use std::fmt;
use std::fs;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Host and port.
    Tcp(String, u16),
    /// A path, with a `/` in it.
    Unix(PathBuf),
}

impl Address {
    /// Parses it.
    ///
    /// # Errors
    /// One sentence that says what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        let parsed = text.rsplit_once(':').and_then(|(host, port)| {
            let host = if host.is_empty() { "127.0.0.1" } else { host };
            Some(Self::Tcp(host.to_owned(), port.parse().ok()?))
        });
        parsed.ok_or_else(|| format!("expected HOST:PORT, :PORT or the path of a socket, not {text:?}"))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Waits for debuggers.
#[derive(Debug)]
pub enum Listener {
    /// On a port.
    Tcp(TcpListener),
    /// On a socket.
    Unix(UnixListener),
}

/// A debugger's connection.
#[derive(Debug)]
pub enum Client {
    /// By a port.
    Tcp(TcpStream),
    /// By a socket.
    Unix(UnixStream),
}

impl Listener {
    /// Binds; a socket that nobody listens on any more is replaced. The file of a socket goes with the second value: whoever
    /// waits for debuggers does so until the process ends.
    ///
    /// # Errors
    /// A usage error: the address is taken, or cannot be had.
    pub fn bind(address: &Address) -> anyhow::Result<(Self, SocketFile)> {
        let failure = || {
            Failure::usage(format!("Cannot wait for a debugger on {address}"))
                .hint("give another address with --gdb")
        };
        match address {
            Address::Tcp(host, port) => {
                let listener = TcpListener::bind((host.as_str(), *port)).with_context(failure)?;
                Ok((Self::Tcp(listener), SocketFile(None)))
            }
            Address::Unix(path) => {
                let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
                if is_socket && UnixStream::connect(path).is_err() {
                    fs::remove_file(path).with_context(failure)?;
                }
                let listener = UnixListener::bind(path).with_context(failure)?;
                let only_user = fs::Permissions::from_mode(0o600);
                fs::set_permissions(path, only_user).with_context(failure)?;
                Ok((Self::Unix(listener), SocketFile(Some(path.clone()))))
            }
        }
    }

    /// The next debugger.
    ///
    /// # Errors
    /// Of the system.
    pub fn accept(&self) -> io::Result<Client> {
        match self {
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Client::Tcp(stream)),
            Self::Unix(listener) => listener.accept().map(|(stream, _)| Client::Unix(stream)),
        }
    }
}

/// Removes a socket's file.
#[derive(Debug)]
pub struct SocketFile(Option<PathBuf>);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Best effort: a socket that stays is replaced by the next user of the path.
            let _ = fs::remove_file(path);
        }
    }
}

impl Client {
    /// The same connection once more.
    ///
    /// # Errors
    /// Of the system.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
        }
    }

    /// Says that nothing more is sent.
    pub fn hang_up(&self) {
        // One that is gone needs no telling.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
        };
    }
}

impl io::Read for Client {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl io::Write for Client {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.flush(),
            Self::Unix(stream) => stream.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let tcp = |host: &str, port| Ok(Address::Tcp(host.to_owned(), port));
        assert_eq!(Address::parse(":1234"), tcp("127.0.0.1", 1234));
        assert_eq!(Address::parse("::1:1234"), tcp("::1", 1234));
        assert_eq!(Address::parse("0.0.0.0:1"), tcp("0.0.0.0", 1));
        assert_eq!(Address::parse("./a:b"), Ok(Address::Unix("./a:b".into())));
        for text in ["", "1234", ":", "host:port", ":65536"] {
            assert!(Address::parse(text).unwrap_err().contains("HOST:PORT"), "{text}");
        }
        assert_eq!(Address::parse(":7").unwrap().to_string(), "127.0.0.1:7");
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let path = std::env::temp_dir().join(format!("kleak-gdb-{}", std::process::id()));
        let address = Address::Unix(path.clone());
        drop(UnixListener::bind(&path).unwrap());
        let (listener, file) = Listener::bind(&address).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Listener::bind(&address).unwrap_err().is::<Failure>());
        drop((listener, file));
        assert!(!path.exists());
        fs::write(&path, b"a file").unwrap();
        assert!(Listener::bind(&address).is_err() && path.exists());
        fs::remove_file(path).unwrap();
    }
}
