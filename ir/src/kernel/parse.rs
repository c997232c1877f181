//! Kernels from text, by recursive descent. The form is what [`super::print`] writes; line breaks mean nothing,
//! `//` comments run to the end of the line.
//!
//! The parser resolves names and infers the types of values; whether they fit, and whether a name is seen where
//! it is used, is the verifier's question. It never panics, and its recursion is bounded by [`MAX_NESTING`] and
//! [`MAX_BLOCKS`], the height of its trees by [`MAX_NODES`] too.

mod lex;
mod warpgroup;

use self::lex::{Place, Token, lex};
use super::verify::{MAX_BLOCKS, MAX_NESTING, MAX_NODES};
use super::warpgroup::{MapId, MbarrierId};
use super::{
    Access, Arith, Buffer, BufferId, Expr, Kernel, RegFile, RegId, Space, Stmt, Type, Var, VarId,
    row_major_checked,
};
use crate::dim::{Dim, MAX_SYMBOLS, Symbol, Symbols};
use crate::dtype::DType;
use crate::graph::Family;
use crate::op::{Compare, Reduction, Unary};
use std::collections::HashMap;

/// Why a text is no kernel, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {kind}")]
pub struct ParseError {
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// What is wrong there.
    pub kind: ParseErrorKind,
}

/// What is wrong with a text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseErrorKind {
    /// Something else stands where the grammar wants this.
    #[error("expected {expected}, found {found}")]
    Expected {
        /// What the grammar wants.
        expected: String,
        /// The token found.
        found: String,
    },
    /// A character that begins no token.
    #[error("no kernel has the character {0:?}")]
    Character(char),
    /// A string without its second quote.
    #[error("this string does not end")]
    OpenString,
    /// A number that its place cannot hold.
    #[error("this number is out of range")]
    Range,
    /// A name that no declaration gave, or that is not one of a fixed set.
    #[error("`{0}` is not known")]
    Unknown(String),
    /// A name of another kind of thing.
    #[error("`%{name}` is not a {expected}")]
    Kind {
        /// The name.
        name: String,
        /// What would do.
        expected: &'static str,
    },
    /// A name given twice.
    #[error("`{0}` is declared twice")]
    Twice(String),
    /// More symbols than a kernel may have.
    #[error("a kernel has at most {MAX_SYMBOLS} symbols")]
    Symbols,
    /// A load of another dtype than the buffer's.
    #[error("`%{buffer}` holds {expected}, not {found}")]
    LoadType {
        /// The buffer's name.
        buffer: String,
        /// Its dtype.
        expected: DType,
        /// The type written.
        found: Type,
    },
    /// A shape that has no row-major strides, without strides.
    #[error("this shape needs `strides`: an extent behind the first is not constant")]
    Strides,
    /// An expression too large to be meant.
    #[error("an expression has at most {MAX_NODES} nodes")]
    Nodes,
    /// Operands and parentheses nested too deeply to be meant.
    #[error("expressions nest at most {MAX_NESTING} deep")]
    Nesting,
    /// Blocks nested too deeply to be meant.
    #[error("blocks nest at most {MAX_BLOCKS} deep")]
    Blocks,
}

type Result<T> = std::result::Result<T, ParseError>;

/// Every kernel of a text, in order.
///
/// # Errors
///
/// The first place where the text is no kernel.
pub fn parse(text: &str) -> Result<Vec<Kernel>> {
    let mut parser =
        Parser { tokens: lex(text)?, at: 0, kernel: empty(), names: HashMap::new(), nodes: 0, nesting: 0 };
    let mut kernels = Vec::new();
    while parser.peek() != &Token::End {
        kernels.push(parser.kernel()?);
    }
    Ok(kernels)
}

/// Is it a name that the lexer reads as one: letters, digits and `_`, with single dots between?
pub fn is_name(name: &str) -> bool {
    name.split('.').all(|part| !part.is_empty() && part.chars().all(is_name_char))
}

/// Is it a word: a name that begins with a letter or `_` and has no dot?
pub fn is_word(word: &str) -> bool {
    is_name(word) && !word.contains('.') && !word.starts_with(|c: char| c.is_ascii_digit())
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn empty() -> Kernel {
    Kernel {
        name: String::new(),
        family: Family::Dot,
        schedule: String::new(),
        threads: 1,
        symbols: Symbols::default(),
        buffers: Vec::new(),
        mbarriers: Vec::new(),
        maps: Vec::new(),
        vars: Vec::new(),
        regs: Vec::new(),
        body: Vec::new(),
    }
}

#[derive(Clone, Copy)]
enum Named {
    Buffer(BufferId),
    Var(VarId),
    Reg(RegId),
    Mbarriers(MbarrierId),
    Map(MapId),
}

struct Parser {
    tokens: Vec<Place>,
    at: usize,
    kernel: Kernel,
    /// What each `%name` of the kernel is.
    names: HashMap<String, Named>,
    /// Nodes of the expression being read.
    nodes: usize,
    /// Operands and parentheses that are open in it.
    nesting: usize,
}

impl Parser {
    fn peek(&self) -> &Token {
        &self.tokens[self.at].token
    }

    fn next(&mut self) -> Token {
        let token = self.peek().clone();
        if token != Token::End {
            self.at += 1;
        }
        token
    }

    /// An error at the token `at`.
    fn error<T>(&self, at: usize, kind: ParseErrorKind) -> Result<T> {
        let Place { line, column, .. } = self.tokens[at];
        Err(ParseError { line, column, kind })
    }

    fn expected<T>(&self, expected: impl Into<String>) -> Result<T> {
        let expected = expected.into();
        self.error(self.at, ParseErrorKind::Expected { expected, found: self.peek().describe() })
    }

    fn found_sign(&mut self, sign: &'static str) -> bool {
        let found = self.peek() == &Token::Sign(sign);
        self.at += usize::from(found);
        found
    }

    fn sign(&mut self, sign: &'static str) -> Result<()> {
        if self.found_sign(sign) { Ok(()) } else { self.expected(format!("`{sign}`")) }
    }

    fn found_word(&mut self, word: &str) -> bool {
        let found = matches!(self.peek(), Token::Word(w) if w == word);
        self.at += usize::from(found);
        found
    }

    fn word(&mut self, word: &'static str) -> Result<()> {
        if self.found_word(word) { Ok(()) } else { self.expected(format!("`{word}`")) }
    }

    fn any_word(&mut self, expected: &'static str) -> Result<String> {
        match self.peek().clone() {
            Token::Word(word) => {
                self.at += 1;
                Ok(word)
            }
            _ => self.expected(expected),
        }
    }

    fn value_name(&mut self) -> Result<String> {
        match self.peek().clone() {
            Token::Value(name) => {
                self.at += 1;
                Ok(name)
            }
            _ => self.expected("a %name"),
        }
    }

    fn int(&mut self) -> Result<i64> {
        let at = self.at;
        let negative = self.found_sign("-");
        let Token::Int(digits) = *self.peek() else { return self.expected("an integer") };
        self.at += 1;
        let x = if negative { -i128::from(digits) } else { i128::from(digits) };
        i64::try_from(x).or_else(|_| self.error(at, ParseErrorKind::Range))
    }

    fn small(&mut self) -> Result<u16> {
        let at = self.at;
        let x = self.int()?;
        u16::try_from(x).or_else(|_| self.error(at, ParseErrorKind::Range))
    }

    /// `[a, b, ...]`, with the opening bracket still ahead.
    fn list<T>(&mut self, mut item: impl FnMut(&mut Parser) -> Result<T>) -> Result<Vec<T>> {
        self.sign("[")?;
        let mut items = Vec::new();
        if self.found_sign("]") {
            return Ok(items);
        }
        loop {
            items.push(item(self)?);
            if self.found_sign("]") {
                return Ok(items);
            }
            if !self.found_sign(",") {
                return self.expected("`,` or `]`");
            }
        }
    }

    /// Gives the name at token `at` its meaning.
    fn declare(&mut self, at: usize, name: &str, what: Named) -> Result<()> {
        match self.names.insert(name.to_string(), what) {
            None => Ok(()),
            Some(_) => self.error(at, ParseErrorKind::Twice(format!("%{name}"))),
        }
    }

    fn resolve(&self, name: &str) -> Result<Named> {
        match self.names.get(name) {
            Some(&what) => Ok(what),
            None => self.error(self.at - 1, ParseErrorKind::Unknown(format!("%{name}"))),
        }
    }

    fn buffer(&mut self) -> Result<BufferId> {
        let name = self.value_name()?;
        match self.resolve(&name)? {
            Named::Buffer(buffer) => Ok(buffer),
            Named::Var(_) | Named::Reg(_) | Named::Mbarriers(_) | Named::Map(_) => self.not_a(name, "buffer"),
        }
    }

    fn not_a<T>(&self, name: String, expected: &'static str) -> Result<T> {
        self.error(self.at - 1, ParseErrorKind::Kind { name, expected })
    }

    fn kernel(&mut self) -> Result<Kernel> {
        self.kernel = empty();
        self.names.clear();
        self.word("kernel")?;
        let Token::At(name) = self.peek().clone() else { return self.expected("an @name") };
        self.next();
        self.kernel.name = name;
        self.sign(":")?;
        let at = self.at;
        let family = self.any_word("a family")?;
        self.kernel.family = match Family::ALL.iter().find(|f| f.name() == family) {
            Some(&family) => family,
            None => return self.error(at, ParseErrorKind::Unknown(family)),
        };
        self.sign(",")?;
        self.word("schedule")?;
        let Token::Text(schedule) = self.peek().clone() else { return self.expected("a string") };
        self.next();
        self.kernel.schedule = schedule;
        if self.found_sign(",") {
            self.kernel.threads = self.small()?;
            self.word("threads")?;
        }
        if self.found_sign("(") {
            self.symbols()?;
        }
        self.sign("{")?;
        loop {
            if self.found_word("param") {
                self.declaration(None)?;
            } else if self.found_word("local") {
                self.declaration(Some(Space::Local))?;
            } else if self.found_word("shared") {
                self.declaration(Some(Space::Shared))?;
            } else if self.found_word("swizzled") {
                self.declaration(Some(Space::Swizzled))?;
            } else if self.found_word("mbarrier") {
                self.mbarriers()?;
            } else if self.found_word("map") {
                self.map()?;
            } else {
                break;
            }
        }
        self.kernel.body = self.block(0)?;
        Ok(std::mem::replace(&mut self.kernel, empty()))
    }

    /// `T in 1..64, P in 0..100)`.
    fn symbols(&mut self) -> Result<()> {
        loop {
            let at = self.at;
            let name = self.any_word("a symbol")?;
            if !is_word(&name) {
                self.at = at;
                return self.expected("a symbol");
            }
            if self.kernel.symbols.find(&name).is_some() {
                return self.error(at, ParseErrorKind::Twice(name));
            }
            if self.kernel.symbols.0.len() == MAX_SYMBOLS {
                return self.error(at, ParseErrorKind::Symbols);
            }
            self.word("in")?;
            let min = self.int()?;
            self.sign("..")?;
            let max = self.int()?;
            self.kernel.symbols.0.push(Symbol { name, min, max });
            if self.found_sign(")") {
                return Ok(());
            }
            self.sign(",")?;
        }
    }

    /// `%x : read bf16[T, 64] strides [80, 1]`; the access stands there if the word before did not say the space.
    fn declaration(&mut self, space: Option<Space>) -> Result<()> {
        let at = self.at;
        let name = self.value_name()?;
        self.declare(at, &name, Named::Buffer(BufferId(self.kernel.buffers.len() as u32)))?;
        self.sign(":")?;
        let space = match space {
            Some(space) => space,
            None => {
                let at = self.at;
                let access = self.any_word("an access")?;
                match Access::ALL.iter().find(|a| a.name() == access) {
                    Some(&access) => Space::Global(access),
                    None => return self.error(at, ParseErrorKind::Unknown(access)),
                }
            }
        };
        let dtype = self.dtype()?;
        let at = self.at;
        let shape = self.list(Parser::dim)?;
        let strides = if self.found_word("strides") {
            self.list(Parser::int)?
        } else {
            match row_major_checked(&shape) {
                Some(strides) => strides,
                None => return self.error(at, ParseErrorKind::Strides),
            }
        };
        self.kernel.buffers.push(Buffer { name, space, dtype, shape, strides });
        Ok(())
    }

    fn dtype(&mut self) -> Result<DType> {
        let at = self.at;
        let name = self.any_word("a dtype")?;
        DType::from_name(&name).map_or_else(|| self.error(at, ParseErrorKind::Unknown(name)), Ok)
    }

    /// `index`, `flag`, `f32`, `bf16x32`.
    fn ty(&mut self) -> Result<Type> {
        let at = self.at;
        let name = self.any_word("a type")?;
        type_from_name(&name).map_or_else(|| self.error(at, ParseErrorKind::Unknown(name)), Ok)
    }

    /// `2*T - 1`: a sum of integers and multiples of symbols.
    fn dim(&mut self) -> Result<Dim> {
        let mut dim = Dim::of(0);
        let mut sign = if self.found_sign("-") { -1 } else { 1 };
        loop {
            let at = self.at;
            let mut factor = sign;
            let mut symbol = None;
            if let Token::Int(_) = self.peek() {
                factor *= self.int()?;
                if self.found_sign("*") {
                    symbol = Some(self.symbol()?);
                }
            } else {
                symbol = Some(self.symbol()?);
            }
            let fits = match symbol {
                // `abs` of the smallest number overflows in the printer, so it is out of range here.
                None => dim.base.checked_add(factor).filter(|&b| b != i64::MIN).map(|base| dim.base = base),
                Some(i) => {
                    let coef = i64::from(dim.coef[i]).checked_add(factor).and_then(|c| i32::try_from(c).ok());
                    coef.filter(|&c| c != i32::MIN).map(|coef| dim.coef[i] = coef)
                }
            };
            if fits.is_none() {
                return self.error(at, ParseErrorKind::Range);
            }
            sign = if self.found_sign("+") {
                1
            } else if self.found_sign("-") {
                -1
            } else {
                return Ok(dim);
            };
        }
    }

    fn symbol(&mut self) -> Result<usize> {
        let at = self.at;
        let name = self.any_word("an extent")?;
        match self.kernel.symbols.find(&name) {
            Some(sym) => Ok(sym.0 as usize),
            None => self.error(at, ParseErrorKind::Unknown(name)),
        }
    }

    /// Statements up to the closing brace, which is taken too.
    fn block(&mut self, depth: usize) -> Result<Vec<Stmt>> {
        if depth > MAX_BLOCKS {
            return self.error(self.at - 1, ParseErrorKind::Blocks);
        }
        let mut stmts = Vec::new();
        while !self.found_sign("}") {
            stmts.push(self.stmt(depth)?);
        }
        Ok(stmts)
    }

    fn body(&mut self, depth: usize) -> Result<Vec<Stmt>> {
        self.sign("{")?;
        self.block(depth + 1)
    }

    fn stmt(&mut self, depth: usize) -> Result<Stmt> {
        let Token::Word(word) = self.peek().clone() else { return self.expected("a statement or `}`") };
        self.at += 1;
        match word.as_str() {
            "let" => {
                let at = self.at;
                let name = self.value_name()?;
                self.sign("=")?;
                let value = self.expr()?;
                let ty = self.kernel.type_of(&value);
                let var = self.var(at, name, ty)?;
                Ok(Stmt::Let { var, value })
            }
            "reg" => {
                let at = self.at;
                let name = self.value_name()?;
                self.sign(":")?;
                let ty = self.ty()?;
                let dims =
                    if self.peek() == &Token::Sign("[") { self.list(Parser::small)? } else { Vec::new() };
                let init = if self.found_sign("=") { Some(self.expr()?) } else { None };
                // Declared behind the initial value, which cannot name it.
                let reg = RegId(self.kernel.regs.len() as u32);
                self.declare(at, &name, Named::Reg(reg))?;
                self.kernel.regs.push(RegFile { name, ty, dims });
                Ok(Stmt::Reg { reg, init })
            }
            "set" => {
                let name = self.value_name()?;
                let Named::Reg(reg) = self.resolve(&name)? else { return self.not_a(name, "register") };
                let index = self.register_index()?;
                self.sign("=")?;
                Ok(Stmt::Set { reg, index, value: self.expr()? })
            }
            "store" => {
                let buffer = self.buffer()?;
                let index = self.index_list()?;
                self.sign("=")?;
                Ok(Stmt::Store { buffer, index, value: self.expr()? })
            }
            "prefetch" => Ok(Stmt::Prefetch { buffer: self.buffer()?, index: self.index_list()? }),
            "for" => {
                let at = self.at;
                let name = self.value_name()?;
                self.word("in")?;
                let lo = self.expr()?;
                self.sign("..")?;
                let hi = self.expr()?;
                let step = if self.found_word("step") { self.int()? } else { 1 };
                let var = self.var(at, name, Type::Index)?;
                Ok(Stmt::For { var, lo, hi, step, body: self.body(depth)? })
            }
            "unroll" => {
                let (at, name) = self.counted()?;
                let count = self.int()?;
                let var = self.var(at, name, Type::Index)?;
                Ok(Stmt::Unroll { var, count, body: self.body(depth)? })
            }
            "parallel" => {
                let (at, name) = self.counted()?;
                let count = self.expr()?;
                let var = self.var(at, name, Type::Index)?;
                Ok(Stmt::Parallel { var, count, body: self.body(depth)? })
            }
            "if" => {
                let cond = self.expr()?;
                let then = self.body(depth)?;
                let otherwise = if self.found_word("else") { self.body(depth)? } else { Vec::new() };
                Ok(Stmt::If { cond, then, otherwise })
            }
            "barrier" => Ok(Stmt::Barrier),
            "sync" => Ok(Stmt::Sync),
            "copy" => {
                let (to, at) = (self.buffer()?, self.index_list()?);
                self.sign("=")?;
                let (from, index) = (self.buffer()?, self.index_list()?);
                let lanes = self.typed(from)?;
                self.sign(",")?;
                Ok(Stmt::Copy { to, at, from, index, lanes, count: self.expr()? })
            }
            "commit" => Ok(Stmt::Commit),
            "wait" => Ok(Stmt::Wait(self.small()?)),
            _ => match self.warpgroup(&word)? {
                Some(stmt) => Ok(Stmt::Warpgroup(stmt)),
                None => {
                    self.at -= 1;
                    self.expected("a statement or `}`")
                }
            },
        }
    }

    /// `%i in 0..`, which `unroll` and `parallel` begin with.
    fn counted(&mut self) -> Result<(usize, String)> {
        let at = self.at;
        let name = self.value_name()?;
        self.word("in")?;
        if self.peek() != &Token::Int(0) {
            return self.expected("0");
        }
        self.at += 1;
        self.sign("..")?;
        Ok((at, name))
    }

    /// A new value; its name stood at token `at`.
    fn var(&mut self, at: usize, name: String, ty: Type) -> Result<VarId> {
        let var = VarId(self.kernel.vars.len() as u32);
        self.declare(at, &name, Named::Var(var))?;
        self.kernel.vars.push(Var { name, ty });
        Ok(var)
    }

    fn register_index(&mut self) -> Result<Vec<Expr>> {
        if self.peek() == &Token::Sign("[") { self.index_list() } else { Ok(Vec::new()) }
    }

    /// The index of a statement: expressions of their own.
    fn index_list(&mut self) -> Result<Vec<Expr>> {
        self.list(Parser::expr)
    }

    /// A whole expression of a statement.
    fn expr(&mut self) -> Result<Expr> {
        (self.nodes, self.nesting) = (0, 0);
        self.sum()
    }

    /// Counts a node.
    fn count(&mut self) -> Result<()> {
        self.nodes += 1;
        if self.nodes > MAX_NODES { self.error(self.at, ParseErrorKind::Nodes) } else { Ok(()) }
    }

    fn sum(&mut self) -> Result<Expr> {
        self.nesting += 1;
        if self.nesting > MAX_NESTING {
            return self.error(self.at, ParseErrorKind::Nesting);
        }
        let mut left = self.product()?;
        loop {
            let op = match self.peek() {
                Token::Sign("+") => Arith::Add,
                Token::Sign("-") => Arith::Sub,
                _ => break,
            };
            self.at += 1;
            self.count()?;
            left = Expr::Arith(op, Box::new(left), Box::new(self.product()?));
        }
        self.nesting -= 1;
        Ok(left)
    }

    fn product(&mut self) -> Result<Expr> {
        let mut left = self.primary()?;
        loop {
            let op = match self.peek() {
                Token::Sign("*") => Arith::Mul,
                Token::Sign("/") => Arith::Div,
                Token::Sign("%") => Arith::Rem,
                _ => return Ok(left),
            };
            self.at += 1;
            self.count()?;
            left = Expr::Arith(op, Box::new(left), Box::new(self.primary()?));
        }
    }

    fn primary(&mut self) -> Result<Expr> {
        if self.found_sign("(") {
            let inner = self.sum()?;
            self.sign(")")?;
            return Ok(inner);
        }
        self.count()?;
        match self.peek().clone() {
            Token::Sign("-") | Token::Int(_) => Ok(Expr::Int(self.int()?)),
            Token::Value(name) => {
                self.at += 1;
                match self.resolve(&name)? {
                    Named::Var(var) => Ok(Expr::Var(var)),
                    Named::Reg(reg) => {
                        let indexed = self.peek() == &Token::Sign("[");
                        let index = if indexed { self.list(Parser::sum)? } else { Vec::new() };
                        Ok(Expr::Reg { reg, index })
                    }
                    Named::Buffer(_) => self.not_a(name, "value; elements are read by `load`"),
                    Named::Mbarriers(_) | Named::Map(_) => self.not_a(name, "value"),
                }
            }
            Token::Word(word) => {
                self.at += 1;
                match self.peek() {
                    Token::Sign("(") => self.call(&word),
                    Token::Value(_) if word == "load" => self.load(),
                    Token::Value(_) if word == "matrix" || word == "matrix.t" => {
                        self.matrix(word == "matrix.t")
                    }
                    _ if word == "thread" => Ok(Expr::Thread),
                    _ => match self.kernel.symbols.find(&word) {
                        Some(sym) => Ok(Expr::Sym(sym)),
                        None => self.error(self.at - 1, ParseErrorKind::Unknown(word)),
                    },
                }
            }
            Token::At(_) | Token::Float(_) | Token::Text(_) | Token::Sign(_) | Token::End => {
                self.expected("an expression")
            }
        }
    }

    /// `%x[%t, %k] : bf16x2`.
    fn load(&mut self) -> Result<Expr> {
        let buffer = self.buffer()?;
        let index = self.list(Parser::sum)?;
        let lanes = self.typed(buffer)?;
        Ok(Expr::Load { buffer, index, lanes })
    }

    /// `%a[%r, %c] : bf16x8`.
    fn matrix(&mut self, trans: bool) -> Result<Expr> {
        let buffer = self.buffer()?;
        let index = self.list(Parser::sum)?;
        let at = self.at;
        let lanes = self.typed(buffer)?;
        match lanes {
            2 | 4 | 8 => Ok(Expr::Matrix { buffer, index, matrices: lanes / 2, trans }),
            _ => self.error(at, ParseErrorKind::Range),
        }
    }

    /// `: bf16x2`, of the buffer's dtype: its lanes.
    fn typed(&mut self, buffer: BufferId) -> Result<u16> {
        self.sign(":")?;
        let at = self.at;
        let found = self.ty()?;
        let expected = self.kernel[buffer].dtype;
        match found {
            Type::Vector { dtype, lanes } if dtype == expected => Ok(lanes),
            Type::Vector { .. } | Type::Index | Type::Flag => {
                let buffer = self.kernel[buffer].name.clone();
                self.error(at, ParseErrorKind::LoadType { buffer, expected, found })
            }
        }
    }

    /// `(a, b, ...)` behind the word that says what is computed.
    fn call(&mut self, word: &str) -> Result<Expr> {
        let at = self.at - 1;
        self.sign("(")?;
        let expr = if let Some(op) = Unary::ALL.iter().find(|op| op.facts().name == word) {
            Expr::Unary(*op, self.operand()?)
        } else if let Some(op) = Compare::ALL.iter().find(|op| op.name() == word) {
            let (a, b) = self.two()?;
            Expr::Compare(*op, a, b)
        } else if let Some(op) = [Arith::Min, Arith::Max].iter().find(|op| op.name() == word) {
            let (a, b) = self.two()?;
            Expr::Arith(*op, a, b)
        } else if let Some(kind) = reduction(word) {
            Expr::Reduce(kind, self.operand()?)
        } else {
            match word {
                "fma" => {
                    let (a, b, c) = self.three()?;
                    Expr::Fma(a, b, c)
                }
                "select" => {
                    let (c, a, b) = self.three()?;
                    Expr::Select(c, a, b)
                }
                "dot.bf16" => {
                    let (acc, a, b) = self.three()?;
                    Expr::DotBf16(acc, a, b)
                }
                "exp2" => Expr::Exp2(self.operand()?),
                "uniform" => Expr::Uniform(self.operand()?),
                "join" => {
                    let (a, b) = self.two()?;
                    Expr::Join(a, b)
                }
                "mma" => {
                    let (acc, a, b) = self.three()?;
                    Expr::Mma(acc, a, b)
                }
                "shuffle" => {
                    let value = self.operand()?;
                    self.sign(",")?;
                    Expr::Shuffle { value, mask: self.small()? }
                }
                "splat" => {
                    let value = self.operand()?;
                    self.sign(",")?;
                    Expr::Splat { value, times: self.small()? }
                }
                "lanes" => {
                    let value = self.operand()?;
                    self.sign(",")?;
                    let start = self.small()?;
                    self.sign(",")?;
                    Expr::Lanes { value, start, lanes: self.small()? }
                }
                "iota" => Expr::Iota { lanes: self.small()? },
                "cast" => {
                    let value = self.operand()?;
                    self.sign(",")?;
                    Expr::Cast { value, dtype: self.dtype()? }
                }
                "index" => Expr::Index(self.operand()?),
                _ => match type_from_name(word) {
                    Some(ty) => Expr::Const { value: self.literal()?, ty },
                    None => return self.error(at, ParseErrorKind::Unknown(word.to_string())),
                },
            }
        };
        self.sign(")")?;
        Ok(expr)
    }

    fn operand(&mut self) -> Result<Box<Expr>> {
        Ok(Box::new(self.sum()?))
    }

    fn two(&mut self) -> Result<(Box<Expr>, Box<Expr>)> {
        let a = self.operand()?;
        self.sign(",")?;
        Ok((a, self.operand()?))
    }

    fn three(&mut self) -> Result<(Box<Expr>, Box<Expr>, Box<Expr>)> {
        let (a, b) = self.two()?;
        self.sign(",")?;
        Ok((a, b, self.operand()?))
    }

    /// `0.5`, `-3`, `inf`, `-inf`, `nan`.
    fn literal(&mut self) -> Result<f64> {
        let sign = if self.found_sign("-") { -1.0 } else { 1.0 };
        let magnitude = match self.peek() {
            Token::Int(x) => *x as f64,
            Token::Float(x) => *x,
            Token::Word(word) if word == "inf" => f64::INFINITY,
            Token::Word(word) if word == "nan" => f64::NAN,
            Token::Word(_)
            | Token::Value(_)
            | Token::At(_)
            | Token::Text(_)
            | Token::Sign(_)
            | Token::End => {
                return self.expected("a number");
            }
        };
        self.at += 1;
        Ok(sign * magnitude)
    }
}

fn reduction(word: &str) -> Option<Reduction> {
    let kind = word.strip_prefix("reduce.")?;
    [Reduction::Sum, Reduction::Max].into_iter().find(|k| k.name() == kind)
}

fn type_from_name(name: &str) -> Option<Type> {
    if let Some(dtype) = DType::from_name(name) {
        return Some(Type::Vector { dtype, lanes: 1 });
    }
    match name {
        "index" => Some(Type::Index),
        "flag" => Some(Type::Flag),
        _ => {
            let (dtype, lanes) = name.rsplit_once('x')?;
            Some(Type::Vector { dtype: DType::from_name(dtype)?, lanes: lanes.parse().ok()? })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        parse(text).expect_err("a text that is no kernel").to_string()
    }

    #[test]
    fn errors_name_line_and_column() {
        assert_eq!(
            error("kernel @a : dot, schedule \"\" {\n  let %é = 1\n}"),
            "line 2, column 8: no kernel has the character 'é'"
        );
        assert_eq!(error("kernel @a : dot"), "line 1, column 16: expected `,`, found the end");
    }

    #[test]
    fn deep_texts_are_refused_and_do_not_overflow() {
        let deep =
            |open: &str, n: usize| format!("kernel @a : dot, schedule \"\" {{ let %a = {}", open.repeat(n));
        for open in ["(", "exp(", "1 + (", "fma(1, 2, ", "load %x[", "-1 - "] {
            let text = deep(open, 100_000);
            parse(&text).expect_err("too deep");
        }
        let blocks = "if 1 {".repeat(100_000);
        let found = error(&format!("kernel @a : dot, schedule \"\" {{ {blocks}"));
        assert!(found.ends_with("blocks nest at most 64 deep"), "{found}");
    }
}
