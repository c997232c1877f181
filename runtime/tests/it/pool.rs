//! The worker pool: who is called, how often, and what a panic does. Never how fast.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use runtime::pool::{Pool, allowed_cores};
use rustix::thread::{CpuSet, sched_setaffinity};

#[test]
fn every_worker_is_called_once_a_run() {
    // 9: more than there are cores on small machines, so workers sleep at once.
    for threads in [0, 1, 2, 3, 9] {
        let mut pool = Pool::new(threads);
        assert_eq!(pool.workers(), threads.max(1));
        let calls: Vec<AtomicUsize> = (0..pool.workers()).map(|_| AtomicUsize::new(0)).collect();
        for round in 1..=500 {
            pool.run(&|worker| {
                calls[worker].fetch_add(1, Ordering::Relaxed);
            });
            assert!(calls.iter().all(|calls| calls.load(Ordering::Relaxed) == round));
        }
    }
}

#[test]
fn sleeping_workers_wake() {
    let mut pool = Pool::new(3);
    for round in 0..30 {
        thread::sleep(Duration::from_millis(round % 3 * 3));
        let called = AtomicUsize::new(0);
        pool.run(&|_| {
            called.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(called.into_inner(), 3);
    }
}

#[test]
fn worker_zero_is_the_caller_and_the_caller_is_not_pinned() {
    let before = allowed_cores();
    let caller = thread::current().id();
    Pool::new(2).run(&|worker| assert_eq!(worker == 0, thread::current().id() == caller));
    assert_eq!(allowed_cores(), before);
}

#[test]
fn a_caller_on_a_workers_core_keeps_its_mask() {
    let cores = allowed_cores();
    if cores.len() < 2 {
        println!("skipped: needs two cores");
        return;
    }
    // In a thread of its own, which takes the mask with it.
    let caller = thread::spawn(move || {
        let mut pool = Pool::new(2);
        let mut on_workers_core = CpuSet::new();
        on_workers_core.set(cores[1]);
        sched_setaffinity(None, &on_workers_core).unwrap();
        (0..10).for_each(|_| pool.run(&|_| ()));
        assert_eq!(allowed_cores(), [cores[1]]);
    });
    caller.join().unwrap();
}

#[test]
fn workers_have_cores_of_their_own_where_there_are_enough() {
    let cores = allowed_cores();
    if cores.len() < 2 {
        println!("skipped: needs two cores");
        return;
    }
    Pool::new(2).run(&|worker| {
        if worker == 1 {
            assert_eq!(allowed_cores(), [cores[1]]);
        }
    });
}

#[test]
fn the_lowest_panic_reaches_the_caller_after_all_are_done() {
    let mut pool = Pool::new(4);
    for lowest in [0, 2] {
        let done = AtomicUsize::new(0);
        let panic = catch_unwind(AssertUnwindSafe(|| {
            pool.run(&|worker| {
                done.fetch_add(1, Ordering::Relaxed);
                if worker >= lowest {
                    panic!("worker {worker}");
                }
            });
        }));
        assert_eq!(panic.unwrap_err().downcast_ref::<String>().unwrap(), &format!("worker {lowest}"));
        assert_eq!(done.into_inner(), 4);
        // The pool lives on, and the panic does not come again.
        pool.run(&|_| ());
    }
}
