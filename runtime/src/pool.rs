//! The workers of a CPU device: threads that all run the same function, spin a little between calls, then sleep.
//!
//! * Worker 0 is whoever calls [`Pool::run`]; the others are threads of their own.
//! * While workers spin, a call allocates nothing, takes no lock and makes no system call.
//! * Workers are pinned, each to a core of its own, if there are cores enough; physical cores before their second
//!   hyperthreads. The first core is left free for the caller, which is not pinned, because every thread that it spawns
//!   later would inherit that; [`Pool::run`] only moves it there when it finds it on a worker's core.
//!
//! Invariants:
//! 1. `job` points to a live reference from the moment `round` grows until `unfinished` is 0, and `run` leaves its
//!    frame only after that, panic or not.
//! 2. `run` and `drop` take the pool by `&mut` or by value, so rounds never overlap.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::{fs, hint};

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// Turns of the waiting loop before a worker sleeps. 10 000: half a millisecond at 49 ns a turn (`examples/pool.rs`), more
/// than lies between two decode steps unless the sampler is slow; a sleeping worker takes 50 us to wake.
const SPINS: u32 = 10_000;

/// A fixed set of workers. Dropping it ends their threads.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// The core of each worker, the caller's first; none if workers are not pinned.
    cores: Vec<usize>,
    /// Turns of the waiting loop before the caller gives way.
    spins: u32,
}

type Job = &'static (dyn Fn(usize) + Sync);
type Panic = Box<dyn Any + Send>;

#[derive(Debug, Default)]
struct Shared {
    /// Grows by one with each call; workers watch it.
    round: Line<AtomicUsize>,
    /// Workers that have not finished this round; the caller watches it.
    unfinished: Line<AtomicUsize>,
    /// Workers that sleep, or are about to.
    sleepers: Line<AtomicUsize>,
    /// Where the round's function is: a reference in the caller's frame.
    job: AtomicPtr<Job>,
    stop: AtomicBool,
    panicked: AtomicBool,
    /// The lowest worker that panicked in this round, and with what.
    panic: Mutex<Option<(usize, Panic)>>,
}

/// A value alone in its pair of cache lines, which x86 prefetches together.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line<T>(T);

impl Pool {
    /// `threads` workers, the caller among them; at least one, at most 1024, and fewer if the system gives no more.
    pub fn new(threads: usize) -> Pool {
        let threads = threads.clamp(1, CpuSet::MAX_CPU);
        let mut cores = allowed_cores();
        cores.truncate(threads);
        if cores.len() < threads {
            cores.clear();
        }
        // Who shares a core must not spin on it: the one that it waits for may need it.
        let spins = if cores.is_empty() { 0 } else { SPINS };
        let shared = Arc::new(Shared::default());
        let spawn = |worker: usize| {
            let (shared, core) = (Arc::clone(&shared), cores.get(worker).copied());
            thread::Builder::new().name(format!("worker {worker}")).spawn(move || {
                core.inspect(|&core| set_affinity(&[core]));
                shared.work(worker, spins);
            })
        };
        let threads = (1..threads).map_while(|worker| spawn(worker).ok()).collect();
        Pool { shared, threads, cores, spins }
    }

    /// Workers, the caller among them.
    pub fn workers(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `f(worker)` on every worker, `f(0)` on this thread, and returns when all are done.
    ///
    /// # Panics
    ///
    /// If a worker panics, as the lowest that did, after all are done. Workers that wait for each other inside `f` must
    /// therefore not panic between.
    pub fn run(&mut self, f: &(dyn Fn(usize) + Sync)) {
        self.step_aside();
        let shared = &*self.shared;
        // The lifetime goes here; invariant 1 stands for it.
        shared.job.store(ptr::from_ref(&f).cast_mut().cast(), Ordering::Relaxed);
        shared.unfinished.0.store(self.threads.len(), Ordering::Relaxed);
        self.next_round();
        let own = catch_unwind(AssertUnwindSafe(|| f(0)));
        let mut spins = self.spins;
        while shared.unfinished.0.load(Ordering::Acquire) > 0 {
            match spins.checked_sub(1) {
                Some(left) => spins = left,
                // A worker lost its core, perhaps to us.
                None => thread::yield_now(),
            }
            hint::spin_loop();
        }
        let others = match shared.panicked.swap(false, Ordering::Relaxed) {
            true => shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take(),
            false => None,
        };
        if let Some(panic) = own.err().or(others.map(|(_, panic)| panic)) {
            resume_unwind(panic);
        }
    }

    /// Moves this thread to its own core if it is on a worker's, and leaves its mask as it was. Two that wait for each
    /// other on one core spin away each other's time, and a busy machine's scheduler leaves them there: without this,
    /// `examples/pool.rs` took 490 us a call beside other work on two cores, with it 0.8 us.
    fn step_aside(&self) {
        let Some((&own, workers)) = self.cores.split_first() else { return };
        // No system call: the kernel keeps the number where the process can read it.
        if workers.contains(&sched_getcpu()) {
            let Ok(allowed) = sched_getaffinity(None) else { return };
            set_affinity(&[own]);
            let _ = sched_setaffinity(None, &allowed);
        }
    }

    fn next_round(&self) {
        self.shared.round.0.fetch_add(1, Ordering::SeqCst);
        // A worker counts itself asleep before it looks at `round` for the last time. In the one order of all SeqCst
        // operations, either it sees the new round or it is seen here.
        if self.shared.sleepers.0.load(Ordering::SeqCst) > 0 {
            self.threads.iter().for_each(|thread| thread.thread().unpark());
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.next_round();
        for thread in self.threads.drain(..) {
            // Workers catch what their functions throw; there is nothing to report.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// What a worker's thread does.
    fn work(&self, worker: usize, spins: u32) {
        for round in 0.. {
            self.wait_past(round, spins);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            // SAFETY: the round has begun and this worker has not finished it, so by invariant 1 the pointer was
            // stored by `run`, and what it points to is alive; what was stored before the round grew is seen after it.
            let job = unsafe { *self.job.load(Ordering::Relaxed) };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(worker))) {
                self.keep_panic(worker, panic);
            }
            self.unfinished.0.fetch_sub(1, Ordering::Release);
        }
    }

    /// Returns once more than `round` rounds have begun.
    fn wait_past(&self, round: usize, spins: u32) {
        for _ in 0..spins {
            if self.round.0.load(Ordering::Acquire) != round {
                return;
            }
            hint::spin_loop();
        }
        self.sleepers.0.fetch_add(1, Ordering::SeqCst);
        while self.round.0.load(Ordering::SeqCst) == round {
            thread::park();
        }
        self.sleepers.0.fetch_sub(1, Ordering::SeqCst);
    }

    fn keep_panic(&self, worker: usize, panic: Panic) {
        let mut kept = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.as_ref().is_none_or(|(lowest, _)| worker < *lowest) {
            *kept = Some((worker, panic));
        }
        self.panicked.store(true, Ordering::Relaxed);
    }
}

/// Cores that this thread may run on: first one hyperthread of each physical core, then the others.
pub fn allowed_cores() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(None) else { return Vec::new() };
    let mut cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect();
    cores.sort_by_cached_key(|&core| (siblings_before(core, &set), core));
    cores
}

/// Physical cores that this thread may run on; at least one.
pub fn physical_cores() -> usize {
    let Ok(set) = sched_getaffinity(None) else { return 1 };
    allowed_cores().into_iter().filter(|&core| siblings_before(core, &set) == 0).count().max(1)
}

/// Hyperthreads of `core`'s physical core that may be used and have a lower number.
fn siblings_before(core: usize, set: &CpuSet) -> usize {
    siblings(core).into_iter().filter(|&sibling| sibling < core && set.is_set(sibling)).count()
}

/// Hyperthreads of `core`'s physical core; none where the system does not say.
fn siblings(core: usize) -> Vec<usize> {
    let file = format!("/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list");
    let list = fs::read_to_string(file).unwrap_or_default();
    // Such as `0,64` or `0-1`.
    let ranges = list.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse().ok()?..=last.parse().ok()?)
    });
    ranges.flatten().filter(|&core| core < CpuSet::MAX_CPU).collect()
}

/// Keeps this thread on `cores`. Where that is not allowed, it runs where it may.
fn set_affinity(cores: &[usize]) {
    let mut set = CpuSet::new();
    cores.iter().for_each(|&core| set.set(core));
    let _ = sched_setaffinity(None, &set);
}
