//! Says whether a plan may be trusted: after it, every index into the plan's tables is in range, every range of bytes
//! lies in its section, and no sum or product of the plan's numbers overflows.
//!
//! What it checks:
//!
//! * **Kernels, entry points**: no two have one name; all launches of a kernel have as many arguments.
//! * **Buffers**: names are unique among weights, states and inputs. Sizes are multiples of [`ALIGN`], and the whole
//!   program's bytes fit `isize`.
//! * **Weights**: aligned, no two overlap, and as large as what they hold, rounded up to [`ALIGN`]. Tensors, packs and
//!   constants are not empty. A pack's words have 1 or 2 elements, its chunks are not empty, its last row has a number,
//!   and it has the name and dtype of its buffer.
//! * **Arena**: each buffer is aligned and inside, and no two that live at the same time overlap. A buffer lives from the
//!   first launch that names it to the last; results live to the end.
//! * **Entry points**: symbols are `T` and at most three others, each with a range that is not empty, of 0 and more
//!   (`T`: 1 and more), up to the cache's capacity, or to what an i32 holds without a cache. Tokens and positions are two
//!   inputs, i32, `T` of them. Logits are f32 in the arena, `vocab` for each row wanted; the token is an i32 there. An
//!   entry point has the results that it says it gives, and launches name them. Of each kind, there is one for every
//!   length from 1 to [`Plan::max_tokens`].
//!
//! What it cannot know: whether the code does what the plan says, and whether a checkpoint has the tensors.

use super::{ALIGN, Entry, Give, Place, Plan, PlanBuffer, WeightSource};
use crate::dim::MAX_SYMBOLS;
use crate::dtype::DType;
use crate::graph::{Pack, Stream, ValueId};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Which rule a plan breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Two of a kind have one name.
    #[error("two {what} have the name `{name}`")]
    Twice {
        /// Kernels, entry points or buffers.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Numbers of the plan whose sum or product is more than an address can hold.
    #[error("{what}: the size overflows")]
    Overflow {
        /// Of what.
        what: String,
    },
    /// A place in memory that is no multiple of [`ALIGN`].
    #[error("{what} is {found}, not a multiple of {ALIGN}")]
    Align {
        /// What should be aligned.
        what: String,
        /// The number.
        found: usize,
    },
    /// A buffer ends after the arena does.
    #[error("buffer `{buffer}` ends at byte {end} of an arena of {arena_bytes} bytes")]
    Outside {
        /// The buffer.
        buffer: String,
        /// Its end.
        end: usize,
        /// Size of the arena.
        arena_bytes: usize,
    },
    /// Two buffers share bytes.
    #[error("{context}buffers `{first}` and `{second}` overlap", context = .entry.as_ref().map(|e| format!("entry @{e}: ")).unwrap_or_default())]
    Overlap {
        /// The entry point in which both live; `None` for weights.
        entry: Option<String>,
        /// One buffer.
        first: String,
        /// The other.
        second: String,
    },
    /// A buffer is not as large as what it holds.
    #[error("buffer `{buffer}` has {found} bytes, its contents {expected}")]
    Size {
        /// The buffer.
        buffer: String,
        /// Its bytes.
        found: usize,
        /// The bytes of what it holds; rounded up to [`ALIGN`] for a weight, at least these for others.
        expected: usize,
    },
    /// A weight that does not say what it holds.
    #[error("weight `{buffer}`: {what}")]
    Source {
        /// The buffer.
        buffer: String,
        /// What is wrong.
        what: &'static str,
    },
    /// A symbol or its range.
    #[error("entry @{entry}: symbol `{symbol}`: {what}")]
    Symbol {
        /// The entry point.
        entry: String,
        /// The symbol.
        symbol: String,
        /// What is wrong.
        what: &'static str,
    },
    /// An index of a kernel or buffer that is not there.
    #[error("entry @{entry}: there is no {what} {index}")]
    Index {
        /// The entry point.
        entry: String,
        /// Kernel or buffer.
        what: &'static str,
        /// The index.
        index: usize,
    },
    /// A kernel is launched with more arguments here than there.
    #[error("entry @{entry}: kernel @{kernel} has {found} arguments, elsewhere {expected}")]
    Arguments {
        /// The entry point.
        entry: String,
        /// The kernel.
        kernel: String,
        /// Arguments here.
        found: usize,
        /// Arguments of its first launch.
        expected: usize,
    },
    /// What an entry point takes or gives is missing, too much, or in no fit buffer.
    #[error("entry @{entry}: {role}: {what}")]
    Binding {
        /// The entry point.
        entry: String,
        /// Tokens, positions, logits or token.
        role: &'static str,
        /// What is wrong.
        what: &'static str,
    },
    /// A step that is shorter than others of its kind has no entry point.
    #[error("no entry point gives {} for a step of {tokens}", .give.name())]
    Gap {
        /// What is wanted.
        give: Give,
        /// The shortest step that is missing.
        tokens: i64,
    },
}

/// Checks a plan; see the page's head for the rules.
///
/// # Errors
///
/// The first rule broken.
pub fn verify(plan: &Plan) -> Result<(), PlanError> {
    unique("kernels", plan.kernels.iter().map(|k| k.name.as_str()))?;
    unique("entry points", plan.entries.iter().map(|e| e.name.as_str()))?;
    let bound = plan.buffers.iter().filter(|b| !matches!(b.place, Place::Arena { .. }));
    unique("buffers", bound.map(|b| b.name.as_str()))?;
    aligned("the arena's size", plan.arena_bytes)?;
    plan.buffers.iter().try_for_each(|buffer| verify_buffer(plan, buffer))?;
    verify_sum(plan)?;
    verify_weights_apart(plan)?;
    let mut arguments = vec![None; plan.kernels.len()];
    for entry in &plan.entries {
        verify_launches(plan, entry, &mut arguments)?;
        verify_symbols(plan, entry)?;
        verify_bindings(plan, entry)?;
        verify_arena(plan, entry)?;
    }
    Give::ALL.into_iter().try_for_each(|give| verify_lengths(plan, give))
}

fn unique<'p>(what: &'static str, names: impl Iterator<Item = &'p str>) -> Result<(), PlanError> {
    let mut seen = HashSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(PlanError::Twice { what, name: name.to_string() });
        }
    }
    Ok(())
}

fn aligned(what: &str, found: usize) -> Result<(), PlanError> {
    match found.is_multiple_of(ALIGN) {
        true => Ok(()),
        false => Err(PlanError::Align { what: what.to_string(), found }),
    }
}

fn verify_buffer(plan: &Plan, buffer: &PlanBuffer) -> Result<(), PlanError> {
    let PlanBuffer { name, place, dtype, extents, bytes } = buffer;
    let overflow = || PlanError::Overflow { what: format!("buffer `{name}`") };
    if !bytes.is_multiple_of(ALIGN) {
        return Err(PlanError::Align { what: format!("the size of buffer `{name}`"), found: *bytes });
    }
    let holds = |contents: Option<usize>| {
        let contents = contents.ok_or_else(overflow)?;
        match contents.checked_next_multiple_of(ALIGN).ok_or_else(overflow)? {
            expected if expected == *bytes => Ok(()),
            expected => Err(PlanError::Size { buffer: name.clone(), found: *bytes, expected }),
        }
    };
    if !extents.is_empty() {
        let elems = extents.iter().try_fold(1_usize, |elems, &extent| elems.checked_mul(extent));
        holds(elems.and_then(|elems| bytes_of(*dtype, elems)))?;
    }
    let (Place::Weight { offset, .. } | Place::Arena { offset }) = place else { return Ok(()) };
    if !offset.is_multiple_of(ALIGN) {
        return Err(PlanError::Align { what: format!("the offset of buffer `{name}`"), found: *offset });
    }
    let end = offset.checked_add(*bytes).filter(|&end| end <= isize::MAX as usize).ok_or_else(overflow)?;
    match place {
        Place::Arena { .. } if end > plan.arena_bytes => {
            Err(PlanError::Outside { buffer: name.clone(), end, arena_bytes: plan.arena_bytes })
        }
        Place::Weight { source, .. } => holds(source_bytes(buffer, source)?),
        Place::Arena { .. } | Place::State | Place::Input => Ok(()),
    }
}

/// Bytes of what a weight holds; `None` if they overflow.
fn source_bytes(buffer: &PlanBuffer, source: &WeightSource) -> Result<Option<usize>, PlanError> {
    let dtype = buffer.dtype;
    let fault = |what| Err(PlanError::Source { buffer: buffer.name.clone(), what });
    match source {
        WeightSource::Tensor { name: _, rows, columns } => {
            if *rows == 0 || *columns == 0 {
                return fault("the tensor is empty");
            }
            if let DType::Block(block) = dtype
                && !columns.is_multiple_of(block.facts().elems)
            {
                return fault("a row is not made of whole blocks");
            }
            Ok(rows.checked_mul(*columns).and_then(|elems| bytes_of(dtype, elems)))
        }
        WeightSource::Pack { pack, names } => {
            let Pack { name, dtype: packed, n, k, lanes, word, streams } = pack;
            if name != &buffer.name || *packed != dtype {
                return fault("the pack has another name or dtype than its buffer");
            }
            if matches!(dtype, DType::Block(_)) {
                return fault("blocks cannot be packed element by element");
            }
            if *n == 0 || *k == 0 || *lanes == 0 || *word == 0 || streams.is_empty() {
                return fault("the pack is empty");
            }
            if streams.len() != names.len() {
                return fault("streams and their tensors differ in number");
            }
            for stream in streams {
                if stream.chunk == 0 {
                    return fault("a stream's chunk is empty");
                }
                if stream.weight != ValueId(0) {
                    return fault("a stream names a value, but plans have none");
                }
                // All that a reader computes of a row: its end, in elements.
                if last_row(stream, *n).and_then(|row| row.checked_add(1)?.checked_mul(*k)).is_none() {
                    return Ok(None);
                }
            }
            // The product of `Pack::elems`.
            let factors = [streams.len(), k.div_ceil(*word), *lanes, *word];
            let elems = factors.iter().try_fold(pack.panels(), |elems, &factor| elems.checked_mul(factor));
            Ok(elems.and_then(|elems| bytes_of(dtype, elems)))
        }
        WeightSource::Constant { data } => {
            if data.is_empty() || matches!(dtype, DType::Block(_)) {
                return fault("a constant has numbers, and no blocks");
            }
            Ok(bytes_of(dtype, data.len()))
        }
    }
}

/// At least the largest row that is one of the stream's `n` columns.
fn last_row(stream: &Stream, n: usize) -> Option<usize> {
    let Stream { weight: _, chunk, stride, offset } = *stream;
    let last = n - 1;
    (last / chunk).checked_mul(stride)?.checked_add(last.min(chunk - 1))?.checked_add(offset)
}

/// [`DType::bytes`], checked.
fn bytes_of(dtype: DType, elems: usize) -> Option<usize> {
    match dtype {
        DType::Block(block) => elems.div_ceil(block.facts().elems).checked_mul(block.facts().bytes),
        plain => elems.checked_mul(plain.bytes(1)),
    }
}

/// The plan's totals must fit an address, so that nobody who adds sizes later needs to look.
fn verify_sum(plan: &Plan) -> Result<(), PlanError> {
    let kept = plan.buffers.iter().filter(|b| matches!(b.place, Place::State | Place::Input));
    let sections = [plan.weight_bytes(), plan.arena_bytes].into_iter();
    let sum = sections.chain(kept.map(|b| b.bytes)).try_fold(0usize, usize::checked_add);
    match sum.filter(|&sum| sum <= isize::MAX as usize) {
        Some(_) => Ok(()),
        None => Err(PlanError::Overflow { what: "the whole program".to_string() }),
    }
}

fn verify_weights_apart(plan: &Plan) -> Result<(), PlanError> {
    let place = |buffer: &'_ PlanBuffer| match buffer.place {
        Place::Weight { offset, .. } if buffer.bytes > 0 => Some(offset),
        Place::Weight { .. } | Place::Arena { .. } | Place::State | Place::Input => None,
    };
    let mut weights: Vec<(usize, &PlanBuffer)> =
        plan.buffers.iter().filter_map(|b| Some((place(b)?, b))).collect();
    weights.sort_by_key(|&(offset, _)| offset);
    match weights.windows(2).find(|pair| pair[0].0 + pair[0].1.bytes > pair[1].0) {
        Some(pair) => Err(PlanError::Overlap {
            entry: None,
            first: pair[0].1.name.clone(),
            second: pair[1].1.name.clone(),
        }),
        None => Ok(()),
    }
}

/// `arguments` has each kernel's count of arguments, once a launch has shown it.
fn verify_launches(plan: &Plan, entry: &Entry, arguments: &mut [Option<usize>]) -> Result<(), PlanError> {
    let missing = |what, index| Err(PlanError::Index { entry: entry.name.clone(), what, index });
    for launch in &entry.launches {
        let Some(known) = arguments.get_mut(launch.kernel) else { return missing("kernel", launch.kernel) };
        if let Some(&arg) = launch.args.iter().find(|&&arg| arg >= plan.buffers.len()) {
            return missing("buffer", arg);
        }
        let (found, expected) = (launch.args.len(), *known.get_or_insert(launch.args.len()));
        if found != expected {
            let (entry, kernel) = (entry.name.clone(), plan.kernels[launch.kernel].name.clone());
            return Err(PlanError::Arguments { entry, kernel, found, expected });
        }
    }
    let bound = [Some(entry.tokens), Some(entry.positions), entry.logits, entry.token];
    match bound.into_iter().flatten().find(|&index| index >= plan.buffers.len()) {
        Some(index) => missing("buffer", index),
        None => Ok(()),
    }
}

fn verify_symbols(plan: &Plan, entry: &Entry) -> Result<(), PlanError> {
    let fault = |symbol: &str, what| {
        Err(PlanError::Symbol { entry: entry.name.clone(), symbol: symbol.to_string(), what })
    };
    let symbols = &entry.symbols.0;
    if symbols.first().is_none_or(|symbol| symbol.name != "T") {
        return fault("T", "is not the first");
    }
    if let Some(symbol) = symbols.get(MAX_SYMBOLS) {
        return fault(&symbol.name, "is one too many");
    }
    // Positions are i32.
    let has_cache = plan.buffers.iter().any(|b| b.place == Place::State);
    let most = if has_cache { plan.context.min(i32::MAX as usize) as i64 } else { i64::from(i32::MAX) };
    for (number, symbol) in symbols.iter().enumerate() {
        let least = i64::from(number == 0);
        if symbols[..number].iter().any(|earlier| earlier.name == symbol.name) {
            return fault(&symbol.name, "is there twice");
        }
        if symbol.min < least || symbol.max < symbol.min {
            return fault(&symbol.name, "has an empty or negative range");
        }
        if symbol.max > most {
            return fault(&symbol.name, "exceeds the cache");
        }
    }
    Ok(())
}

/// Called when indices are known to be in range and symbols to be sane.
fn verify_bindings(plan: &Plan, entry: &Entry) -> Result<(), PlanError> {
    let fault = |role, what| Err(PlanError::Binding { entry: entry.name.clone(), role, what });
    let large_enough = |index: usize, elems: Option<usize>| {
        let buffer = &plan.buffers[index];
        match elems.and_then(|elems| bytes_of(buffer.dtype, elems)) {
            None => Err(PlanError::Overflow { what: format!("buffer `{}`", buffer.name) }),
            Some(expected) if buffer.bytes < expected => {
                Err(PlanError::Size { buffer: buffer.name.clone(), found: buffer.bytes, expected })
            }
            Some(_) => Ok(()),
        }
    };
    let steps = entry.symbols.0[0].max as usize;
    for (role, index) in [("tokens", entry.tokens), ("positions", entry.positions)] {
        if plan.buffers[index].place != Place::Input || plan.buffers[index].dtype != DType::I32 {
            return fault(role, "not an i32 input");
        }
        large_enough(index, Some(steps))?;
    }
    if entry.tokens == entry.positions {
        return fault("tokens", "the positions too");
    }
    let rows = match entry.give {
        Give::Nothing => 0,
        Give::Last => 1,
        Give::All => steps,
    };
    let (needs_logits, needs_token) = (rows > 0, entry.give == Give::Last);
    match entry.logits {
        None if needs_logits => return fault("logits", "missing"),
        Some(_) if !needs_logits => return fault("logits", "there, but not given"),
        Some(_) if plan.vocab == 0 || plan.vocab > i32::MAX as usize => {
            return fault("logits", "no columns, or more than an i32 can count");
        }
        Some(index) => large_enough(index, rows.checked_mul(plan.vocab))?,
        None => {}
    }
    match entry.token {
        None if needs_token => return fault("token", "missing"),
        Some(_) if !needs_logits => return fault("token", "there, but not given"),
        Some(index) => large_enough(index, Some(1))?,
        None => {}
    }
    for (role, index, dtype) in [("logits", entry.logits, DType::F32), ("token", entry.token, DType::I32)] {
        let Some(index) = index else { continue };
        if plan.buffers[index].dtype != dtype || !matches!(plan.buffers[index].place, Place::Arena { .. }) {
            return fault(role, "not in the arena, or of another dtype");
        }
        if !entry.launches.iter().any(|launch| launch.args.contains(&index)) {
            return fault(role, "written by no launch");
        }
    }
    Ok(())
}

/// Called when symbols are known to be sane.
fn verify_lengths(plan: &Plan, give: Give) -> Result<(), PlanError> {
    let of_kind = plan.entries.iter().filter(|e| e.give == give);
    let mut lengths: Vec<(i64, i64)> = of_kind.map(|e| (e.symbols.0[0].min, e.symbols.0[0].max)).collect();
    lengths.sort_unstable();
    let mut tokens = 1;
    for (min, max) in lengths {
        if min > tokens {
            return Err(PlanError::Gap { give, tokens });
        }
        tokens = tokens.max(max + 1);
    }
    Ok(())
}

/// Walks the launches with the buffers that live there, ordered by offset. As these do not overlap, one more buffer
/// needs to be compared with its two neighbours only.
fn verify_arena(plan: &Plan, entry: &Entry) -> Result<(), PlanError> {
    let place = |index: usize| match plan.buffers[index].place {
        Place::Arena { offset } if plan.buffers[index].bytes > 0 => Some(offset),
        Place::Arena { .. } | Place::Weight { .. } | Place::State | Place::Input => None,
    };
    let mut last_use: HashMap<usize, usize> = HashMap::new();
    for (at, launch) in entry.launches.iter().enumerate() {
        last_use.extend(launch.args.iter().map(|&arg| (arg, at)));
    }
    for result in [entry.logits, entry.token].into_iter().flatten() {
        last_use.insert(result, entry.launches.len());
    }
    let mut live: BTreeMap<usize, usize> = BTreeMap::new();
    for (at, launch) in entry.launches.iter().enumerate() {
        for &arg in &launch.args {
            let Some(offset) = place(arg) else { continue };
            let end = offset + plan.buffers[arg].bytes;
            // The last to begin before this one's end: itself, if it lives already.
            if let Some((&other_offset, &other)) = live.range(..end).next_back()
                && other != arg
                && other_offset + plan.buffers[other].bytes > offset
            {
                return Err(PlanError::Overlap {
                    entry: Some(entry.name.clone()),
                    first: plan.buffers[other].name.clone(),
                    second: plan.buffers[arg].name.clone(),
                });
            }
            live.insert(offset, arg);
        }
        for arg in launch.args.iter().filter(|arg| last_use[arg] == at) {
            if let Some(offset) = place(*arg) {
                live.remove(&offset);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::TINY;
    use crate::plan::parse::parse;

    /// What `verify` says of the small plan with `from` replaced by `to`.
    fn with(from: &str, to: &str) -> String {
        assert!(TINY.contains(from), "{from}");
        let plan = parse(&TINY.replace(from, to)).expect("a plan's text");
        verify(&plan).map_or_else(|error| error.to_string(), |()| "fine".to_string())
    }

    #[test]
    fn the_small_plan_is_fine() {
        assert_eq!(verify(&parse(TINY).unwrap()), Ok(()));
        assert_eq!(verify(&Plan::default()), Ok(()));
    }

    #[test]
    #[rustfmt::skip] // a table: one rule a line
    fn each_rule_is_enforced() {
        let huge = usize::MAX;
        for (from, to, says) in [
            ("@2 \"the head\"", "@2 \"embed\"", "two kernels have the name `embed`"),
            ("entry @all", "entry @decode", "two entry points have the name `decode`"),
            ("%4 \"two words\"", "%4 \"tokens\"", "two buffers have the name `tokens`"),
            ("arena = 2176", "arena = 2175", "the arena's size is 2175, not a multiple of 64"),
            ("arena = 2176", "arena = 2112", "buffer `all/logits` ends at byte 2176 of an arena of 2112 bytes"),
            ("at 4096", "at 4100", "the offset of buffer `freq` is 4100, not a multiple of 64"),
            ("f32, 64 bytes", "f32, 65 bytes", "the size of buffer `freq` is 65, not a multiple of 64"),
            ("f32, 64 bytes", "f32, 128 bytes", "buffer `freq` has 128 bytes, its contents 64"),
            ("at 4096", "at 4032", "buffers `head.0` and `freq` overlap"),
            ("at 4096", "at 18446744073709551552", "buffer `freq`: the size overflows"),
            ("at 4096", "at 9223372036854775744", "buffer `freq`: the size overflows"),
            ("at 4096", "at 9223372036854775680", "the whole program: the size overflows"),
            ("[32, 16]", "[0, 16]", "weight `model.embed_tokens.weight`: the tensor is empty"),
            ("[32, 16]", &format!("[{huge}, 16]"), "buffer `model.embed_tokens.weight`: the size overflows"),
            ("[32, 16]", "[64, 16]", "buffer `model.embed_tokens.weight` has 1024 bytes, its contents 2048"),
            ("[2, 64]", "[4, 33]", "weight `two words`: a row is not made of whole blocks"),
            ("{n = 20,", "{n = 0,", "weight `l0.qkv.0`: the pack is empty"),
            ("{n = 20,", &format!("{{n = {huge},"), "buffer `l0.qkv.0`: the size overflows"),
            ("word = 2, streams = [\"q\"", "word = 0, streams = [\"q\"", "weight `l0.qkv.0`: the pack is empty"),
            ("[\"model.embed_tokens.weight\"[n]]", "[]", "weight `head.0`: the pack is empty"),
            ("n / 4 * 8 + n % 4]", "n / 0 * 8 + n % 0]", "weight `l0.qkv.0`: a stream's chunk is empty"),
            ("* 8 + n % 4 + 4", &format!("* {huge} + n % 4 + 4"), "buffer `l0.qkv.0`: the size overflows"),
            ("n % 4 + 4", &format!("n % 4 + {huge}"), "buffer `l0.qkv.0`: the size overflows"),
            ("n = 20, k = 16", &format!("n = 20, k = {huge}"), "buffer `l0.qkv.0`: the size overflows"),
            ("[1.0, 0.1, 1e-7, -0.0, -inf]", "[]", "weight `freq`: a constant has numbers, and no blocks"),
            ("state %k.0 : bf16[1, 2, 8, 64], 2048", "state %k.0 : bf16, 18446744073709551552", "the whole program: the size overflows"),
            ("bf16[1, 2, 8, 64]", "bf16[1, 2, 8, 96]", "buffer `k.0` has 2048 bytes, its contents 3072"),
            ("bf16[1, 2, 8, 64]", &format!("bf16[{huge}, {huge}]"), "buffer `k.0`: the size overflows"),
            ("launch @choose(", "launch @choose(%freq, %freq, ", "fine"),
            ("launch @2(%decode/q, ", "launch @2(", "entry @all: kernel @the head has 3 arguments, elsewhere 2"),
            ("f32, 192 bytes at 128", "f32, 192 bytes at 0", "entry @decode: buffers `decode/x` and `decode/q` overlap"),
            ("f32, 128 bytes at 0", "f32, 128 bytes at 128", "entry @decode: buffers `decode/q` and `decode/logits` overlap"),
            ("i32, 64 bytes at 320", "i32, 64 bytes at 64", "entry @decode: buffers `decode/logits` and `decode/token` overlap"),
            ("bf16, 64 bytes at 64", "bf16, 64 bytes at 128", "entry @all: buffers `all/x` and `all/logits` overlap"),
            ("(T = 1,", "(P = 1,", "entry @decode: symbol `T`: is not the first"),
            ("(T = 1,", "(T = 1, A = 0, B = 0, C = 0,", "entry @decode: symbol `P`: is one too many"),
            ("(T = 1,", "(T = 1, T = 1,", "entry @decode: symbol `T`: is there twice"),
            ("(T = 1,", "(T = 0,", "entry @decode: symbol `T`: has an empty or negative range"),
            ("0..63", "-1..63", "entry @decode: symbol `P`: has an empty or negative range"),
            ("0..63", "9..8", "entry @decode: symbol `P`: has an empty or negative range"),
            ("0..63", "0..65", "entry @decode: symbol `P`: exceeds the cache"),
            ("0..63", "0..9223372036854775807", "entry @decode: symbol `P`: exceeds the cache"),
            ("T in 1..15", "T in 2..15", "no entry point gives nothing for a step of 1"),
            ("T in 1..15", "T in 1..17", "buffer `tokens` has 64 bytes, its contents 68"),
            ("tokens %tokens", "tokens %freq", "entry @decode: tokens: not an i32 input"),
            ("positions %positions", "positions %tokens", "entry @decode: tokens: the positions too"),
            (", logits %decode/logits", "", "entry @decode: logits: missing"),
            (", token %decode/token {", "{", "entry @decode: token: missing"),
            ("gives last", "gives nothing", "entry @decode: logits: there, but not given"),
            ("gives nothing", "gives last", "entry @prefill, cache only: logits: missing"),
            ("vocab = 32", "vocab = 33", "buffer `decode/logits` has 128 bytes, its contents 132"),
            ("vocab = 32", "vocab = 0", "entry @decode: logits: no columns, or more than an i32 can count"),
            ("T in 1..16", "T in 1..16, A = 1", "fine"),
            ("f32, 2048 bytes at 128", "f32, 1984 bytes at 128", "buffer `all/logits` has 1984 bytes, its contents 2048"),
            ("logits %decode/logits", "logits %decode/x", "entry @decode: logits: not in the arena, or of another dtype"),
            ("i32, 64 bytes at 320", "f32, 64 bytes at 256", "entry @decode: token: not in the arena, or of another dtype"),
            ("launch @choose(%decode/logits, %decode/token)", "launch @choose(%decode/logits, %freq)", "entry @decode: token: written by no launch"),
        ] {
            assert_eq!(with(from, to), says, "{from} -> {to}");
        }
    }

    #[test]
    fn what_text_cannot_say_is_found_too() {
        let of = |change: &dyn Fn(&mut Plan)| {
            let mut plan = parse(TINY).unwrap();
            change(&mut plan);
            let _ = plan.to_string(); // A plan at fault can be printed.
            verify(&plan).unwrap_err().to_string()
        };
        assert_eq!(of(&|p| p.entries[0].launches[1].kernel = 9), "entry @decode: there is no kernel 9");
        assert_eq!(of(&|p| p.entries[0].launches[1].args[0] = 99), "entry @decode: there is no buffer 99");
        assert_eq!(of(&|p| p.entries[2].tokens = 99), "entry @all: there is no buffer 99");
        assert_eq!(of(&|p| p.entries[2].logits = Some(99)), "entry @all: there is no buffer 99");
        let pack = |p: &mut Plan, change: &dyn Fn(&mut Pack, &mut Vec<String>)| match &mut p.buffers[1].place
        {
            Place::Weight { source: WeightSource::Pack { pack, names }, .. } => change(pack, names),
            _ => unreachable!("buffer 1 is a pack"),
        };
        let differ = "weight `l0.qkv.0`: the pack has another name or dtype than its buffer";
        assert_eq!(of(&|p| pack(p, &|pack, _| pack.dtype = DType::F16)), differ);
        assert_eq!(of(&|p| pack(p, &|pack, _| pack.name.clear())), differ);
        assert!(of(&|p| pack(p, &|_, names| names.clear())).ends_with("differ in number"));
        assert!(
            of(&|p| pack(p, &|pack, _| pack.streams[0].weight = ValueId(1))).ends_with("but plans have none")
        );
    }
}
