//! Plans as text.
//!
//! ```text
//! plan(context = 512, vocab = 32000, arena = 123456 bytes) {
//!   kernel @qkv : dot, schedule "mr 6, nr 4, prefetch 0"
//!   weight %embed : bf16, 131072000 bytes at 0 = tensor "model.embed_tokens.weight"[32000, 2048]
//!   weight %l0.qkv.0 : bf16, 8388608 bytes at 131072000 = pack {n = 2048, k = 2048, word = 2, streams = ["q"[n]]}
//!   weight %freq : f32, 128 bytes at 139460608 = constant [1.0, 0.5]
//!   state %k.0 : bf16[1, 4, 512, 64], 262144 bytes
//!   input %tokens : i32, 64 bytes
//!   arena %decode/x : f32, 8192 bytes at 0
//!   entry @decode(T = 1, P in 0..511) gives last, tokens %tokens, positions %positions, logits %decode/logits {
//!     launch @qkv(%tokens, %l0.qkv.0, %decode/x) : 123 flops, 456 bytes
//!   }
//! }
//! ```
//!
//! * Buffers and kernels go by their names. One whose name another has too, or that is more than letters, digits and
//!   `_ . / -`, goes by its index, and the name stands behind that in quotes: `weight %12 "two words" : ...`.
//! * Column `n` of a pack's stream is a row of its tensor: `"q"[n / 32 * 64 + n % 32 + 32]`. `[n + 32]` is short for
//!   chunk and stride of all the pack's `n` columns.
//! * A range of symbols includes both ends. Floats round-trip (a NaN comes back as a NaN).
//! * What a verified plan says twice, the text says once: a pack's name and dtype are its buffer's.

use super::{Cost, Entry, Place, Plan, PlanBuffer, WeightSource};
use crate::graph::{Pack, Stream};
use std::collections::HashMap;
use std::fmt::{self, Display, Formatter, Write};

/// The text of a plan.
pub fn print(plan: &Plan) -> String {
    plan.to_string()
}

impl Display for Plan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Plan { buffers, kernels, entries, arena_bytes, context, vocab } = self;
        let kernel_labels = labels('@', kernels.iter().map(|k| k.name.as_str()));
        let buffer_labels = labels('%', buffers.iter().map(|b| b.name.as_str()));
        writeln!(f, "plan(context = {context}, vocab = {vocab}, arena = {arena_bytes} bytes) {{")?;
        for (kernel, label) in kernels.iter().zip(&kernel_labels) {
            write!(f, "  kernel {} : {}", label.definition(), kernel.family.name())?;
            let measured = if kernel.measured { " measured" } else { "" };
            writeln!(f, ", schedule {}{measured}", Quoted(&kernel.schedule))?;
        }
        for (buffer, label) in buffers.iter().zip(&buffer_labels) {
            print_buffer(f, buffer, *label)?;
        }
        for entry in entries {
            print_entry(f, entry, &kernel_labels, &buffer_labels)?;
        }
        writeln!(f, "}}")
    }
}

fn print_buffer(f: &mut Formatter<'_>, buffer: &PlanBuffer, label: Label<'_>) -> fmt::Result {
    let PlanBuffer { name: _, place, dtype, extents, bytes } = buffer;
    let label = label.definition();
    match place {
        Place::Weight { offset, source } => {
            write!(f, "  weight {label} : {dtype}, {bytes} bytes at {offset} = ")?;
            print_source(f, source)
        }
        Place::Arena { offset } => writeln!(f, "  arena {label} : {dtype}, {bytes} bytes at {offset}"),
        Place::State if extents.is_empty() => writeln!(f, "  state {label} : {dtype}, {bytes} bytes"),
        Place::State => writeln!(f, "  state {label} : {dtype}{extents:?}, {bytes} bytes"),
        Place::Input => writeln!(f, "  input {label} : {dtype}, {bytes} bytes"),
    }
}

fn print_source(f: &mut Formatter<'_>, source: &WeightSource) -> fmt::Result {
    match source {
        WeightSource::Tensor { name, rows, columns } => {
            writeln!(f, "tensor {}[{rows}, {columns}]", Quoted(name))
        }
        WeightSource::Pack { pack, names } => {
            let Pack { name: _, dtype: _, n, k, lanes, word, streams } = pack;
            let lanes = if *lanes == Pack::LANES { String::new() } else { format!("lanes = {lanes}, ") };
            write!(f, "pack {{n = {n}, k = {k}, {lanes}word = {word}, streams = [")?;
            for (number, (stream, name)) in streams.iter().zip(names).enumerate() {
                let Stream { weight: _, chunk, stride, offset } = stream;
                write!(f, "{}{}[", if number == 0 { "" } else { ", " }, Quoted(name))?;
                match chunk == n && stride == n {
                    true => write!(f, "n")?,
                    false => write!(f, "n / {chunk} * {stride} + n % {chunk}")?,
                }
                match offset {
                    0 => write!(f, "]")?,
                    offset => write!(f, " + {offset}]")?,
                }
            }
            writeln!(f, "]}}")
        }
        WeightSource::Constant { data } => writeln!(f, "constant {data:?}"),
    }
}

fn print_entry(
    f: &mut Formatter<'_>,
    entry: &Entry,
    kernels: &[Label<'_>],
    buffers: &[Label<'_>],
) -> fmt::Result {
    let Entry { name, symbols, give, tokens, positions, logits, token, launches } = entry;
    write!(f, "  entry @{}(", Name(name))?;
    for (number, symbol) in symbols.0.iter().enumerate() {
        write!(f, "{}{}", if number == 0 { "" } else { ", " }, Name(&symbol.name))?;
        match (symbol.min, symbol.max) {
            (min, max) if min == max => write!(f, " = {min}")?,
            (min, max) => write!(f, " in {min}..{max}")?,
        }
    }
    // An index that is out of range is printed as it is: a plan at fault can be looked at.
    let kernel = |index: usize| {
        kernels.get(index).copied().unwrap_or(Label { sigil: '@', index, name: "", plain: false })
    };
    let buffer = |index: usize| {
        buffers.get(index).copied().unwrap_or(Label { sigil: '%', index, name: "", plain: false })
    };
    write!(f, ") gives {}, tokens {}, positions {}", give.name(), buffer(*tokens), buffer(*positions))?;
    for (what, result) in [("logits", logits), ("token", token)] {
        if let Some(result) = result {
            write!(f, ", {what} {}", buffer(*result))?;
        }
    }
    writeln!(f, " {{")?;
    for launch in launches {
        write!(f, "    launch {}(", kernel(launch.kernel))?;
        for (number, &arg) in launch.args.iter().enumerate() {
            f.write_str(if number == 0 { "" } else { ", " })?;
            buffer(arg).fmt(f)?;
        }
        let Cost { flops, bytes } = launch.cost;
        writeln!(f, ") : {flops} flops, {bytes} bytes")?;
    }
    writeln!(f, "  }}")
}

/// What stands for a kernel or buffer: `@name`, `%name`, or `%12` where the name will not do.
#[derive(Clone, Copy)]
struct Label<'p> {
    sigil: char,
    index: usize,
    name: &'p str,
    plain: bool,
}

/// A label for each of `names`, in order.
fn labels<'p>(sigil: char, names: impl Iterator<Item = &'p str> + Clone) -> Vec<Label<'p>> {
    let mut count: HashMap<&str, usize> = HashMap::new();
    names.clone().for_each(|name| *count.entry(name).or_insert(0) += 1);
    let label = |(index, name)| Label { sigil, index, name, plain: is_plain(name) && count[name] == 1 };
    names.enumerate().map(label).collect()
}

impl Label<'_> {
    /// The label as its own line has it, with the name wherever it is not the label.
    fn definition(self) -> String {
        match self.plain {
            true => self.to_string(),
            false => format!("{self} {}", Quoted(self.name)),
        }
    }
}

impl Display for Label<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.plain {
            true => {
                f.write_char(self.sigil)?;
                f.write_str(self.name)
            }
            false => write!(f, "{}{}", self.sigil, self.index),
        }
    }
}

/// May this stand in text without quotes?
pub(super) fn is_plain(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && name.chars().all(in_name)
}

/// May this character stand in a name without quotes?
pub(super) fn in_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '/' | '-')
}

/// A name, in quotes where it needs them.
struct Name<'p>(&'p str);

impl Display for Name<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match is_plain(self.0) {
            true => f.write_str(self.0),
            false => Quoted(self.0).fmt(f),
        }
    }
}

/// A string in quotes: `\"`, `\\`, and control characters as `\u{a}`.
struct Quoted<'p>(&'p str);

impl Display for Quoted<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for c in self.0.chars() {
            match c {
                '"' | '\\' => write!(f, "\\{c}")?,
                c if c.is_control() => write!(f, "\\u{{{:x}}}", u32::from(c))?,
                c => write!(f, "{c}")?,
            }
        }
        f.write_str("\"")
    }
}
