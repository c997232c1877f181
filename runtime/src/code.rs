//! Generated code in memory, and the one way of calling it.
//!
//! Invariants:
//! 1. Code was made by llamac for this [`ABI`] and for a CPU like this one; whoever loads it has looked (an artifact's
//!    digests, its ABI number, its features). An artifact is code: loading one is trusting it.
//! 2. An entry point has the signature `EntryFn` and reads `Context` as codegen lays it out; [`ABI`] stands for both.
//! 3. While an entry point runs, the table has an address for each buffer that the code names, with at least the bytes
//!    that its plan says, and nobody else touches those that it writes.
//! 4. A [`Pool`] gives each worker number to one thread, and returns when all are done.

use crate::map::{MapError, OwnedBuf};
use crate::pool::Pool;
use ir::dim::MAX_SYMBOLS;
use libloading::Library;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::time::Instant;

/// Version of what entry points are called with (`Context`, `EntryFn`); codegen's number must be the same.
pub const ABI: u32 = 2;

/// `parallel` loops between two barriers that have counters; codegen's number must be the same.
const LOOPS: usize = 8;

/// What an entry point is called with.
#[repr(C)]
struct Context {
    buffers: *const *mut u8,
    meeting: *mut Line,
    workers: i64,
    symbols: [i64; MAX_SYMBOLS],
}

/// A counter alone in its cache line. How many have arrived at a barrier, how often all have, and each worker's turns taken in
/// each loop; at zero before the first step, generated code does the rest.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
struct Line([u64; 8]);

/// The signature of an entry point.
type EntryFn = unsafe extern "C" fn(*const Context, i64);

/// Why code could not be loaded: what the system's loader said.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {said}")]
pub struct CodeError {
    /// The code, or the entry point that it lacks.
    pub what: String,
    /// What the loader said.
    pub said: String,
}

/// Loaded code with the workers that run it.
#[derive(Debug)]
pub struct Code {
    entries: Vec<EntryFn>,
    pool: Pool,
    meeting: Vec<Line>,
    /// Keeps the code mapped.
    _library: Library,
    /// The loader knows a library by its path, and takes two of one path for the same: the file's number must stay taken
    /// while the library is there. Dropped after it.
    _file: File,
}

impl Code {
    /// Maps a shared object, for `threads` workers, and looks up its entry points; [`Code::run`] takes them by number.
    ///
    /// # Errors
    ///
    /// What the system's loader said.
    pub fn load<'n>(
        object: &[u8],
        entries: impl IntoIterator<Item = &'n str>,
        threads: usize,
    ) -> Result<Code, CodeError> {
        let failed = |said: String| CodeError { what: "generated code".to_string(), said };
        // The loader takes files: this one is in memory.
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create("llamac-code", flags).map_err(|e| failed(e.to_string()))?;
        let mut file = File::from(file);
        file.write_all(object).map_err(|e| failed(e.to_string()))?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // SAFETY: invariant 1; the file has no initialisers: the linker put together generated functions only.
        let library = unsafe { Library::new(path) }.map_err(|e| failed(e.to_string()))?;
        let entry = |name: &str| {
            // SAFETY: invariants 1 and 2: the symbol is an entry point of code with our ABI.
            let symbol = unsafe { library.get::<EntryFn>(name.as_bytes()) };
            symbol.map(|s| *s).map_err(|e| CodeError { what: name.to_string(), said: e.to_string() })
        };
        let entries = entries.into_iter().map(entry).collect::<Result<_, _>>()?;
        let pool = Pool::new(threads);
        let meeting = vec![Line([0; 8]); 2 + LOOPS * pool.workers()];
        Ok(Code { entries, pool, meeting, _library: library, _file: file })
    }

    /// Runs an entry point on all workers.
    ///
    /// # Safety
    ///
    /// Invariant 3 for `table`.
    ///
    /// # Panics
    ///
    /// If there is no entry point of that number.
    pub unsafe fn run(&mut self, entry: usize, table: &[*mut u8], symbols: [i64; MAX_SYMBOLS]) {
        let context = self.context(table, symbols);
        let shared = Shared { entry: self.entries[entry], context: &context };
        self.pool.run(&|worker| shared.call(worker));
    }

    /// Runs a tap on all workers. Gives when each of them worked, in seconds since `origin`.
    ///
    /// # Safety
    ///
    /// Invariant 3 for `table`.
    ///
    /// # Panics
    ///
    /// If there is no tap of that number.
    pub unsafe fn run_tap(
        &mut self,
        tap: usize,
        table: &[*mut u8],
        symbols: [i64; MAX_SYMBOLS],
        origin: Instant,
    ) -> Vec<Range<f64>> {
        let context = self.context(table, symbols);
        let shared = Shared { entry: self.entries[tap], context: &context };
        let times = vec![OnceLock::new(); self.pool.workers()];
        let now = || origin.elapsed().as_secs_f64();
        self.pool.run(&|worker| {
            let begin = now();
            shared.call(worker);
            times[worker].get_or_init(|| begin..now());
        });
        // The barrier at the end of a launch does this; a tap has none.
        self.meeting[2..].fill(Line([0; 8]));
        times.into_iter().map(|time| time.into_inner().expect("the pool calls every worker")).collect()
    }

    fn context(&mut self, table: &[*mut u8], symbols: [i64; MAX_SYMBOLS]) -> Context {
        Context {
            buffers: table.as_ptr(),
            meeting: self.meeting.as_mut_ptr(),
            workers: self.pool.workers() as i64,
            symbols,
        }
    }

    /// Runs an entry point on buffers of the caller's: for tests of single kernels.
    ///
    /// A kernel that keeps to what it declares stays inside of buffers that are as large; one that does not is seen by
    /// [`Guarded::is_intact`], if it strays by no more than [`Guarded::BAND`].
    pub fn run_on(&mut self, entry: usize, buffers: &mut [Guarded], symbols: [i64; MAX_SYMBOLS]) {
        let table: Vec<*mut u8> = buffers.iter_mut().map(|b| b.bytes_mut().as_mut_ptr()).collect();
        // SAFETY: invariant 3: the caller made the buffers for this kernel, and they are borrowed until it is done.
        unsafe { self.run(entry, &table, symbols) }
    }
}

/// An entry point with its context, handed to every worker.
struct Shared<'a> {
    entry: EntryFn,
    context: &'a Context,
}

// SAFETY: generated code shares the context's memory between workers by its barriers.
unsafe impl Sync for Shared<'_> {}

impl Shared<'_> {
    fn call(&self, worker: usize) {
        // SAFETY: invariants 2 and 3; each worker number is passed by one thread only (invariant 4).
        unsafe { (self.entry)(self.context, worker as i64) }
    }
}

/// Memory for one buffer, with a band of known bytes before and behind: what writes outside is found out.
#[derive(Debug)]
pub struct Guarded {
    memory: OwnedBuf,
    bytes: usize,
}

impl Guarded {
    /// Bytes of a band: a tile of the largest vectors.
    pub const BAND: usize = 4096;

    /// What bands hold. As f32 or bf16 a large number, so that reading one shows too.
    const MARK: u8 = 0x7B;

    /// `bytes` zeroed bytes between two bands. They begin at a cache line, as the plan's buffers do.
    ///
    /// # Errors
    ///
    /// If the system refuses the memory.
    pub fn zeroed(bytes: usize) -> Result<Guarded, MapError> {
        let mut memory = OwnedBuf::zeroed(bytes + 2 * Guarded::BAND, false)?;
        memory[..Guarded::BAND].fill(Guarded::MARK);
        memory[Guarded::BAND + bytes..].fill(Guarded::MARK);
        Ok(Guarded { memory, bytes })
    }

    /// What is between the bands.
    pub fn bytes(&self) -> &[u8] {
        &self.memory[Guarded::BAND..][..self.bytes]
    }

    /// What is between the bands.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[Guarded::BAND..][..self.bytes]
    }

    /// Are both bands as they were?
    pub fn is_intact(&self) -> bool {
        let (before, rest) = self.memory.split_at(Guarded::BAND);
        before.iter().chain(&rest[self.bytes..]).all(|&b| b == Guarded::MARK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bands_see_what_strays() {
        let mut buffer = Guarded::zeroed(100).unwrap();
        assert_eq!(buffer.bytes().len(), 100);
        buffer.bytes_mut().fill(7);
        assert!(buffer.is_intact());
        buffer.memory[Guarded::BAND + 100] = 0;
        assert!(!buffer.is_intact());
    }

    #[test]
    fn what_is_no_code_is_refused() {
        let error = Code::load(b"no code", [], 1).unwrap_err();
        assert_eq!(error.what, "generated code");
    }
}
