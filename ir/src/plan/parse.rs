//! Reads the text of a plan; its form stands in [`print`](super::print).
//!
//! * `parse(print(p)) == p` for every plan that [`verify`](super::verify) lets pass.
//! * Line ends are spaces, `//` begins a comment. Kernels and buffers stand before the launches that name them.
//! * Every number is checked to fit its type, and memory is taken in proportion to the text; whether the numbers make
//!   sense together, `verify` says.

use super::print::{in_name, is_plain};
use super::{Cost, Entry, Give, Launch, Place, Plan, PlanBuffer, PlanKernel, WeightSource};
use crate::dim::{Symbol, Symbols};
use crate::dtype::DType;
use crate::graph::{Family, Pack, Stream, ValueId};
use std::collections::HashMap;
use std::str::FromStr;

/// Where and why a text is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {fault}")]
pub struct PlanParseError {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong there.
    pub fault: PlanParseFault,
}

/// What is wrong with a plan's text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanParseFault {
    /// Something else should stand here.
    #[error("expected {expected}, found {found}")]
    Expected {
        /// What may stand here.
        expected: String,
        /// The beginning of what does.
        found: String,
    },
    /// A number that its type cannot hold.
    #[error("the number {found} is out of range")]
    Number {
        /// The number.
        found: String,
    },
    /// A launch or an entry point names what no line above defines.
    #[error("there is no {label} above")]
    Unknown {
        /// The name with its sigil.
        label: String,
    },
    /// A name is defined twice.
    #[error("{label} is defined twice")]
    Twice {
        /// The name with its sigil.
        label: String,
    },
    /// A definition by index is not where that index says.
    #[error("this is number {expected}, not {found}")]
    Index {
        /// The index written.
        found: usize,
        /// How many stand above.
        expected: usize,
    },
    /// A stream divides by one chunk and takes the remainder of another.
    #[error("the chunks {divisor} and {modulus} differ")]
    Chunks {
        /// The chunk after `/`.
        divisor: usize,
        /// The chunk after `%`.
        modulus: usize,
    },
}

/// Reads the text of a plan.
///
/// # Errors
///
/// The first place where the text is no plan.
pub fn parse(text: &str) -> Result<Plan, PlanParseError> {
    let mut parser = Parser { text, at: 0 };
    let (mut plan, mut kernels, mut buffers) = (Plan::default(), HashMap::new(), HashMap::new());
    parser.plan(&mut plan, &mut kernels, &mut buffers).map_err(|(at, fault)| {
        let before = &text[..at];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = before.matches('\n').count() + 1;
        PlanParseError { line, column: before[line_start..].chars().count() + 1, fault }
    })?;
    Ok(plan)
}

/// A fault and its byte in the text.
type Fault = (usize, PlanParseFault);

/// Kernels or buffers that go by their names.
type Names<'t> = HashMap<&'t str, usize>;

struct Parser<'t> {
    text: &'t str,
    /// Bytes read; always between two characters.
    at: usize,
}

impl<'t> Parser<'t> {
    fn plan(
        &mut self,
        plan: &mut Plan,
        kernels: &mut Names<'t>,
        buffers: &mut Names<'t>,
    ) -> Result<(), Fault> {
        self.tokens(&["plan", "(", "context", "="])?;
        plan.context = self.number()?;
        self.tokens(&[",", "vocab", "="])?;
        plan.vocab = self.number()?;
        self.tokens(&[",", "arena", "="])?;
        plan.arena_bytes = self.number()?;
        self.tokens(&["bytes", ")", "{"])?;
        while !self.eat("}") {
            if self.eat("kernel") {
                let name = self.define('@', plan.kernels.len(), kernels)?;
                plan.kernels.push(self.kernel(name)?);
            } else if self.eat("entry") {
                let entry = self.entry(plan.kernels.len(), kernels, plan.buffers.len(), buffers)?;
                plan.entries.push(entry);
            } else if let Some(kind) = Kind::ALL.into_iter().find(|kind| self.eat(kind.name())) {
                let name = self.define('%', plan.buffers.len(), buffers)?;
                plan.buffers.push(self.buffer(kind, name)?);
            } else {
                return Err(self.expected("`kernel`, `weight`, `state`, `input`, `arena`, `entry` or `}`"));
            }
        }
        self.skip();
        if self.at < self.text.len() { Err(self.expected("the end")) } else { Ok(()) }
    }

    fn kernel(&mut self, name: String) -> Result<PlanKernel, Fault> {
        self.token(":")?;
        let family = self
            .one_of("a kernel family", |word| Family::ALL.into_iter().find(|family| family.name() == word))?;
        self.tokens(&[",", "schedule"])?;
        Ok(PlanKernel { name, family, schedule: self.string()?, measured: self.eat("measured") })
    }

    fn buffer(&mut self, kind: Kind, name: String) -> Result<PlanBuffer, Fault> {
        self.token(":")?;
        let dtype = self.one_of("a dtype", DType::from_name)?;
        let is_state = matches!(kind, Kind::State);
        let extents = if is_state && self.eat("[") { self.list("]", Parser::number)? } else { Vec::new() };
        self.token(",")?;
        let bytes = self.number()?;
        self.token("bytes")?;
        let place = match kind {
            Kind::Weight => {
                self.token("at")?;
                let offset = self.number()?;
                self.token("=")?;
                Place::Weight { offset, source: self.source(dtype, &name)? }
            }
            Kind::Arena => {
                self.token("at")?;
                Place::Arena { offset: self.number()? }
            }
            Kind::State => Place::State,
            Kind::Input => Place::Input,
        };
        Ok(PlanBuffer { name, place, dtype, extents, bytes })
    }

    fn source(&mut self, dtype: DType, buffer: &str) -> Result<WeightSource, Fault> {
        if self.eat("tensor") {
            let name = self.string()?;
            self.token("[")?;
            let rows = self.number()?;
            self.token(",")?;
            let columns = self.number()?;
            self.token("]")?;
            Ok(WeightSource::Tensor { name, rows, columns })
        } else if self.eat("constant") {
            self.token("[")?;
            Ok(WeightSource::Constant { data: self.list("]", Parser::float)? })
        } else if self.eat("pack") {
            self.tokens(&["{", "n", "="])?;
            let n = self.number()?;
            self.tokens(&[",", "k", "="])?;
            let k = self.number()?;
            self.token(",")?;
            let lanes = if self.eat("lanes") {
                self.token("=")?;
                let lanes = self.number()?;
                self.token(",")?;
                lanes
            } else {
                Pack::LANES
            };
            self.tokens(&["word", "="])?;
            let word = self.number()?;
            self.tokens(&[",", "streams", "=", "["])?;
            let (names, streams) = self.list("]", |parser| parser.stream(n))?.into_iter().unzip();
            self.token("}")?;
            Ok(WeightSource::Pack {
                pack: Pack { name: buffer.to_string(), dtype, n, k, lanes, word, streams },
                names,
            })
        } else {
            Err(self.expected("`tensor`, `pack` or `constant`"))
        }
    }

    /// `"name"[n / chunk * stride + n % chunk + offset]`, or `"name"[n + offset]`.
    fn stream(&mut self, n: usize) -> Result<(String, Stream), Fault> {
        let name = self.string()?;
        self.tokens(&["[", "n"])?;
        let (mut chunk, mut stride) = (n, n);
        if self.eat("/") {
            chunk = self.number()?;
            self.token("*")?;
            stride = self.number()?;
            self.tokens(&["+", "n", "%"])?;
            self.skip();
            let at = self.at;
            let modulus = self.number()?;
            if modulus != chunk {
                return Err((at, PlanParseFault::Chunks { divisor: chunk, modulus }));
            }
        }
        let offset = if self.eat("+") { self.number()? } else { 0 };
        self.token("]")?;
        Ok((name, Stream { weight: ValueId(0), chunk, stride, offset }))
    }

    fn entry(
        &mut self,
        kernel_count: usize,
        kernels: &Names<'t>,
        buffer_count: usize,
        buffers: &Names<'t>,
    ) -> Result<Entry, Fault> {
        self.token("@")?;
        let name = self.name()?;
        self.token("(")?;
        let symbols = Symbols(self.list(")", Parser::symbol)?);
        self.token("gives")?;
        let give = self
            .one_of("`nothing`, `last` or `all`", |word| Give::ALL.into_iter().find(|g| g.name() == word))?;
        let buffer = |parser: &mut Parser<'t>| parser.refer('%', buffer_count, buffers);
        self.tokens(&[",", "tokens"])?;
        let tokens = buffer(self)?;
        self.tokens(&[",", "positions"])?;
        let positions = buffer(self)?;
        let (mut logits, mut token) = (None, None);
        let mut comma = self.eat(",");
        if comma && self.eat("logits") {
            logits = Some(buffer(self)?);
            comma = self.eat(",");
        }
        if comma {
            self.token("token")?;
            token = Some(buffer(self)?);
        }
        self.token("{")?;
        let mut launches = Vec::new();
        while !self.eat("}") {
            self.token("launch")?;
            let kernel = self.refer('@', kernel_count, kernels)?;
            self.token("(")?;
            let args = self.list(")", buffer)?;
            self.token(":")?;
            let flops = self.number()?;
            self.tokens(&["flops", ","])?;
            let bytes = self.number()?;
            self.token("bytes")?;
            launches.push(Launch { kernel, args, cost: Cost { flops, bytes } });
        }
        Ok(Entry { name, symbols, give, tokens, positions, logits, token, launches })
    }

    /// `T = 1` or `P in 0..511`.
    fn symbol(&mut self) -> Result<Symbol, Fault> {
        let name = self.name()?;
        if self.eat("=") {
            let value = self.number()?;
            return Ok(Symbol { name, min: value, max: value });
        }
        self.token("in")?;
        let min = self.number()?;
        self.token("..")?;
        Ok(Symbol { name, min, max: self.number()? })
    }

    /// The label of a new kernel or buffer, the `index`th; gives its name.
    fn define(&mut self, sigil: char, index: usize, names: &mut Names<'t>) -> Result<String, Fault> {
        self.sigil(sigil)?;
        let at = self.at;
        let label = self.take(in_name);
        if label.starts_with(|c: char| c.is_ascii_digit()) {
            let found = number_of(at, label)?;
            return match found == index {
                true => self.string(),
                false => Err((at, PlanParseFault::Index { found, expected: index })),
            };
        }
        if !is_plain(label) {
            self.at = at;
            return Err(self.expected("a name or an index"));
        }
        match names.insert(label, index) {
            None => Ok(label.to_string()),
            Some(_) => Err((at, PlanParseFault::Twice { label: format!("{sigil}{label}") })),
        }
    }

    /// The index of the kernel or buffer that a label names, one of the `count` above.
    fn refer(&mut self, sigil: char, count: usize, names: &Names<'t>) -> Result<usize, Fault> {
        self.sigil(sigil)?;
        let at = self.at;
        let label = self.take(in_name);
        let index = match label.starts_with(|c: char| c.is_ascii_digit()) {
            true => Some(number_of(at, label)?).filter(|&index| index < count),
            false => names.get(label).copied(),
        };
        index.ok_or_else(|| (at, PlanParseFault::Unknown { label: format!("{sigil}{label}") }))
    }

    fn sigil(&mut self, sigil: char) -> Result<(), Fault> {
        self.token(if sigil == '@' { "@" } else { "%" })
    }

    /// Items with commas between them, up to `end`.
    fn list<T>(
        &mut self,
        end: &'static str,
        mut item: impl FnMut(&mut Parser<'t>) -> Result<T, Fault>,
    ) -> Result<Vec<T>, Fault> {
        let mut items = Vec::new();
        if self.eat(end) {
            return Ok(items);
        }
        loop {
            items.push(item(self)?);
            if !self.eat(",") {
                self.token(end)?;
                return Ok(items);
            }
        }
    }

    fn one_of<T>(&mut self, expected: &'static str, find: impl Fn(&str) -> Option<T>) -> Result<T, Fault> {
        self.skip();
        let at = self.at;
        let found = find(self.take(|c| c.is_ascii_alphanumeric() || c == '_'));
        found.ok_or_else(|| {
            self.at = at;
            self.expected(expected)
        })
    }

    fn number<N: FromStr>(&mut self) -> Result<N, Fault> {
        self.skip();
        let (at, rest) = (self.at, &self.text[self.at..]);
        let sign = usize::from(rest.starts_with('-'));
        let digits = rest[sign..].bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 {
            return Err(self.expected("a number"));
        }
        self.at += sign + digits;
        number_of(at, &rest[..sign + digits])
    }

    fn float(&mut self) -> Result<f64, Fault> {
        self.skip();
        let at = self.at;
        let text = self.take(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
        text.parse().map_err(|_| {
            self.at = at;
            self.expected("a number")
        })
    }

    /// A name, in quotes or without.
    fn name(&mut self) -> Result<String, Fault> {
        self.skip();
        if self.text[self.at..].starts_with('"') {
            return self.string();
        }
        let at = self.at;
        let name = self.take(in_name);
        if is_plain(name) {
            return Ok(name.to_string());
        }
        self.at = at;
        Err(self.expected("a name"))
    }

    fn string(&mut self) -> Result<String, Fault> {
        self.skip();
        if !self.text[self.at..].starts_with('"') {
            return Err(self.expected("a string"));
        }
        self.at += 1;
        let mut out = String::new();
        loop {
            out += self.take(|c| c != '"' && c != '\\' && !c.is_control());
            let rest = &self.text[self.at..];
            if rest.starts_with('"') {
                self.at += 1;
                return Ok(out);
            }
            let (c, bytes) = escaped(rest).ok_or_else(|| self.expected("`\"` or an escape"))?;
            out.push(c);
            self.at += bytes;
        }
    }

    fn tokens(&mut self, tokens: &[&'static str]) -> Result<(), Fault> {
        tokens.iter().try_for_each(|token| self.token(token))
    }

    fn token(&mut self, token: &'static str) -> Result<(), Fault> {
        if self.eat(token) { Ok(()) } else { Err(self.expected(&format!("`{token}`"))) }
    }

    /// Steps over `token`, if it is next; a word only where it ends.
    fn eat(&mut self, token: &str) -> bool {
        self.skip();
        let Some(rest) = self.text[self.at..].strip_prefix(token) else { return false };
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if token.ends_with(word) && rest.starts_with(word) {
            return false;
        }
        self.at += token.len();
        true
    }

    /// The characters from here on that are `wanted`.
    fn take(&mut self, wanted: impl Fn(char) -> bool) -> &'t str {
        let rest = &self.text[self.at..];
        let taken = &rest[..rest.find(|c| !wanted(c)).unwrap_or(rest.len())];
        self.at += taken.len();
        taken
    }

    /// Steps over spaces and comments.
    fn skip(&mut self) {
        loop {
            match self.text.as_bytes().get(self.at) {
                Some(b' ' | b'\n' | b'\t' | b'\r') => self.at += 1,
                Some(b'/') if self.text[self.at..].starts_with("//") => {
                    self.take(|c| c != '\n');
                }
                _ => return,
            }
        }
    }

    /// The fault that something else stands here.
    fn expected(&self, expected: &str) -> Fault {
        let rest = &self.text[self.at..];
        // 24 characters show the place and fit the line.
        let word: String = rest.chars().take_while(|c| !c.is_whitespace()).take(24).collect();
        let found = match (rest.is_empty(), word.is_empty()) {
            (true, _) => "the end".to_string(),
            (false, true) => "a space".to_string(),
            (false, false) => format!("`{word}`"),
        };
        (self.at, PlanParseFault::Expected { expected: expected.to_string(), found })
    }
}

/// What may be in a table of buffers.
#[derive(Clone, Copy)]
enum Kind {
    Weight,
    State,
    Input,
    Arena,
}

impl Kind {
    const ALL: [Kind; 4] = [Kind::Weight, Kind::State, Kind::Input, Kind::Arena];

    fn name(self) -> &'static str {
        match self {
            Kind::Weight => "weight",
            Kind::State => "state",
            Kind::Input => "input",
            Kind::Arena => "arena",
        }
    }
}

fn number_of<N: FromStr>(at: usize, text: &str) -> Result<N, Fault> {
    let fault = || PlanParseFault::Number { found: text.chars().take(24).collect() };
    text.parse().map_err(|_| (at, fault()))
}

/// The character that the escape at the beginning of `text` stands for, and the bytes of the escape.
fn escaped(text: &str) -> Option<(char, usize)> {
    let text = text.strip_prefix('\\')?;
    match text.chars().next()? {
        c @ ('"' | '\\') => Some((c, 2)),
        'u' => {
            let hex = text.strip_prefix("u{")?;
            let hex = &hex[..hex.find('}').filter(|&end| end <= 6)?];
            let c = char::from_u32(u32::from_str_radix(hex, 16).ok()?)?;
            Some((c, "\\u{}".len() + hex.len()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::TINY;
    use crate::plan::print::print;
    use crate::plan::verify::verify;
    use proptest::prelude::*;
    use proptest::sample::{Index, select};

    #[test]
    fn the_small_plan_round_trips() {
        assert_eq!(print(&parse(TINY).unwrap()), TINY);
    }

    #[test]
    fn spaces_and_comments_mean_nothing() {
        let spread = TINY.replace(" {\n", " // A comment.\n{\n\n\t");
        assert_eq!(parse(&spread), parse(TINY));
        assert_eq!(parse("plan(context=0,vocab=0,arena=0 bytes){}// end"), Ok(Plan::default()));
    }

    #[test]
    #[rustfmt::skip] // a table: one fault a line
    fn faults_have_a_place() {
        for (from, to, says) in [
            ("plan(", "plain(", "line 1, column 1: expected `plan`, found `plain(context`"),
            ("vocab = 32,", "vocab = -1,", "line 1, column 28: the number -1 is out of range"),
            ("vocab = 32,", "vocab = x,", "line 1, column 28: expected a number, found `x,`"),
            ("vocab = 32,", "vocab = 99999999999999999999,", "line 1, column 28: the number 99999999999999999999 is out of range"),
            ("kernel @embed : gather", "kernel @embed : gatherer", "line 2, column 19: expected a kernel family, found `gatherer,`"),
            ("@l0.qkv :", "@embed :", "line 3, column 11: @embed is defined twice"),
            ("@2 \"the head\"", "@3 \"the head\"", "line 4, column 11: this is number 2, not 3"),
            ("\\u{a}", "\\u{d800}", "line 5, column 59: expected `\"` or an escape, found `\\u{d800}in`"),
            ("\\u{a}", "\n", "line 5, column 59: expected `\"` or an escape, found a space"),
            ("model.embed_tokens.weight : bf16", "model.embed_tokens.weight : bf17", "line 6, column 39: expected a dtype, found `bf17,`"),
            ("%l0.qkv.0 :", "%é :", "line 7, column 11: expected a name or an index, found `é`"),
            ("n % 4]", "n % 5]", "line 7, column 112: the chunks 4 and 5 differ"),
            ("-0.0", "-0.0.0", "line 9, column 68: expected a number, found `-0.0.0,`"),
            ("P in 0..63", "P in 0..9223372036854775808", "line 21, column 32: the number 9223372036854775808 is out of range"),
            ("gives last", "gives least", "line 21, column 42: expected `nothing`, `last` or `all`, found `least,`"),
            ("launch @embed", "launch @emb", "line 22, column 13: there is no @emb above"),
            ("launch @2", "launch @4", "line 24, column 13: there is no @4 above"),
            ("(%12, %13", "(%12, %19", "line 31, column 21: there is no %19 above"),
            ("(%12, %13", "(%12 %13", "line 31, column 19: expected `)`, found `%13,`"),
            ("4000 bytes\n  }\n}\n", "4000 bytes\n  }\n} }\n", "line 33, column 3: expected the end, found `}`"),
            ("4000 bytes\n  }\n}\n", "4000 bytes\n  }\n", "line 33, column 1: expected `kernel`, `weight`, `state`, `input`, `arena`, `entry` or `}`, found the end"),
        ] {
            assert!(TINY.contains(from), "{from}");
            assert_eq!(parse(&TINY.replacen(from, to, 1)).unwrap_err().to_string(), says, "{from} -> {to}");
        }
    }

    /// As long as the plan of a model of 80 layers with a dozen entry points.
    #[test]
    fn a_large_plan_round_trips() {
        let mut plan = parse(TINY).unwrap();
        let mut offset = plan.weight_bytes();
        for layer in 0..80 {
            for part in ["qkv.0", "qkv.1", "o.0", "gate_up.0", "down.0"] {
                let mut buffer = plan.buffers[1].clone();
                let Place::Weight { offset: place, source: WeightSource::Pack { pack, .. } } =
                    &mut buffer.place
                else {
                    unreachable!("buffer 1 is a pack");
                };
                buffer.name = format!("l{layer}.{part}");
                (pack.name, *place) = (buffer.name.clone(), offset);
                offset += buffer.bytes;
                if buffer.name != "l0.qkv.0" {
                    plan.buffers.push(buffer);
                }
            }
        }
        for number in 0..12 {
            let mut entry = plan.entries[0].clone();
            entry.name = format!("decode{number}");
            let middle = entry.launches[1].clone();
            entry.launches.splice(1..2, (0..400).map(|_| middle.clone()));
            plan.entries.push(entry);
        }
        assert_eq!(verify(&plan), Ok(()));
        assert_eq!(parse(&print(&plan)), Ok(plan));
    }

    fn any_name() -> impl Strategy<Value = String> {
        prop_oneof![
            select(vec!["a", "b.0", "a/b", "3", "", "two words", "\"\\\n", "é", "n", "in"])
                .prop_map(String::from),
            ".{0,6}"
        ]
    }

    fn any_float() -> impl Strategy<Value = f64> {
        any::<u64>().prop_map(f64::from_bits).prop_filter("NaN is not equal to itself", |x| !x.is_nan())
    }

    fn any_source() -> impl Strategy<Value = WeightSource> {
        let stream = (any::<usize>(), any::<usize>(), select(vec![0, 1, usize::MAX]));
        let stream =
            stream.prop_map(|(chunk, stride, offset)| Stream { weight: ValueId(0), chunk, stride, offset });
        let pack = (any::<[usize; 4]>(), prop::collection::vec((any_name(), stream, any::<bool>()), 0..3));
        prop_oneof![
            (any_name(), any::<[usize; 2]>()).prop_map(|(name, [rows, columns])| WeightSource::Tensor {
                name,
                rows,
                columns
            }),
            prop::collection::vec(any_float(), 0..4).prop_map(|data| WeightSource::Constant { data }),
            pack.prop_map(|([n, k, lanes, word], parts)| {
                let whole = |(name, mut stream, whole): (String, Stream, bool)| {
                    if whole {
                        (stream.chunk, stream.stride) = (n, n);
                    }
                    (name, stream)
                };
                let (names, streams) = parts.into_iter().map(whole).unzip();
                let pack = Pack { name: String::new(), dtype: DType::F32, n, k, lanes, word, streams };
                WeightSource::Pack { pack, names }
            }),
        ]
    }

    fn any_buffer() -> impl Strategy<Value = PlanBuffer> {
        let place = prop_oneof![
            (any::<usize>(), any_source()).prop_map(|(offset, source)| Place::Weight { offset, source }),
            any::<usize>().prop_map(|offset| Place::Arena { offset }),
            Just(Place::State),
            Just(Place::Input),
        ];
        let dtype =
            select(vec![DType::BF16, DType::I32, DType::Bool, DType::Block(crate::dtype::Block::Q4K)]);
        let extents = prop::collection::vec(any::<usize>(), 0..4);
        (any_name(), place, dtype, extents, any::<usize>()).prop_map(
            |(name, mut place, dtype, extents, bytes)| {
                if let Place::Weight { source: WeightSource::Pack { pack, .. }, .. } = &mut place {
                    (pack.name, pack.dtype) = (name.clone(), dtype);
                }
                let extents = if place == Place::State { extents } else { Vec::new() };
                PlanBuffer { name, place, dtype, extents, bytes }
            },
        )
    }

    prop_compose! {
        fn any_entry()(
            name in any_name(),
            symbols in prop::collection::vec((any_name(), any::<[i64; 2]>()), 0..3),
            give in select(Give::ALL.to_vec()),
            bound in any::<[Index; 2]>(),
            results in any::<[Option<Index>; 2]>(),
            launches in prop::collection::vec(
                (any::<Index>(), prop::collection::vec(any::<Index>(), 0..4), any::<[u64; 2]>()), 0..4),
            kernels in Just(KERNELS), buffers in Just(BUFFERS),
        ) -> Entry {
            let symbol = |(name, [min, max]): (String, [i64; 2])| Symbol { name, min, max };
            let launch = |(kernel, args, [flops, bytes]): (Index, Vec<Index>, [u64; 2])| Launch {
                kernel: kernel.index(kernels),
                args: args.iter().map(|arg| arg.index(buffers)).collect(),
                cost: Cost { flops, bytes },
            };
            Entry {
                name,
                symbols: Symbols(symbols.into_iter().map(symbol).collect()),
                give,
                tokens: bound[0].index(buffers),
                positions: bound[1].index(buffers),
                logits: results[0].map(|i| i.index(buffers)),
                token: results[1].map(|i| i.index(buffers)),
                launches: launches.into_iter().map(launch).collect(),
            }
        }
    }

    const KERNELS: usize = 3;
    const BUFFERS: usize = 6;

    prop_compose! {
        fn any_plan()(
            kernels in prop::collection::vec((any_name(), select(Family::ALL.to_vec()), any_name(), any::<bool>()), KERNELS),
            buffers in prop::collection::vec(any_buffer(), BUFFERS),
            entries in prop::collection::vec(any_entry(), 0..3),
            [arena_bytes, context, vocab] in any::<[usize; 3]>(),
        ) -> Plan {
            let kernel = |(name, family, schedule, measured)| PlanKernel { name, family, schedule, measured };
            let kernels = kernels.into_iter().map(kernel).collect();
            Plan { buffers, kernels, entries, arena_bytes, context, vocab }
        }
    }

    /// A piece of text put in the place of up to `cut` characters.
    fn any_edit() -> impl Strategy<Value = (Index, usize, String)> {
        let pieces = [
            "",
            " ",
            "0",
            "-1",
            "18446744073709551615",
            "%",
            "@",
            "\"",
            "\\",
            "}",
            "{",
            "//",
            ",",
            "é",
            "NaN",
            "0..",
            "%3",
            "64",
        ];
        (any::<Index>(), 0..6usize, select(pieces.to_vec()).prop_map(String::from))
    }

    fn edited(text: &str, edits: &[(Index, usize, String)]) -> String {
        let mut chars: Vec<char> = text.chars().collect();
        for (at, cut, piece) in edits {
            let at = at.index(chars.len() + 1);
            let end = (at + cut).min(chars.len());
            chars.splice(at..end, piece.chars());
        }
        chars.into_iter().collect()
    }

    /// What a run time does with a plan that `verify` let pass: every size and index it computes.
    fn use_all_of(plan: &Plan) {
        let sizes = plan.totals();
        assert!(sizes.total_bytes <= isize::MAX as usize);
        for buffer in &plan.buffers {
            let (end, section) = match &buffer.place {
                Place::Weight { offset, .. } => (offset + buffer.bytes, sizes.weight_bytes),
                Place::Arena { offset } => (offset + buffer.bytes, plan.arena_bytes),
                Place::State | Place::Input => continue,
            };
            assert!(end <= section);
            if let Place::Weight { source: WeightSource::Pack { pack, names }, .. } = &buffer.place {
                let last = pack.index(pack.streams.len() - 1, pack.n - 1, pack.k - 1);
                assert!(pack.dtype.bytes(last + 1) <= buffer.bytes && pack.streams.len() == names.len());
                assert!(pack.streams.iter().all(|s| s.row(pack.n - 1) < usize::MAX));
            }
        }
        for entry in &plan.entries {
            let cost = entry.cost();
            assert!(cost.flops >= entry.launches.iter().map(|l| l.cost.flops).max().unwrap_or(0));
            for launch in &entry.launches {
                assert!(launch.kernel < plan.kernels.len());
                assert!(launch.args.iter().all(|&arg| arg < plan.buffers.len()));
            }
            let steps = entry.max()[0] as usize;
            assert!(4 * steps <= plan.buffers[entry.tokens].bytes.min(plan.buffers[entry.positions].bytes));
        }
    }

    proptest! {
        #[test]
        fn any_plan_round_trips(plan in any_plan()) {
            prop_assert_eq!(parse(&print(&plan)), Ok(plan));
        }

        #[test]
        fn verify_never_panics(plan in any_plan()) {
            if verify(&plan).is_ok() {
                use_all_of(&plan);
            }
        }

        #[test]
        fn mutated_text_is_an_error_or_a_plan(edits in prop::collection::vec(any_edit(), 1..4)) {
            if let Ok(plan) = parse(&edited(TINY, &edits)) {
                let text = print(&plan);
                prop_assert_eq!(print(&parse(&text).unwrap()), text);
                if verify(&plan).is_ok() {
                    use_all_of(&plan);
                }
            }
        }

        #[test]
        fn any_text_is_an_error_or_a_plan(text in ".*") {
            let _ = parse(&text);
        }
    }
}
