//! The weights of an artifact, bit for bit: a flipped bit lies below any numeric bound.
//!
//! Each element is looked up where the plan's text says that it lies, and not by the code that packed it.

use super::{Fault, Seen, layer_of};
use crate::weights::Source;
use half::bf16;
use ir::DType;
use ir::plan::{Place, Plan, PlanBuffer, WeightSource};
use models::ReadError;
use std::ops::Range;

/// A buffer that does not hold what it should.
#[derive(Clone, Debug, PartialEq)]
pub struct BadWeight {
    /// Its number in the plan.
    pub buffer: usize,
    /// Its first element that is wrong.
    pub fault: Fault,
}

/// Compares every weight with the checkpoint; gives the number of tensors that are equal, or the first element that is
/// not. `bytes` is the weights section of the artifact.
///
/// # Errors
///
/// What the checkpoint says, such as that it has no such tensor.
pub fn weights(
    bytes: &[u8],
    plan: &Plan,
    source: &Source<'_>,
) -> Result<Result<usize, BadWeight>, ReadError> {
    let mut tensors = 0;
    for (number, buffer) in plan.buffers.iter().enumerate() {
        let Place::Weight { offset, source: what } = &buffer.place else { continue };
        let mut held = Held { dtype: buffer.dtype, bytes: bytes[*offset..][..buffer.bytes].to_vec() };
        let mut look = |name: &str, index: &[usize], at: usize, x: f32| held.take(name, index, at, x);
        let fault = elements(buffer, what, source, &mut look)?;
        if let Some(fault) = fault.or_else(|| held.padding(&buffer.name)) {
            let launches = plan.entries.iter().flat_map(|entry| &entry.launches);
            let user = launches.filter(|l| l.args.contains(&number)).map(|l| &plan.kernels[l.kernel]).next();
            let (kernel, schedule) = user.map(|k| (k.name.clone(), k.schedule.clone())).unzip();
            return Ok(Err(BadWeight { buffer: number, fault: Fault { kernel, schedule, ..fault } }));
        }
        tensors += match what {
            WeightSource::Constant { .. } => 0,
            WeightSource::Tensor { .. } => 1,
            WeightSource::Pack { names, .. } => names.len(),
        };
    }
    Ok(Ok(tensors))
}

/// What a buffer should hold, laid out by the plan's text.
///
/// # Errors
///
/// What the source says.
pub fn expected(buffer: &PlanBuffer, source: &Source<'_>) -> Result<Vec<u8>, ReadError> {
    let mut bytes = vec![0; buffer.bytes];
    let Place::Weight { source: what, .. } = &buffer.place else { return Ok(bytes) };
    let width = buffer.dtype.bytes(1);
    let mut put = |_: &str, _: &[usize], at: usize, x: f32| {
        bytes[at * width..][..width].copy_from_slice(&bits(buffer.dtype, x).to_le_bytes()[..width]);
        None
    };
    elements(buffer, what, source, &mut put)?;
    Ok(bytes)
}

/// What looks at an element: the tensor's name, where it stands in that, its position in the buffer, and its value.
type Look<'l> = &'l mut dyn FnMut(&str, &[usize], usize, f32) -> Option<Fault>;

/// Goes through the elements of a buffer, up to the first fault.
fn elements(
    buffer: &PlanBuffer,
    what: &WeightSource,
    source: &Source<'_>,
    look: Look<'_>,
) -> Result<Option<Fault>, ReadError> {
    let mut rows = |name: &str, rows: Range<usize>, columns: usize, place: &dyn Fn(usize, usize) -> usize| {
        let mut values = vec![0.0; columns];
        for row in rows {
            source.read(name, row..row + 1, columns, &mut values)?;
            let looked = |(column, &x): (usize, &f32)| look(name, &[row, column], place(row, column), x);
            if let Some(fault) = values.iter().enumerate().find_map(looked) {
                return Ok(Some(fault));
            }
        }
        Ok(None)
    };
    match what {
        WeightSource::Constant { data } => {
            let looked = |(at, &x): (usize, &f64)| look(&buffer.name, &[at], at, x as f32);
            Ok(data.iter().enumerate().find_map(looked))
        }
        WeightSource::Tensor { name, rows: count, columns } => {
            rows(name, 0..*count, *columns, &|row, column| row * columns + column)
        }
        WeightSource::Pack { pack, names } => {
            for (stream, name) in names.iter().enumerate() {
                for n in 0..pack.n {
                    let row = pack.streams[stream].row(n);
                    let fault = rows(name, row..row + 1, pack.k, &|_, k| pack.index(stream, n, k))?;
                    if fault.is_some() {
                        return Ok(fault);
                    }
                }
            }
            Ok(None)
        }
    }
}

/// A buffer of which what was compared is zeroed: what is left is padding.
struct Held {
    dtype: DType,
    bytes: Vec<u8>,
}

impl Held {
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
