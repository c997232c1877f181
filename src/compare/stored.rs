//! What launches store, value by value: found in a device's memory by the names in the plan and the layouts in the text
//! of the graphs after all passes, which an artifact with taps holds. So any artifact can be looked at, whichever llamac
//! made it.

use super::memory;
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::families::storage;
use ir::graph::{Graph, Value, ValueId};
use ir::interp::Tensor;
use ir::op::Op;
use ir::plan::Plan;
use runtime::artifact::{Artifact, ArtifactError};
use runtime::device::{DeviceError, Tap};
use runtime::interpreter::InterpretedProgram;
use runtime::manifest::TargetCode;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

/// What a graph binds in a step.
pub struct Bound<'b> {
    /// Has the artifact's weights.
    pub weights: &'b mut InterpretedProgram,
    /// The step's.
    pub symbols: [i64; MAX_SYMBOLS],
    /// The step's.
    pub tokens: &'b [i32],
    /// What the steps before have stored in the caches, by name; zero where nothing has.
    pub caches: &'b BTreeMap<String, Rc<Tensor>>,
}

impl Bound<'_> {
    /// The tensor of an input, a weight or a state.
    ///
    /// # Errors
    ///
    /// If the artifact does not hold all of a weight.
    ///
    /// # Panics
    ///
    /// On values that are computed.
    pub fn tensor(&mut self, value: &Value) -> Result<Rc<Tensor>, DeviceError> {
        let past = self.symbols[1];
        let ids = |data: Vec<f64>| Rc::new(Tensor::new(DType::I32, &[data.len()], &data));
        Ok(match &value.op {
            Op::Weight { name } => self.weights.weight(name, &value.ty)?,
            Op::State { name } => self.caches.get(name).cloned().unwrap_or_else(|| {
                let extents = value.ty.shape.iter().map(|d| d.eval(&self.symbols) as usize);
                let shape: Vec<usize> = extents.collect();
                let data = vec![0.0; shape.iter().product()];
                Rc::new(Tensor { dtype: value.ty.dtype, shape, data })
            }),
            Op::Input { name } if name == "tokens" => {
                ids(self.tokens.iter().map(|&t| f64::from(t)).collect())
            }
            Op::Input { .. } => ids((past..past + self.symbols[0]).map(|p| p as f64).collect()),
            op => panic!("{op:?} is not bound"),
        })
    }
}

/// Why nothing can be said of what launches store.
#[derive(Debug, thiserror::Error)]
pub enum StoredError {
    /// The artifact has no such text.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// The text is none, or not that of the plan.
    #[error("{}: section `{section}`: {said}", file.display())]
    Graphs {
        /// The artifact.
        file: PathBuf,
        /// Its section.
        section: String,
        /// What is wrong.
        said: String,
    },
    /// A value for which the plan has no memory, or too little.
    #[error("@{entry}: %{value}: launch {launch} stores it in no buffer that it fits")]
    Place {
        /// The entry point.
        entry: String,
        /// The value.
        value: String,
        /// The launch's number.
        launch: usize,
    },
}

/// The graphs of a target after all passes, one for each entry point of its plan and in that order.
///
/// # Errors
///
/// [`StoredError::Artifact`] if it was compiled without taps, [`StoredError::Graphs`] if the text is not the plan's.
pub fn fused(artifact: &Artifact, target: &TargetCode, plan: &Plan) -> Result<Vec<Graph>, StoredError> {
    let section = target.fused_section();
    let bad = |said: String| {
        let (file, section) = (artifact.file().to_path_buf(), section.clone());
        StoredError::Graphs { file, section, said }
    };
    let text = std::str::from_utf8(artifact.require(&section)?).map_err(|error| bad(error.to_string()))?;
    let graphs = ir::parse::graphs(text).map_err(|error| bad(error.to_string()))?;
    if graphs.len() != plan.entries.len() {
        return Err(bad(format!(
            "{} graphs, the plan has {} entry points",
            graphs.len(),
            plan.entries.len()
        )));
    }
    for (graph, entry) in graphs.iter().zip(&plan.entries) {
        ir::verify::verify(graph).map_err(|error| bad(error.to_string()))?;
        let launches = (graph.groups.len(), entry.launches.len());
        if graph.name != entry.name || graph.symbols != entry.symbols || launches.0 != launches.1 {
            return Err(bad(format!("graph @{} is not entry point @{} of the plan", graph.name, entry.name)));
        }
        let kept = |dtype: DType| matches!(dtype, DType::F32 | DType::BF16 | DType::I32 | DType::Bool);
        let values = graph.values.iter().filter(|value| value.group.is_some());
        if let Some(value) = values.into_iter().find(|value| !kept(value.ty.dtype)) {
            return Err(bad(format!("%{}: no kernel stores {}", value.name, value.ty.dtype)));
        }
    }
    Ok(graphs)
}

/// What the launch that was just run has stored as `root`.
///
/// # Errors
///
/// [`StoredError::Place`].
pub fn tensor(
    graph: &Graph,
    plan: &Plan,
    root: ValueId,
    symbols: &[i64; MAX_SYMBOLS],
    tap: Tap<'_>,
) -> Result<Tensor, StoredError> {
    let name = buffer_name(graph, root);
    let args = &tap.entry.launches[tap.launch].args;
    let buffer = args.iter().find(|&&buffer| plan.buffers[buffer].name == name);
    let tensor = buffer.and_then(|&buffer| memory::stored(graph, root, symbols, &tap.bytes(buffer)));
    tensor.ok_or_else(|| StoredError::Place {
        entry: tap.entry.name.clone(),
        value: graph[root].name.clone(),
        launch: tap.launch,
    })
}

/// What a plan calls the memory of a value: a cache bears its own name, all else that of the entry point too.
pub fn buffer_name(graph: &Graph, id: ValueId) -> String {
    let kept = &graph[storage(graph, id)];
    match &kept.op {
        Op::State { name } => name.clone(),
        _ => format!("{}/{}", graph.name, kept.name),
    }
}
