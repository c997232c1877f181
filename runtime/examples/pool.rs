//! Times an empty call of the worker pool, with workers spinning and with workers asleep.
//!
//! `cargo run --release -p runtime --example pool -- [THREADS]`

use std::thread;
use std::time::{Duration, Instant};

use runtime::pool::{Pool, allowed_cores};

fn main() {
    let threads = std::env::args().nth(1).and_then(|arg| arg.parse().ok());
    let mut pool = Pool::new(threads.unwrap_or(allowed_cores().len()));
    println!("workers  {}, cores {:?}", pool.workers(), allowed_cores());
    for (what, pause) in [("spinning", Duration::ZERO), ("asleep", Duration::from_millis(5))] {
        let mut times: Vec<Duration> = (0..1000)
            .map(|_| {
                thread::sleep(pause);
                let begin = Instant::now();
                pool.run(&|_| ());
                begin.elapsed()
            })
            .collect();
        times.sort();
        println!("{what:8} median {:?}, 99 of 100 within {:?}", times[500], times[990]);
    }
}
