//! The MODEL argument of every verb: a directory, a GGUF file, an artifact, `preset:NAME`, a `config.json` or `builtin`.

use crate::tune::table::{Choices, Table};
use models::{Checkpoint, Config, ReadError};
use runtime::artifact::{Artifact, ArtifactError, MAGIC};
use runtime::manifest::{CHAT_TEMPLATE, Manifest, TOKENIZER, TUNING};
use runtime::map::{FileBytes, MapError, map_file};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a MODEL argument names.
pub enum Model {
    /// Weights on disk.
    Checkpoint(Box<Checkpoint>),
    /// Compiled.
    Artifact(Box<Artifact>),
    /// A shape without weights: a published one, or that of a `config.json` alone.
    Preset(Box<Config>),
}

/// Why a MODEL cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A checkpoint's fault.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// An artifact's fault.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// No such preset.
    #[error("preset:{name} is not known; there are {known}")]
    Preset {
        /// As given.
        name: String,
        /// All of them.
        known: String,
    },
}

impl Model {
    /// Opens what `argument` names.
    ///
    /// # Errors
    ///
    /// [`ModelError`].
    pub fn open(argument: &str) -> Result<Model, ModelError> {
        if let Some(name) = argument.strip_prefix("preset:") {
            let known = || models::PRESETS.iter().map(|p| p.name).collect::<Vec<_>>().join(", ");
            return match models::preset(name) {
                Some(config) => Ok(Model::Preset(Box::new(config))),
                None => Err(ModelError::Preset { name: name.to_string(), known: known() }),
            };
        }
        if argument == BUILTIN {
            let checkpoint = Checkpoint::open_directory(Path::new(BUILTIN), &embedded)?;
            return Ok(Model::Checkpoint(Box::new(checkpoint)));
        }
        let path = Path::new(argument);
        if path.extension().is_some_and(|e| e == "llamac") || begins_as_artifact(path) {
            return Ok(Model::Artifact(Box::new(Artifact::open(path)?)));
        }
        if path.extension().is_some_and(|e| e == "json") {
            let io = |source| ReadError::Io { file: path.to_path_buf(), source };
            let text = fs::read_to_string(path).map_err(io)?;
            return Ok(Model::Preset(Box::new(Config::from_hf_json(&text, path)?.0)));
        }
        Ok(Model::Checkpoint(Box::new(Checkpoint::open(path, &mapped)?)))
    }

    /// The model's config.
    ///
    /// # Errors
    ///
    /// [`ModelError::Artifact`] if an artifact's manifest has none.
    pub fn config(&self) -> Result<Config, ModelError> {
        match self {
            Model::Checkpoint(checkpoint) => Ok(checkpoint.config.clone()),
            Model::Preset(config) => Ok((**config).clone()),
            Model::Artifact(artifact) => {
                let manifest: Manifest = artifact.manifest()?;
                let file = artifact.file();
                // Read as plain data: what the readers of checkpoints refuse is refused here too.
                let checked =
                    |config: Config| config.check(file).map_err(serde::de::Error::custom).map(|()| config);
                let config = serde_json::from_value(manifest.config).and_then(checked);
                config.map_err(|source| ArtifactError::Manifest { file: file.to_path_buf(), source }.into())
            }
        }
    }

    /// The measured schedules that an artifact was compiled with; none of other models.
    ///
    /// # Errors
    ///
    /// [`ModelError::Artifact`] if its section has something else.
    pub fn choices(&self) -> Result<Choices, ModelError> {
        let Model::Artifact(artifact) = self else { return Ok(Choices::default()) };
        let text = String::from_utf8_lossy(artifact.section(TUNING).unwrap_or_default());
        let bad = |source| ArtifactError::Manifest { file: artifact.file().to_path_buf(), source };
        let table = Table::parse(&text).map_err(|line| bad(line.source))?;
        Ok(Choices::of(table.records.iter()))
    }

    /// Its `tokenizer.json`, if it has a tokenizer.
    pub fn tokenizer(&self) -> Option<&[u8]> {
        match self {
            Model::Checkpoint(checkpoint) => checkpoint.tokenizer.as_ref().map(|t| &*t.json),
            Model::Artifact(artifact) => artifact.section(TOKENIZER),
            Model::Preset(_) => None,
        }
    }

    /// Its chat template, if it has one.
    pub fn chat_template(&self) -> Option<String> {
        match self {
            Model::Checkpoint(checkpoint) => checkpoint.chat_template.clone(),
            Model::Artifact(artifact) => {
                artifact.section(CHAT_TEMPLATE).map(|text| String::from_utf8_lossy(text).into_owned())
            }
            Model::Preset(_) => None,
        }
    }
}

/// The argument that names the model inside this program.
pub const BUILTIN: &str = "builtin";

/// The files of the model inside this program (see `builtin/README.md`).
const EMBEDDED: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../builtin/config.json")),
    ("generation_config.json", include_bytes!("../builtin/generation_config.json")),
    ("model.safetensors", include_bytes!("../builtin/model.safetensors")),
    ("tokenizer.json", include_bytes!("../builtin/tokenizer.json")),
];

/// Gives the file of that name from this program.
fn embedded(path: &Path) -> io::Result<FileBytes> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let file = EMBEDDED.iter().find(|(known, _)| *known == name);
    file.map(|(_, bytes)| Arc::new(*bytes) as FileBytes).ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn begins_as_artifact(path: &Path) -> bool {
    let mut begin = [0; MAGIC.len()];
    File::open(path).and_then(|mut file| file.read_exact(&mut begin)).is_ok() && begin == MAGIC
}

/// Maps a file for a reader, which wants to know whether it is there.
fn mapped(path: &Path) -> io::Result<FileBytes> {
    map_file(path).map_err(|error| match error {
        MapError::File { source, .. } => source,
        other => io::Error::other(other),
    })
}

/// A model's name for listings and artifacts: the last part of its path, without an ending.
pub fn name_of(argument: &str) -> String {
    let last = argument.strip_prefix("preset:").map(PathBuf::from).unwrap_or_else(|| {
        let path = Path::new(argument);
        if path.is_dir() {
            // Of `.` and `..` only the file system knows the name.
            let real = path.canonicalize().ok();
            real.and_then(|path| path.file_name().map(PathBuf::from))
        } else {
            path.file_stem().map(PathBuf::from)
        }
        .unwrap_or_else(|| path.to_path_buf())
    });
    last.display().to_string()
}
