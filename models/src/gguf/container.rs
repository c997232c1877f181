//! The GGUF container: magic, version, two counts, metadata (key, type, value), tensor entries (name, dims innermost
//! first, type, offset), and from the next multiple of `general.alignment` on tensor data.
//!
//! Source: ggml's `docs/gguf.md`, versions 2 and 3.
//!
//! What is checked: every count, length and offset against the file; each key and tensor stands once; types are known;
//! a row is whole blocks; tensors are aligned, lie in the file and share no bytes.

use std::collections::HashSet;
use std::path::Path;

use indexmap::IndexMap;
use ir::DType;
use ir::dtype::Block;

use crate::checkpoint::StoredTensor;
use crate::dequant;
use crate::error::ReadError;

/// Versions that are read: 2 and 3 differ only in that 3 may be big-endian, which nobody here writes.
const VERSIONS: [u32; 2] = [2, 3];

/// ggml's limit (`GGML_MAX_DIMS`).
const MAX_DIMS: u32 = 4;

/// Storage types that are read, by their number in the file.
#[rustfmt::skip] // a table: one type a line
const TYPES: [(u32, DType); 11] = [
    (0,  DType::F32),
    (1,  DType::F16),
    (2,  DType::Block(Block::Q4_0)),
    (3,  DType::Block(Block::Q4_1)),
    (6,  DType::Block(Block::Q5_0)),
    (7,  DType::Block(Block::Q5_1)),
    (8,  DType::Block(Block::Q8_0)),
    (12, DType::Block(Block::Q4K)),
    (13, DType::Block(Block::Q5K)),
    (14, DType::Block(Block::Q6K)),
    (30, DType::BF16),
];

/// Names of the types that ggml has and this program does not read, for messages.
#[rustfmt::skip]
const OTHER_TYPES: [(u32, &str); 21] = [
    (9, "Q8_1"), (10, "Q2_K"), (11, "Q3_K"), (15, "Q8_K"), (16, "IQ2_XXS"), (17, "IQ2_XS"), (18, "IQ3_XXS"), (19, "IQ1_S"),
    (20, "IQ4_NL"), (21, "IQ3_S"), (22, "IQ2_S"), (23, "IQ4_XS"), (24, "I8"), (25, "I16"), (26, "I32"), (27, "I64"),
    (28, "F64"), (29, "IQ1_M"), (34, "TQ1_0"), (35, "TQ2_0"), (39, "MXFP4"),
];

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any integer type.
    Integer(i128),
    /// f32; kept as such, because its shortest decimal is what its writer meant.
    F32(f32),
    /// f64.
    F64(f64),
    /// A boolean.
    Bool(bool),
    /// Text.
    String(String),
    /// An array of texts.
    Strings(Vec<String>),
    /// An array of any integer type.
    Integers(Vec<i64>),
    /// An array of f32 or f64.
    Floats(Vec<f64>),
    /// An array of anything else, read past.
    Skipped,
}

/// A GGUF file, its parts checked against the file alone.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// Version of the format.
    pub version: u32,
    /// Metadata in the order of the file.
    pub metadata: IndexMap<String, Value>,
    /// Tensors under their GGUF names, dims outermost first.
    pub tensors: Vec<StoredTensor>,
}

impl Gguf {
    /// Reads header, metadata and tensor entries.
    ///
    /// # Errors
    ///
    /// [`ReadError`]: `NoCheckpoint` (no GGUF magic), `Version`, `Truncated`, `Utf8`, `DuplicateKey`, `Value`,
    /// `DuplicateTensor`, `DType`, `Dims`, `Misaligned`, `OutOfFile`, `Overlap`, as the list in the module's head says.
    pub fn read(file: &Path, bytes: &[u8]) -> Result<Gguf, ReadError> {
        let mut cursor = Cursor { file, bytes, at: 0 };
        if bytes.get(..4) != Some(b"GGUF") {
            let found = match bytes.get(..4) {
                Some(magic) => format!("a file that begins with {:?}", String::from_utf8_lossy(magic)),
                None => format!("a file of {} bytes", bytes.len()),
            };
            return Err(ReadError::NoCheckpoint {
                file: file.into(),
                found,
                expected: "a GGUF file or a directory",
            });
        }
        cursor.at = 4;
        let version = cursor.u32("the version")?;
        if !VERSIONS.contains(&version) {
            return Err(ReadError::Version { file: file.into(), found: version, known: &VERSIONS });
        }
        // The least that an entry takes: a tensor's name length, dim count, type and offset; a key's length, type and value.
        let n_tensors = cursor.count("tensors", 24)?;
        let n_keys = cursor.count("metadata keys", 13)?;

        let mut metadata = IndexMap::new();
        for _ in 0..n_keys {
            let key = cursor.string("a metadata key")?;
            let kind = cursor.u32(&key)?;
            let value = cursor.value(&key, kind)?;
            if metadata.contains_key(&key) {
                return Err(ReadError::DuplicateKey { file: file.into(), key });
            }
            metadata.insert(key, value);
        }
        let tensors = read_tensors(&mut cursor, n_tensors, alignment(file, &metadata)?)?;
        Ok(Gguf { version, metadata, tensors })
    }
}

/// `general.alignment`, by default 32.
fn alignment(file: &Path, metadata: &IndexMap<String, Value>) -> Result<u64, ReadError> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(&Value::Integer(found)) if (1..=1 << 20).contains(&found) && found.count_ones() == 1 => {
            Ok(found as u64)
        }
        Some(found) => Err(ReadError::Value {
            file: file.into(),
            key: "general.alignment".into(),
            found: shown(found),
            expected: "a power of two up to 2^20".into(),
        }),
    }
}

/// A tensor entry, before it is known where tensor data begin.
struct Entry {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    n_bytes: u64,
    offset: u64,
}

fn read_tensors(cursor: &mut Cursor, n_tensors: u64, alignment: u64) -> Result<Vec<StoredTensor>, ReadError> {
    let file = cursor.file;
    let mut entries = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..n_tensors {
        let entry = read_entry(cursor)?;
        if !names.insert(entry.name.clone()) {
            return Err(ReadError::DuplicateTensor { file: file.into(), tensor: entry.name });
        }
        entries.push(entry);
    }

    let file_bytes = cursor.bytes.len() as u64;
    let data = (cursor.at as u64).next_multiple_of(alignment);
    let mut tensors = Vec::new();
    for Entry { name, dtype, shape, n_bytes, offset } in entries {
        if !offset.is_multiple_of(alignment) {
            return Err(ReadError::Misaligned {
                file: file.into(),
                tensor: name,
                found: offset,
                expected: alignment,
            });
        }
        // Hostile offsets saturate, and lie behind the end.
        let begin = data.saturating_add(offset);
        let found = begin..begin.saturating_add(n_bytes);
        if found.end > file_bytes {
            return Err(ReadError::OutOfFile {
                file: file.into(),
                tensor: name,
                found,
                expected: file_bytes,
            });
        }
        tensors.push(StoredTensor { name, dtype, shape, bytes: found.start as usize..found.end as usize });
    }

    let mut order: Vec<&StoredTensor> = tensors.iter().collect();
    order.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    for pair in order.windows(2) {
        let [before, after] = pair else { unreachable!("windows of two") };
        if after.bytes.start < before.bytes.end {
            return Err(ReadError::Overlap {
                file: file.into(),
                tensor: after.name.clone(),
                other: before.name.clone(),
                found: after.bytes.start as u64,
                expected: before.bytes.end as u64,
            });
        }
    }
    Ok(tensors)
}

fn read_entry(cursor: &mut Cursor) -> Result<Entry, ReadError> {
    let file = cursor.file;
    let name = cursor.string("a tensor's name")?;
    let bad_dims = |found: Vec<u64>, expected: String| ReadError::Dims {
        file: file.into(),
        tensor: name.clone(),
        found,
        expected,
    };
    let n_dims = cursor.u32(&name)?;
    if !(1..=MAX_DIMS).contains(&n_dims) {
        return Err(bad_dims(vec![], format!("1 to {MAX_DIMS} dims, the file says {n_dims}")));
    }
    let mut dims = Vec::new();
    for _ in 0..n_dims {
        dims.push(cursor.u64(&name)?);
    }
    let kind = cursor.u32(&name)?;
    let Some(&(_, dtype)) = TYPES.iter().find(|row| row.0 == kind) else {
        let other = OTHER_TYPES.iter().find(|row| row.0 == kind);
        let found = other.map_or(format!("ggml type {kind}"), |row| row.1.to_owned());
        return Err(ReadError::DType { file: file.into(), tensor: name, found, known: &dequant::DTYPES });
    };
    let offset = cursor.u64(&name)?;

    let block_elems = if let DType::Block(block) = dtype { block.facts().elems as u64 } else { 1 };
    let block_bytes = dtype.bytes(block_elems as usize) as u64;
    if !dims[0].is_multiple_of(block_elems) {
        return Err(bad_dims(dims, format!("a first dim of whole {dtype} blocks of {block_elems}")));
    }
    let elems = dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
    // A zero hides what the other dims multiply to.
    let Some(n_bytes) =
        elems.filter(|&elems| elems > 0).and_then(|elems| (elems / block_elems).checked_mul(block_bytes))
    else {
        return Err(bad_dims(dims, "a product from 1 to 2^64 / element size".into()));
    };
    let shape = dims.iter().rev().map(|&dim| dim as usize).collect();
    Ok(Entry { name, dtype, shape, n_bytes, offset })
}

/// Reads numbers and strings, never past the end.
struct Cursor<'a> {
    file: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n_bytes: u64, what: &str) -> Result<&'a [u8], ReadError> {
        let rest = &self.bytes[self.at..];
        if n_bytes > rest.len() as u64 {
            return Err(ReadError::Truncated {
                file: self.file.into(),
                what: what.into(),
                found: self.bytes.len() as u64,
                expected: (self.at as u64).saturating_add(n_bytes),
            });
        }
        self.at += n_bytes as usize;
        Ok(&rest[..n_bytes as usize])
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ReadError> {
        let bytes = self.take(N as u64, what)?;
        Ok(bytes.try_into().expect("as many bytes as were taken"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, ReadError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, ReadError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `least_bytes` each, which the rest of the file must hold.
    fn count(&mut self, what: &str, least_bytes: u64) -> Result<u64, ReadError> {
        let count = self.u64(what)?;
        let rest = (self.bytes.len() - self.at) as u64;
        if count > rest / least_bytes {
            return Err(ReadError::Truncated {
                file: self.file.into(),
                what: format!("{count} {what}"),
                found: self.bytes.len() as u64,
                expected: count.saturating_mul(least_bytes).saturating_add(self.at as u64),
            });
        }
        Ok(count)
    }

    fn string(&mut self, what: &str) -> Result<String, ReadError> {
        let n_bytes = self.u64(what)?;
        let bytes = self.take(n_bytes, what)?;
        let text = str::from_utf8(bytes);
        text.map(str::to_owned).map_err(|_| ReadError::Utf8 { file: self.file.into(), what: what.into() })
    }

    /// The value of `key`; numbers of types are GGUF's `gguf_metadata_value_type`.
    fn value(&mut self, key: &str, kind: u32) -> Result<Value, ReadError> {
        Ok(match kind {
            0 | 1 | 2 | 3 | 4 | 5 | 10 | 11 => Value::Integer(self.integer(key, kind)?),
            6 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            7 => match self.array(key)? {
                [byte @ (0 | 1)] => Value::Bool(byte == 1),
                [byte] => return Err(self.bad_value(key, byte.to_string(), "0 or 1, as a boolean is")),
            },
            8 => Value::String(self.string(key)?),
            9 => {
                let kind = self.u32(key)?;
                self.values(key, kind, 0)?
            }
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(self.bad_value(key, format!("of type {kind}"), "a type from 0 to 12")),
        })
    }

    fn integer(&mut self, key: &str, kind: u32) -> Result<i128, ReadError> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.array(key)?).into(),
            1 => i8::from_le_bytes(self.array(key)?).into(),
            2 => u16::from_le_bytes(self.array(key)?).into(),
            3 => i16::from_le_bytes(self.array(key)?).into(),
            4 => u32::from_le_bytes(self.array(key)?).into(),
            5 => i32::from_le_bytes(self.array(key)?).into(),
            10 => u64::from_le_bytes(self.array(key)?).into(),
            _ => i64::from_le_bytes(self.array(key)?).into(),
        })
    }

    /// An array's values, of which those nobody asks for are read past.
    fn values(&mut self, key: &str, kind: u32, depth: u32) -> Result<Value, ReadError> {
        // Arrays in arrays are legal and unused; hostile ones would nest to the stack's end.
        const MAX_DEPTH: u32 = 4;
        let element_bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 if depth < MAX_DEPTH => 12,
            _ => {
                return Err(self.bad_value(
                    key,
                    format!("an array of type {kind}"),
                    "a type from 0 to 12, nested at most four times",
                ));
            }
        };
        let count = self.count(key, element_bytes)?;
        Ok(match kind {
            8 => Value::Strings((0..count).map(|_| self.string(key)).collect::<Result<_, _>>()?),
            0..=5 | 11 => {
                Value::Integers((0..count).map(|_| Ok(self.integer(key, kind)? as i64)).collect::<Result<
                    _,
                    ReadError,
                >>(
                )?)
            }
            6 => Value::Floats(
                (0..count)
                    .map(|_| Ok(f32::from_le_bytes(self.array(key)?).into()))
                    .collect::<Result<_, ReadError>>()?,
            ),
            9 => {
                for _ in 0..count {
                    let kind = self.u32(key)?;
                    self.values(key, kind, depth + 1)?;
                }
                Value::Skipped
            }
            _ => {
                self.take(count * element_bytes, key)?;
                Value::Skipped
            }
        })
    }

    fn bad_value(&self, key: &str, found: String, expected: &str) -> ReadError {
        ReadError::Value { file: self.file.into(), key: key.into(), found, expected: expected.into() }
    }
}

/// A value as messages show it.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Integer(x) => x.to_string(),
        Value::F32(x) => x.to_string(),
        Value::F64(x) => x.to_string(),
        Value::Bool(x) => x.to_string(),
        Value::String(x) => format!("{:?}", x.chars().take(80).collect::<String>()),
        Value::Strings(x) => format!("{} strings", x.len()),
        Value::Integers(x) => format!("{} integers", x.len()),
        Value::Floats(x) => format!("{} floats", x.len()),
        Value::Skipped => "an array".into(),
    }
}
