//! Ceilings of this machine: bytes a second that its cores can read, and operations a second that they can do in
//! registers. A speed without its ceiling says nothing; both are measured in the same run, by the same threads.
//!
//! * Reading: every worker streams its own part, as one stream or as four side by side; the faster form counts. (More
//!   forms, with other distances and prefetches, were timed: all are within 5 %, from mapped files and huge pages alike.)
//! * Dot products: chains of multiply-adds on registers, enough of them to hide their latency.
//!
//! Invariants:
//! 1. A function with a `target_feature` is called only behind the detection of all its features.
//! 2. A stream reads its part of a slice and nothing outside.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::map::{MapError, OwnedBuf};
use crate::pool::Pool;

/// What a dot product multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dot {
    /// f32 by f32: FMA.
    F32,
    /// bf16 by bf16, summed in f32: `vdpbf16ps` where the CPU has it, else what [`Dot::F32`] does.
    Bf16,
}

/// Most bytes of one sample: larger than any cache, and read in some ten milliseconds.
const SAMPLE_BYTES: usize = 256 << 20;
/// A sample lasts at least so long, seconds: the start of a round, some microseconds, is then nothing.
const SAMPLE_SECONDS: f64 = 0.002;

/// Forms of reading: streams of a worker that lie side by side.
const FORMS: [usize; 2] = [1, 4];

/// Bytes from one stream to the next.
const BLOCK_BYTES: usize = 64 << 10;

/// Measures with as many workers as the program that it is compared with.
#[derive(Debug)]
pub struct Meter {
    pool: Pool,
    /// Which part of the buffer the next sample reads.
    turn: usize,
    /// How often it reads that.
    repeats: usize,
}

impl Meter {
    /// A meter of `threads` workers.
    pub fn new(threads: usize) -> Meter {
        Meter { pool: Pool::new(threads), turn: 0, repeats: 1 }
    }

    /// Samples of the speed of reading `bytes`, in bytes a second, for about `seconds`: those of the faster form.
    ///
    /// A buffer that fits a cache measures that cache. Its pages should have been touched.
    pub fn read(&mut self, bytes: &[u8], seconds: f64) -> Vec<f64> {
        if bytes.len() < 64 * self.pool.workers() {
            return Vec::new();
        }
        let begin = Instant::now();
        let mut samples: [Vec<f64>; FORMS.len()] = Default::default();
        while samples[0].is_empty() || begin.elapsed().as_secs_f64() < seconds {
            samples
                .iter_mut()
                .zip(FORMS)
                .for_each(|(samples, streams)| samples.push(self.speed(bytes, streams)));
        }
        samples.into_iter().max_by(|a, b| median(a).total_cmp(&median(b))).unwrap_or_default()
    }

    /// One sample: bytes a second of reading the next part of `bytes`.
    fn speed(&mut self, bytes: &[u8], streams: usize) -> f64 {
        let window = bytes.len().min(SAMPLE_BYTES);
        let at = self.turn % (bytes.len() / window) * window;
        self.turn += 1;
        loop {
            let repeats = self.repeats;
            let elapsed = self.sample(&bytes[at..at + window], streams, repeats);
            if elapsed >= SAMPLE_SECONDS {
                // The next sample, of a smaller buffer perhaps, need not last much longer than it must.
                self.repeats = (repeats / (elapsed / SAMPLE_SECONDS) as usize).max(1);
                return (window * repeats) as f64 / elapsed;
            }
            self.repeats *= 2;
        }
    }

    /// Seconds that reading `bytes` so many times takes.
    fn sample(&mut self, bytes: &[u8], streams: usize, repeats: usize) -> f64 {
        let workers = self.pool.workers();
        let begin = Instant::now();
        self.pool.run(&|worker| {
            let part = |n: usize| bytes.len() / 64 * n / workers * 64;
            let part = &bytes[part(worker)..part(worker + 1)];
            for _ in 0..repeats {
                black_box(stream(black_box(part), streams));
            }
        });
        begin.elapsed().as_secs_f64()
    }

    /// Samples of the speed of multiplying and adding in registers, FLOPs a second, for about `seconds`. A
    /// multiply-add is two.
    pub fn dot(&mut self, dot: Dot, seconds: f64) -> Vec<f64> {
        let begin = Instant::now();
        let mut samples = Vec::new();
        let mut steps = 1 << 12;
        while samples.is_empty() || begin.elapsed().as_secs_f64() < seconds {
            let flops = AtomicU64::new(0);
            let start = Instant::now();
            self.pool.run(&|_| {
                flops.fetch_add(multiply(dot, black_box(steps)), Ordering::Relaxed);
            });
            let elapsed = start.elapsed().as_secs_f64();
            if elapsed < SAMPLE_SECONDS {
                steps *= 2;
                continue;
            }
            samples.push(flops.into_inner() as f64 / elapsed);
        }
        samples
    }
}

/// The largest of the samples; 0 if there are none.
pub fn best(samples: &[f64]) -> f64 {
    samples.iter().copied().fold(0.0, f64::max)
}

/// Memory to read: `bytes`, but no more than it takes to be larger than every cache.
///
/// # Errors
///
/// If the system refuses it.
pub fn memory(bytes: usize) -> Result<OwnedBuf, MapError> {
    let large = cache_bytes().map_or(SAMPLE_BYTES, |cache| (4 * cache).clamp(64 << 20, SAMPLE_BYTES));
    let mut memory = OwnedBuf::zeroed(bytes.clamp(1 << 16, large), true)?;
    // Pages that were never written are all the same page of zeros.
    memory.fill(1);
    Ok(memory)
}

/// The middle of the samples; 0 if there are none.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// Does this CPU multiply bf16 by itself?
pub fn has_bf16_dot() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("avx512bf16") && std::arch::is_x86_feature_detected!("avx512f")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Bytes of this machine's largest cache, where the system says.
pub fn cache_bytes() -> Option<usize> {
    let sizes = (0..8).filter_map(|index| {
        let file = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = std::fs::read_to_string(file).ok()?;
        text.trim().strip_suffix('K')?.parse::<usize>().ok().map(|kib| kib << 10)
    });
    sizes.max()
}

/// Reads all of `bytes`, and gives something that depends on them.
fn stream(bytes: &[u8], streams: usize) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: invariant 1.
            return unsafe { if streams == 1 { x86::one_512(bytes) } else { x86::four_512(bytes) } };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: invariant 1.
            return unsafe { if streams == 1 { x86::one_256(bytes) } else { x86::four_256(bytes) } };
        }
    }
    let _ = streams;
    bytes.chunks_exact(8).fold(0, |or, word| or | u64::from_ne_bytes(word.try_into().expect("eight bytes")))
}

/// `steps` rounds of independent multiply-adds; gives their FLOPs.
fn multiply(dot: Dot, steps: u64) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if dot == Dot::Bf16 && has_bf16_dot() {
            // SAFETY: invariant 1.
            return unsafe { x86::dot_bf16(steps) };
        }
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: invariant 1.
            return unsafe { x86::fma_512(steps) };
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            // SAFETY: invariant 1.
            return unsafe { x86::fma_256(steps) };
        }
    }
    let _ = dot;
    const LANES: usize = 64;
    let x = black_box(0.999_f32);
    let mut acc = [1.0_f32; LANES];
    for _ in 0..steps {
        acc.iter_mut()
            .for_each(|a| *a = if cfg!(target_feature = "fma") { a.mul_add(x, x) } else { *a * x + x });
    }
    black_box(acc);
    steps * 2 * LANES as u64
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Reads blocks of `$streams` parts that lie side by side, `$vectors` vectors of each in turn; then what is left.
    macro_rules! stream {
        ($name:ident, $feature:literal, $streams:literal, $vectors:literal, $type:ty, $zero:ident, $load:ident, $or:ident) => {
            #[target_feature(enable = $feature)]
            pub fn $name(bytes: &[u8]) -> u64 {
                const WIDTH: usize = size_of::<$type>();
                let mut acc = [[$zero(); $vectors]; $streams];
                let blocks = bytes.chunks_exact($streams * super::BLOCK_BYTES);
                let rest = blocks.remainder();
                for block in blocks {
                    for at in (0..super::BLOCK_BYTES).step_by($vectors * WIDTH) {
                        for (stream, acc) in acc.iter_mut().enumerate() {
                            for (vector, acc) in acc.iter_mut().enumerate() {
                                let from = stream * super::BLOCK_BYTES + at + vector * WIDTH;
                                // SAFETY: inside the block (invariant 2).
                                *acc = $or(*acc, unsafe { $load(block.as_ptr().add(from).cast()) });
                            }
                        }
                    }
                }
                for vector in rest.chunks_exact(WIDTH) {
                    // SAFETY: a chunk of a vector's width (invariant 2).
                    acc[0][0] = $or(acc[0][0], unsafe { $load(vector.as_ptr().cast()) });
                }
                // SAFETY: vectors of integers are as many bytes of plain data.
                let words: [u64; $streams * $vectors * WIDTH / 8] = unsafe { std::mem::transmute(acc) };
                words.iter().fold(0, |or, word| or | word)
            }
        };
    }
    stream!(one_512, "avx512f", 1, 8, __m512i, _mm512_setzero_si512, _mm512_loadu_si512, _mm512_or_si512);
    stream!(four_512, "avx512f", 4, 1, __m512i, _mm512_setzero_si512, _mm512_loadu_si512, _mm512_or_si512);
    stream!(one_256, "avx2", 1, 8, __m256i, _mm256_setzero_si256, _mm256_loadu_si256, _mm256_or_si256);
    stream!(four_256, "avx2", 4, 2, __m256i, _mm256_setzero_si256, _mm256_loadu_si256, _mm256_or_si256);

    /// Chains of multiply-adds. 24 with 32 registers, 12 with 16: two a cycle, four or five cycles each, need ten.
    macro_rules! chains {
        ($name:ident, $feature:literal, $chains:literal, $flops:literal, $acc:expr, $x:expr, $step:ident) => {
            #[target_feature(enable = $feature)]
            pub fn $name(steps: u64) -> u64 {
                let (mut acc, x) = ([$acc; $chains], $x);
                for _ in 0..steps {
                    // Not `map`: it is compiled without the feature, and would call each step.
                    for acc in &mut acc {
                        *acc = $step(*acc, x, x);
                    }
                }
                black_box(acc);
                steps * $chains * $flops
            }
        };
    }
    chains!(
        dot_bf16,
        "avx512f,avx512bf16",
        24,
        64,
        _mm512_setzero_ps(),
        _mm512_cvtne2ps_pbh(_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.5))),
        _mm512_dpbf16_ps
    );
    chains!(fma_512, "avx512f", 24, 32, _mm512_setzero_ps(), _mm512_set1_ps(black_box(0.5)), _mm512_fmadd_ps);
    chains!(
        fma_256,
        "avx2,fma",
        12,
        16,
        _mm256_setzero_ps(),
        _mm256_set1_ps(black_box(0.5)),
        _mm256_fmadd_ps
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_speeds() {
        let mut meter = Meter::new(2);
        let reads = meter.read(&vec![1; 1 << 20], 0.01);
        assert!(!reads.is_empty() && reads.iter().all(|&s| s > 1e6));
        assert!(meter.dot(Dot::F32, 0.01).iter().chain(&meter.dot(Dot::Bf16, 0.01)).all(|&s| s > 1e6));
        assert!(meter.read(&[], 0.01).is_empty());
    }

    #[test]
    fn every_byte_is_read() {
        for streams in FORMS {
            let mut bytes = vec![0; 5 * BLOCK_BYTES + 640];
            assert_eq!(stream(&bytes, streams), 0);
            for at in [0, 4096, BLOCK_BYTES, 4 * BLOCK_BYTES, 5 * BLOCK_BYTES + 639] {
                bytes[at] = 1;
                assert_ne!(stream(&bytes, streams), 0, "{streams} streams, byte {at}");
                bytes[at] = 0;
            }
        }
        assert_eq!((median(&[3.0, 1.0, 2.0]), best(&[1.0, 3.0])), (2.0, 3.0));
    }
}
