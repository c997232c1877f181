//! A fault in a folder: all that shows it again, alone.
//!
//! | file | of | holds |
//! |---|---|---|
//! | `README` | all | what was found, and the command that shows it again |
//! | `case.json` | all | what kind of fault it is, and what is said in a word or a number: target, symbols, dtype |
//! | `graph.ir` | a kernel | the group alone, as a graph that `llamac opt` reads; what others stored are inputs |
//! | `kernel.ir` | a kernel | the kernel that ran |
//! | `tensors.safetensors` | a kernel | `input.NAME`, `found.NAME`, and `expected.NAME` in f64, by names of `graph.ir` |
//! | `plan.txt` | a weight | the one line of the plan that lays the buffer out |
//! | `tensors.safetensors` | a weight | bytes `found` and `expected`, and each tensor of the checkpoint in f32 |
//! | `graph.ir`, `config.json` | a graph | the text in the artifact, and the config that it should be of |
//!
//! A folder is written whole or not at all, and never over another.

mod kernel;
mod weight;

pub use kernel::KernelCase;
pub use weight::WeightCase;

use super::{Fault, weights};
use crate::check::device::LoadError;
use crate::file_error::FileError;
use crate::pipeline::Request;
use codegen::Backend;
use codegen::backend::names;
use codegen::cpu::CodegenError;
use ir::DType;
use ir::families::LowerError;
use ir::interp::InterpError;
use models::Config;
use runtime::whole_file::{self, WriteError};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A fault that can be looked at alone.
pub enum Reproducer {
    /// A kernel's launch that stores something else than its group says.
    Kernel(Box<KernelCase>),
    /// A buffer of weights that does not hold what the checkpoint does.
    Weight(WeightCase),
    /// A graph that is not the one of the config.
    Graph(GraphCase),
}

/// A graph that is not the one of the config.
pub struct GraphCase {
    /// The text in the artifact, of all entry points.
    pub graph: String,
    /// What it should be of.
    pub config: Config,
    /// As compiled.
    pub dtype: DType,
    /// As compiled.
    pub context: usize,
    /// Name of the target that it was compiled for: GPUs have more entry points.
    pub target: String,
}

/// Where a kernel is run again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    /// As code for its target.
    Cpu,
    /// In the kernel interpreter: bounds, unwritten reads and races are found too.
    Interpreter,
}

/// What came of running a fault again.
#[derive(Debug, Default)]
pub struct Replay {
    /// What was judged and how it went, by name.
    pub lines: Vec<(&'static str, String)>,
    /// The worst share of a bound; 0 where there is none.
    pub worst: f64,
    /// What is wrong still.
    pub fault: Option<Fault>,
}

/// Why a folder shows nothing.
#[derive(Debug, thiserror::Error)]
pub enum ReproducerError {
    /// A file of it.
    #[error(transparent)]
    File(#[from] FileError),
    /// The group has no kernel in this llamac.
    #[error(transparent)]
    Lower(#[from] LowerError),
    /// The group cannot be computed on the inputs.
    #[error(transparent)]
    Oracle(#[from] InterpError),
    /// The kernel is for another machine.
    #[error("it is for {target}, which needs {needs}: this machine is without")]
    Machine {
        /// The target.
        target: String,
        /// What is missing.
        needs: String,
    },
    /// LLVM, linker or loader.
    #[error(transparent)]
    Load(#[from] LoadError),
}

impl From<CodegenError> for ReproducerError {
    fn from(error: CodegenError) -> ReproducerError {
        ReproducerError::Load(error.into())
    }
}

/// What `case.json` says.
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum Case {
    Kernel {
        target: String,
        /// By name, as `T`.
        symbols: BTreeMap<String, i64>,
        /// BLAKE3 of `kernel.ir` as it was written.
        kernel_digest: String,
    },
    Weight {},
    Graph {
        dtype: String,
        context: usize,
        target: String,
    },
}

impl Reproducer {
    /// Writes the folder, which must not be there yet. `what` says what was found.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn write(&self, folder: &Path, what: &str) -> Result<(), WriteError> {
        let mut files = match self {
            Reproducer::Kernel(case) => case.files(),
            Reproducer::Weight(case) => case.files(),
            Reproducer::Graph(GraphCase { graph, config, dtype, context, target }) => {
                let (dtype, target) = (dtype.name().to_string(), target.clone());
                let case = Case::Graph { dtype, context: *context, target };
                let config = serde_json::to_string_pretty(config).expect("a config is plain data");
                vec![case.file(), ("graph.ir", graph.clone().into()), ("config.json", config.into())]
            }
        };
        files.push(("README", readme(self, what).into()));
        let bytes = files.iter().map(|(_, contents)| contents.len() as u64).sum();
        whole_file::write_folder(folder, bytes, |place| {
            files.iter().try_for_each(|(name, contents)| fs::write(place.join(name), contents))
        })
    }

    /// Reads a folder.
    ///
    /// # Errors
    ///
    /// [`ReproducerError`], with the file that is at fault.
    pub fn read(folder: &Path) -> Result<Reproducer, ReproducerError> {
        let reader = Reader { folder };
        let case: Case = reader.json("case.json")?;
        Ok(match case {
            Case::Kernel { target, symbols, kernel_digest } => {
                Reproducer::Kernel(Box::new(KernelCase::read(&reader, target, &symbols, kernel_digest)?))
            }
            Case::Weight {} => Reproducer::Weight(WeightCase::read(&reader)?),
            Case::Graph { dtype, context, target } => {
                let config: Config = reader.json("config.json")?;
                let checked = config.check(&folder.join("config.json"));
                checked.map_err(|error| reader.text("config.json", error))?;
                let known = DType::from_name(&dtype).filter(|d| matches!(d, DType::F32 | DType::BF16));
                let Some(known) = known else {
                    return Err(reader.content("case.json", "dtype", dtype, "f32 or bf16"));
                };
                if !(1..=config.context).contains(&context) {
                    let most = format!("1 to {}", config.context);
                    return Err(reader.content("case.json", "context", context, most));
                }
                if !names().iter().any(|known| known.0 == target) {
                    let known = names().iter().map(|known| known.0).collect::<Vec<_>>().join(", ");
                    return Err(reader.content("case.json", "target", target, known));
                }
                let graph = reader.string("graph.ir")?;
                Reproducer::Graph(GraphCase { graph, config, dtype: known, context, target })
            }
        })
    }

    /// Shows the fault again, or that it is gone.
    ///
    /// # Errors
    ///
    /// Why nothing can be shown.
    pub fn replay(&self, place: Where) -> Result<Replay, ReproducerError> {
        match self {
            Reproducer::Kernel(case) => case.replay(place),
            Reproducer::Weight(case) => Ok(case.replay()),
            Reproducer::Graph(GraphCase { graph, config, dtype, context, target }) => {
                let machine = Backend::of(target)?.target().machine;
                let request = Request { config, dtype: *dtype, context: *context, measured: None };
                let expected = request.text(&machine);
                let lines = vec![("graph", format!("{dtype}, context {context}, by config.json"))];
                Ok(Replay { lines, worst: 0.0, fault: weights::graph(graph, &expected) })
            }
        }
    }
}

/// For who finds the folder.
fn readme(reproducer: &Reproducer, what: &str) -> String {
    let rule = match reproducer {
        Reproducer::Kernel(_) => {
            "It lowers graph.ir with its schedule, runs the kernel on the inputs in tensors.safetensors, and judges what\n\
             it stores. kernel.ir is the kernel that ran. Edit it, and the edited text runs in place of what llamac lowers;\n\
             with `--device interpreter` what reaches outside of its buffers is found, as code it is not held back."
        }
        Reproducer::Weight(_) => {
            "It looks up each element of the tensors where plan.txt says that it lies, and compares the bits `found`.\n\
             It also packs the tensors anew, which says whether llamac or the file is at fault."
        }
        Reproducer::Graph(_) => {
            "It builds the graphs of config.json and compares their text with graph.ir, which the artifact holds."
        }
    };
    format!(
        "{what}\n\nThis shows it again, here in this folder, with exit code 1; once it is right, with 0:\n\n    \
         llamac compare --replay .\n\n{rule}\n"
    )
}

/// A file of a reproducer: its name and what it holds.
type File = (&'static str, Vec<u8>);

impl Case {
    fn file(&self) -> File {
        let text = serde_json::to_string_pretty(self).expect("a case is plain data");
        ("case.json", (text + "\n").into())
    }
}

/// Tensors for a file: name, type, shape, bytes.
type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

fn safetensors(tensors: Vec<Stored>) -> File {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).expect("as many bytes as its shape says");
        (name.as_str(), view)
    });
    let bytes = safetensors::serialize(views, None).expect("tensors of different names");
    (TENSORS, bytes)
}

const TENSORS: &str = "tensors.safetensors";

/// Reads the files of a folder.
struct Reader<'f> {
    folder: &'f Path,
}

impl Reader<'_> {
    fn bytes(&self, name: &str) -> Result<Vec<u8>, ReproducerError> {
        let file = self.folder.join(name);
        Ok(fs::read(&file).map_err(|source| FileError::Read { file, source })?)
    }

    fn string(&self, name: &str) -> Result<String, ReproducerError> {
        String::from_utf8(self.bytes(name)?).map_err(|error| self.text(name, error))
    }

    fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, ReproducerError> {
        serde_json::from_slice(&self.bytes(name)?).map_err(|error| self.text(name, error))
    }

    /// The tensors of `bytes`, which are those of the file of tensors.
    fn tensors<'b>(&self, bytes: &'b [u8]) -> Result<SafeTensors<'b>, ReproducerError> {
        let file = self.folder.join(TENSORS);
        Ok(SafeTensors::deserialize(bytes).map_err(|source| FileError::Format { file, source })?)
    }

    fn text(&self, name: &str, said: impl ToString) -> ReproducerError {
        FileError::Text { file: self.folder.join(name), said: said.to_string() }.into()
    }

    fn content(
        &self,
        name: &str,
        what: impl ToString,
        found: impl ToString,
        expected: impl ToString,
    ) -> ReproducerError {
        let (file, what) = (self.folder.join(name), what.to_string());
        FileError::Content { file, what, found: found.to_string(), expected: expected.to_string() }.into()
    }
}
