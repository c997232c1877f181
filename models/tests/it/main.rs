//! Readers and tokenizers on real files. Those live beside the checkout; where they are absent, a test says that it
//! was skipped.

mod bad;
mod checkpoints;
mod damage;
mod fuzz;
mod gguf_file;
mod tokenizers;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use models::{Checkpoint, FileBytes, ReadError};

/// A path in the folder `shared` beside the checkout, if it is there; says so if not.
fn shared(path: &str) -> Option<PathBuf> {
    there(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared").join(path))
}

/// The SmolLM2 file that is too large for a repository, if it was fetched; says so if not.
fn smollm2() -> Option<PathBuf> {
    let dir = std::env::var_os("LLAMAC_TEST_DATA").map(PathBuf::from);
    let dir = dir.or_else(|| std::env::home_dir().map(|home| home.join(".cache/llamac-test-data")));
    there(dir?.join("SmolLM2-135M-Instruct.Q4_1.gguf"))
}

fn there(path: PathBuf) -> Option<PathBuf> {
    if path.exists() {
        return Some(path);
    }
    // Written past the harness, which would swallow what `println!` says; once, though a fuzz test asks for each case.
    static SAID: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    if SAID.lock().is_ok_and(|mut said| said.insert(path.clone())) {
        let _ = writeln!(std::io::stderr(), "skipped: {} is absent", path.display());
    }
    None
}

/// Reads a whole file; what a test asks for need not be mapped.
fn read_file(path: &Path) -> std::io::Result<FileBytes> {
    Ok(Arc::new(std::fs::read(path)?))
}

fn open(path: &Path) -> Result<Checkpoint, ReadError> {
    Checkpoint::open(path, &read_file)
}

/// Opens what the writer wrote.
fn open_gguf(gguf: &gguf_file::Gguf) -> Checkpoint {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("m.gguf");
    std::fs::write(&file, gguf.finish()).expect("room for a small file");
    open(&file).expect("a right file")
}

/// All numbers of a tensor.
fn numbers(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let tensor = checkpoint.tensors().find(|tensor| tensor.name == name).expect("a tensor of that name");
    let rows = if tensor.shape.len() == 1 { 1 } else { tensor.shape[0] };
    let mut out = vec![f32::NAN; tensor.shape.iter().product()];
    checkpoint.read_rows(name, 0..rows, &mut out).expect("the tensor was checked");
    out
}

/// An error and all its sources, as the command prints them.
fn whole_message(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}
