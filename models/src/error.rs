//! Why a checkpoint cannot be read: one enum for every reader of this crate.

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use crate::tokenizer::TokenizerError;

/// Why a checkpoint cannot be read: file, tensor or key, found, expected. Exit code 3.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file system refused.
    #[error("{}: cannot be read", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not JSON, or not the JSON that the file should hold.
    #[error("{}: not the JSON expected", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Line, column and reason.
        source: serde_json::Error,
    },
    /// Text that is not UTF-8.
    #[error("{}: {what} is not UTF-8", file.display())]
    Utf8 {
        /// The file.
        file: PathBuf,
        /// Which text.
        what: String,
    },

    /// A key without which the model is not known.
    #[error("{}: no key `{key}`, expected {expected}", file.display())]
    MissingKey {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// What it would hold.
        expected: &'static str,
    },
    /// The same key twice: which one counts is a matter of the reader, so neither does.
    #[error("{}: key `{key}` stands twice", file.display())]
    DuplicateKey {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
    },
    /// A value of the wrong type or out of its range.
    #[error("{}: `{key}` is {found}, expected {expected}", file.display())]
    Value {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// The value, as the file writes it.
        found: String,
        /// What may stand there.
        expected: String,
    },
    /// A value that names something this program does not know.
    #[error("{}: `{key}` is `{found}`, known are {}", file.display(), known.join(", "))]
    UnknownValue {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// The value.
        found: String,
        /// Values that are known.
        known: &'static [&'static str],
    },
    /// A key that changes the mathematics in a way this program does not know.
    #[error("{}: key `{key}` (= {found}) is not supported: it changes what the model computes; {expected}", file.display())]
    UnknownKey {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What would be accepted.
        expected: String,
    },

    /// A path that is neither a Hugging Face directory nor a GGUF file.
    #[error("{}: no checkpoint: found {found}, expected {expected}", file.display())]
    NoCheckpoint {
        /// The path.
        file: PathBuf,
        /// What is there.
        found: String,
        /// What is looked for.
        expected: &'static str,
    },
    /// A format version that is not read.
    #[error("{}: version {found} of the format, known are {known:?}", file.display())]
    Version {
        /// The file.
        file: PathBuf,
        /// The version in the file.
        found: u32,
        /// Versions that are read.
        known: &'static [u32],
    },
    /// The file ends before something that it announces.
    #[error("{}: {what} needs bytes up to {expected}, the file has {found}", file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// What is cut off.
        what: String,
        /// Bytes of the file.
        found: u64,
        /// Bytes needed.
        expected: u64,
    },
    /// A number in a header that no file of this format has.
    #[error("{}: {what} is {found}, at most {limit} is accepted", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Which number.
        what: String,
        /// The number.
        found: u64,
        /// The largest accepted.
        limit: u64,
    },
    /// A shard that the index names and that is not there.
    #[error("{}: shard is missing; the index puts `{tensor}` there", file.display())]
    MissingShard {
        /// The shard.
        file: PathBuf,
        /// The first tensor that is looked for in it.
        tensor: String,
    },

    /// A tensor that is not in the shard that the index names.
    #[error("{}: no tensor `{tensor}`; the index puts it there", file.display())]
    NotInShard {
        /// The shard.
        file: PathBuf,
        /// The tensor.
        tensor: String,
    },

    /// A tensor that the config asks for and that is in no file.
    #[error("{}: no tensor `{tensor}`, the config asks for one of shape {expected:?}", file.display())]
    MissingTensor {
        /// The file or directory.
        file: PathBuf,
        /// Hugging Face name.
        tensor: String,
        /// Its shape.
        expected: Vec<usize>,
    },
    /// A tensor that the config does not ask for: the model computes something else.
    #[error("{}: tensor `{tensor}` {found:?} has no place in the model that the config describes", file.display())]
    UnexpectedTensor {
        /// The file.
        file: PathBuf,
        /// Name in the file.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
    },
    /// Two tensors of one name.
    #[error("{}: tensor `{tensor}` stands twice", file.display())]
    DuplicateTensor {
        /// The file of the second one.
        file: PathBuf,
        /// The name.
        tensor: String,
    },
    /// A shape other than the config's.
    #[error("{}: tensor `{tensor}` is {found:?}, the config asks for {expected:?}", file.display())]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that the config asks for.
        expected: Vec<usize>,
    },
    /// Dims whose product no file can hold, or too many dims.
    #[error("{}: tensor `{tensor}` has dims {found:?}, expected {expected}", file.display())]
    Dims {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Dims in the file.
        found: Vec<u64>,
        /// What is accepted.
        expected: String,
    },
    /// A storage type that is not read.
    #[error("{}: tensor `{tensor}` is stored as {found}, known are {}", file.display(), known.join(", "))]
    DType {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Type in the file.
        found: String,
        /// Types that are read.
        known: &'static [&'static str],
    },
    /// Fewer or more bytes than the shape and the type need.
    #[error("{}: tensor `{tensor}` has {found} bytes, its shape and type need {expected}", file.display())]
    TensorBytes {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Bytes in the file.
        found: u64,
        /// Bytes that the shape and the type need.
        expected: u64,
    },
    /// A tensor that lies partly or wholly behind the end of the file.
    #[error("{}: tensor `{tensor}` lies at bytes {found:?}, the file has {expected}", file.display())]
    OutOfFile {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its bytes, counted from the start of the file.
        found: Range<u64>,
        /// Bytes of the file.
        expected: u64,
    },
    /// Two tensors that share bytes.
    #[error("{}: tensor `{tensor}` begins at byte {found}, inside `{other}`, which ends at {expected}", file.display())]
    Overlap {
        /// The file.
        file: PathBuf,
        /// The later tensor.
        tensor: String,
        /// The one before it.
        other: String,
        /// Where the later one begins, counted from the start of the file.
        found: u64,
        /// Where the one before it ends.
        expected: u64,
    },
    /// Bytes that belong to no tensor, in a format that has none.
    #[error("{}: bytes {found:?} belong to no tensor", file.display())]
    Gap {
        /// The file.
        file: PathBuf,
        /// The bytes, counted from the start of the file.
        found: Range<u64>,
    },
    /// A tensor that does not begin where the format's alignment puts it.
    #[error("{}: tensor `{tensor}` begins at offset {found}, expected a multiple of {expected}", file.display())]
    Misaligned {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its offset in the tensor data.
        found: u64,
        /// The alignment.
        expected: u64,
    },
    /// The caller asked for rows that the tensor does not have.
    #[error("{}: tensor `{tensor}` has {expected} rows, asked for {found:?}", file.display())]
    Rows {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Rows asked for.
        found: Range<usize>,
        /// Rows there are.
        expected: usize,
    },
    /// The caller's buffer does not fit the rows asked for.
    #[error("{}: rows of `{tensor}` have {expected} elements, the buffer has {found}", file.display())]
    Buffer {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Elements of the buffer.
        found: usize,
        /// Elements of the rows.
        expected: usize,
    },

    /// The tokenizer cannot be used.
    #[error("{}: tokenizer", file.display())]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// Why.
        source: TokenizerError,
    },
}
