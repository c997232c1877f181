//! Modules, kernels, statements and operands.
//!
//! One walk over the tokens. Names are looked up as they are met, in the scopes of `{ }`; labels are filled in at the end of
//! the kernel. Immediate values become constant registers, one a value.

use super::lexer::{Kind, Token, tokens};
use super::opcode;
use super::{
    Address, Banks, Constant, Instruction, Kernel, Module, Names, Op, Param, Pred, PtxError, Reg, Special,
    Type,
};
use std::collections::HashMap;

/// Registers a bank may have: more than any kernel that fits a GPU, few enough for 16 bits.
const MAX_REGISTERS: u64 = 30_000;
/// Bytes that a parameter or a variable may have.
const MAX_BYTES: u64 = 1 << 20;

/// An operand as it is written.
#[derive(Clone, Debug)]
pub enum Arg<'t> {
    /// A name, `!` before it or not.
    Name { name: &'t str, negated: bool },
    /// An integer, in two's complement.
    Int(u64),
    /// `0f...`: the bits of an f32.
    F32(u32),
    /// `0d...`: the bits of an f64; a decimal fraction.
    F64(u64),
    /// `[name+offset]`, `[offset]`.
    Address { base: Option<&'t str>, offset: i64 },
    /// `[map, {x, y}]`.
    Tile { map: &'t str, coordinates: Vec<Arg<'t>> },
    /// `{a, b}`.
    Vector(Vec<Arg<'t>>),
    /// `p|q`.
    Pair(&'t str, &'t str),
}

impl Arg<'_> {
    fn shown(&self) -> String {
        match self {
            Arg::Name { name, negated } => format!("{}{name}", if *negated { "!" } else { "" }),
            Arg::Int(value) => (*value as i64).to_string(),
            Arg::F32(bits) => f32::from_bits(*bits).to_string(),
            Arg::F64(bits) => f64::from_bits(*bits).to_string(),
            Arg::Address { base, offset } => format!("[{}+{offset}]", base.unwrap_or_default()),
            Arg::Tile { map, .. } => format!("[{map}, {{..}}]"),
            Arg::Vector(parts) => {
                format!("{{{}}}", parts.iter().map(Arg::shown).collect::<Vec<_>>().join(", "))
            }
            Arg::Pair(a, b) => format!("{a}|{b}"),
        }
    }
}

/// What a name stands for.
#[derive(Clone, Copy, Debug)]
enum Named {
    Reg { reg: Reg, bits: u32 },
    Pred(Pred),
    Shared(u32),
    Dynamic,
    Param(u32),
}

/// `.reg .b32 %r<86>`: the names `%r0` to `%r85`.
#[derive(Clone, Copy, Debug)]
struct Range {
    count: u32,
    bits: u32,
    first: u16,
}

#[derive(Default)]
struct Scope<'t> {
    names: HashMap<&'t str, Named>,
    ranges: HashMap<&'t str, Range>,
    /// Which scope of the kernel it is: labels are known in theirs and those inside.
    number: usize,
}

/// The parser, and what it has of the kernel at hand.
pub struct Parser<'t> {
    tokens: Vec<Token<'t>>,
    at: usize,
    scopes: Vec<Scope<'t>>,
    /// Labels by scope and name.
    labels: HashMap<(usize, &'t str), u32>,
    /// Lists of labels, `.branchtargets`.
    lists: HashMap<&'t str, Vec<&'t str>>,
    constants: HashMap<(bool, Constant), Reg>,
    kernel: Kernel,
    /// Of the dynamic part of shared memory.
    dynamic_align: u32,
    /// Instructions whose labels are not filled in: scopes they are in, the labels, the line.
    jumps: Vec<(usize, Vec<usize>, Vec<&'t str>)>,
    scopes_made: usize,
}

pub fn module(text: &str) -> Result<Module, PtxError> {
    let mut parser = Parser {
        tokens: tokens(text)?,
        at: 0,
        scopes: vec![Scope::default()],
        labels: HashMap::new(),
        lists: HashMap::new(),
        constants: HashMap::new(),
        kernel: empty_kernel(),
        dynamic_align: 1,
        jumps: Vec::new(),
        scopes_made: 0,
    };
    parser.module()
}

fn empty_kernel() -> Kernel {
    Kernel {
        name: String::new(),
        params: Vec::new(),
        max_threads: None,
        required_threads: None,
        min_ctas: None,
        max_registers: None,
        cluster: None,
        static_shared: 0,
        dynamic_shared: 0,
        banks: Banks::default(),
        constants: Vec::new(),
        constant_predicates: Vec::new(),
        code: Vec::new(),
        names: Vec::new(),
    }
}

impl<'t> Parser<'t> {
    fn peek(&self) -> Token<'t> {
        self.tokens[self.at.min(self.tokens.len() - 1)]
    }

    fn next(&mut self) -> Token<'t> {
        let token = self.peek();
        self.at += 1;
        token
    }

    /// The line of the next token.
    pub fn line(&self) -> u32 {
        self.peek().line
    }

    fn wrong<T>(&self, found: Token<'_>, expected: &str) -> Result<T, PtxError> {
        Err(PtxError::Syntax { line: found.line, found: found.shown(), expected: expected.to_string() })
    }

    /// An operand that cannot stand there.
    pub fn wrong_operand<T>(&self, arg: &Arg<'_>, expected: &str) -> Result<T, PtxError> {
        let found = format!("`{}`", arg.shown());
        Err(PtxError::Syntax { line: self.statement_line(), found, expected: expected.to_string() })
    }

    /// The line of the statement whose operands have been read.
    pub fn statement_line(&self) -> u32 {
        self.tokens[self.at.saturating_sub(1).min(self.tokens.len() - 1)].line
    }

    fn take(&mut self, sign: &str) -> bool {
        let found = self.peek().text == sign && self.peek().kind != Kind::End;
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, sign: &str) -> Result<(), PtxError> {
        if self.take(sign) { Ok(()) } else { self.wrong(self.peek(), &format!("`{sign}`")) }
    }

    fn word(&mut self, expected: &str) -> Result<&'t str, PtxError> {
        let token = self.next();
        if token.kind == Kind::Word { Ok(token.text) } else { self.wrong(token, expected) }
    }

    fn integer(&mut self) -> Result<u64, PtxError> {
        let token = self.next();
        match number(token.text) {
            Some(Arg::Int(value)) if token.kind == Kind::Number => Ok(value),
            _ => self.wrong(token, "an integer"),
        }
    }

    fn at_most(&mut self, what: &'static str, limit: u64) -> Result<u32, PtxError> {
        let line = self.line();
        let found = self.integer()?;
        if found <= limit { Ok(found as u32) } else { Err(PtxError::TooMany { line, what, found, limit }) }
    }

    fn module(&mut self) -> Result<Module, PtxError> {
        let mut module = Module { version: (0, 0), target: String::new(), kernels: Vec::new() };
        loop {
            let token = self.next();
            match token.text {
                _ if token.kind == Kind::End => break,
                ".version" => {
                    let token = self.next();
                    let parts = token
                        .text
                        .split_once('.')
                        .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
                    match parts {
                        Some(version) => module.version = version,
                        None => return self.wrong(token, "a version, such as `7.4`"),
                    }
                }
                ".target" => {
                    module.target = self.word("a target, such as `sm_80`")?.to_string();
                    while self.take(",") {
                        self.word("an option of the target")?;
                    }
                }
                ".address_size" => {
                    let token = self.peek();
                    if self.integer()? != 64 {
                        return self.wrong(token, "`64`");
                    }
                }
                ".visible" | ".weak" | ".extern" => {}
                ".entry" => {
                    let line = self.line();
                    let kernel = self.entry()?;
                    if module.kernel(&kernel.name).is_some() {
                        return Err(PtxError::Twice { line, name: kernel.name });
                    }
                    module.kernels.push(kernel);
                }
                ".shared" => self.shared()?,
                ".file" => {
                    while matches!(self.peek().kind, Kind::Number | Kind::Text) || self.peek().text == "," {
                        self.next();
                    }
                }
                _ if token.kind == Kind::Word && token.text.starts_with('.') => {
                    return Err(PtxError::UnknownDirective {
                        line: token.line,
                        directive: token.text.to_string(),
                    });
                }
                _ => return self.wrong(token, "a directive"),
            }
        }
        if module.version == (0, 0) || module.target.is_empty() {
            return self.wrong(self.peek(), "`.version` and `.target`");
        }
        Ok(module)
    }

    /// `.shared .align 1024 .b8 name[16]`, at module scope or in a kernel. A length of nothing is the dynamic part.
    fn shared(&mut self) -> Result<(), PtxError> {
        let (ty, align) = self.variable_type()?;
        let name = self.word("a variable's name")?;
        let mut bytes = Some(ty.bits() / 8);
        if self.take("[") {
            bytes = None;
            if !self.take("]") {
                bytes = Some(self.at_most("the length", MAX_BYTES)?.saturating_mul(ty.bits() / 8));
                self.expect("]")?;
            }
        }
        self.expect(";")?;
        // Variables at module scope are laid out once, before any kernel; the dynamic part begins at 0 where it is all.
        let begin = self.kernel.static_shared.next_multiple_of(align);
        match bytes {
            Some(bytes) => {
                self.kernel.static_shared = begin.saturating_add(bytes);
                if u64::from(self.kernel.static_shared) > MAX_BYTES {
                    let found = u64::from(self.kernel.static_shared);
                    let line = self.statement_line();
                    return Err(PtxError::TooMany { line, what: "shared memory", found, limit: MAX_BYTES });
                }
            }
            // It begins behind all that have a size, which may still come.
            None => self.dynamic_align = self.dynamic_align.max(align),
        }
        let named = if bytes.is_some() { Named::Shared(begin) } else { Named::Dynamic };
        self.declare(name, named)
    }

    /// Gives a name its meaning in the innermost scope.
    fn declare(&mut self, name: &'t str, named: Named) -> Result<(), PtxError> {
        let line = self.statement_line();
        let scope = self.scopes.last_mut().expect("the module's scope");
        match scope.names.insert(name, named).is_some() || scope.ranges.contains_key(name) {
            true => Err(PtxError::Twice { line, name: name.to_string() }),
            false => Ok(()),
        }
    }

    /// `.align N .type`, in either order.
    fn variable_type(&mut self) -> Result<(Type, u32), PtxError> {
        let (mut ty, mut align) = (None, 1);
        loop {
            let token = self.peek();
            match token.text {
                ".align" => {
                    self.next();
                    let token = self.peek();
                    align = self.at_most("the alignment", 1 << 16)?;
                    if !align.is_power_of_two() {
                        return self.wrong(token, "a power of two");
                    }
                }
                // What a pointer points to: `.ptr .global .align 16`.
                ".ptr" => {
                    self.next();
                    while matches!(self.peek().text, ".global" | ".shared" | ".const" | ".local") {
                        self.next();
                    }
                    if self.take(".align") {
                        self.integer()?;
                    }
                }
                _ if ty.is_none() && token.kind == Kind::Word => {
                    ty = token.text.strip_prefix('.').and_then(type_named);
                    if ty.is_none() {
                        return self.wrong(token, "a type, such as `.b32`");
                    }
                    self.next();
                }
                _ => break,
            }
        }
        match ty {
            Some(ty) => Ok((ty, align.max(ty.bits() / 8))),
            None => self.wrong(self.peek(), "a type, such as `.b32`"),
        }
    }

    fn entry(&mut self) -> Result<Kernel, PtxError> {
        let module_shared = (self.kernel.static_shared, self.dynamic_align);
        self.kernel.name = self.word("a kernel's name")?.to_string();
        let mut scope = Scope::default();
        if self.take("(") && !self.take(")") {
            loop {
                self.expect(".param")?;
                let (ty, align) = self.variable_type()?;
                let name = self.word("a parameter's name")?;
                let mut bytes = ty.bits() / 8;
                if self.take("[") {
                    bytes = bytes.saturating_mul(self.at_most("the length", 4096)?);
                    self.expect("]")?;
                }
                let offset = self.kernel.param_bytes().next_multiple_of(align);
                if offset + bytes > 32_764 {
                    let found = u64::from(offset + bytes);
                    let line = self.statement_line();
                    return Err(PtxError::TooMany {
                        line,
                        what: "the parameters' size",
                        found,
                        limit: 32_764,
                    });
                }
                scope.names.insert(name, Named::Param(offset));
                self.kernel.params.push(Param { name: name.to_string(), offset, bytes, align });
                if self.take(")") {
                    break;
                }
                self.expect(",")?;
            }
        }
        loop {
            let token = self.next();
            match token.text {
                ".maxntid" => self.kernel.max_threads = Some(self.product(1024)?),
                ".reqntid" => {
                    self.kernel.required_threads = Some(self.product(1024)?);
                    self.kernel.max_threads = self.kernel.required_threads;
                }
                ".minnctapersm" => self.kernel.min_ctas = Some(self.at_most("CTAs", 64)?),
                ".maxnreg" => self.kernel.max_registers = Some(self.at_most("registers", 256)?),
                // Clusters lie along x.
                ".reqnctapercluster" => {
                    self.kernel.cluster = Some(self.at_most("CTAs of a cluster", 16)?);
                    while self.take(",") {
                        self.at_most("CTAs of a cluster along y and z", 1)?;
                    }
                }
                ".explicitcluster" => {}
                ".pragma" => {
                    self.next();
                    self.take(";");
                }
                "{" => break,
                _ if token.kind == Kind::Word && token.text.starts_with('.') => {
                    return Err(PtxError::UnknownDirective {
                        line: token.line,
                        directive: token.text.to_string(),
                    });
                }
                _ => return self.wrong(token, "`{`"),
            }
        }
        self.scopes_made = 1;
        scope.number = 1;
        self.scopes.push(scope);
        self.statements()?;
        self.scopes.truncate(1);
        self.fill_in_labels()?;
        self.lists.clear();
        self.labels.clear();
        self.constants.clear();
        self.kernel.dynamic_shared = self.kernel.static_shared.next_multiple_of(self.dynamic_align);
        let mut next = empty_kernel();
        (next.static_shared, self.dynamic_align) = module_shared;
        Ok(std::mem::replace(&mut self.kernel, next))
    }

    /// `x, y, z` multiplied.
    fn product(&mut self, limit: u64) -> Result<u32, PtxError> {
        let line = self.line();
        let mut found = u64::from(self.at_most("threads", limit)?);
        while self.take(",") {
            found *= u64::from(self.at_most("threads", limit)?);
        }
        if found <= limit {
            Ok(found as u32)
        } else {
            Err(PtxError::TooMany { line, what: "threads", found, limit })
        }
    }

    /// Statements up to the `}` that ends the kernel.
    fn statements(&mut self) -> Result<(), PtxError> {
        let outer = self.scopes.len();
        loop {
            let token = self.peek();
            match token.text {
                _ if token.kind == Kind::End => return self.wrong(token, "`}`"),
                "{" => {
                    self.next();
                    self.scopes_made += 1;
                    self.scopes.push(Scope { number: self.scopes_made, ..Scope::default() });
                }
                "}" => {
                    self.next();
                    if self.scopes.len() == outer {
                        return Ok(());
                    }
                    self.scopes.pop();
                }
                ";" => _ = self.next(),
                ".reg" => {
                    self.next();
                    self.registers()?;
                }
                ".shared" => {
                    self.next();
                    self.shared()?;
                }
                ".pragma" => {
                    self.next();
                    while self.peek().kind == Kind::Text || self.peek().text == "," {
                        self.next();
                    }
                    self.expect(";")?;
                }
                _ if token.kind == Kind::Word && token.text.starts_with('.') => {
                    return Err(PtxError::UnknownDirective {
                        line: token.line,
                        directive: token.text.to_string(),
                    });
                }
                _ => self.statement()?,
            }
        }
    }

    /// `.reg .b32 %r<86>, x;`
    fn registers(&mut self) -> Result<(), PtxError> {
        let token = self.next();
        let bits = match token.text {
            ".pred" => 1,
            text => match text.strip_prefix('.').and_then(type_named) {
                Some(ty) => ty.bits(),
                None => return self.wrong(token, "a register's type"),
            },
        };
        loop {
            let name = self.word("a register's name")?;
            let mut count = None;
            if self.take("<") {
                count = Some(self.at_most("the number of registers", MAX_REGISTERS)?);
                self.expect(">")?;
            }
            let first = self.allocate(bits, count.unwrap_or(1))?;
            if bits > 1 {
                let first = Reg { wide: bits == 64, index: first };
                self.kernel.names.push(Names { first, count, stem: name.to_string() });
            }
            let scope = self.scopes.last_mut().expect("a kernel's scope");
            match count {
                Some(count) => {
                    let twice = scope.ranges.insert(name, Range { count, bits, first }).is_some();
                    if twice || scope.names.contains_key(name) {
                        return Err(PtxError::Twice { line: self.statement_line(), name: name.to_string() });
                    }
                }
                None => self.declare(name, register(bits, first))?,
            }
            if self.take(";") {
                return Ok(());
            }
            self.expect(",")?;
        }
    }

    fn allocate(&mut self, bits: u32, count: u32) -> Result<u16, PtxError> {
        let line = self.statement_line();
        let bank = match bits {
            1 => &mut self.kernel.banks.predicates,
            64 => &mut self.kernel.banks.wide,
            _ => &mut self.kernel.banks.narrow,
        };
        let found = u64::from(*bank) + u64::from(count);
        if found > MAX_REGISTERS {
            return Err(PtxError::TooMany {
                line,
                what: "the number of registers",
                found,
                limit: MAX_REGISTERS,
            });
        }
        let first = *bank;
        *bank = found as u16;
        Ok(first)
    }

    fn lookup(&self, name: &str) -> Option<Named> {
        for scope in self.scopes.iter().rev() {
            if let Some(&named) = scope.names.get(name) {
                return Some(named);
            }
            let digits = name.len() - name.bytes().rev().take_while(u8::is_ascii_digit).count();
            let (prefix, index) = name.split_at(digits);
            if let (Some(range), Ok(index)) = (scope.ranges.get(prefix), index.parse::<u32>())
                && index < range.count
            {
                return Some(register(range.bits, range.first + index as u16));
            }
        }
        None
    }

    /// A label, or `@p op operands;`.
    fn statement(&mut self) -> Result<(), PtxError> {
        let token = self.peek();
        let guard = if self.take("@") {
            let negated = self.take("!");
            let name = self.word("a predicate")?;
            let pred = self.pred(&Arg::Name { name, negated: false })?;
            Some((pred, !negated))
        } else {
            None
        };
        let line = self.line();
        let name = self.word("an instruction or a label")?;
        if guard.is_none() && self.take(":") {
            if self.take(".branchtargets") {
                let mut targets = vec![self.word("a label")?];
                while self.take(",") {
                    targets.push(self.word("a label")?);
                }
                self.lists.insert(name, targets);
                return self.expect(";");
            }
            let scope = self.scopes.last().expect("a kernel's scope").number;
            let here = self.kernel.code.len() as u32;
            if self.labels.insert((scope, name), here).is_some() {
                return self.wrong(token, "a label that is new");
            }
            return Ok(());
        }
        let mut args = Vec::new();
        if !self.take(";") {
            loop {
                args.push(self.operand()?);
                if self.take(";") {
                    break;
                }
                self.expect(",")?;
            }
        }
        let op = opcode::read(self, line, name, &args)?;
        self.kernel.code.push(Instruction { line, guard, op });
        Ok(())
    }

    fn operand(&mut self) -> Result<Arg<'t>, PtxError> {
        let token = self.next();
        match (token.kind, token.text) {
            (Kind::Word, name) => {
                if self.take("|") {
                    return Ok(Arg::Pair(name, self.word("a register")?));
                }
                // `name+4` outside brackets: the address of a byte of a variable.
                if self.take("+") {
                    let offset = self.integer()? as i64;
                    return Ok(Arg::Address { base: Some(name), offset });
                }
                Ok(Arg::Name { name, negated: false })
            }
            (Kind::Sign, "!") => Ok(Arg::Name { name: self.word("a predicate")?, negated: true }),
            (Kind::Sign, "-") => {
                let token = self.next();
                match number(token.text) {
                    Some(Arg::Int(value)) => Ok(Arg::Int(value.wrapping_neg())),
                    Some(Arg::F64(bits)) => Ok(Arg::F64((-f64::from_bits(bits)).to_bits())),
                    _ => self.wrong(token, "a number"),
                }
            }
            (Kind::Number, text) => match number(text) {
                Some(arg) => Ok(arg),
                None => self.wrong(token, "a number"),
            },
            (Kind::Sign, "{") => Ok(Arg::Vector(self.list()?)),
            (Kind::Sign, "[") => self.in_brackets(),
            _ => self.wrong(token, "an operand"),
        }
    }

    /// The rest of `{a, b}`.
    fn list(&mut self) -> Result<Vec<Arg<'t>>, PtxError> {
        let mut parts = Vec::new();
        loop {
            let token = self.next();
            parts.push(match (token.kind, token.text) {
                (Kind::Word, name) => Arg::Name { name, negated: false },
                (Kind::Number, text) if number(text).is_some() => number(text).expect("it was one"),
                (Kind::Sign, "-") => Arg::Int(self.integer()?.wrapping_neg()),
                _ => return self.wrong(token, "a register"),
            });
            if self.take("}") {
                return Ok(parts);
            }
            self.expect(",")?;
        }
    }

    /// The rest of `[base+offset]` or `[map, {x, y}]`.
    fn in_brackets(&mut self) -> Result<Arg<'t>, PtxError> {
        let token = self.next();
        let (base, mut offset) = match (token.kind, number(token.text)) {
            (Kind::Word, _) => (Some(token.text), 0),
            (Kind::Number, Some(Arg::Int(value))) => (None, value as i64),
            _ => return self.wrong(token, "an address"),
        };
        if self.take("+") {
            let negative = self.take("-");
            let value = self.integer()? as i64;
            offset = if negative { value.wrapping_neg() } else { value };
        } else if self.take("-") {
            offset = (self.integer()? as i64).wrapping_neg();
        } else if let Some(map) = base
            && self.take(",")
        {
            self.expect("{")?;
            let coordinates = self.list()?;
            self.expect("]")?;
            return Ok(Arg::Tile { map, coordinates });
        }
        self.expect("]")?;
        Ok(Arg::Address { base, offset })
    }

    /// Fills in the targets of branches.
    fn fill_in_labels(&mut self) -> Result<(), PtxError> {
        for (at, scopes, names) in std::mem::take(&mut self.jumps) {
            let mut found = Vec::new();
            for name in names {
                let target = scopes.iter().rev().find_map(|&scope| self.labels.get(&(scope, name)));
                let Some(&target) = target else {
                    let line = self.kernel.code[at].line;
                    return Err(PtxError::Undeclared { line, name: name.to_string(), expected: "a label" });
                };
                found.push(target);
            }
            match &mut self.kernel.code[at].op {
                Op::Branch { target } => *target = found[0],
                Op::BranchIndexed { targets, .. } => *targets = found.into(),
                op => unreachable!("{op:?} has no label"),
            }
        }
        Ok(())
    }

    /// Notes that the instruction about to be made jumps to `labels`.
    pub fn jump(&mut self, arg: &Arg<'t>) -> Result<(), PtxError> {
        let Arg::Name { name, negated: false } = *arg else { return self.wrong_operand(arg, "a label") };
        let names = self.lists.get(name).cloned().unwrap_or_else(|| vec![name]);
        let scopes = self.scopes.iter().map(|scope| scope.number).collect();
        self.jumps.push((self.kernel.code.len(), scopes, names));
        Ok(())
    }

    /// A register that a result goes to.
    pub fn reg(&mut self, arg: &Arg<'t>, bits: u32) -> Result<Reg, PtxError> {
        let Arg::Name { name, negated: false } = *arg else { return self.wrong_operand(arg, "a register") };
        match self.lookup(name) {
            Some(Named::Reg { reg, bits: found }) if fits(found, bits) => Ok(reg),
            Some(Named::Reg { bits: found, .. }) => self.width(name, width_name(found), width_name(bits)),
            Some(Named::Pred(_)) => self.width(name, width_name(1), width_name(bits)),
            Some(Named::Shared(_) | Named::Dynamic | Named::Param(_)) => {
                self.wrong_operand(arg, "a register")
            }
            None => self.undeclared(name, "a register"),
        }
    }

    /// The result register, or `_`.
    pub fn reg_or_sink(&mut self, arg: &Arg<'t>, bits: u32) -> Result<Option<Reg>, PtxError> {
        match arg {
            Arg::Name { name: "_", .. } => Ok(None),
            arg => Ok(Some(self.reg(arg, bits)?)),
        }
    }

    fn width<T>(&self, operand: &str, found: &'static str, expected: &'static str) -> Result<T, PtxError> {
        Err(PtxError::Width { line: self.statement_line(), operand: operand.to_string(), found, expected })
    }

    fn undeclared<T>(&self, name: &str, expected: &'static str) -> Result<T, PtxError> {
        Err(PtxError::Undeclared { line: self.statement_line(), name: name.to_string(), expected })
    }

    /// A predicate register.
    pub fn pred(&mut self, arg: &Arg<'t>) -> Result<Pred, PtxError> {
        let Arg::Name { name, negated: false } = *arg else { return self.wrong_operand(arg, "a predicate") };
        match self.lookup(name) {
            Some(Named::Pred(pred)) => Ok(pred),
            Some(Named::Reg { bits, .. }) => self.width(name, width_name(bits), width_name(1)),
            Some(Named::Shared(_) | Named::Dynamic | Named::Param(_)) => {
                self.wrong_operand(arg, "a predicate")
            }
            None => self.undeclared(name, "a predicate"),
        }
    }

    /// A predicate, negated or not; 0 and 1 are constants.
    pub fn pred_source(&mut self, arg: &Arg<'t>) -> Result<(Pred, bool), PtxError> {
        match *arg {
            Arg::Name { name, negated } => Ok((self.pred(&Arg::Name { name, negated: false })?, negated)),
            Arg::Int(value) => Ok((self.constant_pred(value != 0)?, false)),
            _ => self.wrong_operand(arg, "a predicate"),
        }
    }

    /// A predicate that is always `value`.
    pub fn constant_pred(&mut self, value: bool) -> Result<Pred, PtxError> {
        if let Some((pred, _)) = self.kernel.constant_predicates.iter().find(|(_, known)| *known == value) {
            return Ok(*pred);
        }
        let pred = Pred(self.allocate(1, 1)?);
        self.kernel.constant_predicates.push((pred, value));
        Ok(pred)
    }

    /// A register with that constant in it.
    pub fn constant(&mut self, wide: bool, constant: Constant) -> Result<Reg, PtxError> {
        if let Some(&reg) = self.constants.get(&(wide, constant)) {
            return Ok(reg);
        }
        let index = self.allocate(if wide { 64 } else { 32 }, 1)?;
        let reg = Reg { wide, index };
        self.constants.insert((wide, constant), reg);
        self.kernel.constants.push((reg, constant));
        Ok(reg)
    }

    /// A source operand of type `ty`: a register, a constant, a special register, the address of a variable.
    pub fn source(&mut self, arg: &Arg<'t>, ty: Type) -> Result<Reg, PtxError> {
        let wide = ty.wide();
        let bits = match *arg {
            Arg::Name { name, negated: false } => {
                let constant = match self.lookup(name) {
                    Some(Named::Shared(offset)) => Constant::Shared(offset),
                    Some(Named::Dynamic) => Constant::Dynamic(0),
                    Some(Named::Param(offset)) => Constant::Param(offset),
                    Some(Named::Reg { .. } | Named::Pred(_)) => return self.reg(arg, ty.bits()),
                    None => match special(name) {
                        Some(special) => Constant::Special(special),
                        None => return self.undeclared(name, "a register, a special register or a variable"),
                    },
                };
                return self.constant(wide, constant);
            }
            Arg::Address { base: Some(name), offset } => {
                let constant = match (self.lookup(name), u32::try_from(offset)) {
                    (Some(Named::Shared(begin)), Ok(offset)) => Constant::Shared(begin.wrapping_add(offset)),
                    (Some(Named::Dynamic), Ok(offset)) => Constant::Dynamic(offset),
                    _ => return self.wrong_operand(arg, "a register or a constant"),
                };
                return self.constant(wide, constant);
            }
            Arg::Int(value) if ty.float() && matches!(ty, Type::F32 | Type::F64) => {
                float_bits(value as i64 as f64, ty)
            }
            Arg::Int(value) => value,
            Arg::F32(bits) if ty.bits() == 32 => u64::from(bits),
            Arg::F64(bits) if ty.bits() == 64 => bits,
            Arg::F64(bits) if ty == Type::F32 => float_bits(f64::from_bits(bits), ty),
            _ => return self.wrong_operand(arg, "a register or a constant"),
        };
        let bits = if ty.bits() == 64 { bits } else { bits & ((1 << ty.bits()) - 1) };
        self.constant(wide, Constant::Bits(bits))
    }

    /// An integer that must be written out.
    pub fn immediate(&self, arg: &Arg<'t>, limit: u32) -> Result<u32, PtxError> {
        match *arg {
            Arg::Int(value) if value <= u64::from(limit) => Ok(value as u32),
            _ => self.wrong_operand(arg, &format!("a constant from 0 to {limit}")),
        }
    }

    /// `[base+offset]`. Addresses are of 64 bits, or of 32 in shared memory.
    pub fn address(&mut self, arg: &Arg<'t>) -> Result<Address, PtxError> {
        let Arg::Address { base, offset } = *arg else {
            return self.wrong_operand(arg, "an address in brackets");
        };
        let base = match base {
            None => self.constant(true, Constant::Bits(0))?,
            Some(name) => {
                let ty = match self.lookup(name) {
                    Some(Named::Reg { reg: Reg { wide: false, .. }, .. }) => Type::B32,
                    _ => Type::B64,
                };
                self.source(&Arg::Name { name, negated: false }, ty)?
            }
        };
        Ok(Address { base, offset })
    }

    /// `{a, b}`, or `a` for one.
    pub fn regs(&mut self, arg: &Arg<'t>, bits: u32, count: usize) -> Result<Box<[Reg]>, PtxError> {
        let parts = self.parts(arg, count)?;
        parts.iter().map(|part| self.reg(part, bits)).collect()
    }

    /// Sources `{a, b}`, or `a` for one.
    pub fn sources(&mut self, arg: &Arg<'t>, ty: Type, count: usize) -> Result<Box<[Reg]>, PtxError> {
        let parts = self.parts(arg, count)?;
        parts.iter().map(|part| self.source(part, ty)).collect()
    }

    fn parts(&self, arg: &Arg<'t>, count: usize) -> Result<Vec<Arg<'t>>, PtxError> {
        let parts = match arg {
            Arg::Vector(parts) => parts.clone(),
            one => vec![one.clone()],
        };
        if parts.len() == count { Ok(parts) } else { self.wrong_operand(arg, &format!("{count} registers")) }
    }

    /// The width of a register, if it is one.
    pub fn bits(&self, arg: &Arg<'t>) -> Option<u32> {
        match *arg {
            Arg::Name { name, .. } => match self.lookup(name)? {
                Named::Reg { bits, .. } => Some(bits),
                Named::Pred(_) => Some(1),
                Named::Shared(_) | Named::Dynamic | Named::Param(_) => None,
            },
            _ => None,
        }
    }

    /// What a name in brackets is, if it is a parameter: its offset.
    pub fn is_param(&self, arg: &Arg<'t>) -> bool {
        match *arg {
            Arg::Address { base: Some(name), .. } => matches!(self.lookup(name), Some(Named::Param(_))),
            _ => false,
        }
    }
}

/// May a register of `found` bits stand where the instruction has `bits`? 8-bit values live in 16-bit registers.
fn fits(found: u32, bits: u32) -> bool {
    found == bits || (found == 16 && bits == 8)
}

fn width_name(bits: u32) -> &'static str {
    match bits {
        1 => "a predicate",
        8 => "of 8 bits",
        16 => "of 16 bits",
        32 => "of 32 bits",
        _ => "of 64 bits",
    }
}

fn register(bits: u32, index: u16) -> Named {
    match bits {
        1 => Named::Pred(Pred(index)),
        _ => Named::Reg { reg: Reg { wide: bits == 64, index }, bits },
    }
}

fn float_bits(value: f64, ty: Type) -> u64 {
    if ty == Type::F32 { u64::from((value as f32).to_bits()) } else { value.to_bits() }
}

pub fn type_named(name: &str) -> Option<Type> {
    Type::ALL.iter().find(|(known, _)| *known == name).map(|&(_, ty)| ty)
}

fn number(text: &str) -> Option<Arg<'static>> {
    let lower = text.to_ascii_lowercase();
    if let Some(hex) = lower.strip_prefix("0x") {
        return u64::from_str_radix(hex.trim_end_matches('u'), 16).ok().map(Arg::Int);
    }
    if let Some(hex) = lower.strip_prefix("0f").filter(|hex| hex.len() == 8) {
        return u32::from_str_radix(hex, 16).ok().map(Arg::F32);
    }
    if let Some(hex) = lower.strip_prefix("0d").filter(|hex| hex.len() == 16) {
        return u64::from_str_radix(hex, 16).ok().map(Arg::F64);
    }
    if !lower.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    match lower.trim_end_matches('u').parse::<u64>() {
        Ok(value) => Some(Arg::Int(value)),
        Err(_) => lower.parse::<f64>().ok().map(|value| Arg::F64(value.to_bits())),
    }
}

fn special(name: &str) -> Option<Special> {
    let (stem, axis) = match name.rsplit_once('.') {
        Some((stem, "x")) => (stem, 0),
        Some((stem, "y")) => (stem, 1),
        Some((stem, "z")) => (stem, 2),
        Some(_) => return None,
        None => (name, 3),
    };
    Some(match (stem, axis) {
        ("%tid", 0..3) => Special::Tid(axis),
        ("%ntid", 0..3) => Special::Ntid(axis),
        ("%ctaid", 0..3) => Special::Ctaid(axis),
        ("%nctaid", 0..3) => Special::Nctaid(axis),
        ("%laneid", 3) => Special::LaneId,
        ("%warpid", 3) => Special::WarpId,
        ("%nwarpid", 3) => Special::NwarpId,
        ("%lanemask_eq", 3) => Special::LanemaskEq,
        ("%lanemask_lt", 3) => Special::LanemaskLt,
        ("%lanemask_le", 3) => Special::LanemaskLe,
        ("%lanemask_gt", 3) => Special::LanemaskGt,
        ("%lanemask_ge", 3) => Special::LanemaskGe,
        ("%cluster_ctarank", 3) => Special::ClusterCtaRank,
        ("%cluster_nctarank", 3) => Special::ClusterNctaRank,
        ("%cluster_ctaid", 0..3) => Special::ClusterCtaid(axis),
        ("%cluster_nctaid", 0..3) => Special::ClusterNctaid(axis),
        ("%clusterid", 0..3) => Special::ClusterId(axis),
        ("%nclusterid", 0..3) => Special::NclusterId(axis),
        ("%dynamic_smem_size", 3) => Special::DynamicSharedBytes,
        _ => return None,
    })
}
