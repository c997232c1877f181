//! A buffer of weights that does not hold what the checkpoint does.

use super::super::weights;
use super::{Case, File, Reader, Replay, ReproducerError, Stored, TENSORS, safetensors};
use crate::weights::{self as packing, Source};
use ir::plan::{Place, Plan, PlanBuffer, WeightSource};
use models::ReadError;
use safetensors::tensor::Dtype;
use std::collections::BTreeMap;

/// A buffer with what it holds, and the tensors that it should hold.
pub struct WeightCase {
    /// A plan of this buffer alone.
    plan: Plan,
    /// Its bytes in the artifact.
    found: Vec<u8>,
    /// Rows of the checkpoint, as f32, by name.
    tensors: BTreeMap<String, Vec<f32>>,
}

impl WeightCase {
    /// Takes the buffer of that number, with `bytes` the weights section, and reads what it should hold.
    ///
    /// # Errors
    ///
    /// What the checkpoint says.
    ///
    /// # Panics
    ///
    /// If the plan has no such buffer of weights.
    pub fn of(
        plan: &Plan,
        number: usize,
        bytes: &[u8],
        checkpoint: &Source<'_>,
    ) -> Result<WeightCase, ReadError> {
        let mut buffer = plan.buffers[number].clone();
        let Place::Weight { offset, source } = &mut buffer.place else { panic!("no buffer of weights") };
        let found = bytes[*offset..][..buffer.bytes].to_vec();
        *offset = 0;
        let mut tensors = BTreeMap::new();
        for (name, [rows, columns]) in shapes(source) {
            let mut values = vec![0.0; rows * columns];
            checkpoint.read(&name, 0..rows, columns, &mut values)?;
            tensors.insert(name, values);
        }
        Ok(WeightCase { plan: Plan { buffers: vec![buffer], ..Plan::default() }, found, tensors })
    }

    fn source(&self) -> Source<'_> {
        Source::Tensors(&self.tensors)
    }

    fn expected(&self) -> Vec<u8> {
        weights::expected(&self.plan.buffers[0], &self.source()).expect("tensors in memory")
    }

    pub(super) fn files(&self) -> Vec<File> {
        let bytes = |name: &str, bytes: Vec<u8>| (name.to_string(), Dtype::U8, vec![bytes.len()], bytes);
        let mut stored: Vec<Stored> =
            vec![bytes("found", self.found.clone()), bytes("expected", self.expected())];
        for (name, shape) in shapes(source_of(&self.plan.buffers[0])) {
            let bytes = self.tensors[&name].iter().flat_map(|x| x.to_le_bytes()).collect();
            stored.push((format!("tensor.{name}"), Dtype::F32, shape.to_vec(), bytes));
        }
        vec![Case::Weight {}.file(), ("plan.txt", self.plan.to_string().into()), safetensors(stored)]
    }

    pub(super) fn read(reader: &Reader<'_>) -> Result<WeightCase, ReproducerError> {
        let text = reader.string("plan.txt")?;
        let plan = ir::plan::parse::parse(&text).map_err(|error| reader.text("plan.txt", error))?;
        ir::plan::verify::verify(&plan).map_err(|error| reader.text("plan.txt", error))?;
        let weights = plan.buffers.iter().filter(|b| matches!(b.place, Place::Weight { offset: 0, .. }));
        if weights.count() != 1 || plan.buffers.len() != 1 {
            let found = format!("{} buffers", plan.buffers.len());
            return Err(reader.content("plan.txt", "the plan", found, "one of weights, at 0"));
        }
        let buffer = &plan.buffers[0];
        if !matches!(buffer.dtype, ir::DType::F32 | ir::DType::BF16) {
            return Err(reader.content("plan.txt", &buffer.name, buffer.dtype, "f32 or bf16"));
        }
        let bytes = reader.bytes(TENSORS)?;
        let file = reader.tensors(&bytes)?;
        let tensor = |name: &str, dtype: Dtype, shape: &[usize]| {
            let expected = format!("{dtype:?}{shape:?}");
            let Ok(view) = file.tensor(name) else {
                return Err(reader.content(TENSORS, name, "nothing", expected));
            };
            if view.dtype() != dtype || view.shape() != shape {
                let found = format!("{:?}{:?}", view.dtype(), view.shape());
                return Err(reader.content(TENSORS, name, found, expected));
            }
            Ok(view.data().to_vec())
        };
        let found = tensor("found", Dtype::U8, &[buffer.bytes])?;
        let mut tensors = BTreeMap::new();
        for (name, shape) in shapes(source_of(buffer)) {
            let bytes = tensor(&format!("tensor.{name}"), Dtype::F32, &shape)?;
            tensors.insert(name, bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect());
        }
        Ok(WeightCase { plan, found, tensors })
    }

    pub(super) fn replay(&self) -> Replay {
        let judged = weights::weights(&self.found, &self.plan, &self.source()).expect("tensors in memory");
        let mut packed = Vec::new();
        let mut append = |piece: &[u8]| {
            packed.extend_from_slice(piece);
            Ok::<(), ReadError>(())
        };
        packing::write(&self.plan, &self.source(), &mut append, &mut |_| ()).expect("tensors in memory");
        let (fault, packs) = (judged.err().map(|bad| bad.fault), packed == self.expected());
        let buffer = &self.plan.buffers[0];
        let lines = vec![
            (
                "buffer",
                format!(
                    "%{} : {}, {} bytes, as plan.txt lays it out",
                    buffer.name, buffer.dtype, buffer.bytes
                ),
            ),
            (
                "packing",
                match (packs, &fault) {
                    (false, _) => {
                        "wrong: this llamac packs the tensors otherwise than plan.txt says".to_string()
                    }
                    (true, None) => "right".to_string(),
                    (true, Some(_)) => "right: what is wrong is what the artifact holds".to_string(),
                },
            ),
        ];
        Replay { lines, worst: 0.0, fault }
    }
}

fn source_of(buffer: &PlanBuffer) -> &WeightSource {
    match &buffer.place {
        Place::Weight { source, .. } => source,
        Place::Arena { .. } | Place::State | Place::Input => unreachable!("the buffer is of weights"),
    }
}

/// The tensors that a buffer is made of, each once: rows that it needs, and columns.
fn shapes(source: &WeightSource) -> BTreeMap<String, [usize; 2]> {
    match source {
        WeightSource::Constant { .. } => BTreeMap::new(),
        WeightSource::Tensor { name, rows, columns } => BTreeMap::from([(name.clone(), [*rows, *columns])]),
        WeightSource::Pack { pack, names } => {
            let mut shapes = BTreeMap::new();
            for (stream, name) in pack.streams.iter().zip(names) {
                let rows = (0..pack.n).map(|n| stream.row(n) + 1).max().unwrap_or(0);
                let shape = shapes.entry(name.clone()).or_insert([rows, pack.k]);
                shape[0] = shape[0].max(rows);
            }
            shapes
        }
    }
}
