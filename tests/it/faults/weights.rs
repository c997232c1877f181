//! Faults in weights, and in how they are packed: all are found bit by bit, and named by layer and tensor. What a program
//! says shows most of them too, but not a flipped bit: that is why bits are compared.

use super::model::{Model, checkpoint};
use crate::Checked;
use half::bf16;
use ir::DType;
use ir::graph::Pack;
use ir::plan::{Place, PlanBuffer, WeightSource};
use llamac::compare::layer_of;
use llamac::compare::weights::{BadWeight, weights as compare};
use llamac::weights::Source;
use runtime::cpu::Cpu;
use std::collections::BTreeMap;

/// What can be wrong with a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// One percent too large.
    Scaled,
    /// The rows of two heads, or their columns, in each other's place.
    SwappedHeads,
    /// The first square of 16 rows and columns, turned.
    TransposedBlock,
    /// The tensor of that name of another layer.
    OtherLayer,
    /// Rounded as another dtype: bf16 where f32 is stored, cut off and not rounded where bf16 is.
    WrongRounding,
    /// The lowest bit of one number.
    FlippedBit,
}

/// What can be wrong with how tensors are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mispacked {
    /// Each panel in the place of the next.
    PanelByOne,
    /// Neighbouring columns of a panel in each other's place.
    SwappedLanes,
    /// The two numbers of a word of bf16 in each other's place.
    SwappedPair,
    /// Tensors that are interleaved, as gate and up are, in each other's place.
    SwappedStreams,
    /// Rows read as if they were one number longer.
    WrongPitch,
    /// Padding that holds what was there before.
    StalePadding,
}

impl Fault {
    const ALL: [Fault; 6] = [
        Fault::Scaled,
        Fault::SwappedHeads,
        Fault::TransposedBlock,
        Fault::OtherLayer,
        Fault::WrongRounding,
        Fault::FlippedBit,
    ];

    /// The tensor with the fault; `None` where it has no place.
    fn changed(self, model: &Model, name: &str) -> Option<Vec<f32>> {
        let (shape, numbers) = &model.tensors[name];
        let mut changed = numbers.clone();
        let columns = *shape.last()?;
        let mut swap =
            |a: (usize, usize), b: (usize, usize)| changed.swap(a.0 * columns + a.1, b.0 * columns + b.1);
        match self {
            Fault::Scaled => changed.iter_mut().for_each(|x| *x *= 1.01),
            Fault::SwappedHeads => {
                let d = model.config.head_dim;
                match name.split('.').rfind(|part| part.ends_with("_proj"))? {
                    "q_proj" | "k_proj" | "v_proj" => {
                        (0..d * columns).for_each(|at| {
                            swap((at / columns, at % columns), (d + at / columns, at % columns))
                        });
                    }
                    "o_proj" => (0..shape[0] * d).for_each(|at| swap((at / d, at % d), (at / d, d + at % d))),
                    _ => return None,
                }
            }
            Fault::TransposedBlock if shape.len() == 2 => {
                (0..16).for_each(|row| (0..row).for_each(|column| swap((row, column), (column, row))));
            }
            Fault::TransposedBlock => return None,
            Fault::OtherLayer => {
                let layer = layer_of(name).0?;
                let other = name.replace(&format!("layers.{layer}."), &format!("layers.{}.", 1 - layer));
                changed.clone_from(&model.tensors[&other].1);
            }
            Fault::WrongRounding => changed.iter_mut().for_each(|x| {
                *x = match model.dtype {
                    DType::F32 => bf16::from_f32(*x).to_f32(),
                    _ => f32::from_bits(x.to_bits() & 0xFFFF_0000),
                }
            }),
            Fault::FlippedBit => {
                let x = changed.last_mut()?;
                *x = match model.dtype {
                    DType::F32 => f32::from_bits(x.to_bits() ^ 1),
                    _ => bf16::from_bits(bf16::from_f32(*x).to_bits() ^ 1).to_f32(),
                };
            }
        }
        Some(changed)
    }
}

impl Mispacked {
    const ALL: [Mispacked; 6] = [
        Mispacked::PanelByOne,
        Mispacked::SwappedLanes,
        Mispacked::SwappedPair,
        Mispacked::SwappedStreams,
        Mispacked::WrongPitch,
        Mispacked::StalePadding,
    ];

    /// The bytes of a packed buffer with the fault; `None` where it has no place.
    fn packed(self, pack: &Pack, width: usize, right: &[u8]) -> Option<Vec<u8>> {
        let Pack { n: rows, k: columns, .. } = *pack;
        let every = (0..pack.streams.len())
            .flat_map(|s| (0..rows).flat_map(move |n| (0..columns).map(move |k| (s, n, k))));
        let mut bytes = right.to_vec();
        let mut put = |to: usize, from: usize| {
            bytes[to * width..][..width].copy_from_slice(&right[from * width..][..width]);
        };
        let last = |s, n: usize, k: usize| (s, n.min(rows - 1), k.min(columns - 1));
        for (s, n, k) in every {
            // The element that comes to lie where this one should.
            let (stream, row, column) = match self {
                Mispacked::PanelByOne => last(s, n + Pack::LANES, k),
                Mispacked::SwappedLanes => last(s, n ^ 1, k),
                Mispacked::SwappedPair if pack.word == 2 => last(s, n, k ^ 1),
                Mispacked::SwappedPair => return None,
                Mispacked::SwappedStreams => ((s + 1) % pack.streams.len(), n, k),
                Mispacked::WrongPitch => {
                    last(s, (n * (columns + 1) + k) / columns, (n * (columns + 1) + k) % columns)
                }
                Mispacked::StalePadding => (s, n, k),
            };
            put(pack.index(s, n, k), pack.index(stream, row, column));
        }
        if self == Mispacked::StalePadding {
            let padded = rows.next_multiple_of(Pack::LANES);
            (rows..padded).for_each(|n| put(pack.index(0, n, 0), pack.index(0, n - 1, 0)));
        }
        (bytes != right).then_some(bytes)
    }
}

pub fn weights() -> Checked<()> {
    // By kind: places, and those that what the program says shows.
    let mut shown: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for model in [Model::new(DType::F32)?, Model::new(DType::BF16)?] {
        let right = checkpoint(&model.tensors)?;
        let section = model.packed(&right)?;
        let right = Source::Checkpoint(&right);
        let plan = &model.lowered.plan;
        let passed = compare(&section, plan, &right)?.map_err(|bad| bad.fault.to_string())?;
        assert!(passed > model.config.n_layers * 7, "{passed} tensors were compared");
        let mut judge = |kind: String, mutant: &[u8], names: &[&str]| -> Checked<()> {
            let Err(BadWeight { fault, .. }) = compare(mutant, plan, &right)? else {
                return Err(format!("{kind} in {names:?} is not caught").into());
            };
            let named = |name: &&str| {
                let (layer, op) = layer_of(name.trim_end_matches(".weight"));
                (fault.layer, fault.op.as_deref()) == (layer, Some(op))
            };
            if !names.iter().any(named) || fault.kernel.is_none() {
                return Err(format!("{kind} in {names:?} is called: {fault}").into());
            }
            let mut program = Cpu { threads: 1 }.open(&model.with_weights(mutant)?)?;
            let (places, by_logits) = shown.entry(kind).or_default();
            *places += 1;
            *by_logits += usize::from(model.logits(&mut program)?.is_err());
            Ok(())
        };
        for fault in Fault::ALL {
            for name in model.tensors.keys() {
                let Some(changed) = fault.changed(&model, name) else { continue };
                let mut tensors = model.tensors.clone();
                tensors.get_mut(name).expect("a tensor of the model").1 = changed;
                let mutant = model.packed(&checkpoint(&tensors)?)?;
                if mutant != section {
                    judge(format!("{fault:?}"), &mutant, &[name])?;
                }
            }
        }
        for fault in Mispacked::ALL {
            for buffer in &plan.buffers {
                let PlanBuffer { place: Place::Weight { offset, source }, dtype, bytes, name, .. } = buffer
                else {
                    continue;
                };
                let WeightSource::Pack { pack, names } = source else { continue };
                let Some(packed) = fault.packed(pack, dtype.bytes(1), &section[*offset..][..*bytes]) else {
                    continue;
                };
                let mut mutant = section.clone();
                mutant[*offset..][..*bytes].copy_from_slice(&packed);
                let padding = format!("{name}: padding");
                let names: Vec<&str> = names.iter().chain([&padding]).map(String::as_str).collect();
                judge(format!("{fault:?}"), &mutant, &names)?;
            }
        }
    }
    for (kind, (places, by_logits)) in &shown {
        println!("fault {kind}: {places}, all found bit by bit; {by_logits} by logits");
    }
    let kinds =
        Fault::ALL.iter().map(|f| format!("{f:?}")).chain(Mispacked::ALL.iter().map(|f| format!("{f:?}")));
    for kind in kinds {
        let &(places, by_logits) = shown.get(&kind).ok_or(format!("{kind} was never planted"))?;
        assert!(places > 1, "{kind} has one place");
        match &*kind {
            "FlippedBit" => assert!(by_logits < places, "no fault needs the comparison of bits"),
            // No kernel reads padding into what it stores.
            "StalePadding" => {}
            _ => assert!(by_logits > 0, "{kind} never shows in logits"),
        }
    }
    Ok(())
}
