//! The CPU: maps an artifact's code and calls it.
//!
//! Invariants:
//! 1. Code is loaded only after the artifact's digests (by [`Artifact::open`]), its ABI number and the CPU's features were
//!    checked, and the plan was verified.
//! 2. Every buffer that the plan names is in the table while an entry point runs, with at least the bytes of the plan:
//!    weights inside the mapped section, which code only reads; the others inside memory that the program or state owns.

use crate::artifact::Artifact;
use crate::code::{ABI, Code};
use crate::device::{Device, DeviceError, Memory, Program, State, Step, StepOutputs, Tap, Tapped, Want};
use crate::manifest::{Manifest, TargetCode};
use crate::map::{FileBytes, OwnedBuf};
use ir::dim::MAX_SYMBOLS;
use ir::plan::{Entry, Place, Plan};
use std::borrow::Cow;
use std::collections::HashMap;
use std::convert::Infallible;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The CPU that runs this program.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    /// Workers.
    pub threads: usize,
}

impl Device for Cpu {
    fn load(&mut self, artifact: &Artifact) -> Result<Box<dyn Program>, DeviceError> {
        Ok(Box::new(self.open(artifact)?))
    }

    fn load_tapped(&mut self, artifact: &Artifact) -> Result<Box<dyn Tapped>, DeviceError> {
        Ok(Box::new(self.open(artifact)?))
    }
}

impl Cpu {
    /// As [`Device::load`], for who wants what only the CPU's program can do.
    ///
    /// # Errors
    ///
    /// As [`Device::load`].
    pub fn open(&self, artifact: &Artifact) -> Result<CpuProgram, DeviceError> {
        CpuProgram::load(artifact, self.threads)
    }
}

/// This CPU's name, as the system has it.
pub fn model_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or(std::env::consts::ARCH.to_string(), |(_, name)| name.trim().to_string())
}

/// Features of this CPU that artifacts may require.
pub fn features() -> Vec<&'static str> {
    let known = ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "avx512f", "avx512bw", "avx512cd", "avx512dq"];
    let known = known.into_iter().chain(["avx512vl", "avx512bf16", "avx512vnni", "neon"]);
    known.filter(|feature| detected(feature)).collect()
}

/// Is the feature, named as `std::arch` does, there?
fn detected(feature: &str) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! any {
            ($($name:tt)*) => { match feature { $($name => std::arch::is_x86_feature_detected!($name),)* _ => false } };
        }
        any!("avx" "avx2" "bmi1" "bmi2" "f16c" "fma" "avx512f" "avx512bw" "avx512cd" "avx512dq" "avx512vl"
             "avx512bf16" "avx512vnni")
    }
    #[cfg(target_arch = "aarch64")]
    {
        feature == "neon"
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        let _ = feature;
        false
    }
}

/// The first code in an artifact that this machine runs: the best, as they stand.
///
/// # Errors
///
/// [`DeviceError::MissingFeature`] with what each target lacks here.
pub fn choose<'a>(file: &Path, manifest: &'a Manifest) -> Result<&'a TargetCode, DeviceError> {
    let arch = std::env::consts::ARCH;
    let lacks = |target: &TargetCode| -> Vec<String> {
        if target.arch != arch {
            return vec![target.arch.clone()];
        }
        target.requires.iter().filter(|f| !detected(f)).cloned().collect()
    };
    let found = manifest.targets.iter().find(|t| t.abi == ABI && lacks(t).is_empty());
    found.ok_or_else(|| {
        let needs = manifest.targets.iter().map(|t| {
            if t.abi == ABI {
                format!("{} ({})", t.name, lacks(t).join(" "))
            } else {
                format!("{} (ABI {})", t.name, t.abi)
            }
        });
        DeviceError::MissingFeature {
            file: file.to_path_buf(),
            needs: needs.collect::<Vec<_>>().join(" or "),
            has: format!("{arch} with {}, ABI {ABI}", features().join(" ")),
        }
    })
}

/// A loaded artifact on the CPU.
pub struct CpuProgram {
    plan: Plan,
    context: usize,
    file: PathBuf,
    /// Entry points by their number in the plan, then the taps of each, if there are any.
    code: Code,
    taps: bool,
    arena: OwnedBuf,
    inputs: OwnedBuf,
    /// Each input's place in `inputs`, each state's in a state's memory.
    offsets: HashMap<usize, usize>,
    state_bytes: usize,
    weights: Option<(FileBytes, Range<usize>)>,
}

impl CpuProgram {
    fn load(artifact: &Artifact, threads: usize) -> Result<CpuProgram, DeviceError> {
        let manifest: Manifest = artifact.manifest()?;
        let target = choose(artifact.file(), &manifest)?;
        let plan = read_plan(artifact, target)?;
        let section = target.code_section();
        let mut names: Vec<String> = plan.entries.iter().map(|entry| entry.name.clone()).collect();
        for entry in plan.entries.iter().filter(|_| manifest.taps) {
            names.extend((0..entry.launches.len()).map(|launch| entry.tap(launch)));
        }
        let names = names.iter().map(String::as_str);
        let code = Code::load(artifact.require(&section)?, names, threads)
            .map_err(|e| DeviceError::Launch { kernel: e.what, said: e.said })?;
        let mut offsets = HashMap::new();
        let (mut inputs_bytes, mut state_bytes) = (0, 0);
        for (number, buffer) in plan.buffers.iter().enumerate() {
            let end = match buffer.place {
                Place::Input => &mut inputs_bytes,
                Place::State => &mut state_bytes,
                Place::Weight { .. } | Place::Arena { .. } => continue,
            };
            offsets.insert(number, *end);
            *end += buffer.bytes.next_multiple_of(ir::plan::ALIGN);
        }
        let weights = weights_of(artifact, target, &plan)?;
        Ok(CpuProgram {
            context: manifest.context,
            file: artifact.file().to_path_buf(),
            code,
            taps: manifest.taps,
            arena: OwnedBuf::zeroed(plan.arena_bytes, true)?,
            inputs: OwnedBuf::zeroed(inputs_bytes, false)?,
            offsets,
            state_bytes,
            weights,
            plan,
        })
    }

    /// Checks a step and writes its inputs. Gives the number of its entry point, and the values of the symbols.
    fn begin(
        &mut self,
        step: &Step<'_>,
        state: &mut State,
    ) -> Result<(usize, [i64; MAX_SYMBOLS]), DeviceError> {
        let (number, symbols) = step.entry(self, &self.plan, state)?;
        let past = state.past();
        if state.inner_mut::<OwnedBuf>()?.len() != self.state_bytes {
            return Err(DeviceError::ForeignState); // Another program's: invariant 2 would not hold.
        }
        let Entry { tokens, positions, .. } = self.plan.entries[number];
        for (buffer, bytes) in [tokens, positions].into_iter().zip(step.inputs(past)) {
            let at = self.offsets[&buffer];
            self.inputs[at..][..bytes.len()].copy_from_slice(&bytes);
        }
        Ok((number, symbols))
    }

    /// What an entry point has left in the arena.
    fn outputs(&self, step: &Step<'_>, number: usize) -> StepOutputs {
        let bytes = |buffer, count| Ok::<_, Infallible>(self.arena_bytes(buffer, count));
        let Ok(outputs) = StepOutputs::of(step, &self.plan.entries[number], self.plan.vocab, bytes);
        outputs
    }

    fn weights(&self) -> Option<&[u8]> {
        self.weights.as_ref().map(|(bytes, range)| &(**bytes).as_ref()[range.clone()])
    }

    /// Addresses of the plan's buffers, for one step.
    fn table(&mut self, state: &mut OwnedBuf) -> Vec<*mut u8> {
        let weights = self.weights().map(<[u8]>::as_ptr);
        let (arena, inputs, state) = (self.arena.as_mut_ptr(), self.inputs.as_mut_ptr(), state.as_mut_ptr());
        let place = |(number, buffer): (usize, &ir::plan::PlanBuffer)| match buffer.place {
            Place::Weight { offset, .. } => {
                weights.map_or(std::ptr::null_mut(), |w| w.wrapping_add(offset).cast_mut())
            }
            Place::Arena { offset } => arena.wrapping_add(offset),
            Place::State => state.wrapping_add(self.offsets[&number]),
            Place::Input => inputs.wrapping_add(self.offsets[&number]),
        };
        self.plan.buffers.iter().enumerate().map(place).collect()
    }

    fn arena_bytes(&self, buffer: usize, bytes: usize) -> &[u8] {
        match self.plan.buffers[buffer].place {
            Place::Arena { offset } => &self.arena[offset..offset + bytes],
            Place::Weight { .. } | Place::State | Place::Input => {
                unreachable!("verified: results are in the arena")
            }
        }
    }
}

impl Program for CpuProgram {
    fn vocab(&self) -> usize {
        self.plan.vocab
    }

    fn context(&self) -> usize {
        self.context
    }

    fn max_tokens(&self, want: Want) -> usize {
        self.plan.max_tokens(want.give())
    }

    fn state(&self) -> Result<State, DeviceError> {
        Ok(State::new(OwnedBuf::zeroed(self.state_bytes, true)?))
    }

    fn run(&mut self, step: &Step<'_>, state: &mut State) -> Result<StepOutputs, DeviceError> {
        let (number, symbols) = self.begin(step, state)?;
        let table = self.table(state.inner_mut::<OwnedBuf>()?);
        // SAFETY: invariants 1 and 2.
        unsafe { self.code.run(number, &table, symbols) };
        state.advance(step.tokens.len());
        Ok(self.outputs(step, number))
    }
}

impl Tapped for CpuProgram {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn run_tapped(
        &mut self,
        step: &Step<'_>,
        state: &mut State,
        after: &mut dyn FnMut(Tap<'_>),
    ) -> Result<StepOutputs, DeviceError> {
        if !self.taps {
            return Err(DeviceError::NoTaps { file: self.file.clone() });
        }
        let (number, symbols) = self.begin(step, state)?;
        let before: usize = self.plan.entries[..number].iter().map(|entry| entry.launches.len()).sum();
        let first = self.plan.entries.len() + before;
        let cache = state.inner_mut::<OwnedBuf>()?;
        let origin = Instant::now();
        for launch in 0..self.plan.entries[number].launches.len() {
            // Anew: what `after` read of the memory ended the table's right to write it.
            let table = self.table(cache);
            // SAFETY: invariants 1 and 2.
            let workers = unsafe { self.code.run_tap(first + launch, &table, symbols, origin) };
            let memory = &CpuMemory { program: self, cache };
            after(Tap { entry: &self.plan.entries[number], launch, workers: &workers, memory });
        }
        state.advance(step.tokens.len());
        Ok(self.outputs(step, number))
    }
}

/// A program's memory with that of a state.
struct CpuMemory<'a> {
    program: &'a CpuProgram,
    cache: &'a OwnedBuf,
}

impl Memory for CpuMemory<'_> {
    fn bytes(&self, buffer: usize) -> Cow<'_, [u8]> {
        let program = self.program;
        let bytes = program.plan.buffers[buffer].bytes;
        let (memory, at): (&[u8], usize) = match program.plan.buffers[buffer].place {
            Place::Weight { offset, .. } => (program.weights().unwrap_or_default(), offset),
            Place::Arena { offset } => (&program.arena, offset),
            Place::State => (self.cache, program.offsets[&buffer]),
            Place::Input => (&program.inputs, program.offsets[&buffer]),
        };
        Cow::Borrowed(&memory[at..at + bytes])
    }
}

/// The plan of a target, verified.
///
/// # Errors
///
/// When its text is not there, or is no valid plan.
pub fn read_plan(artifact: &Artifact, target: &TargetCode) -> Result<Plan, DeviceError> {
    let section = target.plan_section();
    let bad = |said: String| DeviceError::BadPlan {
        file: artifact.file().to_path_buf(),
        section: section.clone(),
        said,
    };
    let text = std::str::from_utf8(artifact.require(&section)?).map_err(|e| bad(e.to_string()))?;
    let plan = ir::plan::parse::parse(text).map_err(|e| bad(e.to_string()))?;
    ir::plan::verify::verify(&plan).map_err(|e| bad(e.to_string()))?;
    Ok(plan)
}

/// The weights section of a target, as large as its plan says.
///
/// # Errors
///
/// When it is not there, or smaller.
pub(crate) fn weights_of(
    artifact: &Artifact,
    target: &TargetCode,
    plan: &Plan,
) -> Result<Option<(FileBytes, Range<usize>)>, DeviceError> {
    if plan.weight_bytes() == 0 {
        return Ok(None);
    }
    let bytes = artifact.require(&target.weights)?;
    if bytes.len() < plan.weight_bytes() {
        return Err(DeviceError::BadPlan {
            file: artifact.file().to_path_buf(),
            section: target.weights.clone(),
            said: format!("{} bytes, the plan needs {}", bytes.len(), plan.weight_bytes()),
        });
    }
    let whole = (**artifact.bytes()).as_ref();
    let begin = bytes.as_ptr() as usize - whole.as_ptr() as usize;
    Ok(Some((artifact.bytes().clone(), begin..begin + bytes.len())))
}
