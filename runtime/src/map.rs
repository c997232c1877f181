//! Memory that comes from the kernel: files mapped read-only, and zeroed buffers for arenas and KV caches.
//!
//! Invariants:
//! 1. A mapped file is never written in place: llamac replaces files by rename (`artifact`), which leaves the
//!    mapped inode as it was. Whoever truncates a checkpoint under a running program gets SIGBUS, as in any
//!    program that maps files.

use std::fs::{self, File};
use std::io;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Advice, Mmap, MmapMut};

/// The bytes of a file, mapped or owned, shared by all who read it. Cloning copies a pointer.
pub type FileBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A page of transparent huge memory on x86-64, and on aarch64 with 4 KiB pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Why memory or a file could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The file cannot be opened or mapped; `source` says why.
    #[error("{file}: cannot be mapped")]
    File {
        /// The file asked for.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, a pipe or a device.
    #[error("{file}: not a regular file")]
    NotAFile {
        /// The path asked for.
        file: PathBuf,
    },
    /// The system refuses the memory.
    #[error("out of memory: {needed} bytes asked, {} available", or_unknown(*.available))]
    Memory {
        /// Bytes asked for.
        needed: u64,
        /// Bytes that the system could have given, where it says so.
        available: Option<u64>,
        /// What the system said.
        source: io::Error,
    },
}

fn or_unknown(bytes: Option<u64>) -> String {
    bytes.map_or("an unknown number".into(), |bytes| bytes.to_string())
}

/// Maps `path` read-only, all of it; an empty file gives no bytes.
///
/// # Errors
///
/// [`MapError::File`] if it cannot be opened or mapped, [`MapError::NotAFile`] for anything but a regular file.
pub fn map_file(path: &Path) -> Result<FileBytes, MapError> {
    let at_path = |source| MapError::File { file: path.into(), source };
    let file = File::open(path).map_err(at_path)?;
    let metadata = file.metadata().map_err(at_path)?;
    if !metadata.is_file() {
        return Err(MapError::NotAFile { file: path.into() });
    }
    if metadata.len() == 0 {
        // The kernel maps no empty range.
        return Ok(Arc::new([]));
    }
    // SAFETY: the mapping is private and read-only, and the file is not written in place by invariant 1.
    let bytes = unsafe { Mmap::map(&file) }.map_err(at_path)?;
    Ok(Arc::new(bytes))
}

/// Zeroed memory of its own pages: an arena or a KV cache. Freed when dropped.
///
/// It begins at a page (at a 2 MiB boundary when huge pages were asked for). Pages are taken when first written.
#[derive(Debug)]
pub struct OwnedBuf {
    map: MmapMut,
    /// Where the first byte is in `map`.
    start: usize,
    len: usize,
}

impl OwnedBuf {
    /// `len` zeroed bytes; `huge` asks for transparent huge pages and does without where there are none.
    ///
    /// # Errors
    ///
    /// [`MapError::Memory`] if the system refuses, or would kill whoever writes to it all; nothing aborts.
    pub fn zeroed(len: usize, huge: bool) -> Result<OwnedBuf, MapError> {
        let refused = |source| MapError::Memory { needed: len as u64, available: available_bytes(), source };
        // The kernel promises more than it has.
        if available_bytes().is_some_and(|available| len as u64 > available) {
            return Err(refused(io::ErrorKind::OutOfMemory.into()));
        }
        // Huge pages begin only at their own multiples, so room is left to move the start there.
        let slack = if huge { HUGE_PAGE_BYTES } else { 0 };
        let mapped = len.checked_add(slack).filter(|&mapped| mapped <= isize::MAX as usize);
        let mapped = mapped.ok_or_else(|| refused(io::ErrorKind::OutOfMemory.into()))?;
        let map = MmapMut::map_anon(mapped.max(1)).map_err(refused)?;
        let mut start = 0;
        if huge {
            start = map.as_ptr().align_offset(HUGE_PAGE_BYTES);
            // A kernel without huge pages refuses the advice; the memory serves all the same.
            let _ = map.advise(Advice::HugePage);
        }
        Ok(OwnedBuf { map, start, len })
    }
}

impl Deref for OwnedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.start..self.start + self.len]
    }
}

impl DerefMut for OwnedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..self.start + self.len]
    }
}

/// The most memory that this process has had, mapped files counted, in bytes; none where the kernel does not say.
pub fn peak_rss_bytes() -> Option<u64> {
    kib("/proc/self/status", "VmHWM:")
}

/// Bytes that can be had without swapping, as the kernel estimates it; none where it does not say.
pub fn available_bytes() -> Option<u64> {
    kib("/proc/meminfo", "MemAvailable:")
}

/// All memory of this machine, in bytes; none where the kernel does not say.
pub fn total_bytes() -> Option<u64> {
    kib("/proc/meminfo", "MemTotal:")
}

/// The number behind `key` in a file of the kernel's, in bytes.
fn kib(file: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}
