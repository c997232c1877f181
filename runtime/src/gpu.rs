//! What all GPUs have in common, real and emulated: which code of an artifact they take, and what a step launches.
//!
//! A kernel's parameters are the addresses of its buffers, then the symbols as 32-bit integers, each in the order of its text.
//! Its workers are CTAs; any number of them computes the whole. A kernel with barriers is a grid for each of its phases
//! ([`Kernel::phases`]), with the same parameters: in the order of one stream a grid begins when the one before has ended.
//!
//! Code for sm_90a says itself when it needs the grids before it (*programmatic dependent launch*): such a grid may begin when
//! all CTAs of the one before have begun, fetches instructions, tensor maps and weights, and then waits until that one has
//! ended. As each waits, the one before has waited in its turn, so all before it are over.

use crate::artifact::Artifact;
use crate::cpu::read_plan;
use crate::cuda::CTAS_PER_SM;
use crate::device::DeviceError;
use crate::manifest::{Manifest, TargetCode};
use crate::tensor_map::{Element, Fill, Swizzle, TENSOR_MAP_ALIGN, TENSOR_MAP_BYTES, TensorMap};
use ir::dim::MAX_SYMBOLS;
use ir::dtype::DType;
use ir::graph::Family;
use ir::kernel::warpgroup::WARPGROUP;
use ir::kernel::{self, Buffer, Kernel, reads};
use ir::plan::Plan;
use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

/// Version of how kernels are called; codegen's number must be the same.
pub const ABI: u32 = 1;

/// Instruction set of GPU code, as a manifest names it.
pub const ARCH: &str = "nvptx64";

/// A form of code for GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Machine code, for one kind of GPU.
    Cubin,
    /// Text that the driver compiles at load.
    Ptx,
}

/// What GPUs of a range of compute capabilities take, best first.
struct Row {
    /// The first, in tenths: 8.0 is 80.
    from: u32,
    /// The last.
    to: u32,
    /// Code for this machine, in this form.
    takes: &'static [(&'static str, Form)],
}

/// Which code a GPU takes. Machine code runs on its own major version, from its minor one on; PTX on all that came later, but
/// that of an `a` architecture nowhere else (CUDA C++ Programming Guide, "Compute Capabilities").
#[rustfmt::skip] // a table: one row a line
const RULE: [Row; 3] = [
    Row { from: 80, to: 89, takes: &[("sm_80", Form::Cubin), ("sm_80", Form::Ptx)] },
    Row { from: 90, to: 90, takes: &[("sm_90a", Form::Cubin), ("sm_90a", Form::Ptx), ("sm_80", Form::Ptx)] },
    Row { from: 100, to: u32::MAX, takes: &[("sm_80", Form::Ptx)] },
];

/// A compute capability in tenths, as it is written.
pub fn capability_text(capability: u32) -> String {
    format!("{}.{}", capability / 10, capability % 10)
}

/// What a GPU of this compute capability takes, best first; nothing if it is too old.
pub fn takes(capability: u32) -> &'static [(&'static str, Form)] {
    let row = RULE.iter().find(|row| row.from <= capability && capability <= row.to);
    row.map_or(&[], |row| row.takes)
}

/// What the user should know of a GPU of this compute capability: that no code is for it in particular.
pub fn remark(capability: u32) -> Option<String> {
    let [(sm, Form::Ptx)] = takes(capability) else { return None };
    Some(format!(
        "a GPU of compute capability {}: it runs PTX for {sm}, which the driver compiles at load",
        capability_text(capability)
    ))
}

fn machine(target: &TargetCode) -> Option<&str> {
    let gpu = target.arch == ARCH && target.abi == ABI;
    target.requires.first().filter(|_| gpu).map(String::as_str)
}

/// The best code of an artifact for a GPU of this compute capability, in tenths: 8.0 is 80; of one machine the code that uses the
/// most shared memory of what the GPU allows a CTA, in bytes.
///
/// # Errors
///
/// [`DeviceError::MissingFeature`], with what each target needs.
pub fn choose<'a>(
    file: &Path,
    manifest: &'a Manifest,
    capability: u32,
    shared_bytes: u32,
) -> Result<&'a TargetCode, DeviceError> {
    let fits = |target: &&TargetCode| target.shared_bytes <= shared_bytes as usize;
    let of = |&(sm, _): &(&str, Form)| {
        let targets = manifest.targets.iter().filter(|target| machine(target) == Some(sm));
        targets.filter(fits).max_by_key(|target| target.shared_bytes)
    };
    takes(capability).iter().find_map(of).ok_or_else(|| {
        let kib = |bytes: usize| format!(", {} KiB of shared memory", bytes >> 10);
        let needs = manifest.targets.iter().map(|target| {
            let shared = if target.shared_bytes > 0 { kib(target.shared_bytes) } else { String::new() };
            format!("{} (ABI {}{shared})", target.name, target.abi)
        });
        DeviceError::MissingFeature {
            file: file.to_path_buf(),
            needs: needs.collect::<Vec<_>>().join(" or "),
            has: format!(
                "a GPU of compute capability {}, ABI {ABI}{}",
                capability_text(capability),
                kib(shared_bytes as usize)
            ),
        }
    })
}

/// The sections of a target that hold its code in forms that such a GPU takes, best first.
pub fn images(target: &TargetCode, has: impl Fn(&str) -> bool, capability: u32) -> Vec<(Form, String)> {
    let forms = takes(capability).iter().filter(|(sm, _)| machine(target) == Some(sm));
    let sections = forms.map(|&(_, form)| match form {
        Form::Cubin => (form, target.cubin_section()),
        Form::Ptx => (form, target.code_section()),
    });
    sections.filter(|(_, section)| has(section)).collect()
}

/// A grid as a GPU is asked for it. Two that are equal do the same on the same memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// By its number in [`GpuCode::phases`].
    pub phase: usize,
    /// CTAs.
    pub ctas: u32,
    /// Threads of a CTA.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a CTA.
    pub shared_bytes: u32,
    /// The parameters, as they lie in memory; without tensor maps, which each device writes in its own way.
    pub params: Vec<u8>,
    /// The tensor maps behind them: see [`with_maps`].
    pub maps: Vec<TensorMap>,
    /// May the grid begin before the one before has ended? It waits for that itself, where it needs to.
    pub dependent: bool,
}

/// CTAs of a kernel's launch at most, where `most` is for kernels of which a multiprocessor holds several.
///
/// A product of two warpgroups has one for itself, by its registers. As many CTAs as there are multiprocessors then take all
/// turns: while one tile's epilogue runs, the next one's steps are fetched into the ring, which goes on from turn to turn. Further
/// CTAs would begin with an empty ring each. (The turns of an attention differ in length: there a multiprocessor that is done
/// takes the next CTA.)
pub fn most_ctas(kernel: &Kernel, most: u32) -> u32 {
    let alone =
        kernel.family == Family::Dot && !kernel.mbarriers.is_empty() && kernel.threads > 2 * WARPGROUP;
    if alone { most.div_ceil(CTAS_PER_SM) } else { most }
}

/// A phase of a kernel: one entry of the module.
#[derive(Debug)]
pub struct Phase {
    /// The kernel, by its number in the plan.
    pub kernel: usize,
    /// What it runs.
    pub code: Kernel,
    /// Bytes of shared memory of a CTA.
    pub shared_bytes: u32,
    /// The symbols that it reads.
    reads: [bool; MAX_SYMBOLS],
    /// Does its code wait for the grids before it (PTX `griddepcontrol.wait`)?
    waits: bool,
}

/// Code for GPUs, taken from an artifact and checked.
#[derive(Debug)]
pub struct GpuCode {
    /// What runs on which bytes.
    pub plan: Plan,
    /// The plan's kernels.
    pub kernels: Vec<Kernel>,
    /// The module of all kernels.
    pub ptx: String,
    /// Those of the first kernel, in their order, then those of the next.
    pub phases: Vec<Phase>,
    /// Of each kernel: its phases.
    of_kernel: Vec<Range<usize>>,
}

impl GpuCode {
    /// Reads the code of a target.
    ///
    /// # Errors
    ///
    /// When a section is missing, or plan and kernels do not belong together.
    pub fn read(artifact: &Artifact, target: &TargetCode) -> Result<GpuCode, DeviceError> {
        let bad = |section: String, said: String| DeviceError::BadPlan {
            file: artifact.file().to_path_buf(),
            section,
            said,
        };
        let text = |section: String| match std::str::from_utf8(artifact.require(&section)?) {
            Ok(text) => Ok((section, text)),
            Err(said) => Err(bad(section, said.to_string())),
        };
        let plan = read_plan(artifact, target)?;
        let (section, kernels) = text(target.kernels_section())?;
        let kernels = kernel::parse::parse(kernels).map_err(|e| bad(section.clone(), e.to_string()))?;
        for kernel in &kernels {
            kernel::verify::verify(kernel).map_err(|e| bad(section.clone(), e.to_string()))?;
        }
        if !kernels.iter().map(|k| &k.name).eq(plan.kernels.iter().map(|k| &k.name)) {
            return Err(bad(section, "the kernels are not those of the plan".to_string()));
        }
        for launch in plan.entries.iter().flat_map(|entry| &entry.launches) {
            let kernel = &kernels[launch.kernel];
            if kernel.params().count() != launch.args.len() {
                return Err(bad(section, format!("@{} has not the parameters of its launch", kernel.name)));
            }
        }
        let ptx = text(target.code_section())?.1.to_string();
        Ok(GpuCode::new(plan, kernels, ptx))
    }

    pub(crate) fn new(plan: Plan, kernels: Vec<Kernel>, ptx: String) -> GpuCode {
        let (mut phases, mut of_kernel) = (Vec::new(), Vec::new());
        let entries = ptx.split(".entry ").skip(1).filter(|entry| entry.contains("griddepcontrol.wait"));
        let waiting: HashSet<&str> =
            entries.filter_map(|entry| Some(entry.split_once('(')?.0.trim())).collect();
        for (number, kernel) in kernels.iter().enumerate() {
            let first = phases.len();
            phases.extend(kernel.phases().into_iter().map(|code| {
                let (shared_bytes, reads) = (code.shared_bytes() as u32, reads::symbols(&code));
                let waits = waiting.contains(symbol(&code.name).as_str());
                Phase { kernel: number, code, shared_bytes, reads, waits }
            }));
            of_kernel.push(first..phases.len());
        }
        GpuCode { plan, kernels, ptx, phases, of_kernel }
    }

    /// What an entry point launches, in order, on buffers at these addresses, with at most so many CTAs each
    /// ([`most_ctas`]): of each launch the phases of its kernel.
    ///
    /// A symbol that a phase does not read is passed as 0, so that a launch depends on no more than it must. All grids but the
    /// first that wait for those before them may begin early.
    pub fn calls(
        &self,
        entry: usize,
        addresses: &[u64],
        symbols: &[i64; MAX_SYMBOLS],
        most_ctas: u32,
    ) -> Vec<Vec<Call>> {
        let call = |launch: &ir::plan::Launch, number: usize| {
            let Phase { code, shared_bytes, reads, waits, .. } = &self.phases[number];
            let bound: Vec<u64> = launch.args.iter().map(|&arg| addresses[arg]).collect();
            let mut params: Vec<u8> = bound.iter().flat_map(|address| address.to_le_bytes()).collect();
            for (symbol, _) in code.symbols.0.iter().enumerate() {
                let value = if reads[symbol] { symbols[symbol] } else { 0 };
                params.extend((value as i32).to_le_bytes());
            }
            Call {
                phase: number,
                ctas: code.turns(symbols).min(self::most_ctas(code, most_ctas).into()) as u32,
                threads: code.threads.into(),
                shared_bytes: *shared_bytes,
                params,
                maps: tensor_maps(code, &bound, symbols),
                dependent: *waits,
            }
        };
        let calls = |launch: &ir::plan::Launch| {
            self.of_kernel[launch.kernel].clone().map(|number| call(launch, number)).collect()
        };
        let mut calls: Vec<Vec<Call>> = self.plan.entries[entry].launches.iter().map(calls).collect();
        // What the host writes, and the step before, are over when the first begins.
        if let Some(first) = calls.first_mut().and_then(|calls| calls.first_mut()) {
            first.dependent = false;
        }
        calls
    }

    /// Does an entry point launch the same for all tokens and positions? Then it can be recorded once and replayed.
    ///
    /// Each symbol that a kernel of it reads has one value; what else changes from step to step lies in buffers.
    pub fn is_constant(&self, entry: usize) -> bool {
        let entry = &self.plan.entries[entry];
        let varies = |number: usize| entry.symbols.0.get(number).is_none_or(|s| s.min != s.max);
        let constant = |phase: &Phase| (0..MAX_SYMBOLS).all(|n| !(phase.reads[n] && varies(n)));
        let phases =
            entry.launches.iter().flat_map(|launch| &self.phases[self.of_kernel[launch.kernel].clone()]);
        phases.into_iter().all(constant)
    }
}

/// The tensor maps of a kernel, on params at these addresses, in calling order.
///
/// # Panics
///
/// On a kernel that the verifier refuses.
pub fn tensor_maps(kernel: &Kernel, addresses: &[u64], symbols: &[i64; MAX_SYMBOLS]) -> Vec<TensorMap> {
    let map = |map: &ir::kernel::warpgroup::TensorMap| {
        let param = kernel.params().position(|(id, _)| id == map.buffer).expect("a map is of a param");
        let Buffer { dtype, shape, strides, .. } = &kernel[map.buffer];
        let bytes = dtype.bytes(1) as u64;
        // A map's lists go from the innermost dimension outwards, and the innermost has no stride.
        let outwards = || (0..shape.len()).rev();
        TensorMap {
            dtype: match dtype {
                DType::F64 => Element::F64,
                DType::F32 => Element::F32,
                DType::F16 => Element::F16,
                DType::BF16 => Element::Bf16,
                DType::I32 => Element::S32,
                DType::I8 | DType::U8 | DType::Bool | DType::Block(_) => Element::U8,
            },
            base: addresses[param],
            dims: outwards().map(|axis| shape[axis].eval(symbols) as u64).collect(),
            strides: outwards().skip(1).map(|axis| strides[axis] as u64 * bytes).collect(),
            tile: outwards().map(|axis| map.extents[axis].into()).collect(),
            element_strides: vec![1; shape.len()],
            swizzle: Swizzle::Bytes128,
            fill: Fill::Zeros,
        }
    };
    kernel.maps.iter().map(map).collect()
}

/// Parameters with the bytes of tensor maps behind them, at multiples of 64.
pub fn with_maps(params: &[u8], maps: impl IntoIterator<Item = [u8; TENSOR_MAP_BYTES]>) -> Vec<u8> {
    maps.into_iter().fold(params.to_vec(), |mut params, map| {
        params.resize(params.len().next_multiple_of(TENSOR_MAP_ALIGN as usize), 0);
        params.extend(map);
        params
    })
}

/// The version of the PTX ISA that a text asks for: `7.4`.
pub fn isa(ptx: &str) -> Option<&str> {
    ptx.lines().find_map(|line| line.strip_prefix(".version ")).map(str::trim)
}

/// A kernel's name in PTX, which knows no dots.
pub fn symbol(kernel: &str) -> String {
    format!("k_{}", kernel.replace('.', "$"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a GPU takes of an artifact with code for these machines, in the order in which it is tried.
    fn taken(capability: u32, kib: u32, machines: &[&str], cubins: bool) -> String {
        let target = |name: &&str| TargetCode {
            name: format!("cuda:{name}"),
            abi: ABI,
            requires: vec![name.trim_end_matches("-99k").to_string()],
            shared_bytes: match *name {
                "sm_80" => 163 << 10,
                "sm_80-99k" => 99 << 10,
                _ => 0,
            },
            arch: ARCH.to_string(),
            weights: String::new(),
            ptxas: None,
        };
        let manifest = Manifest {
            model: String::new(),
            config: serde_json::Value::Null,
            dtype: String::new(),
            context: 0,
            weights: false,
            targets: machines.iter().map(target).collect(),
            taps: false,
            compiler: String::new(),
            llvm: String::new(),
            bos: None,
            eos: Vec::new(),
        };
        let target = match choose(Path::new("a.llamac"), &manifest, capability, kib << 10) {
            Ok(target) => target,
            Err(error) => return error.to_string(),
        };
        let has = |section: &str| cubins || !section.starts_with("cubin.");
        let sections = images(target, has, capability).into_iter().map(|(_, section)| section);
        sections.collect::<Vec<_>>().join(", ")
    }

    #[test]
    #[rustfmt::skip] // a table: one GPU a line
    fn each_gpu_takes_the_best_code_for_it() {
        let (all, old) = (&["sm_80-99k", "sm_80", "sm_90a"], &["sm_80"]);
        let small = &["sm_80-99k"];
        let cases: &[(u32, u32, &[&str], bool, &str)] = &[
            (80, 163, all, true, "cubin.cuda:sm_80, code.cuda:sm_80"),
            (86, 99, all, true, "cubin.cuda:sm_80-99k, code.cuda:sm_80-99k"),
            (87, 163, all, true, "cubin.cuda:sm_80, code.cuda:sm_80"),
            (89, 99, all, false, "code.cuda:sm_80-99k"),
            (80, 163, small, false, "code.cuda:sm_80-99k"),
            (90, 227, all, true, "cubin.cuda:sm_90a, code.cuda:sm_90a"),
            (90, 227, all, false, "code.cuda:sm_90a"),
            // Machine code for 8.0 does not run on 9.0, nor that for 9.0a anywhere else.
            (90, 227, old, true, "code.cuda:sm_80"),
            (100, 227, all, true, "code.cuda:sm_80"),
            (103, 227, all, true, "code.cuda:sm_80"),
            (120, 99, all, false, "code.cuda:sm_80-99k"),
            (120, 99, small, true, "code.cuda:sm_80-99k"),
        ];
        for &(capability, kib, machines, cubins, expected) in cases {
            assert_eq!(taken(capability, kib, machines, cubins), expected, "{capability} of {machines:?}");
            assert_eq!(remark(capability).is_some(), capability >= 100, "{capability}");
        }
    }

    #[test]
    fn a_product_that_fills_a_multiprocessor_has_a_cta_on_each() {
        let most = |family: &str, threads: usize, mbarrier: &str| {
            let head = format!("kernel @k : {family}, schedule \"\", {threads} threads (T in 1..8) {{\n");
            let text = head + mbarrier + "  parallel %t in 0..T {\n    sync\n  }\n}\n";
            most_ctas(&kernel::parse::parse(&text).unwrap()[0], 8 * 132)
        };
        let mbarrier = "  mbarrier %m[4] of 1\n";
        assert_eq!(most("dot", 384, mbarrier), 132);
        let others = [("dot", 256, mbarrier), ("attention", 384, mbarrier), ("dot", 384, "")];
        for (family, threads, mbarrier) in others {
            assert_eq!(most(family, threads, mbarrier), 8 * 132);
        }
    }

    #[test]
    fn a_gpu_without_code_is_told_what_there_is() {
        let said = "a.llamac: needs cuda:sm_80 (ABI 1, 163 KiB of shared memory) or cuda:sm_90a (ABI 1), this machine is a GPU of \
                    compute capability 7.5, ABI 1, 64 KiB of shared memory; `compile --target` makes code for it";
        assert_eq!(taken(75, 64, &["sm_80", "sm_90a"], true), said);
        let of_an_a100 = taken(89, 99, &["sm_80"], true);
        assert!(
            of_an_a100.contains("needs cuda:sm_80 (ABI 1, 163 KiB of shared memory), this"),
            "{of_an_a100}"
        );
        assert!(
            taken(86, 99, &["sm_90a"], true)
                .contains("needs cuda:sm_90a (ABI 1), this machine is a GPU of compute capability 8.6")
        );
        assert_eq!(
            remark(120).unwrap(),
            "a GPU of compute capability 12.0: it runs PTX for sm_80, which the driver compiles at load"
        );
    }
}
