//! The safetensors format: eight bytes with the header's length, a JSON header, tensor data.
//!
//! Source: <https://github.com/huggingface/safetensors>, README, "Format". Read by hand and not by the crate of
//! that name, which names neither tensor nor numbers when it refuses a file and lets a name stand twice; a test
//! holds the two to the same verdicts.
//!
//! What is checked: the header fits the file; each name stands once; each type is known; the product of the dims
//! and the bytes agree; tensors follow each other from the first data byte to the last, no gap, no overlap.

use std::ops::Range;
use std::path::Path;

use ir::DType;
use serde::Deserialize;
use serde_json::Value;

use crate::checkpoint::StoredTensor;
use crate::error::ReadError;
use crate::json;

/// Longest header accepted, as in the reference implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Types that are read, as the format names them.
const DTYPES: [(&str, DType); 3] = [("F32", DType::F32), ("BF16", DType::BF16), ("F16", DType::F16)];

/// Names in [`DTYPES`].
const DTYPE_NAMES: [&str; 3] = ["F32", "BF16", "F16"];

/// One tensor's entry in the header.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    /// First byte and end, counted from the end of the header.
    data_offsets: [u64; 2],
}

/// The tensors of a safetensors file, in the order of the header.
///
/// # Errors
///
/// [`ReadError`]: `Truncated`, `TooLarge`, `Json`, `DuplicateTensor`, `DType`, `Dims`, `TensorBytes`, `OutOfFile`,
/// `Overlap`, `Gap`, as the list in the module's head says.
pub fn read(file: &Path, bytes: &[u8]) -> Result<Vec<StoredTensor>, ReadError> {
    let file_bytes = bytes.len() as u64;
    let truncated = |what: &str, expected| ReadError::Truncated {
        file: file.into(),
        what: what.into(),
        found: file_bytes,
        expected,
    };
    let length = bytes.first_chunk::<8>().ok_or_else(|| truncated("the header's length", 8))?;
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_HEADER_BYTES {
        let what = "the header's length".into();
        return Err(ReadError::TooLarge {
            file: file.into(),
            what,
            found: header_bytes,
            limit: MAX_HEADER_BYTES,
        });
    }
    let data_start = 8 + header_bytes;
    let header = bytes.get(8..data_start as usize).ok_or_else(|| truncated("the header", data_start))?;

    let mut tensors: Vec<StoredTensor> = Vec::new();
    let mut names = std::collections::HashSet::new();
    for (name, value) in json::entries::<Value>(header, file)? {
        if name == "__metadata__" {
            continue;
        }
        let entry =
            Entry::deserialize(value).map_err(|source| ReadError::Json { file: file.into(), source })?;
        if !names.insert(name.clone()) {
            return Err(ReadError::DuplicateTensor { file: file.into(), tensor: name });
        }
        tensors.push(stored(file, name, entry, data_start, file_bytes)?);
    }
    check_cover(file, &tensors, data_start..file_bytes)?;
    Ok(tensors)
}

/// Checks one header entry by itself.
fn stored(
    file: &Path,
    name: String,
    entry: Entry,
    data_start: u64,
    file_bytes: u64,
) -> Result<StoredTensor, ReadError> {
    let Entry { dtype, shape, data_offsets: [begin, end] } = entry;
    let Some(&(_, dtype)) = DTYPES.iter().find(|row| row.0 == dtype) else {
        return Err(ReadError::DType { file: file.into(), tensor: name, found: dtype, known: &DTYPE_NAMES });
    };
    // Offsets of a real file are far from overflow; those of a hostile one saturate and lie behind the end.
    let found = data_start.saturating_add(begin)..data_start.saturating_add(end);
    if end < begin || found.end > file_bytes {
        return Err(ReadError::OutOfFile { file: file.into(), tensor: name, found, expected: file_bytes });
    }
    let elems = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
    let Some(expected) = elems.and_then(|elems| elems.checked_mul(dtype.bytes(1) as u64)) else {
        let expected = "a product that 64 bits hold".into();
        return Err(ReadError::Dims { file: file.into(), tensor: name, found: shape, expected });
    };
    if end - begin != expected {
        return Err(ReadError::TensorBytes { file: file.into(), tensor: name, found: end - begin, expected });
    }
    let shape = shape.into_iter().map(|dim| dim as usize).collect();
    Ok(StoredTensor { name, dtype, shape, bytes: found.start as usize..found.end as usize })
}

/// Tensors must lie one behind the other and fill the data.
fn check_cover(file: &Path, tensors: &[StoredTensor], data: Range<u64>) -> Result<(), ReadError> {
    let mut order: Vec<&StoredTensor> = tensors.iter().collect();
    order.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    let mut covered = data.start;
    let mut before = "";
    for tensor in order {
        let begin = tensor.bytes.start as u64;
        if begin < covered {
            return Err(ReadError::Overlap {
                file: file.into(),
                tensor: tensor.name.clone(),
                other: before.into(),
                found: begin,
                expected: covered,
            });
        }
        if begin > covered {
            return Err(ReadError::Gap { file: file.into(), found: covered..begin });
        }
        (covered, before) = (tensor.bytes.end as u64, &tensor.name);
    }
    match covered == data.end {
        true => Ok(()),
        false => Err(ReadError::Gap { file: file.into(), found: covered..data.end }),
    }
}
