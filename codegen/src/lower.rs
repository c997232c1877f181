//! Kernel IR to LLVM IR text.
//!
//! * A kernel is a function of its parameters' addresses, the context and the worker; `entry` writes the function that
//!   calls the kernels of an entry point with a barrier after each. *Taps* are functions beside it, one a launch, for who
//!   wants to look between launches; a tap has no barrier at its end: whoever calls it meets there.
//! * Registers are stack slots that LLVM's `sroa` turns into registers: `unroll` is copied out here, so each slot has a
//!   constant place.
//! * bf16 is `i16` in memory and in vectors, so that no target without the type is asked for it.
//! * No function of a library is called: [`math`](crate::math) has the vector functions, and the attribute
//!   `no-builtins` keeps loops from becoming `memset`.
//!
//! For PTX a worker is a CTA, and every thread of it runs the function: its number comes from special registers, and symbols
//! are parameters. Indices have 32 bits there, for the machine has no wider ones, and accesses the alignment that
//! `Function::multiple` finds: without it vectors would fall apart.
//!
//! The context that the run time hands over (`runtime::cpu` mirrors it; [`ABI`] is their common version):
//! `{ ptr buffers, ptr meeting, i64 workers, i64 symbols[4] }`. The meeting is lines of 64 bytes, all zero at first: how many
//! workers have arrived at a barrier (`i32`), how often all have (`i32`), and [`LOOPS`] times the workers' counters (`i64`)
//! of turns taken.
//!
//! A worker takes the turns of a `parallel` loop from its own contiguous piece, so that it streams; when that is empty, from
//! its neighbours' pieces: nobody waits for a core that is slower, or busy with something else. Which worker takes a turn
//! changes no bit.

pub(crate) mod threads;
mod vectors;
mod warpgroup;

use ir::dtype::DType;
use ir::kernel::{Access, Arith, BufferId, Expr, Kernel, RegId, Space, Stmt, Type, VarId};
use ir::op::{Compare, Reduction, Unary};
use ir::plan::{Entry, Launch, Plan};
use std::collections::{BTreeSet, HashMap};
use std::fmt::Write;

/// Version of the context's layout and of the entry points' signature.
pub const ABI: u32 = 2;

/// `parallel` loops between two barriers that have counters; further ones are split evenly.
pub const LOOPS: usize = 8;

/// Workers from whose pieces a worker takes turns, itself counted: with many, asking them all would take longer than a turn.
const NEIGHBOURS: usize = 8;

/// What the target's instructions can do, as far as lowering asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// `vdpbf16ps` and `vcvtneps2bf16`.
    pub bf16: bool,
    /// Which instruction a waiting worker executes.
    pub pause: Pause,
}

/// The instruction that eases a spinning worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// x86 `pause`.
    X86,
    /// AArch64 `yield`.
    Aarch64,
    /// None: workers are CTAs, which do not wait for each other.
    Grid,
}

/// A whole module: math functions, barrier, kernels, entry points, and their taps if they are wanted.
pub fn module(plan: &Plan, kernels: &[Kernel], features: Features, taps: bool) -> String {
    let mut out = String::new();
    let mut needs = BTreeSet::new();
    for kernel in kernels {
        out += &function(kernel, features, &mut needs);
    }
    for entry_point in &plan.entries {
        out += &entry(kernels, entry_point);
        for (number, launch) in entry_point.launches.iter().enumerate().filter(|_| taps) {
            out += &begin(&entry_point.tap(number));
            out += &call(kernels, number, launch);
            out += END;
        }
    }
    let mut head = String::from(BARRIER);
    head += match features.pause {
        Pause::X86 => {
            "declare void @llvm.x86.sse2.pause()\ndefine internal void @pause() #1 {\n  call void @llvm.x86.sse2.pause()\n  ret void\n}\n"
        }
        Pause::Aarch64 => {
            "declare void @llvm.aarch64.hint(i32)\ndefine internal void @pause() #1 {\n  call void @llvm.aarch64.hint(i32 1)\n  ret void\n}\n"
        }
        Pause::Grid => unreachable!("a grid has no entry points: nvptx writes its modules"),
    };
    head + &out + &ending(needs)
}

/// The math functions that kernels called, and the attributes of all functions.
pub(crate) fn ending(needs: BTreeSet<(Unary, u16)>) -> String {
    let math: String = needs.into_iter().map(|(op, lanes)| crate::math::function(op, lanes)).collect();
    math + ATTRIBUTES
}

/// A kernel's function in the module.
pub fn symbol(kernel: &str) -> String {
    format!("@\"k.{kernel}\"")
}

const ATTRIBUTES: &str = "
attributes #0 = { nounwind noinline \"no-builtins\" \"prefer-vector-width\"=\"512\" }
attributes #1 = { nounwind alwaysinline \"no-builtins\" \"prefer-vector-width\"=\"512\" }
";

/// Meets the other workers: the last to arrive takes the counters of the loops before back to zero and lets all go on. What
/// each stored before is seen by all after.
const BARRIER: &str = "
define internal void @barrier(ptr %ctx, i64 %loops) #0 {
  %at.workers = getelementptr i8, ptr %ctx, i64 16
  %workers = load i64, ptr %at.workers
  %at.meeting = getelementptr i8, ptr %ctx, i64 8
  %arrived = load ptr, ptr %at.meeting
  %generation = getelementptr i8, ptr %arrived, i64 64
  %counters = getelementptr i8, ptr %arrived, i64 128
  %count = trunc i64 %workers to i32
  %lines = mul i64 %workers, %loops
  %now = load atomic i32, ptr %generation acquire, align 4
  %before = atomicrmw add ptr %arrived, i32 1 acq_rel, align 4
  %mine = add i32 %before, 1
  %last = icmp eq i32 %mine, %count
  br i1 %last, label %clear, label %wait
clear:
  %line = phi i64 [ 0, %0 ], [ %following, %zero ]
  %more = icmp slt i64 %line, %lines
  br i1 %more, label %zero, label %release
zero:
  %at = getelementptr [64 x i8], ptr %counters, i64 %line
  store i64 0, ptr %at, align 8
  %following = add i64 %line, 1
  br label %clear
release:
  store atomic i32 0, ptr %arrived monotonic, align 4
  %next = add i32 %now, 1
  store atomic i32 %next, ptr %generation release, align 4
  br label %done
wait:
  call void @pause()
  %seen = load atomic i32, ptr %generation acquire, align 4
  %same = icmp eq i32 %seen, %now
  br i1 %same, label %wait, label %done
done:
  ret void
}
";

/// The function of an entry point: its launches, a barrier after each.
fn entry(kernels: &[Kernel], entry: &Entry) -> String {
    let mut out = begin(&entry.name);
    for (number, launch) in entry.launches.iter().enumerate() {
        out += &call(kernels, number, launch);
        let kernel = &kernels[launch.kernel];
        let after = kernel.body.iter().rev().take_while(|s| !matches!(s, Stmt::Barrier));
        let loops = after.filter(|s| matches!(s, Stmt::Parallel { .. })).count().min(LOOPS);
        let _ = writeln!(out, "  call void @barrier(ptr %ctx, i64 {loops})");
    }
    out + END
}

/// The head of a function that the run time calls.
fn begin(name: &str) -> String {
    format!("\ndefine void @\"{name}\"(ptr %ctx, i64 %worker) #0 {{\n  %table = load ptr, ptr %ctx\n")
}

const END: &str = "  ret void\n}\n";

/// One launch: its kernel with its buffers.
fn call(kernels: &[Kernel], number: usize, launch: &Launch) -> String {
    let (mut out, mut args) = (String::new(), String::new());
    for (position, buffer) in launch.args.iter().enumerate() {
        let name = format!("{number}.{position}");
        let _ = writeln!(out, "  %p{name} = getelementptr ptr, ptr %table, i64 {buffer}");
        let _ = writeln!(out, "  %b{name} = load ptr, ptr %p{name}");
        let _ = write!(args, "ptr %b{name}, ");
    }
    let kernel = symbol(&kernels[launch.kernel].name);
    let _ = writeln!(out, "  call void {kernel}({args}ptr %ctx, i64 %worker)");
    out
}

/// One kernel's function. Math functions that it calls are added to `needs`.
pub fn function(kernel: &Kernel, features: Features, needs: &mut BTreeSet<(Unary, u16)>) -> String {
    let awaits_grids = kernel.awaits_grids();
    let mut f = Function {
        kernel,
        features,
        needs,
        int: if features.pause == Pause::Grid { "i32" } else { "i64" },
        multiples: HashMap::new(),
        head: String::new(),
        body: String::new(),
        next: 0,
        vars: HashMap::new(),
        block: "entry".to_string(),
        loops: 0,
        awaits_grids,
        turn: "%worker".to_string(),
    };
    let grid = features.pause == Pause::Grid;
    if grid {
        f.head += GRID_WORKER;
    }
    for (number, sym) in kernel.symbols.0.iter().enumerate() {
        if sym.min != sym.max && !grid {
            let _ =
                writeln!(f.head, "  %sym{number}.at = getelementptr i8, ptr %ctx, i64 {}", 24 + 8 * number);
            let _ = writeln!(f.head, "  %sym{number} = load i64, ptr %sym{number}.at");
        }
    }
    for (number, reg) in kernel.regs.iter().enumerate() {
        for slot in 0..reg.len() {
            let _ = writeln!(f.head, "  %r{number}.{slot} = alloca {}", f.ty(reg.ty));
        }
    }
    for (number, buffer) in kernel.buffers.iter().enumerate().filter(|b| b.1.space == Space::Local) {
        let elems = extent(buffer);
        let _ = writeln!(f.head, "  %b{number} = alloca [{elems} x {}], align 64", llvm_elem(buffer.dtype));
    }
    for (id, offset) in kernel.shared_offsets() {
        let _ = writeln!(
            f.head,
            "  %b{} = getelementptr inbounds i8, ptr addrspace(3) {SHARED}, i32 {offset}",
            id.0
        );
    }
    f.make_mbarriers();
    f.stmts(&kernel.body);
    let barrier = kernel.body.iter().any(|s| matches!(s, Stmt::Barrier));
    let params: Vec<String> = kernel
        .params()
        .map(|(id, buffer)| {
            // What a barrier hands to other workers is not this function's alone, nor what grids before still write: there
            // accesses say for themselves whose they are (`Function::scope`).
            let alone = match buffer.space {
                Space::Global(Access::Read) if !awaits_grids => " noalias readonly",
                Space::Global(Access::Write | Access::ReadWrite) if !barrier && !awaits_grids => " noalias",
                Space::Global(_) | Space::Local | Space::Shared | Space::Swizzled => "",
            };
            format!("ptr{alone} %b{}, ", id.0)
        })
        .collect();
    let (params, head, body) = (params.concat(), f.head, f.body);
    if grid {
        let symbols: Vec<String> = (0..kernel.symbols.0.len()).map(|n| format!("i32 %sym{n}")).collect();
        let (name, symbols, threads) =
            (crate::nvptx::symbol(&kernel.name), symbols.join(", "), kernel.threads);
        // Left alone, ptxas spills a few bytes to fit one CTA more.
        let registers = warpgroup::registers(kernel);
        let comma = if symbols.is_empty() { "" } else { ", " };
        let params = format!("{params}{symbols}{comma}{}", warpgroup::map_params(kernel));
        let params = params.trim_end_matches(", ");
        return format!(
            "\ndefine ptx_kernel void @{name}({params}) #0 \"nvvm.reqntid\"=\"{threads}\" \"nvvm.maxnreg\"=\"{registers}\" {{\nentry:\n{head}{body}  ret void\n}}\n"
        );
    }
    let name = symbol(&kernel.name);
    format!(
        "\ndefine internal void {name}({params}ptr %ctx, i64 %worker) #0 {{\nentry:\n{head}{body}  ret void\n}}\n"
    )
}

/// A CTA's number and the number of CTAs, and a thread's number in its CTA.
const GRID_WORKER: &str = "  %worker = call i32 @llvm.nvvm.read.ptx.sreg.ctaid.x()
  %workers = call i32 @llvm.nvvm.read.ptx.sreg.nctaid.x()
  %thread = call i32 @llvm.nvvm.read.ptx.sreg.tid.x()
";

/// Registers of an SM, which all GPUs from 8.0 on have.
const REGISTERS: u32 = 1 << 16;

/// The shared memory of a CTA, whose size the launch says.
const SHARED: &str = "@smem";

/// The declaration of [`SHARED`].
pub(crate) fn declare_shared(kernels: &[Kernel]) -> String {
    // The rows among which chunks are swizzled begin at multiples of 1,024.
    let swizzled = kernels.iter().flat_map(|k| &k.buffers).any(|b| b.space == Space::Swizzled);
    format!("{SHARED} = external addrspace(3) global [0 x i8], align {}\n", if swizzled { 1024 } else { 128 })
}

/// Elements of a buffer of constant shape.
fn extent(buffer: &ir::kernel::Buffer) -> i64 {
    let last = buffer.shape.iter().zip(&buffer.strides);
    1 + last.map(|(d, s)| (d.constant().expect("locals are of constant shape") - 1) * s).sum::<i64>()
}

/// An element in memory and in vectors.
fn llvm_elem(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "double",
        DType::F32 => "float",
        DType::BF16 => "i16",
        DType::F16 => "half",
        DType::I32 => "i32",
        DType::I8 | DType::U8 => "i8",
        DType::Bool => "i1",
        DType::Block(_) => panic!("block formats have no vectors"),
    }
}

fn vector(elem: &str, lanes: u16) -> String {
    if lanes == 1 { elem.to_string() } else { format!("<{lanes} x {elem}>") }
}

struct Function<'a> {
    kernel: &'a Kernel,
    features: Features,
    needs: &'a mut BTreeSet<(Unary, u16)>,
    /// The type of an index.
    int: &'static str,
    /// What each value that is an index is surely a multiple of.
    multiples: HashMap<VarId, u64>,
    /// Stack slots and symbols.
    head: String,
    body: String,
    next: usize,
    /// `parallel` loops since the last barrier.
    loops: usize,
    /// Does it wait for the grids before it?
    awaits_grids: bool,
    /// The first turn that this CTA takes of the next of them.
    turn: String,
    /// What each value is now: a name, or a number where a loop was copied out.
    vars: HashMap<VarId, String>,
    block: String,
}

impl Function<'_> {
    fn fresh(&mut self) -> String {
        self.next += 1;
        format!("%v{}", self.next - 1)
    }

    /// Writes `%v = text` and gives `%v`.
    fn emit(&mut self, text: String) -> String {
        let name = self.fresh();
        let _ = writeln!(self.body, "  {name} = {text}");
        name
    }

    fn line(&mut self, text: &str) {
        let _ = writeln!(self.body, "  {text}");
    }

    fn label(&mut self) -> String {
        self.next += 1;
        format!("l{}", self.next - 1)
    }

    fn begin(&mut self, label: &str) {
        let _ = writeln!(self.body, "{label}:");
        self.block = label.to_string();
    }

    fn type_of(&self, expr: &Expr) -> Type {
        self.kernel.type_of(expr)
    }

    fn ty(&self, ty: Type) -> String {
        match ty {
            Type::Index => self.int.to_string(),
            Type::Flag => "i1".to_string(),
            Type::Vector { dtype, lanes } => vector(llvm_elem(dtype), lanes),
        }
    }

    // Statements.

    fn stmts(&mut self, stmts: &[Stmt]) {
        for stmt in stmts {
            self.stmt(stmt);
        }
    }

    fn stmt(&mut self, stmt: &Stmt) {
        match stmt {
            Stmt::Let { var, value } => {
                let multiple = self.multiple(value);
                self.multiples.insert(*var, multiple);
                let value = self.expr(value);
                self.vars.insert(*var, value);
            }
            Stmt::Reg { reg, init } => {
                let Some(init) = init else { return };
                let (value, ty) = (self.expr(init), self.ty(self.kernel[*reg].ty));
                for slot in 0..self.kernel[*reg].len() {
                    self.line(&format!("store {ty} {value}, ptr %r{}.{slot}", reg.0));
                }
            }
            Stmt::Set { reg, index, value } => {
                let (value, ty) = (self.expr(value), self.ty(self.kernel[*reg].ty));
                let slot = self.slot(*reg, index);
                self.line(&format!("store {ty} {value}, ptr {slot}"));
            }
            Stmt::Store { buffer, index, value } => self.store(*buffer, index, value),
            // The intrinsic does not select on every GPU, and nothing there asks for it.
            Stmt::Prefetch { .. } if self.features.pause == Pause::Grid => {}
            Stmt::Prefetch { buffer, index } => {
                let at = self.address(*buffer, index);
                self.line(&format!("call void @llvm.prefetch.p0(ptr {at}, i32 0, i32 2, i32 1)"));
            }
            Stmt::For { var, lo, hi, step, body } => {
                let multiple = gcd(self.multiple(lo), *step as u64);
                self.multiples.insert(*var, multiple);
                let (lo, hi) = (self.expr(lo), self.expr(hi));
                self.looped(*var, &lo, &hi, &step.to_string(), body);
            }
            Stmt::Unroll { var, count, body } => {
                for i in 0..*count {
                    self.vars.insert(*var, i.to_string());
                    self.stmts(body);
                }
            }
            Stmt::Parallel { var, count, body } => {
                let count = self.expr(count);
                if self.features.pause == Pause::Grid {
                    return self.turns(*var, &count, body);
                }
                let at = self.emit("getelementptr i8, ptr %ctx, i64 16".to_string());
                let workers = self.emit(format!("load i64, ptr {at}"));
                if self.loops == LOOPS {
                    let [lo, hi] = self.piece(&count, "%worker", &workers);
                    self.looped(*var, &lo, &hi, "1", body);
                    return;
                }
                self.shared_out(*var, &count, &workers, body);
                self.loops += 1;
            }
            Stmt::If { cond, then, otherwise } => {
                let cond = self.expr(cond);
                let (yes, no, end) = (self.label(), self.label(), self.label());
                self.line(&format!("br i1 {cond}, label %{yes}, label %{no}"));
                // Groups of threads have loops over turns of their own.
                let turn = self.turn.clone();
                for (label, body) in [(yes, then), (no, otherwise)] {
                    self.begin(&label);
                    self.turn.clone_from(&turn);
                    self.stmts(body);
                    self.line(&format!("br label %{end}"));
                }
                self.turn = turn;
                self.begin(&end);
            }
            Stmt::Barrier => {
                self.line(&format!("call void @barrier(ptr %ctx, i64 {})", self.loops));
                self.loops = 0;
            }
            Stmt::Sync => self.line("call void @llvm.nvvm.barrier.cta.sync.aligned.all(i32 0)"),
            Stmt::Copy { to, at, from, index, lanes: _, count } => {
                self.copy((*to, at), (*from, index), count)
            }
            Stmt::Commit => self.line("call void @llvm.nvvm.cp.async.commit.group()"),
            Stmt::Wait(newest) => {
                self.line(&format!("call void @llvm.nvvm.cp.async.wait.group(i32 {newest})"));
            }
            Stmt::Warpgroup(stmt) => self.warpgroup(stmt),
        }
    }

    /// The piece of a worker's own: from `count * worker / workers` on.
    fn piece(&mut self, count: &str, worker: &str, workers: &str) -> [String; 2] {
        let begin = self.emit(format!("mul i64 {count}, {worker}"));
        let end = self.emit(format!("add i64 {begin}, {count}"));
        [begin, end].map(|at| self.emit(format!("udiv i64 {at}, {workers}")))
    }

    /// A loop over this worker's piece and its neighbours', around a loop that takes turns while a piece has any.
    fn shared_out(&mut self, var: VarId, count: &str, workers: &str, body: &[Stmt]) {
        let [head, neighbour, take, inside, next, end] = [(); 6].map(|()| self.label());
        let (distance, following) = (self.fresh(), self.fresh());
        let at = self.emit("getelementptr i8, ptr %ctx, i64 8".to_string());
        let meeting = self.emit(format!("load ptr, ptr {at}"));
        let asked = self.emit(format!("call i64 @llvm.umin.i64(i64 {workers}, i64 {NEIGHBOURS})"));
        let before = self.block.clone();
        self.line(&format!("br label %{head}"));
        self.begin(&head);
        self.line(&format!("{distance} = phi i64 [ 0, %{before} ], [ {following}, %{next} ]"));
        let more = self.emit(format!("icmp slt i64 {distance}, {asked}"));
        self.line(&format!("br i1 {more}, label %{neighbour}, label %{end}"));

        self.begin(&neighbour);
        let around = self.emit(format!("add i64 %worker, {distance}"));
        let owner = self.emit(format!("urem i64 {around}, {workers}"));
        let [lo, hi] = self.piece(count, &owner, workers);
        let turns = self.emit(format!("sub i64 {hi}, {lo}"));
        let first = self.emit(format!("mul i64 {workers}, {}", self.loops));
        let line = self.emit(format!("add i64 {first}, {owner}"));
        let line = self.emit(format!("add i64 {line}, 2"));
        let counter = self.emit(format!("getelementptr [64 x i8], ptr {meeting}, i64 {line}"));
        self.line(&format!("br label %{take}"));

        self.begin(&take);
        let taken = self.emit(format!("atomicrmw add ptr {counter}, i64 1 monotonic, align 8"));
        let left = self.emit(format!("icmp slt i64 {taken}, {turns}"));
        self.line(&format!("br i1 {left}, label %{inside}, label %{next}"));
        self.begin(&inside);
        let turn = self.emit(format!("add i64 {lo}, {taken}"));
        self.vars.insert(var, turn);
        self.stmts(body);
        self.line(&format!("br label %{take}"));

        self.begin(&next);
        self.line(&format!("{following} = add i64 {distance}, 1"));
        self.line(&format!("br label %{head}"));
        self.begin(&end);
    }

    /// A loop; gives what its variable is behind it.
    fn looped(&mut self, var: VarId, lo: &str, hi: &str, step: &str, body: &[Stmt]) -> String {
        let (head, inside, end) = (self.label(), self.label(), self.label());
        let (i, next) = (self.fresh(), self.fresh());
        let before = self.block.clone();
        self.line(&format!("br label %{head}"));
        self.begin(&head);
        // The last block of the body is only known after it: the phi names it by a block of its own.
        let latch = self.label();
        let int = self.int;
        self.line(&format!("{i} = phi {int} [ {lo}, %{before} ], [ {next}, %{latch} ]"));
        let more = self.emit(format!("icmp slt {int} {i}, {hi}"));
        self.line(&format!("br i1 {more}, label %{inside}, label %{end}"));
        self.begin(&inside);
        self.vars.insert(var, i.clone());
        self.stmts(body);
        self.line(&format!("br label %{latch}"));
        self.begin(&latch);
        self.line(&format!("{next} = add nsw {int} {i}, {step}"));
        self.line(&format!("br label %{head}"));
        self.begin(&end);
        i
    }

    fn store(&mut self, buffer: BufferId, index: &[Expr], value: &Expr) {
        let dtype = self.kernel[buffer].dtype;
        let lanes = self.type_of(value).lanes();
        let mut value = self.expr(value);
        let at = self.address(buffer, index);
        let mut elem = llvm_elem(dtype);
        if dtype == DType::Bool {
            value = self.emit(format!("zext {} {value} to {}", vector("i1", lanes), vector("i8", lanes)));
            elem = "i8";
        }
        let (pointer, align) = (self.pointer(buffer), self.align(buffer, index, lanes));
        let scope = self.scope(buffer);
        self.line(&format!("store {} {value}, {pointer} {at}, align {align}{scope}", vector(elem, lanes)));
    }

    /// The type of a buffer's address.
    fn pointer(&self, buffer: BufferId) -> &'static str {
        match self.kernel[buffer].space {
            Space::Shared | Space::Swizzled => "ptr addrspace(3)",
            Space::Global(_) | Space::Local => "ptr",
        }
    }

    fn address(&mut self, buffer: BufferId, index: &[Expr]) -> String {
        if self.kernel[buffer].space == Space::Swizzled {
            return self.swizzled_address(buffer, index);
        }
        self.address_of(buffer, index, "getelementptr inbounds")
    }

    /// The address of an element that is in the buffer if it is used, by the given instruction.
    fn address_of(&mut self, buffer: BufferId, index: &[Expr], instruction: &str) -> String {
        let kernel = self.kernel;
        let mut offset = "0".to_string();
        for (expr, stride) in index.iter().zip(&kernel[buffer].strides) {
            let mut term = self.expr(expr);
            if *stride != 1 && term != "0" {
                term = self.emit(format!("mul nsw {} {term}, {stride}", self.int));
            }
            offset = match (offset.as_str(), term.as_str()) {
                ("0", _) => term,
                (_, "0") => offset,
                _ => self.emit(format!("add nsw {} {offset}, {term}", self.int)),
            };
        }
        let elem = match kernel[buffer].dtype {
            DType::Bool => "i8",
            dtype => llvm_elem(dtype),
        };
        let (pointer, int) = (self.pointer(buffer), self.int);
        self.emit(format!("{instruction} {elem}, {pointer} %b{}, {int} {offset}", buffer.0))
    }

    /// The stack slot of a register.
    fn slot(&self, reg: RegId, index: &[Expr]) -> String {
        format!("%r{}.{}", reg.0, self.slot_number(reg, index))
    }

    /// The number of a register in its file; its indices are constants by now.
    fn slot_number(&self, reg: RegId, index: &[Expr]) -> usize {
        let dims = &self.kernel[reg].dims;
        let mut slot = 0;
        for (expr, &dim) in index.iter().zip(dims) {
            let at: i64 = self.constant(expr);
            assert!(0 <= at && at < i64::from(dim), "the verifier checked register indices");
            slot = slot * i64::from(dim) + at;
        }
        slot as usize
    }

    fn constant(&self, expr: &Expr) -> i64 {
        match expr {
            Expr::Int(x) => *x,
            Expr::Var(var) => {
                self.vars[var].parse().expect("the verifier checked that register indices are constant")
            }
            Expr::Arith(op, a, b) => index_arith(*op, self.constant(a), self.constant(b)),
            other => panic!("the verifier checked that register indices are constant, this is {other:?}"),
        }
    }

    // Expressions.

    fn expr(&mut self, expr: &Expr) -> String {
        match expr {
            Expr::Int(x) => x.to_string(),
            Expr::Sym(sym) => match &self.kernel.symbols.0[sym.0 as usize] {
                fixed if fixed.min == fixed.max => fixed.min.to_string(),
                _ => format!("%sym{}", sym.0),
            },
            Expr::Thread => "%thread".to_string(),
            Expr::Uniform(a) => {
                let a = self.expr(a);
                self.emit(format!("call i32 @llvm.nvvm.shfl.sync.idx.i32(i32 -1, i32 {a}, i32 0, i32 31)"))
            }
            Expr::Var(var) => self.vars[var].clone(),
            Expr::Const { value, ty } => literal(*value, *ty),
            Expr::Reg { reg, index } => {
                let slot = self.slot(*reg, index);
                self.emit(format!("load {}, ptr {slot}", self.ty(self.kernel[*reg].ty)))
            }
            Expr::Load { buffer, index, lanes } => self.load(*buffer, index, *lanes),
            Expr::Arith(op, a, b) => self.arith(*op, a, b),
            Expr::Fma(a, b, c) => {
                let ty = self.ty(self.type_of(a));
                let lanes = self.type_of(a).lanes();
                let [a, b, c] = [a, b, c].map(|e| self.expr(e));
                self.emit(format!(
                    "call {ty} @llvm.fma.{}({ty} {a}, {ty} {b}, {ty} {c})",
                    suffix("f32", lanes)
                ))
            }
            Expr::Unary(op, a) => {
                let lanes = self.type_of(a).lanes();
                let a = self.expr(a);
                self.needs.insert((*op, lanes));
                let ty = vector("float", lanes);
                self.emit(format!("call {ty} {}({ty} {a})", crate::math::symbol(*op, lanes)))
            }
            Expr::Compare(op, a, b) => {
                let ty = self.type_of(a);
                let text = self.ty(ty);
                let (a, b) = (self.expr(a), self.expr(b));
                let float = matches!(ty, Type::Vector { dtype, .. } if dtype.is_float());
                let relation = match (op, float) {
                    (Compare::Eq, true) => "fcmp oeq",
                    (Compare::Ne, true) => "fcmp une",
                    (Compare::Lt, true) => "fcmp olt",
                    (Compare::Le, true) => "fcmp ole",
                    (Compare::Gt, true) => "fcmp ogt",
                    (Compare::Ge, true) => "fcmp oge",
                    (Compare::Eq, false) => "icmp eq",
                    (Compare::Ne, false) => "icmp ne",
                    (Compare::Lt, false) => "icmp slt",
                    (Compare::Le, false) => "icmp sle",
                    (Compare::Gt, false) => "icmp sgt",
                    (Compare::Ge, false) => "icmp sge",
                };
                self.emit(format!("{relation} {text} {a}, {b}"))
            }
            Expr::Select(c, a, b) => {
                let (flags, ty) = (self.ty(self.type_of(c)), self.ty(self.type_of(a)));
                let [c, a, b] = [c, a, b].map(|e| self.expr(e));
                self.emit(format!("select {flags} {c}, {ty} {a}, {ty} {b}"))
            }
            Expr::Splat { value, times } => {
                let Type::Vector { dtype, lanes } = self.type_of(value) else { panic!("verified: a vector") };
                let value = self.expr(value);
                self.repeat(dtype, lanes, &value, *times)
            }
            Expr::Lanes { value, start, lanes } => {
                let Type::Vector { dtype, lanes: has } = self.type_of(value) else {
                    panic!("verified: a vector")
                };
                let value = self.expr(value);
                self.pick(dtype, has, &value, *start, *lanes)
            }
            Expr::Iota { lanes } => {
                let numbers: Vec<String> = (0..*lanes).map(|i| format!("i32 {i}")).collect();
                if *lanes == 1 { "0".to_string() } else { format!("<{}>", numbers.join(", ")) }
            }
            Expr::Cast { value, dtype } => {
                let from = self.type_of(value);
                let value = self.expr(value);
                self.cast(&value, from, *dtype)
            }
            Expr::Index(value) => {
                let value = self.expr(value);
                if self.int == "i32" { value } else { self.emit(format!("sext i32 {value} to i64")) }
            }
            Expr::Reduce(kind, value) => {
                let Type::Vector { dtype, mut lanes } = self.type_of(value) else {
                    panic!("verified: a vector")
                };
                let mut value = self.expr(value);
                while lanes > 1 {
                    let half = lanes / 2;
                    let low = self.pick(dtype, lanes, &value, 0, half);
                    let high = self.pick(dtype, lanes, &value, half, half);
                    let op = if *kind == Reduction::Sum { Arith::Add } else { Arith::Max };
                    value = self.vector_arith(op, dtype, half, &low, &high);
                    lanes = half;
                }
                value
            }
            Expr::DotBf16(acc, a, b) => {
                let lanes = self.type_of(acc).lanes();
                let [acc, a, b] = [acc, a, b].map(|e| self.expr(e));
                self.dot_bf16(lanes, &acc, &a, &b)
            }
            Expr::Join(a, b) => self.join(a, b),
            Expr::Exp2(a) => self.exp2(a),
            Expr::Shuffle { value, mask } => self.shuffle(value, *mask),
            Expr::Matrix { buffer, index, matrices, trans } => self.matrix(*buffer, index, *matrices, *trans),
            Expr::Mma(acc, a, b) => self.mma(acc, a, b),
        }
    }

    fn load(&mut self, buffer: BufferId, index: &[Expr], lanes: u16) -> String {
        let dtype = self.kernel[buffer].dtype;
        let at = self.address(buffer, index);
        let align = self.align(buffer, index, lanes);
        if dtype == DType::Bool {
            let ty = vector("i8", lanes);
            let bytes =
                self.emit(format!("load {ty}, {} {at}, align 1{}", self.pointer(buffer), self.scope(buffer)));
            let zero = if lanes == 1 { "0" } else { "zeroinitializer" };
            return self.emit(format!("icmp ne {ty} {bytes}, {zero}"));
        }
        let pointer = self.pointer(buffer);
        let scope = self.scope(buffer);
        self.emit(format!("load {}, {pointer} {at}, align {align}{scope}", vector(llvm_elem(dtype), lanes)))
    }

    fn arith(&mut self, op: Arith, a: &Expr, b: &Expr) -> String {
        let ty = self.type_of(a);
        let (x, y) = (self.expr(a), self.expr(b));
        match ty {
            Type::Vector { dtype, lanes } => self.vector_arith(op, dtype, lanes, &x, &y),
            Type::Index | Type::Flag => {
                if let (Ok(x), Ok(y)) = (x.parse(), y.parse()) {
                    return index_arith(op, x, y).to_string();
                }
                let int = self.int;
                match op {
                    Arith::Add => self.emit(format!("add nsw {int} {x}, {y}")),
                    Arith::Sub => self.emit(format!("sub nsw {int} {x}, {y}")),
                    Arith::Mul => self.emit(format!("mul nsw {int} {x}, {y}")),
                    Arith::Min => self.emit(format!("call {int} @llvm.smin.{int}({int} {x}, {int} {y})")),
                    Arith::Max => self.emit(format!("call {int} @llvm.smax.{int}({int} {x}, {int} {y})")),
                    Arith::Div | Arith::Rem => self.floor_div(op, &x, &y),
                }
            }
        }
    }

    /// Division towards minus infinity by a positive constant.
    fn floor_div(&mut self, op: Arith, x: &str, y: &str) -> String {
        let int = self.int;
        let by: i64 = y.parse().expect("verified: a constant divisor");
        if by & (by - 1) == 0 {
            return match op {
                Arith::Div => self.emit(format!("ashr {int} {x}, {}", by.trailing_zeros())),
                _ => self.emit(format!("and {int} {x}, {}", by - 1)),
            };
        }
        let rest = self.emit(format!("srem {int} {x}, {by}"));
        let below = self.emit(format!("icmp slt {int} {rest}, 0"));
        let up = self.emit(format!("add {int} {rest}, {by}"));
        let rest = self.emit(format!("select i1 {below}, {int} {up}, {int} {rest}"));
        if op == Arith::Rem {
            return rest;
        }
        let whole = self.emit(format!("sub {int} {x}, {rest}"));
        self.emit(format!("sdiv exact {int} {whole}, {by}"))
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn index_arith(op: Arith, x: i64, y: i64) -> i64 {
    match op {
        Arith::Add => x + y,
        Arith::Sub => x - y,
        Arith::Mul => x * y,
        Arith::Div => x.div_euclid(y),
        Arith::Rem => x.rem_euclid(y),
        Arith::Min => x.min(y),
        Arith::Max => x.max(y),
    }
}

/// `v16f32`, or `f32` for one lane.
pub(crate) fn suffix(elem: &str, lanes: u16) -> String {
    if lanes == 1 { elem.to_string() } else { format!("v{lanes}{elem}") }
}

pub(crate) fn splat_int(x: i64, lanes: u16) -> String {
    if lanes == 1 { x.to_string() } else { format!("splat (i32 {x})") }
}

/// A float as LLVM writes it exactly: the bits of the double that it is.
pub(crate) fn float_bits(x: f64) -> String {
    format!("0x{:016X}", (x as f32 as f64).to_bits())
}

fn literal(value: f64, ty: Type) -> String {
    let Type::Vector { dtype, lanes } = ty else { return (value as i64).to_string() };
    let one = match dtype {
        DType::F32 | DType::F16 => float_bits(value),
        DType::BF16 => ((value as f32).to_bits() >> 16).to_string(),
        DType::Bool => (value != 0.0).to_string(),
        _ => (value as i64).to_string(),
    };
    if lanes == 1 { one } else { format!("splat ({} {one})", llvm_elem(dtype)) }
}
