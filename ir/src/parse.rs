//! Reads graph text, the form that [`crate::print`] writes.
//!
//! ```text
//! file   = graph*
//! graph  = "graph" @name "(" [symbol ("," symbol)*] ")" "{" (value | group | pack | output)* "}"
//! symbol = word "in" int ".." int | word "=" int
//! value  = %name "=" op ":" type ["@" word "(" int ")"]
//! op     = word [string | numbers | %name ("," %name)*] ["{" field ("," field)* "}"]
//! type   = word "[" [dim ("," dim)*] "]"
//! dim    = ["-"] term (("+" | "-") term)*         term = int ["*" word] | word
//! group  = "group" @name ":" word ["," "schedule" string ["measured"]] "{" value* "}"
//! pack   = "pack" @name ":" word "{" n, k, [lanes,] word, "streams" "=" "[" stream ("," stream)* "]" "}"
//! stream = %name "[" ("n" | "n" "/" int "*" int "+" "n" "%" int) ["+" int] "]"
//! output = "output" string "=" %name ":" type
//! ```
//!
//! Fields stand in one order, the printer's. A comment on a line of its own is a remark of the value or group
//! that follows; one behind other text, above a graph or above anything else is dropped.
//!
//! Here names are resolved and numbers bounded; whether the graph means anything is [`crate::verify`]'s affair.
//! Nothing here recurses, and no text makes it panic.

mod lex;

use self::lex::{Kind, Place, Token, tokens};
use crate::dim::{Dim, MAX_SYMBOLS, Sym};
use crate::dtype::DType;
use crate::graph::{Family, Graph, Group, GroupId, Layout, Pack, Stream, TensorType, Value, ValueId};
use crate::op::{Binary, Compare, DotAxes, Op, Reduction, Unary};
use crate::print;
use crate::verify::{MAX_COEF, MAX_EXTENT, MAX_OPERANDS, MAX_RANK};
use std::collections::{HashMap, HashSet};

/// Where and why text is no graph. Lines and columns count from 1, columns in characters.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {fault}")]
pub struct ParseError {
    /// Line of the word at fault.
    pub line: usize,
    /// Its column.
    pub column: usize,
    /// What is wrong with it.
    pub fault: ParseFault,
}

/// What is wrong with a word of graph text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say what the fields are
pub enum ParseFault {
    #[error("expected {expected}, found {found}")]
    Expected { expected: &'static str, found: String },
    #[error("a graph has no character `{0}` outside of quotes")]
    Character(char),
    #[error("the quotes are never closed")]
    OpenQuotes,
    #[error("unknown escape; known are \\\" \\\\ and \\u{{hex}}")]
    Escape,
    #[error("`{text}` is beyond {max}, the largest number here")]
    Number { text: String, max: i64 },
    #[error("there is no {what} `{name}`; known are {known}")]
    Unknown { what: &'static str, name: String, known: String },
    #[error("%{0} is not defined above")]
    UnknownValue(String),
    #[error("the graph has no symbol `{0}`")]
    UnknownSymbol(String),
    #[error("a second {what} `{name}`")]
    Duplicate { what: &'static str, name: String },
    #[error("more than {max} {what}")]
    TooMany { what: &'static str, max: usize },
    #[error("`{0}` names no contraction such as \"tk,nk->tn\"")]
    Axes(String),
    #[error("%{name} is {found}, not {written}")]
    OutputType { name: String, found: String, written: String },
    #[error("expected one graph, found {0}")]
    Graphs(usize),
}

type Result<T> = std::result::Result<T, ParseError>;

/// Reads one graph.
///
/// # Errors
///
/// The first fault, or [`ParseFault::Graphs`] where the text holds none or several.
pub fn graph(text: &str) -> Result<Graph> {
    let mut graphs = graphs(text)?;
    match (graphs.pop(), graphs.len()) {
        (Some(graph), 0) => Ok(graph),
        (last, more) => {
            let found = more + usize::from(last.is_some());
            Err(ParseError { line: 1, column: 1, fault: ParseFault::Graphs(found) })
        }
    }
}

/// Reads every graph of a file.
///
/// # Errors
///
/// The first fault.
pub fn graphs(text: &str) -> Result<Vec<Graph>> {
    let mut parser =
        Parser { tokens: tokens(text)?, next: 0, graph: Graph::default(), names: HashMap::new() };
    let mut graphs: Vec<Graph> = Vec::new();
    loop {
        let start = parser.next();
        match start.kind {
            Kind::End => return Ok(graphs),
            Kind::Word("graph") => {}
            _ => return Err(start.unexpected("`graph`")),
        }
        let graph = parser.graph()?;
        if graphs.iter().any(|other| other.name == graph.name) {
            return Err(start.place.fault(ParseFault::Duplicate { what: "graph", name: graph.name }));
        }
        graphs.push(graph);
    }
}

struct Parser<'a> {
    tokens: Vec<Token<'a>>,
    next: usize,
    /// The graph being read.
    graph: Graph,
    /// Its values by name.
    names: HashMap<&'a str, ValueId>,
}

impl<'a> Parser<'a> {
    /// The next word that is no remark. Remarks stay where they are until a word behind them is taken: the value
    /// that follows may still want them.
    fn peek(&self) -> &Token<'a> {
        let mut words = self.tokens[self.next..].iter();
        words.find(|token| !matches!(token.kind, Kind::Remark(_))).expect("the last word is the end")
    }

    fn peek_place(&self) -> Place {
        self.peek().place
    }

    /// Takes a word. The end of the text can be taken again and again.
    fn next(&mut self) -> Token<'a> {
        self.remarks();
        let Token { kind, place } = &self.tokens[self.next];
        let token = Token { kind: kind.clone(), place: *place };
        self.next = (self.next + 1).min(self.tokens.len() - 1);
        token
    }

    /// Takes the next word if `take` knows it.
    fn take<T>(&mut self, expected: &'static str, take: impl Fn(&Kind<'a>) -> Option<T>) -> Result<T> {
        match take(&self.peek().kind) {
            Some(taken) => {
                self.next();
                Ok(taken)
            }
            None => Err(self.peek().unexpected(expected)),
        }
    }

    /// Takes a sign if it comes next.
    fn accept(&mut self, sign: char) -> bool {
        let comes = self.peek().kind == Kind::Sign(sign);
        if comes {
            self.next();
        }
        comes
    }

    /// Takes one of the grammar's signs; `expected` is the sign in backquotes.
    fn sign(&mut self, expected: &'static str) -> Result<()> {
        let sign = expected.chars().nth(1).expect("a sign in backquotes");
        self.take(expected, |kind| (*kind == Kind::Sign(sign)).then_some(()))
    }

    fn word(&mut self, expected: &'static str) -> Result<&'a str> {
        self.take(expected, |kind| if let Kind::Word(word) = kind { Some(*word) } else { None })
    }

    /// Takes a fixed word; `expected` is the word in backquotes.
    fn keyword(&mut self, expected: &'static str) -> Result<()> {
        let word = expected.trim_matches('`');
        self.take(expected, |kind| (*kind == Kind::Word(word)).then_some(()))
    }

    fn name(&mut self) -> Result<&'a str> {
        self.take("a name such as `@x`", |kind| if let Kind::Name(name) = kind { Some(*name) } else { None })
    }

    fn text(&mut self) -> Result<String> {
        self.take(
            "text in quotes",
            |kind| if let Kind::Text(text) = kind { Some(text.clone()) } else { None },
        )
    }

    /// Takes a whole number of at most [`MAX_EXTENT`].
    fn int(&mut self) -> Result<i64> {
        let place = self.peek_place();
        let text = self.take("a whole number", |kind| match kind {
            Kind::Number(text) if text.bytes().all(|b| b.is_ascii_digit()) => Some(*text),
            _ => None,
        })?;
        let too_large = || place.fault(ParseFault::Number { text: text.to_string(), max: MAX_EXTENT });
        text.parse().ok().filter(|&n| n <= MAX_EXTENT).ok_or_else(too_large)
    }

    fn index(&mut self) -> Result<usize> {
        Ok(self.int()? as usize)
    }

    /// A whole number that may be negative.
    fn signed(&mut self) -> Result<i64> {
        if self.accept('-') { Ok(-self.int()?) } else { self.int() }
    }

    fn float(&mut self) -> Result<f64> {
        let sign = if self.accept('-') { -1.0 } else { 1.0 };
        let size = self.take("a number", |kind| match kind {
            Kind::Number(text) => text.parse::<f64>().ok(),
            Kind::Word("inf") => Some(f64::INFINITY),
            Kind::Word("nan") => Some(f64::NAN),
            _ => None,
        })?;
        Ok(sign * size)
    }

    /// `one` between commas until `end`, at most `max`. The opening bracket was taken.
    fn list<T>(
        &mut self,
        end: &'static str,
        (what, max): (&'static str, usize),
        mut one: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let mut list = Vec::new();
        let closing = end.chars().nth(1).expect("a sign in backquotes");
        if self.accept(closing) {
            return Ok(list);
        }
        loop {
            let place = self.peek_place();
            list.push(one(self)?);
            if list.len() > max {
                return Err(place.fault(ParseFault::TooMany { what, max }));
            }
            if !self.accept(',') {
                return self.sign(end).map(|()| list);
            }
        }
    }

    /// `name =`, as it stands before a field's value.
    fn field(&mut self, name: &'static str) -> Result<()> {
        self.keyword(name)?;
        self.sign("`=`")
    }

    /// A graph after the word `graph`.
    fn graph(&mut self) -> Result<Graph> {
        self.names.clear();
        self.graph = Graph { name: self.name()?.to_string(), ..Graph::default() };
        self.sign("`(`")?;
        self.list("`)`", ("symbols", MAX_SYMBOLS), Self::symbol)?;
        self.sign("`{`")?;
        let mut taken = Taken::default();
        loop {
            let remarks = self.remarks();
            let token = self.next();
            match token.kind {
                Kind::Sign('}') => return Ok(std::mem::take(&mut self.graph)),
                Kind::Value(name) => self.value(name, token.place, remarks, None)?,
                Kind::Word("group") => self.group(remarks, &mut taken)?,
                Kind::Word("pack") => self.pack(&mut taken)?,
                Kind::Word("output") => self.output(&mut taken)?,
                _ => return Err(token.unexpected("a value, `group`, `pack`, `output` or `}`")),
            }
        }
    }

    /// Comments on lines of their own that come next.
    fn remarks(&mut self) -> Vec<String> {
        let mut remarks = Vec::new();
        while let Kind::Remark(text) = self.tokens[self.next].kind {
            remarks.push(text.to_string());
            self.next += 1;
        }
        remarks
    }

    fn symbol(&mut self) -> Result<()> {
        let place = self.peek_place();
        let name = self.word("a symbol")?;
        if self.graph.symbols.find(name).is_some() {
            return Err(place.fault(ParseFault::Duplicate { what: "symbol", name: name.to_string() }));
        }
        let (min, max) = if self.accept('=') {
            let only = self.signed()?;
            (only, only)
        } else {
            self.keyword("`in`")?;
            let min = self.signed()?;
            self.take("`..`", |kind| (*kind == Kind::Range).then_some(()))?;
            (min, self.signed()?)
        };
        if self.graph.symbols.0.len() == MAX_SYMBOLS {
            return Err(place.fault(ParseFault::TooMany { what: "symbols", max: MAX_SYMBOLS }));
        }
        self.graph.symbols.add(name, min, max);
        Ok(())
    }

    /// A value after its name.
    fn value(
        &mut self,
        name: &'a str,
        place: Place,
        remarks: Vec<String>,
        group: Option<GroupId>,
    ) -> Result<()> {
        if self.names.contains_key(name) {
            return Err(place.fault(ParseFault::Duplicate { what: "value", name: name.to_string() }));
        }
        self.sign("`=`")?;
        let (op, operands) = self.op()?;
        self.sign("`:`")?;
        let ty = self.tensor_type()?;
        let layout = if self.accept('@') { Some(self.layout()?) } else { None };
        self.names.insert(name, ValueId(self.graph.values.len() as u32));
        self.graph.values.push(Value { name: name.to_string(), op, operands, ty, group, layout, remarks });
        Ok(())
    }

    /// The id of a value defined above.
    fn operand(&mut self) -> Result<ValueId> {
        let place = self.peek_place();
        let name =
            self.take(
                "a value such as `%x`",
                |kind| if let Kind::Value(name) = kind { Some(*name) } else { None },
            )?;
        let id = self.names.get(name).copied();
        id.ok_or_else(|| place.fault(ParseFault::UnknownValue(name.to_string())))
    }

    fn op(&mut self) -> Result<(Op, Vec<ValueId>)> {
        let place = self.peek_place();
        let word = self.word("an op")?;
        match word {
            "input" => return Ok((Op::Input { name: self.text()? }, Vec::new())),
            "weight" => return Ok((Op::Weight { name: self.text()? }, Vec::new())),
            "state" => return Ok((Op::State { name: self.text()? }, Vec::new())),
            "constant" => return Ok((Op::Constant { data: self.numbers()? }, Vec::new())),
            _ => {}
        }
        let mut operands = Vec::new();
        if matches!(self.peek().kind, Kind::Value(_)) {
            operands.push(self.operand()?);
            while self.accept(',') {
                operands.push(self.operand()?);
                if operands.len() > MAX_OPERANDS {
                    return Err(place.fault(ParseFault::TooMany { what: "operands", max: MAX_OPERANDS }));
                }
            }
        }
        let op = match word {
            "cast" => Op::Cast,
            "select" => Op::Select,
            "iota" => Op::Iota { axis: self.only_axis()? },
            "broadcast" => Op::Broadcast { axes: self.axes("`axes`")? },
            "reshape" => Op::Reshape,
            "transpose" => Op::Transpose { perm: self.axes("`perm`")? },
            "slice" => {
                self.sign("`{`")?;
                let axis = self.axis()?;
                self.sign("`,`")?;
                self.field("`start`")?;
                let start = self.dim()?;
                self.sign("`}`")?;
                Op::Slice { axis, start }
            }
            "concat" => Op::Concat { axis: self.only_axis()? },
            "reduce.sum" => Op::Reduce { kind: Reduction::Sum, axis: self.only_axis()? },
            "reduce.max" => Op::Reduce { kind: Reduction::Max, axis: self.only_axis()? },
            "dot" => {
                self.sign("`{`")?;
                self.field("`axes`")?;
                let place = self.peek_place();
                let text = self.text()?;
                let axes = DotAxes::parse(&text).ok_or_else(|| place.fault(ParseFault::Axes(text)))?;
                self.sign("`}`")?;
                Op::Dot { axes }
            }
            "gather" => Op::Gather,
            "scatter_add" => Op::ScatterAdd,
            op @ ("attention" | "attention_lse") => {
                let lse = op == "attention_lse";
                self.sign("`{`")?;
                self.field("`causal`")?;
                let causal = self.take("`true` or `false`", |kind| match kind {
                    Kind::Word("true") => Some(true),
                    Kind::Word("false") => Some(false),
                    _ => None,
                })?;
                self.sign("`,`")?;
                self.field("`scale`")?;
                let scale = self.float()?;
                self.sign("`}`")?;
                if lse { Op::AttentionLse { causal, scale } } else { Op::Attention { causal, scale } }
            }
            "cache_append" => Op::CacheAppend,
            "quantize" => Op::Quantize,
            "dequantize" => Op::Dequantize,
            "argmax" => Op::Argmax,
            word => element_wise(word).ok_or_else(|| place.fault(unknown_op(word)))?,
        };
        Ok((op, operands))
    }

    /// One number, or several in brackets.
    fn numbers(&mut self) -> Result<Vec<f64>> {
        if self.accept('[') {
            self.list("`]`", ("numbers", usize::MAX), Self::float)
        } else {
            Ok(vec![self.float()?])
        }
    }

    fn axis(&mut self) -> Result<usize> {
        self.field("`axis`")?;
        self.index()
    }

    /// `{ axis = 1 }`
    fn only_axis(&mut self) -> Result<usize> {
        self.sign("`{`")?;
        let axis = self.axis()?;
        self.sign("`}`")?;
        Ok(axis)
    }

    /// `{ axes = [0, 2] }`, under the field's name.
    fn axes(&mut self, name: &'static str) -> Result<Vec<usize>> {
        self.sign("`{`")?;
        self.field(name)?;
        self.sign("`[`")?;
        let axes = self.list("`]`", ("axes", MAX_RANK), Self::index)?;
        self.sign("`}`")?;
        Ok(axes)
    }

    fn dtype(&mut self) -> Result<DType> {
        let place = self.peek_place();
        let name = self.word("a dtype")?;
        let known = "f64 f32 bf16 f16 i32 i8 u8 bool and block formats such as q8_0";
        DType::from_name(name).ok_or_else(|| place.fault(unknown("dtype", name, known)))
    }

    fn tensor_type(&mut self) -> Result<TensorType> {
        let dtype = self.dtype()?;
        self.sign("`[`")?;
        let shape = self.list("`]`", ("axes", MAX_RANK), Self::dim)?;
        Ok(TensorType { dtype, shape })
    }

    /// `2*T - 1`
    fn dim(&mut self) -> Result<Dim> {
        let mut dim = Dim::of(0);
        let mut sign = if self.accept('-') { -1 } else { 1 };
        loop {
            let place = self.peek_place();
            let (factor, sym) = self.term()?;
            let (total, max) = match sym {
                Some(Sym(index)) if factor <= MAX_COEF => {
                    let coef = &mut dim.coef[usize::from(index)];
                    *coef += (sign * factor) as i32;
                    (i64::from(*coef), MAX_COEF)
                }
                Some(_) => (factor, MAX_COEF),
                None => {
                    dim.base += sign * factor;
                    (dim.base, MAX_EXTENT)
                }
            };
            if total.abs() > max {
                return Err(place.fault(ParseFault::Number { text: total.to_string(), max }));
            }
            sign = match self.peek().kind {
                Kind::Sign('+') => 1,
                Kind::Sign('-') => -1,
                _ => return Ok(dim),
            };
            self.next();
        }
    }

    /// `2*T`, `T` or `2`.
    fn term(&mut self) -> Result<(i64, Option<Sym>)> {
        let mut factor = 1;
        if matches!(self.peek().kind, Kind::Number(_)) {
            factor = self.int()?;
            if !self.accept('*') {
                return Ok((factor, None));
            }
        }
        let place = self.peek_place();
        let name = self.word("an extent")?;
        let sym = self.graph.symbols.find(name);
        let unknown = || place.fault(ParseFault::UnknownSymbol(name.to_string()));
        sym.map(|sym| (factor, Some(sym))).ok_or_else(unknown)
    }

    /// `rows(96)`
    fn layout(&mut self) -> Result<Layout> {
        let place = self.peek_place();
        let name = self.word("a layout")?;
        self.sign("`(`")?;
        let number = self.index()?;
        self.sign("`)`")?;
        match name {
            "rows" => Ok(Layout::Rows { pitch: number }),
            "pages" => Ok(Layout::Pages { slots: number }),
            "key_panels" => Ok(Layout::KeyPanels { word: number }),
            "value_panels" => Ok(Layout::ValuePanels { word: number }),
            name => Err(place.fault(unknown("layout", name, "rows pages key_panels value_panels"))),
        }
    }

    /// A group after the word `group`.
    fn group(&mut self, remarks: Vec<String>, taken: &mut Taken<'a>) -> Result<()> {
        let name = taken.group(self)?;
        self.sign("`:`")?;
        let place = self.peek_place();
        let family = self.word("a family")?;
        let family = Family::ALL.into_iter().find(|f| f.name() == family).ok_or_else(|| {
            let known: Vec<_> = Family::ALL.iter().map(|f| f.name()).collect();
            place.fault(unknown("family", family, &known.join(" ")))
        })?;
        let (mut schedule, mut measured) = (None, false);
        if self.accept(',') {
            self.keyword("`schedule`")?;
            schedule = Some(self.text()?);
            measured = self.peek().kind == Kind::Word("measured");
            if measured {
                self.next();
            }
        }
        self.sign("`{`")?;
        let id = GroupId(self.graph.groups.len() as u32);
        self.graph.groups.push(Group { name: name.to_string(), family, schedule, measured, remarks });
        loop {
            let remarks = self.remarks();
            let token = self.next();
            match token.kind {
                Kind::Sign('}') => return Ok(()),
                Kind::Value(name) => self.value(name, token.place, remarks, Some(id))?,
                _ => return Err(token.unexpected("a value or `}`")),
            }
        }
    }

    /// A pack after the word `pack`.
    fn pack(&mut self, taken: &mut Taken<'a>) -> Result<()> {
        let name = taken.pack(self)?.to_string();
        self.sign("`:`")?;
        let dtype = self.dtype()?;
        self.sign("`{`")?;
        let [n, k] = [self.size("`n`")?, self.size("`k`")?];
        let named = matches!(self.peek().kind, Kind::Word("lanes"));
        let lanes = if named { self.size("`lanes`")? } else { Pack::LANES };
        let word = self.size("`word`")?;
        self.field("`streams`")?;
        self.sign("`[`")?;
        let streams = self.list("`]`", ("streams", MAX_OPERANDS), |parser| parser.stream(n))?;
        self.sign("`}`")?;
        self.graph.packs.push(Pack { name, dtype, n, k, lanes, word, streams });
        Ok(())
    }

    /// `n = 64,`, under the field's name.
    fn size(&mut self, name: &'static str) -> Result<usize> {
        self.field(name)?;
        let size = self.index()?;
        self.sign("`,`").map(|()| size)
    }

    /// `%w[n / 32 * 64 + n % 32 + 32]`, or `%w[n]` for one chunk of `whole`.
    fn stream(&mut self, whole: usize) -> Result<Stream> {
        let weight = self.operand()?;
        self.sign("`[`")?;
        self.keyword("`n`")?;
        let (mut chunk, mut stride, mut offset) = (whole, whole, 0);
        if self.accept('/') {
            chunk = self.index()?;
            self.sign("`*`")?;
            stride = self.index()?;
            self.sign("`+`")?;
            self.keyword("`n`")?;
            self.sign("`%`")?;
            let place = self.peek_place();
            if self.index()? != chunk {
                let found = "another number".to_string();
                return Err(place.fault(ParseFault::Expected { expected: "the divisor of `n /`", found }));
            }
        }
        if self.accept('+') {
            offset = self.index()?;
        }
        self.sign("`]`")?;
        Ok(Stream { weight, chunk, stride, offset })
    }

    /// An output after the word `output`.
    fn output(&mut self, taken: &mut Taken<'a>) -> Result<()> {
        let name = taken.output(self)?;
        self.sign("`=`")?;
        let id = self.operand()?;
        self.sign("`:`")?;
        let place = self.peek_place();
        let ty = self.tensor_type()?;
        if ty != self.graph[id].ty {
            let [written, found] =
                [&ty, &self.graph[id].ty].map(|ty| print::tensor_type(&self.graph.symbols, ty));
            let name = self.graph[id].name.clone();
            return Err(place.fault(ParseFault::OutputType { name, found, written }));
        }
        self.graph.outputs.push((name, id));
        Ok(())
    }
}

/// Names of a graph that may stand once; a set each, so that long texts take linear time.
#[derive(Default)]
struct Taken<'a> {
    groups: HashSet<&'a str>,
    packs: HashSet<&'a str>,
    outputs: HashSet<String>,
}

impl<'a> Taken<'a> {
    fn group(&mut self, parser: &mut Parser<'a>) -> Result<&'a str> {
        let place = parser.peek_place();
        let name = parser.name()?;
        once(place, self.groups.insert(name), "group", name).map(|()| name)
    }

    fn pack(&mut self, parser: &mut Parser<'a>) -> Result<&'a str> {
        let place = parser.peek_place();
        let name = parser.name()?;
        once(place, self.packs.insert(name), "pack", name).map(|()| name)
    }

    fn output(&mut self, parser: &mut Parser<'a>) -> Result<String> {
        let place = parser.peek_place();
        let name = parser.text()?;
        once(place, self.outputs.insert(name.clone()), "output", &name).map(|()| name)
    }
}

fn once(place: Place, is_new: bool, what: &'static str, name: &str) -> Result<()> {
    if is_new { Ok(()) } else { Err(place.fault(ParseFault::Duplicate { what, name: name.to_string() })) }
}

/// The element-wise op of that name: rows of the ops' tables.
fn element_wise(word: &str) -> Option<Op> {
    let unary = || Unary::ALL.into_iter().find(|op| op.facts().name == word).map(Op::Unary);
    let binary = || Binary::ALL.into_iter().find(|op| op.facts().name == word).map(Op::Binary);
    let relation = || {
        let name = word.strip_prefix("compare.")?;
        Compare::ALL.into_iter().find(|relation| relation.name() == name).map(Op::Compare)
    };
    unary().or_else(binary).or_else(relation)
}

fn unknown(what: &'static str, name: &str, known: &str) -> ParseFault {
    ParseFault::Unknown { what, name: name.to_string(), known: known.to_string() }
}

fn unknown_op(word: &str) -> ParseFault {
    let mut known: Vec<String> =
        "input weight state constant cast select iota broadcast reshape transpose slice \
        concat reduce.sum reduce.max dot gather scatter_add attention attention_lse cache_append quantize dequantize \
        argmax"
            .split_whitespace()
            .map(str::to_string)
            .collect();
    known.extend(Unary::ALL.iter().map(|op| op.facts().name.to_string()));
    known.extend(Binary::ALL.iter().map(|op| op.facts().name.to_string()));
    known.extend(Compare::ALL.iter().map(|relation| format!("compare.{}", relation.name())));
    unknown("op", word, &known.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::simplify::simplify;
    use crate::random::{MAX_T, Rng, random_graph};
    use crate::verify::verify;
    use proptest::prelude::*;

    /// What `fuse`, `layout` and `schedule` add, at random: groups of values that stand together, pitches, packs
    /// of the weights, remarks everywhere.
    fn dress(graph: &mut Graph, rng: &mut Rng) {
        let remark = |rng: &mut Rng| match rng.below(6) {
            0 => vec!["not fused: %h2 has two consumers".to_string()],
            1 => vec!["".to_string(), " indented // and \"quoted\" ü".to_string()],
            _ => Vec::new(),
        };
        let mut open = false;
        for id in graph.ids() {
            graph[id].remarks = remark(rng);
            let bound = matches!(
                graph[id].op,
                Op::Input { .. } | Op::Weight { .. } | Op::State { .. } | Op::Constant { .. }
            );
            if bound || rng.below(5) == 0 {
                open = false;
                continue;
            }
            if !open || rng.below(3) == 0 {
                let schedule = (rng.below(2) == 0).then(|| "mr 6, nr 4".to_string());
                let measured = schedule.is_some() && rng.below(2) == 0;
                let (name, remarks) = (format!("g.{}", graph.groups.len()), remark(rng));
                let family = rng.pick(&Family::ALL);
                graph.groups.push(Group { name, family, schedule, measured, remarks });
                open = true;
            }
            graph[id].group = Some(GroupId(graph.groups.len() as u32 - 1));
            let shape = graph[id].ty.shape.clone();
            if !shape.is_empty() && rng.below(3) == 0 {
                let row: i64 = shape[1..].iter().map(|dim| dim.eval(&[MAX_T; MAX_SYMBOLS])).product();
                graph[id].layout = Some(Layout::Rows { pitch: row as usize + rng.below(9) });
            }
        }
        for id in graph.ids() {
            let (Op::Weight { .. }, [n, k]) = (&graph[id].op, graph[id].ty.shape.as_slice()) else {
                continue;
            };
            let (n, k) = (n.base as usize, k.base as usize);
            let half = n.div_ceil(2);
            let streams = match rng.below(3) {
                0 => continue,
                1 => vec![Stream { weight: id, chunk: n, stride: n, offset: 0 }],
                _ => [0, n - half]
                    .map(|offset| Stream { weight: id, chunk: half, stride: half, offset })
                    .to_vec(),
            };
            let n = if streams.len() == 1 { n } else { half };
            let (name, dtype) = (format!("p.{}", graph.packs.len()), graph[id].ty.dtype);
            let (lanes, word) = if rng.below(3) == 0 {
                (1, k + rng.below(k.next_multiple_of(64) - k + 1))
            } else {
                (Pack::LANES, 1 + rng.below(2))
            };
            graph.packs.push(Pack { name, dtype, n, k, lanes, word, streams });
        }
        if rng.below(2) == 0 {
            graph.packs.reverse();
        }
    }

    /// The text of a random graph with all that text can hold.
    fn random_text(seed: u64) -> String {
        let mut graph = random_graph(seed, 12);
        dress(&mut graph, &mut Rng(seed));
        graph.to_string()
    }

    /// Cuts, doubles and swaps pieces of `text`.
    fn mutate(text: &str, rng: &mut Rng) -> String {
        const PIECES: [&str; 24] = [
            "%",
            "@",
            "{",
            "}",
            "[",
            "]",
            "(",
            ")",
            ",",
            ":",
            "=",
            "..",
            "-",
            "*",
            "\"",
            "\\",
            "//",
            "\n",
            "T",
            "0",
            "9223372036854775808",
            "1e999",
            "é",
            "graph",
        ];
        let mut chars: Vec<char> = text.chars().collect();
        for _ in 0..1 + rng.below(4) {
            let from = rng.below(chars.len() + 1);
            let to = (from + rng.below(12)).min(chars.len());
            let piece: Vec<char> = match rng.below(4) {
                0 => Vec::new(),
                1 => rng.pick(&PIECES).chars().collect(),
                2 => [&chars[from..to], &chars[from..to]].concat(),
                _ => {
                    let other = rng.below(chars.len() + 1);
                    chars[other..(other + rng.below(30)).min(chars.len())].to_vec()
                }
            };
            chars.splice(from..to, piece);
        }
        chars.into_iter().collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..Default::default() })]

        #[test]
        fn text_reads_back(seed: u64) {
            let mut graph = random_graph(seed, 15);
            dress(&mut graph, &mut Rng(seed));
            verify(&graph).unwrap();
            let text = graph.to_string();
            let read = super::graph(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
            prop_assert_eq!(read, graph, "{}", text);
        }

        /// Whatever the text, the parser answers; what it accepts, the verifier answers to; what that accepts,
        /// prints, reads back and simplifies.
        #[test]
        fn no_text_panics(seed: u64) {
            let text = mutate(&random_text(seed % 40), &mut Rng(seed));
            for mut graph in graphs(&text).unwrap_or_default() {
                if verify(&graph).is_ok() {
                    let printed = graph.to_string();
                    let again = super::graph(&printed).unwrap_or_else(|error| panic!("{error}\n{printed}"));
                    prop_assert_eq!(again.to_string(), printed);
                    simplify(&mut graph);
                    prop_assert_eq!(verify(&graph), Ok(()));
                }
            }
        }

        #[test]
        fn no_noise_panics(text in "[a-z%@{}()\\[\\],:=.0-9\"\\\\/ \n*+-]{0,80}") {
            let _ = graphs(&text);
            let _ = graphs(&format!("graph @f(T in 1..4) {{ %x = input \"x\" : f32[T] {text}"));
        }

        #[test]
        fn floats_read_back(bits: u64) {
            let x = f64::from_bits(bits);
            let text = format!("graph @f() {{ %c = constant {} : f64[] }}", print::float(x));
            let read = super::graph(&text).unwrap();
            let Op::Constant { data } = &read.values[0].op else { panic!("a constant") };
            prop_assert!(data[0].to_bits() == x.to_bits() || data[0].is_nan() && x.is_nan());
        }

        #[test]
        fn quotes_read_back(name: String) {
            let text = format!("graph @f() {{ %x = input {} : f64[] }}", print::quoted(&name));
            prop_assert_eq!(&super::graph(&text).unwrap().values[0].op, &Op::Input { name });
        }
    }

    #[test]
    fn faults_have_a_place() {
        let error = graphs("graph @f() {\n  %x = ypmul %x\n}").unwrap_err();
        assert_eq!((error.line, error.column), (2, 14));
        assert_eq!(error.to_string(), "line 2, column 14: %x is not defined above");
        let error = super::graph("").unwrap_err();
        assert_eq!(error.fault, ParseFault::Graphs(0));
    }
}
