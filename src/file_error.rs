//! Why a file of tensors or text that belongs to a comparison cannot be used: a reference, a part of a reproducer.

use safetensors::SafeTensorError;
use std::io;
use std::path::PathBuf;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("{}: cannot be read", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A text that its parser or verifier refuses.
    #[error("{}: {said}", file.display())]
    Text {
        /// The file.
        file: PathBuf,
        /// What it said.
        said: String,
    },
    /// It is no safetensors file.
    #[error("{}: not safetensors", file.display())]
    Format {
        /// The file.
        file: PathBuf,
        /// Why.
        source: SafeTensorError,
    },
    /// Something in it is missing or not as it should be.
    #[error("{}: {what}: found {found}, expected {expected}", file.display())]
    Content {
        /// The file.
        file: PathBuf,
        /// Tensor or key.
        what: String,
        /// What stands there.
        found: String,
        /// What should.
        expected: String,
    },
}
