//! A checkpoint, whatever its format: config, tensors under Hugging Face names and layouts, tokenizer, chat template.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indexmap::IndexMap;
use ir::DType;

use crate::config::Config;
use crate::dequant;
use crate::error::ReadError;
use crate::tokenizer::TokenizerSource;
use crate::{gguf, hugging_face};

/// A file's bytes, mapped or read.
pub type FileBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Gives the bytes of a file. The caller maps files: doing so is `unsafe`, which this crate forbids.
pub type OpenFile<'a> = &'a dyn Fn(&Path) -> io::Result<FileBytes>;

/// A model on disk, opened and checked: every tensor that the config asks for is there once, with its shape and all
/// its bytes.
pub struct Checkpoint {
    /// What the model is.
    pub config: Config,
    /// Where it was read from.
    pub format: Format,
    /// Keys of the config (or of the GGUF metadata) that were read past: they do not touch the mathematics.
    pub ignored_keys: Vec<String>,
    /// Tensors that were read past: tables that the config implies, a head beside a tied embedding.
    pub ignored_tensors: Vec<String>,
    /// The tokenizer, where there is one.
    pub tokenizer: Option<TokenizerSource>,
    /// The chat template (Jinja), where there is one.
    pub chat_template: Option<String>,
    tensors: IndexMap<String, TensorInfo>,
    files: Vec<FileBytes>,
}

/// The format of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A directory with `config.json` and safetensors files.
    HuggingFace,
    /// One GGUF file of this version.
    Gguf(u32),
}

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Hugging Face name.
    pub name: String,
    /// Storage type.
    pub dtype: DType,
    /// Dims, outermost first; `[out, in]` for projections.
    pub shape: Vec<usize>,
    /// The file that holds it.
    pub file: PathBuf,
    /// That file's index among the checkpoint's.
    file_idx: usize,
    /// Its bytes in that file.
    bytes: Range<usize>,
    /// `Some(head_dim)` if rows are stored as interleaved pairs (see [`stored_row`]).
    pairs: Option<usize>,
}

/// A tensor as a file holds it, checked against that file alone: the bytes lie in the file and are those of the
/// shape and the type.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredTensor {
    /// Name in the file.
    pub name: String,
    /// Storage type: f32, f16, bf16 or a block format, of which a row has whole blocks.
    pub dtype: DType,
    /// Dims, outermost first.
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub bytes: Range<usize>,
}

/// What a reader of one format found, before the tensors are held against the config.
pub(crate) struct Parts {
    pub config: Config,
    pub format: Format,
    pub ignored_keys: Vec<String>,
    pub tokenizer: Option<TokenizerSource>,
    pub chat_template: Option<String>,
    /// Files with their tensors, named as Hugging Face does.
    pub files: Vec<(PathBuf, FileBytes, Vec<StoredTensor>)>,
    /// q and k rows are interleaved pairs.
    pub pairs: bool,
}

impl Checkpoint {
    /// Opens a Hugging Face directory or a GGUF file, by what is there. Reads headers and tokenizers, no weights.
    ///
    /// # Errors
    ///
    /// [`ReadError`]; see its variants. Nothing that a file holds makes this panic or allocate more than a small
    /// multiple of the file's size.
    pub fn open(path: &Path, open: OpenFile) -> Result<Checkpoint, ReadError> {
        let parts = if path.is_dir() { hugging_face::read(path, open)? } else { gguf::read(path, open)? };
        Checkpoint::assemble(path, parts)
    }

    /// Opens a Hugging Face directory through `open` alone, so that it need not be on disk. Otherwise as
    /// [`Checkpoint::open`].
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::open`].
    pub fn open_directory(path: &Path, open: OpenFile) -> Result<Checkpoint, ReadError> {
        Checkpoint::assemble(path, hugging_face::read(path, open)?)
    }

    /// Holds the tensors that are there against those that the config asks for.
    fn assemble(path: &Path, parts: Parts) -> Result<Checkpoint, ReadError> {
        let Parts { config, format, ignored_keys, tokenizer, chat_template, files, pairs } = parts;
        let mut found: IndexMap<String, (usize, StoredTensor)> = IndexMap::new();
        let mut opened = Vec::new();
        let mut names = Vec::new();
        for (file_idx, (file, bytes, tensors)) in files.into_iter().enumerate() {
            for tensor in tensors {
                if found.contains_key(&tensor.name) {
                    return Err(ReadError::DuplicateTensor { file, tensor: tensor.name });
                }
                found.insert(tensor.name.clone(), (file_idx, tensor));
            }
            opened.push(bytes);
            names.push(file);
        }

        let mut tensors = IndexMap::new();
        for (name, expected) in config.tensors() {
            let Some((file_idx, stored)) = found.swap_remove(&name) else {
                return Err(ReadError::MissingTensor { file: path.into(), tensor: name, expected });
            };
            let StoredTensor { name: _, dtype, shape, bytes } = stored;
            let file = names[file_idx].clone();
            if shape != expected {
                return Err(ReadError::Shape { file, tensor: name, found: shape, expected });
            }
            let pairs = (pairs && (name.contains(".q_proj.") || name.contains(".k_proj.")))
                .then_some(config.head_dim);
            tensors.insert(name.clone(), TensorInfo { name, dtype, shape, file, file_idx, bytes, pairs });
        }
        let mut ignored_tensors = Vec::new();
        for (name, (file_idx, stored)) in found {
            let implied = name.ends_with(".rotary_emb.inv_freq") || (config.tied && name == "lm_head.weight");
            if !implied {
                let file = names[file_idx].clone();
                return Err(ReadError::UnexpectedTensor { file, tensor: name, found: stored.shape });
            }
            ignored_tensors.push(name);
        }
        ignored_tensors.sort_unstable();
        let files = opened;
        Ok(Checkpoint {
            config,
            format,
            ignored_keys,
            ignored_tensors,
            tokenizer,
            chat_template,
            tensors,
            files,
        })
    }

    /// The tensors that the config asks for, in its order.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// Storage types and how many tensors each has, most first, ties by name.
    pub fn stored_dtypes(&self) -> Vec<(DType, usize)> {
        let mut counts: IndexMap<DType, usize> = IndexMap::new();
        for tensor in self.tensors() {
            *counts.entry(tensor.dtype).or_default() += 1;
        }
        counts.sort_by(|a, m, b, n| n.cmp(m).then_with(|| a.name().cmp(b.name())));
        counts.into_iter().collect()
    }

    /// Decodes rows `rows` of a tensor, by its Hugging Face name, to f32. Rows go along the leading axis; a vector
    /// is one row. Block formats are decoded to the very numbers of ggml, plain floats widened exactly.
    ///
    /// # Errors
    ///
    /// [`ReadError::MissingTensor`], [`ReadError::Rows`], [`ReadError::Buffer`] if `out` is not as long as the
    /// rows, [`ReadError::OutOfFile`] if the file has shrunk since it was opened.
    pub fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<(), ReadError> {
        let Some(tensor) = self.tensors.get(name) else {
            let file = self.tensors.first().map(|(_, tensor)| tensor.file.clone()).unwrap_or_default();
            return Err(ReadError::MissingTensor { file, tensor: name.into(), expected: vec![] });
        };
        let (n_rows, row_elems) = match tensor.shape[..] {
            [elems] => (1, elems),
            _ => (tensor.shape[0], tensor.shape[1..].iter().product()),
        };
        let (file, name) = (|| tensor.file.clone(), || tensor.name.clone());
        if rows.start > rows.end || rows.end > n_rows {
            return Err(ReadError::Rows { file: file(), tensor: name(), found: rows, expected: n_rows });
        }
        let expected = rows.len() * row_elems;
        if out.len() != expected {
            return Err(ReadError::Buffer { file: file(), tensor: name(), found: out.len(), expected });
        }
        let whole: &[u8] = (*self.files[tensor.file_idx]).as_ref();
        let Some(bytes) = whole.get(tensor.bytes.clone()) else {
            let found = tensor.bytes.start as u64..tensor.bytes.end as u64;
            return Err(ReadError::OutOfFile {
                file: file(),
                tensor: name(),
                found,
                expected: whole.len() as u64,
            });
        };

        let row_bytes = tensor.dtype.bytes(row_elems);
        match (tensor.pairs, tensor.shape.len()) {
            (None, _) => {
                dequant::decode(tensor.dtype, &bytes[rows.start * row_bytes..rows.end * row_bytes], out)
            }
            // A bias: its elements are what a matrix's rows are.
            (Some(head_dim), 1) if !rows.is_empty() => {
                let mut stored = vec![0.0; row_elems];
                dequant::decode(tensor.dtype, bytes, &mut stored);
                for (i, out) in out.iter_mut().enumerate() {
                    *out = stored[stored_row(i, head_dim)];
                }
            }
            (Some(head_dim), _) => {
                for (row, out) in rows.zip(out.chunks_exact_mut(row_elems)) {
                    let at = stored_row(row, head_dim) * row_bytes;
                    dequant::decode(tensor.dtype, &bytes[at..at + row_bytes], out);
                }
            }
        }
        Ok(())
    }
}

/// Where a GGUF file keeps row `row` of q or k. Hugging Face turns element `i` of a head with element
/// `i + head_dim / 2`, GGUF (as Meta's originals) element `2i` with `2i + 1`, and so their rows are permuted.
fn stored_row(row: usize, head_dim: usize) -> usize {
    let (head, i) = (row / head_dim, row % head_dim);
    let (side, pair) = (i / (head_dim / 2), i % (head_dim / 2));
    head * head_dim + 2 * pair + side
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_from_pairs() {
        let rows: Vec<usize> = (0..12).map(|row| stored_row(row, 6)).collect();
        assert_eq!(rows, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }
}
