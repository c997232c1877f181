//! Files and folders that are whole or not there: written beside their place and renamed.
//!
//! A file that is larger than the system lets this process write (`ulimit -f`) is refused as one on a full disk is.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Once;

use rustix::process::{Resource, getrlimit};
use tempfile::NamedTempFile;

/// Why a file is not there.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum WriteError {
    /// No room for the file.
    #[error("{file}: no room: the file needs {needed} bytes, there is room for {available}")]
    DiskFull { file: PathBuf, needed: u64, available: u64 },
    /// The system refuses; `source` says why.
    #[error("{file}: cannot be written")]
    Io { file: PathBuf, source: io::Error },
}

/// Has `fill` write about `needed` bytes to a temporary file, and puts that in the place of `file`.
///
/// # Errors
///
/// [`WriteError`]; the place is then as it was before.
pub fn write(file: &Path, needed: u64, fill: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), WriteError> {
    let cannot = |source| WriteError::Io { file: file.into(), source };
    let temporary = beside(file).map_err(cannot)?;
    if let Err(source) = fill(temporary.path()) {
        if !is_full(&source) {
            return Err(cannot(source));
        }
        // What the temporary file holds comes back when it goes.
        drop(temporary);
        let available = room(folder(file), 0).map_err(cannot)?;
        return Err(WriteError::DiskFull { file: file.into(), needed, available });
    }
    temporary.persist(file).map_err(|error| cannot(error.error))?;
    Ok(())
}

/// Has `fill` write about `needed` bytes into a temporary folder, and gives that the name of `place`, where nothing is.
///
/// # Errors
///
/// [`WriteError`]; no folder is left then. One that is there already is an error too, and stays as it is.
pub fn write_folder(
    place: &Path,
    needed: u64,
    fill: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<(), WriteError> {
    let cannot = |source| WriteError::Io { file: place.into(), source };
    if place.symlink_metadata().is_ok() {
        return Err(cannot(io::ErrorKind::AlreadyExists.into()));
    }
    let temporary = named(&mut tempfile::Builder::new())
        .permissions(fs::Permissions::from_mode(0o777))
        .tempdir_in(folder(place))
        .map_err(cannot)?;
    if let Err(source) = fill(temporary.path()) {
        if !is_full(&source) {
            return Err(cannot(source));
        }
        drop(temporary);
        let available = room(folder(place), 0).map_err(cannot)?;
        return Err(WriteError::DiskFull { file: place.into(), needed, available });
    }
    fs::rename(temporary.path(), place).map_err(cannot)?;
    // Nothing is there any more that could be removed.
    let _ = temporary.keep();
    Ok(())
}

/// A temporary file in the folder of `file`, removed when it is dropped.
pub(crate) fn beside(file: &Path) -> io::Result<NamedTempFile> {
    named(&mut tempfile::Builder::new())
        // As any new file, less the umask: temporary files are private, results are not.
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(folder(file))
}

/// A name beside others, for what is not whole yet.
fn named<'b, 'n>(builder: &'b mut tempfile::Builder<'n, 'n>) -> &'b mut tempfile::Builder<'n, 'n> {
    survive_size_limit();
    builder.prefix(".llamac-").suffix(".tmp")
}

/// Has writes beyond the limit of a file's size fail. Else a signal ends the program there, and temporary files stay.
fn survive_size_limit() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the signal is ignored and has no handler, so no code of ours ever runs inside of it.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    });
}

/// Is there no room, as far as the system says?
pub(crate) fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// Where `file` is.
pub(crate) fn folder(file: &Path) -> &Path {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Bytes that a file in `folder` may have: `held`, which it has, and what this user may still write in that file system,
/// up to the limit of a file's size.
pub(crate) fn room(folder: &Path, held: u64) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(folder)?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize).saturating_add(held);
    Ok(free.min(getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_or_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a");
        let entries = || fs::read_dir(folder.path()).unwrap().count();
        write(&file, 1, |path| fs::write(path, "a")).unwrap();
        let full = |path: &Path| fs::write(path, "b").and(Err(io::ErrorKind::StorageFull.into()));
        assert!(matches!(write(&file, u64::MAX, full), Err(WriteError::DiskFull { needed: u64::MAX, .. })));
        let fails = |path: &Path| fs::write(path, "c").and(Err(io::ErrorKind::InvalidInput.into()));
        assert!(matches!(write(&file, 1, fails), Err(WriteError::Io { .. })));
        assert_eq!((fs::read(&file).unwrap(), entries()), (b"a".to_vec(), 1));
    }

    #[test]
    fn folders_are_whole_and_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("a");
        let entries = || fs::read_dir(folder.path()).unwrap().count();
        let fails = |path: &Path| fs::write(path.join("f"), "b").and(Err(io::ErrorKind::InvalidInput.into()));
        assert!(matches!(write_folder(&place, 1, fails), Err(WriteError::Io { .. })));
        assert_eq!(entries(), 0);
        write_folder(&place, 1, |path| fs::write(path.join("f"), "a")).unwrap();
        assert!(write_folder(&place, 1, |path| fs::write(path.join("f"), "c")).is_err());
        assert_eq!((fs::read(place.join("f")).unwrap(), entries()), (b"a".to_vec(), 1));
    }
}
