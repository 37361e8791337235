//! Where a saved machine goes.

use super::check_place;
use crate::files::WholeFile;
use crate::lab::{self, Export};
use std::io::{self, Write};
use std::path::Path;

/// A file on its way: on this host, or, for a run in the lab, on the host outside.
pub enum Sink {
    /// Here.
    File(WholeFile),
    /// Outside.
    Lab(Export),
}

impl Sink {
    /// Begins a file of `size` bytes; `path` is absolute.
    ///
    /// # Errors
    /// It cannot be written, or something that is no core would be replaced. In the lab [`Sink::place`] says so.
    pub fn create(path: &Path, size: u64) -> io::Result<Self> {
        if lab::inside().is_some() {
            return Export::create(path, size).map(Self::Lab);
        }
        check_place(path)?;
        WholeFile::private(path).map(Self::File)
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// The host has no room, or no such folder.
    pub fn place(self) -> io::Result<()> {
        match self {
            Self::File(file) => file.place(),
            Self::Lab(export) => export.place(),
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.write(bytes),
            Self::Lab(export) => export.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::File(file) => file.flush(),
            Self::Lab(export) => export.flush(),
        }
    }
}
