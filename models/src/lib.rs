//! Models of the LLaMA family as data: what a checkpoint says, and nothing about how it is computed.
//!
//! * [`config`]: sizes, rope, `config.json`; [`presets`]: configs of published models.
//! * [`checkpoint`]: a model on disk in any format; [`hugging_face`] and [`gguf`] read directories and files,
//!   [`safetensors`] and [`dequant`] what lies inside.
//! * [`tokenizer`]: text to ids and back; [`tokenizer_json`] and [`sentencepiece`] bring other forms to
//!   the one that is run. [`chat`]: chat templates.
//! * [`date`]: days by their dates. [`error`]: why a checkpoint cannot be read.
//!
//! Readers take bytes: who maps files is the caller, and nothing here is `unsafe`. Whatever a file holds gives a
//! typed error at worst: sizes are checked before they are added, multiplied or allocated.

#![forbid(unsafe_code)]

pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod date;
pub mod dequant;
pub mod error;
pub mod gguf;
pub mod hugging_face;
mod json;
pub mod llama;
pub mod presets;
pub mod safetensors;
pub mod sentencepiece;
pub mod tokenizer;
pub mod tokenizer_json;

pub use chat::{ChatError, Message, render_chat};
pub use checkpoint::{Checkpoint, FileBytes, OpenFile, TensorInfo};
pub use config::{Config, Rope, RopeKind};
pub use error::ReadError;
pub use presets::{PRESETS, preset};
pub use tokenizer::{Tokenizer, TokenizerError, TokenizerSource};
