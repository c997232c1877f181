//! The weights of an artifact, bit for bit: a flipped bit lies below any numeric bound.
//!
//! Each element is looked up where the plan's text says that it lies, and not by the code that packed it.

use super::{Fault, Seen, layer_of};
use half::bf16;
use ir::DType;
use ir::plan::{Place, Plan, WeightSource};
use models::{Checkpoint, ReadError};

/// Compares every weight with the checkpoint; gives the number of tensors that are equal, or the first element that is
/// not. `bytes` is the weights section of the artifact.
///
/// # Errors
///
/// What the checkpoint says, such as that it has no such tensor.
pub fn weights(
    bytes: &[u8],
    plan: &Plan,
    checkpoint: &Checkpoint,
) -> Result<Result<usize, Fault>, ReadError> {
    let mut tensors = 0;
    for (number, buffer) in plan.buffers.iter().enumerate() {
        let Place::Weight { offset, source } = &buffer.place else { continue };
        let mut held = Held { dtype: buffer.dtype, bytes: bytes[*offset..][..buffer.bytes].to_vec() };
        let at_kernel = |fault: Fault| {
            let launches = plan.entries.iter().flat_map(|entry| &entry.launches);
            let user = launches.filter(|l| l.args.contains(&number)).map(|l| &plan.kernels[l.kernel]).next();
            let (kernel, schedule) = user.map(|k| (k.name.clone(), k.schedule.clone())).unzip();
            Fault { kernel, schedule, ..fault }
        };
        let fault = match source {
            WeightSource::Constant { data } => {
                let wrong = |(at, &x): (usize, &f64)| held.take(&buffer.name, &[at], at, x as f32);
                data.iter().enumerate().find_map(wrong)
            }
            WeightSource::Tensor { name, rows, columns } => {
                tensors += 1;
                held.rows(name, 0..*rows, *columns, checkpoint, |row, column| row * columns + column)?
            }
            WeightSource::Pack { pack, names } => {
                let mut fault = None;
                for (stream, name) in names.iter().enumerate() {
                    tensors += 1;
                    for n in 0..pack.n {
                        let row = pack.streams[stream].row(n);
                        let place = |_, k| pack.index(stream, n, k);
                        fault = fault.or(held.rows(name, row..row + 1, pack.k, checkpoint, place)?);
                    }
                }
                fault
            }
        };
        if let Some(fault) = fault.or_else(|| held.padding(&buffer.name)) {
            return Ok(Err(at_kernel(fault)));
        }
    }
    Ok(Ok(tensors))
}

/// A buffer of which what was compared is zeroed: what is left is padding.
struct Held {
    dtype: DType,
    bytes: Vec<u8>,
}

impl Held {
    /// Compares rows of a tensor, each element at its place.
    fn rows(
        &mut self,
        name: &str,
        rows: std::ops::Range<usize>,
        columns: usize,
        checkpoint: &Checkpoint,
        place: impl Fn(usize, usize) -> usize,
    ) -> Result<Option<Fault>, ReadError> {
        let mut values = vec![0.0; columns];
        for row in rows {
            checkpoint.read_rows(name, row..row + 1, &mut values)?;
            for (column, &x) in values.iter().enumerate() {
                if let Some(fault) = self.take(name, &[row, column], place(row, column), x) {
                    return Ok(Some(fault));
                }
            }
        }
        Ok(None)
    }

    /// Compares the element at position `at` with what it was packed from.
    fn take(&mut self, name: &str, index: &[usize], at: usize, x: f32) -> Option<Fault> {
        let (bits, wanted) = (self.bits(at, true), bits(self.dtype, x));
        (bits != wanted).then(|| self.fault(name, index, bits, wanted))
    }

    /// The first element that no tensor put there.
    fn padding(&mut self, name: &str) -> Option<Fault> {
        let elems = self.bytes.len() / self.dtype.bytes(1);
        let at = (0..elems).find(|&at| self.bits(at, false) != 0)?;
        let bits = self.bits(at, false);
        Some(self.fault(&format!("{name}: padding"), &[at], bits, 0))
    }

    fn bits(&mut self, at: usize, take: bool) -> u32 {
        let width = self.dtype.bytes(1);
        let place = &mut self.bytes[at * width..][..width];
        let bits = place.iter().rev().fold(0, |bits, &byte| bits << 8 | u32::from(byte));
        if take {
            place.fill(0);
        }
        bits
    }

    fn fault(&self, name: &str, index: &[usize], found: u32, expected: u32) -> Fault {
        let (layer, rest) = layer_of(name);
        let what = format!("weight `{name}`, bits {found:#x} for {expected:#x}");
        let number = |bits: u32| {
            let bits = if self.dtype == DType::BF16 { bits << 16 } else { bits };
            Seen::Number(f64::from(f32::from_bits(bits)))
        };
        let (op, index) = (Some(rest.trim_end_matches(".weight").to_string()), index.to_vec());
        let (found, expected) = (number(found), number(expected));
        Fault { layer, op, kernel: None, schedule: None, index, found, expected, what }
    }
}

/// As stored.
fn bits(dtype: DType, x: f32) -> u32 {
    match dtype {
        DType::F32 => x.to_bits(),
        DType::BF16 => u32::from(bf16::from_f32(x).to_bits()),
        other => unreachable!("no plan stores weights as {other}"),
    }
}

/// Compares the text of an artifact's graphs with those of the checkpoint's config: what else than weights makes a model,
/// such as rope's frequencies or a norm's epsilon. Gives the first line that differs.
pub fn graph(found: &str, expected: &str) -> Option<Fault> {
    if found == expected {
        return None;
    }
    let mut lines = found.lines().zip(expected.lines());
    let (found, expected) = lines.find(|(a, b)| a != b).unwrap_or(("an end", "more lines"));
    let name =
        expected.trim().split([' ', '(']).find_map(|word| word.strip_prefix(['%', '@'])).unwrap_or("graph");
    let (layer, rest) = layer_of(name);
    let short = |line: &str| {
        let shown: String = line.trim().chars().take(100).collect();
        Seen::Text(format!("`{shown}`"))
    };
    let what = "the graph is not that of the checkpoint's config".to_string();
    let (op, found, expected) = (Some(rest.to_string()), short(found), short(expected));
    Some(Fault { layer, op, kernel: None, schedule: None, index: Vec::new(), found, expected, what })
}
