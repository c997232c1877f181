//! Weights as the artifact holds them: each buffer's bytes in the plan's order, read tensor by tensor.
//!
//! Peak memory is one panel of one pack, or one row of one tensor.

use half::bf16;
use ir::DType;
use ir::graph::Pack;
use ir::plan::{ALIGN, Place, Plan, WeightSource};
use models::{Checkpoint, ReadError};
use std::collections::BTreeMap;
use std::ops::Range;

/// Where weights come from.
pub enum Source<'a> {
    /// A checkpoint's tensors.
    Checkpoint(&'a Checkpoint),
    /// Tensors in memory.
    Tensors(&'a BTreeMap<String, Vec<f32>>),
    /// Numbers from a seed: the same on every machine. Norms' weights lie around one, the others around zero.
    Random(u64),
}

impl Source<'_> {
    /// Decodes rows of a tensor with `columns` elements a row.
    ///
    /// # Errors
    ///
    /// What a checkpoint says, such as that it has no such tensor.
    ///
    /// # Panics
    ///
    /// If tensors in memory do not have such rows.
    pub fn read(
        &self,
        name: &str,
        rows: Range<usize>,
        columns: usize,
        out: &mut [f32],
    ) -> Result<(), ReadError> {
        match self {
            Source::Checkpoint(checkpoint) => checkpoint.read_rows(name, rows, out),
            Source::Tensors(tensors) => {
                out.copy_from_slice(&tensors[name][rows.start * columns..rows.end * columns]);
                Ok(())
            }
            Source::Random(seed) => {
                let tensor = name.bytes().fold(*seed, |h, b| mix(h ^ u64::from(b)));
                let norm = name.ends_with("norm.weight");
                // The uniform distribution of variance 1 / columns keeps activations near one.
                let (centre, spread) = if norm { (1.0, 0.1) } else { (0.0, (3.0 / columns as f32).sqrt()) };
                let first = (rows.start * columns) as u64;
                for (number, x) in (first..).zip(out) {
                    let unit = (mix(tensor.wrapping_add(number)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
                    *x = centre + spread * unit;
                }
                Ok(())
            }
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): a number from a counter.
fn mix(counter: u64) -> u64 {
    let z = counter.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Bytes that one worker makes at a time, about.
const PIECE_BYTES: usize = 1 << 20;

/// Writes the weights section of a plan. `progress` is told the bytes written so far.
///
/// # Errors
///
/// What the source or the writer says.
pub fn write<E: From<ReadError>>(
    plan: &Plan,
    source: &Source<'_>,
    write: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    progress: &mut dyn FnMut(usize),
) -> Result<(), E> {
    let mut at = 0;
    for buffer in &plan.buffers {
        let Place::Weight { offset, source: what } = &buffer.place else { continue };
        debug_assert_eq!(at, *offset, "weights stand in the order of their offsets");
        let mut put = |bytes: &[u8]| {
            at += bytes.len();
            progress(at);
            write(bytes)
        };
        match what {
            WeightSource::Constant { data } => {
                let values: Vec<f32> = data.iter().map(|&x| x as f32).collect();
                put(&encoded(buffer.dtype, &values))?;
            }
            WeightSource::Tensor { name, rows, columns } => {
                let per_piece = (PIECE_BYTES / (4 * columns).max(1)).max(1);
                pieces(rows.div_ceil(per_piece), &mut put, &|piece| {
                    let rows = piece * per_piece..((piece + 1) * per_piece).min(*rows);
                    let mut values = vec![0.0; rows.len() * columns];
                    source.read(name, rows, *columns, &mut values)?;
                    Ok(encoded(buffer.dtype, &values))
                })?;
            }
            WeightSource::Pack { pack, names } => {
                // Panels of one column are rows: some at a time.
                let per_piece = (PIECE_BYTES * pack.panels() / (4 * pack.elems())).max(1);
                pieces(pack.panels().div_ceil(per_piece), &mut put, &|piece| {
                    let panels = piece * per_piece..((piece + 1) * per_piece).min(pack.panels());
                    let mut bytes = Vec::new();
                    for number in panels {
                        bytes.extend(encoded(buffer.dtype, &panel(pack, names, source, number)?));
                    }
                    Ok(bytes)
                })?;
            }
        }
        let rest = (offset + buffer.bytes).saturating_sub(at);
        debug_assert!(rest < ALIGN, "a weight fills its buffer");
        write(&vec![0; rest])?;
        at += rest;
    }
    Ok(())
}

/// Makes pieces on all cores, a few at a time, and puts them in order.
fn pieces<E: From<ReadError>>(
    count: usize,
    put: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    make: &(dyn Fn(usize) -> Result<Vec<u8>, ReadError> + Sync),
) -> Result<(), E> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for first in (0..count).step_by(cores) {
        let made: Vec<_> = std::thread::scope(|scope| {
            let others: Vec<_> =
                (first + 1..count.min(first + cores)).map(|piece| scope.spawn(move || make(piece))).collect();
            let own = make(first);
            let others = others.into_iter().map(|thread| thread.join().expect("a reader does not panic"));
            std::iter::once(own).chain(others).collect()
        });
        for piece in made {
            put(&piece?)?;
        }
    }
    Ok(())
}

/// The elements of one panel of a pack, stream after stream.
fn panel(pack: &Pack, names: &[String], source: &Source<'_>, number: usize) -> Result<Vec<f32>, ReadError> {
    let per_stream = pack.words() * pack.lanes * pack.word;
    let columns = number * pack.lanes..((number + 1) * pack.lanes).min(pack.n);
    let mut rows = vec![0.0; pack.lanes * pack.k];
    let mut panel = vec![0.0; pack.streams.len() * per_stream];
    for ((stream, name), out) in pack.streams.iter().zip(names).zip(panel.chunks_exact_mut(per_stream)) {
        // Runs of columns from neighbouring rows are read at once.
        let mut n = columns.start;
        while n < columns.end {
            let row = stream.row(n);
            let run = (n..columns.end).take_while(|&m| stream.row(m) == row + (m - n)).count();
            source.read(name, row..row + run, pack.k, &mut rows[..run * pack.k])?;
            for (lane, values) in rows[..run * pack.k].chunks_exact(pack.k).enumerate() {
                let lane = n % pack.lanes + lane;
                for (word, values) in values.chunks(pack.word).enumerate() {
                    let at = (word * pack.lanes + lane) * pack.word;
                    out[at..at + values.len()].copy_from_slice(values);
                }
            }
            n += run;
        }
    }
    Ok(panel)
}

/// Rounded to the dtype, to nearest even.
fn encoded(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        other => unreachable!("no plan stores weights as {other}"),
    }
}
