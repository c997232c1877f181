//! Runs every kernel text of `tests/kernel/`, one file a test, and random and mutated kernels.
//!
//! The first line says what is tested; `UPDATE_EXPECT=1` rewrites the message in it.
//!
//! * `// print`: the verifier accepts it, and printed it is the text again.
//! * `// error: ...`: the parser or the verifier refuses it with this message.
//! * `// fault: ...`: the interpreter stops with this message.
//! * `// run`: the interpreter runs it without a fault.
//!
//! Symbols have their largest values; `read` and `update` params count 0, 1, 2 ... 6, 0 ...

use ir::DType;
use ir::dim::{Dim, MAX_SYMBOLS, Symbols};
use ir::graph::Family;
use ir::kernel::interp::{KBuffer, Options, Stats, run};
use ir::kernel::parse::parse;
use ir::kernel::verify::verify;
use ir::kernel::{Access, Arith, BufferId, Builder, Expr, Kernel, RegId, Space, Type};
use ir::op::{Compare, Reduction, Unary};
use libtest_mimic::{Arguments, Failed, Trial};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let args = Arguments::from_args();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/kernel");
    let files = texts(&root);
    assert!(!files.is_empty(), "no kernel texts in {}", root.display());
    let mut tests: Vec<Trial> = Vec::new();
    for file in files.clone() {
        let name = file.strip_prefix(&root).expect("a file of the folder").display().to_string();
        tests.push(Trial::test(name, move || check(&file)));
    }
    tests.push(Trial::test("random kernels come back from text", random_kernels));
    tests.push(Trial::test("mutated texts never panic", move || mutated_texts(&files)));
    libtest_mimic::run(&args, tests).exit();
}

/// The `.ir` files below a folder, in order of their names.
fn texts(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder of texts") {
        let path = entry.expect("a readable folder").path();
        if path.is_dir() {
            found.extend(texts(&path));
        } else if path.extension().is_some_and(|e| e == "ir") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn check(file: &Path) -> Result<(), Failed> {
    let text = fs::read_to_string(file)?;
    let (header, body) = text.split_once('\n').ok_or("an empty file")?;
    let verb = header.strip_prefix("// ").ok_or("no header")?.split(':').next().unwrap_or_default();
    let actual = match verb {
        "print" => {
            let kernels = accepted(&text)?;
            let printed: String = kernels.iter().map(Kernel::to_string).collect();
            if printed != body {
                return Err(format!("printed, it is another text:\n{printed}").into());
            }
            header.to_string()
        }
        "error" => match accepted(&text) {
            Ok(_) => return Err("nothing is wrong with it".into()),
            Err(message) => format!("// error: {message}"),
        },
        "fault" | "run" => {
            let outcome: Result<Vec<Stats>, String> = accepted(&text)?.iter().map(run_at_largest).collect();
            match (verb, outcome) {
                ("run", Ok(_)) => header.to_string(),
                ("run", Err(message)) => return Err(message.into()),
                (_, Ok(_)) => return Err("no fault was reported".into()),
                (_, Err(message)) => format!("// fault: {message}"),
            }
        }
        _ => return Err(format!("no such header: {header}").into()),
    };
    if actual == header {
        return Ok(());
    }
    if env::var_os("UPDATE_EXPECT").is_some() {
        return Ok(fs::write(file, format!("{actual}\n{body}"))?);
    }
    Err(format!("-{header}\n+{actual}\nUPDATE_EXPECT=1 accepts").into())
}

/// Kernels that the parser reads and the verifier accepts.
fn accepted(text: &str) -> Result<Vec<Kernel>, String> {
    let kernels = parse(text).map_err(|e| e.to_string())?;
    for kernel in &kernels {
        verify(kernel).map_err(|e| e.to_string())?;
    }
    Ok(kernels)
}

fn run_at_largest(kernel: &Kernel) -> Result<Stats, String> {
    let symbols = kernel.symbols.max();
    let mut params: Vec<KBuffer> = kernel
        .params()
        .map(|(_, buffer)| {
            let elems: i64 = buffer.shape.iter().map(|dim| dim.eval(&symbols)).product();
            let data: Vec<f64> = (0..elems).map(|i| (i % 7) as f64).collect();
            KBuffer::from_data(buffer, &symbols, &data)
        })
        .collect();
    run(kernel, &symbols, &mut params, Options { max_steps: 100_000 }).map_err(|fault| fault.to_string())
}

// Random kernels.

fn random_kernels() -> Result<(), Failed> {
    let mut runner =
        TestRunner::new_with_rng(Config { failure_persistence: None, ..Config::with_cases(1000) }, seed(1));
    let choices = proptest::collection::vec(any::<u32>(), 20..400);
    let outcome = runner.run(&choices, |choices| {
        let kernel = Random::kernel(choices);
        let text = kernel.to_string();
        verify(&kernel).map_err(|e| TestCaseError::fail(format!("{e}\n{text}")))?;
        let again = parse(&text).map_err(|e| TestCaseError::fail(format!("{e}\n{text}")))?;
        prop_assert_eq!(again.len(), 1);
        prop_assert_eq!(again[0].to_string(), text);
        prop_assert_eq!(&again[0], &kernel);
        // Faults are the kernel's own; what must not happen is a panic.
        let _ = run_at_largest(&kernel);
        Ok(())
    });
    outcome.map_err(|e| e.to_string().into())
}

fn seed(seed: u8) -> proptest::test_runner::TestRng {
    proptest::test_runner::TestRng::from_seed(proptest::test_runner::RngAlgorithm::ChaCha, &[seed; 32])
}

/// Writes a kernel that the verifier must accept. Every decision is taken from `choices`, so that fewer choices give a
/// smaller kernel; when they are spent, each decision is the first.
struct Random {
    choices: std::vec::IntoIter<u32>,
    builder: Builder,
    /// Of f32, bf16, f16 and i32 in turn: what is read, written, and local. All are `[T, 8, 32]` or `[4, 8, 32]`.
    read: [BufferId; 4],
    write: [BufferId; 4],
    local: [BufferId; 4],
    /// What is seen here.
    indices: Vec<Expr>,
    constants: Vec<Expr>,
    vectors: Vec<(Expr, Type)>,
    /// Registers of four f32x8.
    regs: Vec<RegId>,
    depth: usize,
}

const DTYPES: [DType; 4] = [DType::F32, DType::BF16, DType::F16, DType::I32];

impl Random {
    fn kernel(choices: Vec<u32>) -> Kernel {
        let mut symbols = Symbols::default();
        let t = Dim::from(symbols.add("T", 1, 5));
        symbols.add("P", -2, 3);
        let family = Family::ALL[choices[0] as usize % Family::ALL.len()];
        let schedule = ["mr 1, nr 4", "", "a \"b\" \\ c\nd"][choices[1] as usize % 3];
        let mut builder = Builder::new("l0.k", family, schedule.to_string(), symbols);
        let shape = [t, Dim::of(8), Dim::of(32)];
        let strides = [None, Some(vec![300, 33, 1])];
        let strides = &strides[choices[2] as usize % 2];
        let mut buffers = |name: &str, space, shape: &[Dim], strides: &Option<Vec<i64>>| {
            DTYPES.map(|dtype| builder.buffer(name, space, dtype, shape, strides.clone()))
        };
        let read = buffers("x", Space::Global(Access::Read), &shape, strides);
        let write = buffers("y", Space::Global(Access::Write), &shape, strides);
        let local = buffers("s", Space::Local, &[4.into(), 8.into(), 32.into()], &None);
        let mut random = Random {
            choices: choices.into_iter(),
            builder,
            read,
            write,
            local,
            indices: vec![Expr::from(t), Expr::Sym(ir::dim::Sym(1))],
            constants: Vec::new(),
            vectors: Vec::new(),
            regs: Vec::new(),
            depth: 0,
        };
        while !random.choices.as_slice().is_empty() {
            match random.pick(4) {
                0 => random.stmt(false),
                1 => random.builder.barrier(),
                _ => {
                    let count = random.index(2);
                    random.block(|random, builder| {
                        builder.parallel("p", count, |k, p| random.body(k, Some(p), None, true));
                    });
                }
            }
        }
        random.builder.finish()
    }

    /// One of `n` choices.
    fn pick(&mut self, n: usize) -> usize {
        self.choices.next().map_or(0, |x| x as usize % n)
    }

    /// Runs what opens a block, and forgets what is seen only there. The builder is lent, for its methods take closures.
    fn block(&mut self, open: impl FnOnce(&mut Random, &mut Builder)) {
        let seen = (
            self.indices.clone(),
            self.constants.clone(),
            self.vectors.clone(),
            self.regs.clone(),
            self.depth,
        );
        let placeholder = Builder::new("", Family::Dot, String::new(), Symbols::default());
        let mut lent = std::mem::replace(&mut self.builder, placeholder);
        self.depth += 1;
        open(self, &mut lent);
        self.builder = lent;
        (self.indices, self.constants, self.vectors, self.regs, self.depth) = seen;
    }

    /// Statements of a block that `k` has open.
    fn body(&mut self, k: &mut Builder, index: Option<Expr>, constant: Option<Expr>, in_parallel: bool) {
        if in_parallel && self.depth == 1 {
            // Registers declared outside are not set inside.
            self.regs.clear();
        }
        std::mem::swap(k, &mut self.builder);
        self.indices.extend(index);
        self.constants.extend(constant);
        for _ in 0..self.pick(5) {
            self.stmt(in_parallel);
        }
        std::mem::swap(k, &mut self.builder);
    }

    fn stmt(&mut self, in_parallel: bool) {
        let kinds = if self.depth < 4 { 11 } else { 7 };
        match self.pick(kinds) {
            0 | 1 => {
                let ty = Type::f32([1, 8, 16][self.pick(3)]);
                let value = self.f32(ty.lanes(), 4);
                let named = self.builder.let_("v", value);
                if matches!(named, Expr::Var(_)) {
                    self.vectors.push((named, ty));
                }
            }
            2 => {
                let value = self.index(4);
                let named = self.builder.let_("i", value);
                self.indices.push(named);
            }
            3 => {
                let init = (self.pick(3) > 0).then(|| self.f32(8, 2));
                let reg = self.builder.reg("r", Type::f32(8), &[2, 2], init);
                self.regs.push(reg);
            }
            4 => {
                let Some(&reg) = self.regs.last() else { return };
                let (index, value) = ([self.small(), self.small()], self.f32(8, 4));
                self.builder.set(reg, &index, value);
            }
            5 => {
                let lanes = [1, 8, 16][self.pick(3)];
                let dtype = self.pick(4);
                let value = self.f32(lanes, 4);
                let buffer =
                    if in_parallel && self.pick(3) > 0 { self.write[dtype] } else { self.local[dtype] };
                let index = self.element();
                self.builder.store(buffer, &index, value);
            }
            6 => {
                let index = [self.index(2), self.index(2), self.index(2)];
                self.builder.prefetch(self.read[0], &index);
            }
            7 => {
                let (lo, hi, step) = (self.index(2), self.index(2), 1 + self.pick(3) as i64);
                self.block(|random, builder| {
                    builder.for_("k", lo, hi, step, |k, i| random.body(k, Some(i), None, in_parallel));
                });
            }
            8 => {
                let count = 1 + self.pick(3);
                self.block(|random, builder| {
                    // As a constant it is below 2 only with two copies.
                    builder.unroll("j", count, |k, j| {
                        let constant = (count <= 2).then(|| j.clone());
                        random.body(k, Some(j), constant, in_parallel);
                    });
                });
            }
            _ => {
                let cond = self.flag();
                self.block(|random, builder| {
                    builder.if_(cond, |k| random.body(k, None, None, in_parallel));
                });
            }
        }
    }

    /// A constant index below 2.
    fn small(&mut self) -> Expr {
        let constants = self.constants.clone();
        match self.pick(2 + 2 * constants.len()) {
            0 => Expr::Int(0),
            1 => Expr::Int(1),
            n if n % 2 == 0 => constants[(n - 2) / 2].clone(),
            n => Expr::Int(1) - constants[(n - 2) / 2].clone(),
        }
    }

    /// An index of an element of any buffer; the constants in it are inside.
    fn element(&mut self) -> [Expr; 3] {
        let row = if self.pick(2) == 0 { Expr::Int(0) } else { self.index(2).max(0i64) % 4i64 };
        let column = self.index(2).max(0i64) % 8i64;
        let first = if self.pick(2) == 0 { self.small() * 8i64 } else { self.small() };
        [row, column, first]
    }

    fn index(&mut self, depth: usize) -> Expr {
        if depth == 0 || self.pick(3) == 0 {
            return match self.pick(1 + self.indices.len()) {
                0 => Expr::Int(self.pick(9) as i64 - 2),
                n => self.indices[n - 1].clone(),
            };
        }
        let a = Box::new(self.index(depth - 1));
        match Arith::ALL[self.pick(7)] {
            Arith::Div => Expr::Arith(Arith::Div, a, Box::new(Expr::Int(1 + self.pick(5) as i64))),
            Arith::Rem => {
                // Mostly not negative, so that the interpreter gets beyond it.
                let a = if self.pick(8) == 7 { *a } else { a.max(0i64) };
                Expr::Arith(Arith::Rem, Box::new(a), Box::new(Expr::Int(1 + self.pick(5) as i64)))
            }
            op => Expr::Arith(op, a, Box::new(self.index(depth - 1))),
        }
    }

    fn flag(&mut self) -> Expr {
        let op = Compare::ALL[self.pick(6)];
        self.index(2).compare(op, self.index(2))
    }

    fn f32(&mut self, lanes: u16, depth: usize) -> Expr {
        if depth == 0 {
            return self.leaf(lanes);
        }
        let less = depth - 1;
        match self.pick(12) {
            0 | 1 => self.leaf(lanes),
            2 | 3 => {
                let ops = [Arith::Add, Arith::Sub, Arith::Mul, Arith::Div, Arith::Min, Arith::Max];
                let op = ops[self.pick(6)];
                Expr::Arith(op, Box::new(self.f32(lanes, less)), Box::new(self.f32(lanes, less)))
            }
            4 => self.f32(lanes, less).fma(self.f32(lanes, less), self.f32(lanes, less)),
            5 => {
                let op = Unary::ALL[self.pick(Unary::ALL.len())];
                self.f32(lanes, less).unary(op)
            }
            6 => {
                let cond = if self.pick(2) == 0 {
                    self.flag()
                } else {
                    let op = Compare::ALL[self.pick(6)];
                    self.f32(lanes, less).compare(op, self.f32(lanes, less))
                };
                cond.select(self.f32(lanes, less), self.f32(lanes, less))
            }
            7 => Expr::Splat { value: Box::new(self.f32(1, less)), times: lanes },
            8 => {
                let start = self.pick(8) as u16;
                self.f32(8, less).lanes(start, lanes)
            }
            9 => {
                let kind = [Reduction::Sum, Reduction::Max][self.pick(2)];
                self.f32(16, less).reduce(kind).splat(lanes)
            }
            10 => {
                let a = self.f32(lanes * 2, 0).cast(DType::BF16);
                let b = self.f32(lanes * 2, 0).cast(DType::BF16);
                self.f32(lanes, less).dot_bf16(a, b)
            }
            _ => {
                let dtype = DTYPES[self.pick(4)];
                self.f32(lanes, less).cast(dtype).cast(DType::F32)
            }
        }
    }

    fn leaf(&mut self, lanes: u16) -> Expr {
        let fits: Vec<Expr> =
            self.vectors.iter().filter(|(_, ty)| *ty == Type::f32(lanes)).map(|(v, _)| v.clone()).collect();
        match self.pick(6) {
            0 => {
                let numbers = [0.0, -0.0, 1.5, -1e-30, f64::INFINITY, f64::NEG_INFINITY, 0.1, 3e38];
                Expr::f32(numbers[self.pick(8)], lanes)
            }
            1 if !fits.is_empty() => fits[self.pick(fits.len())].clone(),
            2 if lanes == 8 && !self.regs.is_empty() => {
                let which = self.pick(self.regs.len());
                let index = [self.small(), self.small()];
                self.builder.get(self.regs[which], &index)
            }
            3 => Expr::Iota { lanes }.cast(DType::F32),
            4 if lanes == 1 => {
                let position = Expr::Const { value: 3.0, ty: Type::Vector { dtype: DType::I32, lanes: 1 } };
                let index = if self.pick(2) == 0 { self.index(2) } else { position.index() };
                index.cast(DType::F32)
            }
            _ => {
                let dtype = self.pick(4);
                let buffer = [self.read, self.read, self.read, self.write, self.local][self.pick(5)][dtype];
                let index = self.element();
                let load = self.builder.load(buffer, &index, lanes.min(16));
                let load = if dtype == 0 { load } else { load.cast(DType::F32) };
                if lanes > 16 { load.splat(lanes / 16) } else { load }
            }
        }
    }
}

// Mutated texts.

/// Pieces that make a mutation hit deeper than the lexer.
const PIECES: [&str; 24] = [
    "%x",
    "%t",
    "[",
    "]",
    "(",
    ")",
    "{",
    "}",
    "load ",
    " : f32",
    "x16",
    "-",
    "..",
    " step 2",
    "0",
    "9223372036854775807",
    "f32(nan)",
    "T",
    "barrier\n",
    "// ",
    "\"",
    "é",
    "%",
    "index",
];

fn mutated_texts(files: &[PathBuf]) -> Result<(), Failed> {
    let texts: Vec<String> = files.iter().map(fs::read_to_string).collect::<Result<_, _>>()?;
    let edit = (any::<prop::sample::Index>(), 0usize..12, 0..PIECES.len());
    let strategy = (0..texts.len(), prop::collection::vec(edit, 1..6));
    let mut runner =
        TestRunner::new_with_rng(Config { failure_persistence: None, ..Config::with_cases(5000) }, seed(2));
    let outcome = runner.run(&strategy, |(which, edits)| {
        let mut chars: Vec<char> = texts[which].chars().collect();
        for (at, cut, piece) in edits {
            let at = at.index(chars.len() + 1);
            let end = (at + cut).min(chars.len());
            // Half of the edits only cut.
            let piece = if cut % 2 == 0 { PIECES[piece] } else { "" };
            chars.splice(at..end, piece.chars());
        }
        let text: String = chars.into_iter().collect();
        let Ok(kernels) = parse(&text) else { return Ok(()) };
        for kernel in kernels.iter().filter(|kernel| verify(kernel).is_ok()) {
            let printed = kernel.to_string();
            let again = parse(&printed).map_err(|e| TestCaseError::fail(format!("{e}\n{printed}")))?;
            prop_assert_eq!(again[0].to_string(), printed);
            let symbols: [i64; MAX_SYMBOLS] = kernel.symbols.max();
            let small = kernel.buffers.iter().all(|b| {
                let extents = b.shape.iter().map(|d| d.eval(&symbols));
                extents.zip(&b.strides).map(|(extent, &stride)| extent as f64 * stride as f64).sum::<f64>()
                    < 1e6
            });
            if small {
                let _ = run_at_largest(kernel);
            }
        }
        Ok(())
    });
    outcome.map_err(|e| e.to_string().into())
}
