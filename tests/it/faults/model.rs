//! A small model in memory that faults are planted in: two layers, two query heads to a KV head, and rows and columns
//! that fill no panel.

use crate::Checked;
use codegen::Backend;
use ir::DType;
use ir::interp::Rounding;
use ir::plan::Plan;
use ir::random::Rng;
use llamac::compare::logits::{Logits, LogitsFault};
use llamac::compile::{self, Options};
use llamac::pipeline::{Lowered, Request};
use llamac::reference::Reference;
use llamac::weights::{self, Source};
use models::{Checkpoint, Config, FileBytes, ReadError};
use runtime::artifact::{Artifact, ArtifactWriter};
use runtime::device::Program;
use runtime::interpreter::InterpretedProgram;
use runtime::manifest::{Manifest, WEIGHTS};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

const CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 40,
    "hidden_size": 48, "intermediate_size": 41, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2
}"#;

/// Tensors by name: shape and numbers.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The model, compiled with taps for this machine.
pub struct Model {
    pub config: Config,
    pub dtype: DType,
    pub tensors: Tensors,
    /// Two entry points, `decode` and `logits_all`, that between them have every kind of launch.
    pub lowered: Lowered,
    backend: Backend,
    artifact: Artifact,
    reference: Reference,
    folder: TempDir,
}

impl Model {
    pub fn new(dtype: DType) -> Checked<Model> {
        let (config, _) = Config::from_hf_json(CONFIG, Path::new("config.json"))?;
        let mut rng = Rng(1);
        let mut tensors = Tensors::new();
        for (name, shape) in config.tensors() {
            let columns = *shape.last().ok_or("a tensor has dims")? as f64;
            let number = |rng: &mut Rng| match shape.len() {
                1 => 1.0 + 0.1 * rng.unit(),
                // Uniform, of variance 1 / columns: activations stay near one.
                _ => (3.0 / columns).sqrt() * rng.unit(),
            };
            let numbers = (0..shape.iter().product()).map(|_| number(&mut rng) as f32).collect();
            tensors.insert(name, (shape, numbers));
        }
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("right.llamac");
        let right = checkpoint(&tensors)?;
        let context = config.context;
        let options = Options {
            model: "small".to_string(),
            config: &config,
            weights: Some(Source::Checkpoint(&right)),
            tokenizer: None,
            chat_template: None,
            dtype,
            context,
            targets: vec!["cpu:native".to_string()],
            taps: true,
            measured: None,
            cubin: false,
            keep: None,
        };
        compile::compile(&options, &file, &mut |_| ControlFlow::Continue(()))?;
        let artifact = Artifact::open(&file)?;
        let request = Request { config: &config, dtype, context, measured: None };
        let code = compile::lower(&request, "cpu:native", true)?;
        let (backend, mut lowered) = (code.backend, code.lowered);
        let kept = |name: &str| ["decode", "logits_all"].contains(&name);
        lowered.entries.retain(|entry| kept(&entry.graph.name));
        lowered.plan.entries.retain(|entry| kept(&entry.name));
        let mut exact = InterpretedProgram::load(&artifact, Rounding::Exact)?;
        let mut stored = InterpretedProgram::load(&artifact, Rounding::Stored)?;
        let reference = Reference::interpreted(&mut exact, &mut stored, &[9], 4)?;
        Ok(Model { config, dtype, tensors, lowered, backend, artifact, reference, folder })
    }

    /// The weights section, packed from a checkpoint as the plan says.
    pub fn packed(&self, checkpoint: &Checkpoint) -> Checked<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut append = |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok::<_, ReadError>(())
        };
        weights::write(&self.lowered.plan, &Source::Checkpoint(checkpoint), &mut append, &mut |_| ())?;
        Ok(bytes)
    }

    /// The artifact with other weights.
    pub fn with_weights(&self, weights: &[u8]) -> Checked<Artifact> {
        self.with(&[(WEIGHTS, weights)])
    }

    /// The artifact with another plan, and the code for it.
    pub fn with_plan(&self, plan: &Plan) -> Checked<Artifact> {
        let code = self.backend.code(&self.backend.llvm(plan, &self.lowered.kernels, true)?)?;
        let target = &self.artifact.manifest::<Manifest>()?.targets[0];
        self.with(&[(&target.plan_section(), plan.to_string().as_bytes()), (&target.code_section(), &code)])
    }

    fn with(&self, others: &[(&str, &[u8])]) -> Checked<Artifact> {
        // Loaded code keeps its own copy, and the file of the one before is replaced by renaming.
        let file: PathBuf = self.folder.path().join("mutant.llamac");
        let mut writer = ArtifactWriter::create(&file, None)?;
        for section in self.artifact.sections() {
            let own = self.artifact.require(&section.name)?;
            let other = others.iter().find(|(name, _)| *name == section.name);
            let mut out = writer.section(&section.name)?;
            out.append(other.map_or(own, |(_, bytes)| bytes))?;
            out.end()?;
        }
        writer.finish(&self.artifact.manifest::<Manifest>()?)?;
        Ok(Artifact::open(&file)?)
    }

    /// The weights as they are, for judging launches.
    pub fn weights(&self) -> Checked<InterpretedProgram> {
        Ok(InterpretedProgram::load(&self.artifact, Rounding::Stored)?)
    }

    /// Judges what a program says, by the interpreter in f64.
    pub fn logits(&self, program: &mut dyn Program) -> Checked<Result<(), LogitsFault>> {
        let mut honest = self.weights()?;
        let mut exact = InterpretedProgram::load(&self.artifact, Rounding::Exact)?;
        Ok(Logits::default().judge(program, [&mut honest, &mut exact], &self.reference, self.dtype)?)
    }
}

/// A checkpoint of these tensors, in f32.
pub fn checkpoint(tensors: &Tensors) -> Checked<Checkpoint> {
    let bytes: Vec<_> = tensors
        .iter()
        .map(|(name, (shape, numbers))| {
            let data: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
            (name, shape, data)
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, data)| {
        (*name, TensorView::new(Dtype::F32, shape.to_vec(), data).expect("as many numbers as its shape says"))
    });
    let file: FileBytes = Arc::new(safetensors::serialize(views, None)?);
    let open = |path: &Path| match path.file_name().and_then(|name| name.to_str()) {
        Some("config.json") => Ok(Arc::new(CONFIG) as FileBytes),
        Some("model.safetensors") => Ok(file.clone()),
        _ => Err(std::io::ErrorKind::NotFound.into()),
    };
    Ok(Checkpoint::open_directory(Path::new("small"), &open)?)
}
