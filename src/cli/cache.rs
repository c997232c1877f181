//! The cache folder: `llamac` in `$XDG_CACHE_HOME`, or in `~/.cache`. It may be removed at any time.

use super::error::CliError;
use super::source::BuildOptions;
use blake3::Hasher;
use llamac::model::{Model, name_of};
use runtime::whole_file::WriteError;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// Where artifacts are kept that nobody asked for by name.
pub fn folder() -> PathBuf {
    let given = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    given.or_else(home).unwrap_or_else(env::temp_dir).join("llamac")
}

/// The place of a model's artifact. Its name changes with all that the artifact depends on: the source files, as far
/// as path, size and time of change tell them apart, the options, this machine's CPU, and the compiler.
pub fn place(argument: &str, model: &Model, build: &BuildOptions) -> Result<PathBuf, CliError> {
    let mut hasher = Hasher::new();
    let mut add = |part: &str| {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    };
    match model {
        Model::Checkpoint(_) if argument == "builtin" => add("builtin"),
        Model::Checkpoint(_) => {
            for file in source_files(Path::new(argument))? {
                add(&file);
            }
        }
        Model::Preset(_) | Model::Artifact(_) => add(argument),
    }
    add(&format!("{:?} {:?} {}", build.random_weights, build.dtype(model), build.taps));
    add(&format!("{} {}", build.machine.target(), build.machine.takes_cubin()));
    add(&build.context(model.config()?.context).to_string());
    if let Some(table) = &build.tune_db {
        add(&fs::read_to_string(table).map_err(|source| CliError::Read { file: table.clone(), source })?);
    }
    let level = codegen::cpu::level("cpu:native").map_err(llamac::compile::CompileError::from)?;
    add(&format!("{} {}", level.cpu, level.llvm_features));
    add(&format!("{} {}", env!("CARGO_PKG_VERSION"), codegen::cpu::llvm_version()));
    // A compiler of the same version, built anew, may write other code.
    if let Ok(program) = env::current_exe().and_then(identity_of) {
        add(&program);
    }
    let folder = folder();
    fs::create_dir_all(&folder).map_err(|source| WriteError::Io { file: folder.clone(), source })?;
    let digest = hasher.finalize().to_hex();
    let name: String = name_of(argument)
        .chars()
        .map(|c| if c.is_alphanumeric() || ".-_".contains(c) { c } else { '_' })
        .collect();
    Ok(folder.join(format!("{name}-{}.llamac", &digest[..16])))
}

/// The files of a checkpoint: a directory's that models are read from, or the one.
fn source_files(path: &Path) -> Result<Vec<String>, CliError> {
    let failed = |source| CliError::Read { file: path.to_path_buf(), source };
    let mut files = vec![path.to_path_buf()];
    if path.is_dir() {
        files = fs::read_dir(path)
            .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect::<io::Result<_>>())
            .map_err(failed)?;
        let endings = ["json", "jinja", "model", "safetensors"];
        files.retain(|file| file.extension().is_some_and(|e| endings.iter().any(|ending| e == *ending)));
        files.sort();
    }
    files.into_iter().map(|file| identity_of(file).map_err(failed)).collect()
}

/// Path, size and time of change.
fn identity_of(file: PathBuf) -> io::Result<String> {
    let (path, data) = (file.canonicalize()?, fs::metadata(&file)?);
    Ok(format!("{} {} {}.{}", path.display(), data.size(), data.mtime(), data.mtime_nsec()))
}
