//! The manifest of an artifact: what it is, in JSON.

use serde::{Deserialize, Serialize};

/// Everything that one wants to know of an artifact before looking at its sections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Where the model came from: a file's or directory's last name, or a preset's.
    pub model: String,
    /// The model's config, as `models` writes it.
    pub config: serde_json::Value,
    /// Dtype of weights and stored values.
    pub dtype: String,
    /// Positions that a sequence may have.
    pub context: usize,
    /// Is there a `weights` section?
    pub weights: bool,
    /// Code, one for each target: best first.
    pub targets: Vec<TargetCode>,
    /// Has the code a function for each launch, beside the entry points?
    #[serde(default)]
    pub taps: bool,
    /// Version of llamac.
    pub compiler: String,
    /// Version of LLVM.
    pub llvm: String,
    /// Token that begins a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

/// Code for one target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetCode {
    /// As on the command line.
    pub name: String,
    /// Version of the context and of the entry points' signature.
    pub abi: u32,
    /// CPU features that must be there.
    pub requires: Vec<String>,
    /// Bytes of shared memory that a GPU must allow a CTA; 0 where nothing is said, as artifacts of older versions do.
    #[serde(default)]
    pub shared_bytes: usize,
    /// Instruction set: `x86_64`, `aarch64`, `nvptx64`.
    pub arch: String,
    /// Section of the weights, in the order that this code reads.
    #[serde(default = "weights")]
    pub weights: String,
    /// Version of the `ptxas` that assembled the code into machine code of one GPU; none where there is PTX alone.
    #[serde(default)]
    pub ptxas: Option<String>,
}

fn weights() -> String {
    WEIGHTS.to_string()
}

impl TargetCode {
    /// Section of the plan's text.
    pub fn plan_section(&self) -> String {
        format!("plan.{}", self.name)
    }

    /// Section of the code.
    pub fn code_section(&self) -> String {
        format!("code.{}", self.name)
    }

    /// Section of the machine code of the GPU that the target names: an ELF file. It may be missing.
    pub fn cubin_section(&self) -> String {
        format!("cubin.{}", self.name)
    }

    /// Section of the kernels' text: how many threads and how much shared memory a launch needs. For a GPU.
    pub fn kernels_section(&self) -> String {
        format!("kernels.{}", self.name)
    }

    /// Section of the graphs' text after all passes, which says what each launch stores; beside taps.
    pub fn fused_section(&self) -> String {
        format!("fused.{}", self.name)
    }
}

/// Section of the graphs' text: what the artifact computes, before any pass.
///
/// It has an entry point for each of the first target's plan, which is the one that the interpreter runs. Those of other targets
/// are the same graph for other ranges of tokens, so they would say nothing more.
pub const GRAPH: &str = "graph";
/// Section of the tokenizer.
pub const TOKENIZER: &str = "tokenizer";
/// Section of the chat template.
pub const CHAT_TEMPLATE: &str = "chat_template";
/// Section of the weights, as CPUs read them.
pub const WEIGHTS: &str = "weights";
/// Section of the weights, as GPUs read them.
pub const GPU_WEIGHTS: &str = "weights.gpu";
/// Section of the records of the tuning table that schedules were taken from: one JSON object a line.
pub const TUNING: &str = "tuning";
