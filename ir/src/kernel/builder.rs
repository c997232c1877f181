//! Kernels written by families.

use super::{Buffer, BufferId, Expr, Kernel, RegFile, RegId, Space, Stmt, Type, Var, VarId, row_major};
use crate::dim::{Dim, Symbols};
use crate::dtype::DType;
use crate::graph::Family;

/// Writes a kernel statement by statement. Names are made unique as they come.
///
/// # Panics
///
/// Methods panic on misuse by a family's own code; kernels from text go through the parser and verifier.
#[derive(Clone, Debug)]
pub struct Builder {
    pub(super) kernel: Kernel,
    /// The block being written, innermost last.
    blocks: Vec<Vec<Stmt>>,
}

impl Builder {
    /// An empty kernel.
    pub fn new(name: &str, family: Family, schedule: String, symbols: Symbols) -> Builder {
        let kernel = Kernel {
            name: name.to_string(),
            family,
            schedule,
            threads: 1,
            symbols,
            buffers: Vec::new(),
            mbarriers: Vec::new(),
            maps: Vec::new(),
            vars: Vec::new(),
            regs: Vec::new(),
            body: Vec::new(),
        };
        Builder { kernel, blocks: vec![Vec::new()] }
    }

    /// Ends the kernel.
    pub fn finish(mut self) -> Kernel {
        self.kernel.body = self.blocks.pop().expect("the outermost block");
        assert!(self.blocks.is_empty(), "a block was left open");
        self.kernel
    }

    /// The kernel so far, for its types.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    pub(super) fn unique(&self, name: &str) -> String {
        let taken = |n: &str| {
            self.kernel.vars.iter().any(|v| v.name == n)
                || self.kernel.regs.iter().any(|r| r.name == n)
                || self.kernel.buffers.iter().any(|b| b.name == n)
                || self.kernel.mbarriers.iter().any(|m| m.name == n)
                || self.kernel.maps.iter().any(|m| m.name == n)
        };
        if !taken(name) {
            return name.to_string();
        }
        (1..).map(|i| format!("{name}.{i}")).find(|n| !taken(n)).expect("numbers do not end")
    }

    pub(super) fn push(&mut self, stmt: Stmt) {
        self.blocks.last_mut().expect("an open block").push(stmt);
    }

    /// Opens a block; what follows is written into it.
    pub fn open(&mut self) {
        self.blocks.push(Vec::new());
    }

    /// Ends the block and takes it out.
    pub fn close(&mut self) -> Vec<Stmt> {
        assert!(self.blocks.len() > 1, "no block is open");
        self.blocks.pop().expect("just counted")
    }

    /// Names a loop variable and opens the loop's body.
    pub fn open_loop(&mut self, name: &str) -> VarId {
        let var = self.var(name, Type::Index);
        self.open();
        var
    }

    /// Ends the body of `for var in lo..hi step step`.
    pub fn close_for(&mut self, var: VarId, lo: Expr, hi: Expr, step: i64) {
        let body = self.close();
        self.push(Stmt::For { var, lo, hi, step, body });
    }

    /// Ends the body of `unroll var in 0..count`.
    pub fn close_unroll(&mut self, var: VarId, count: usize) {
        let body = self.close();
        self.push(Stmt::Unroll { var, count: count as i64, body });
    }

    /// Ends the body of `parallel var in 0..count`.
    pub fn close_parallel(&mut self, var: VarId, count: Expr) {
        let body = self.close();
        self.push(Stmt::Parallel { var, count, body });
    }

    /// Runs one of two blocks that were closed before.
    pub fn if_else(&mut self, cond: Expr, then: Vec<Stmt>, otherwise: Vec<Stmt>) {
        self.push(Stmt::If { cond, then, otherwise });
    }

    fn var(&mut self, name: &str, ty: Type) -> VarId {
        let name = self.unique(name);
        self.kernel.vars.push(Var { name, ty });
        VarId(self.kernel.vars.len() as u32 - 1)
    }

    /// Adds a buffer; `strides` of `None` are row-major.
    pub fn buffer(
        &mut self,
        name: &str,
        space: Space,
        dtype: DType,
        shape: &[Dim],
        strides: Option<Vec<i64>>,
    ) -> BufferId {
        let strides = strides.unwrap_or_else(|| row_major(shape));
        let name = self.unique(name);
        self.kernel.buffers.push(Buffer { name, space, dtype, shape: shape.to_vec(), strides });
        BufferId(self.kernel.buffers.len() as u32 - 1)
    }

    /// Adds a per-worker buffer of constant shape.
    pub fn local(&mut self, name: &str, dtype: DType, shape: &[usize]) -> BufferId {
        let shape: Vec<Dim> = shape.iter().map(|&n| n.into()).collect();
        self.buffer(name, Space::Local, dtype, &shape, None)
    }

    /// Makes a worker of so many threads.
    pub fn threads(&mut self, threads: usize) {
        self.kernel.threads = threads as u16;
    }

    /// Adds shared memory of constant shape with `pitch` elements from one index of the last axis but one to the next.
    pub fn shared(&mut self, name: &str, dtype: DType, shape: &[usize], pitch: usize) -> BufferId {
        let dims: Vec<Dim> = shape.iter().map(|&n| n.into()).collect();
        let mut strides = vec![1i64; shape.len()];
        for axis in (0..shape.len().saturating_sub(1)).rev() {
            let inner =
                if axis + 2 == shape.len() { pitch } else { shape[axis + 1] * strides[axis + 1] as usize };
            strides[axis] = inner as i64;
        }
        self.buffer(name, Space::Shared, dtype, &dims, Some(strides))
    }

    /// Adds swizzled memory: `[..., panel, row, column]` with rows of 128 bytes.
    pub fn swizzled(&mut self, name: &str, dtype: DType, shape: &[usize]) -> BufferId {
        let shape: Vec<Dim> = shape.iter().map(|&n| n.into()).collect();
        self.buffer(name, Space::Swizzled, dtype, &shape, None)
    }

    /// Names a value.
    pub fn let_(&mut self, name: &str, value: Expr) -> Expr {
        if matches!(value, Expr::Int(_) | Expr::Var(_) | Expr::Sym(_)) {
            return value; // It has a name, or needs none.
        }
        let ty = self.kernel.type_of(&value);
        let var = self.var(name, ty);
        self.push(Stmt::Let { var, value });
        Expr::Var(var)
    }

    /// Declares registers.
    pub fn reg(&mut self, name: &str, ty: Type, dims: &[usize], init: Option<Expr>) -> RegId {
        let name = self.unique(name);
        let dims = dims.iter().map(|&d| d as u16).collect();
        self.kernel.regs.push(RegFile { name, ty, dims });
        let reg = RegId(self.kernel.regs.len() as u32 - 1);
        self.push(Stmt::Reg { reg, init });
        reg
    }

    /// Reads a register.
    pub fn get(&self, reg: RegId, index: &[Expr]) -> Expr {
        Expr::Reg { reg, index: index.to_vec() }
    }

    /// Writes a register.
    pub fn set(&mut self, reg: RegId, index: &[Expr], value: Expr) {
        self.push(Stmt::Set { reg, index: index.to_vec(), value });
    }

    /// Consecutive elements from memory.
    pub fn load(&self, buffer: BufferId, index: &[Expr], lanes: u16) -> Expr {
        Expr::Load { buffer, index: index.to_vec(), lanes }
    }

    /// Writes consecutive elements, rounded to the buffer's dtype.
    pub fn store(&mut self, buffer: BufferId, index: &[Expr], value: Expr) {
        let dtype = self.kernel[buffer].dtype;
        let is = self.kernel.type_of(&value);
        let same = matches!(is, Type::Vector { dtype: d, .. } if d == dtype);
        let value = if same { value } else { value.cast(dtype) };
        self.push(Stmt::Store { buffer, index: index.to_vec(), value });
    }

    /// Asks for a cache line early.
    pub fn prefetch(&mut self, buffer: BufferId, index: &[Expr]) {
        self.push(Stmt::Prefetch { buffer, index: index.to_vec() });
    }

    /// `for name in lo..hi step s`; nothing for a loop that surely has no iteration.
    pub fn for_(
        &mut self,
        name: &str,
        lo: impl Into<Expr>,
        hi: impl Into<Expr>,
        step: i64,
        body: impl FnOnce(&mut Builder, Expr),
    ) {
        let (lo, hi) = (lo.into(), hi.into());
        if matches!((&lo, &hi), (Expr::Int(lo), Expr::Int(hi)) if lo >= hi) {
            return;
        }
        let var = self.open_loop(name);
        body(self, Expr::Var(var));
        self.close_for(var, lo, hi, step);
    }

    /// Copies of a body; one copy needs no loop.
    pub fn unroll(&mut self, name: &str, count: usize, body: impl FnOnce(&mut Builder, Expr)) {
        if count == 1 {
            return body(self, Expr::Int(0));
        }
        let var = self.open_loop(name);
        body(self, Expr::Var(var));
        self.close_unroll(var, count);
    }

    /// A loop split over the workers.
    pub fn parallel(&mut self, name: &str, count: impl Into<Expr>, body: impl FnOnce(&mut Builder, Expr)) {
        let var = self.open_loop(name);
        body(self, Expr::Var(var));
        self.close_parallel(var, count.into());
    }

    /// Runs the body where the flag holds.
    pub fn if_(&mut self, cond: Expr, then: impl FnOnce(&mut Builder)) {
        self.open();
        then(self);
        let then = self.close();
        self.if_else(cond, then, Vec::new());
    }

    /// Waits for all threads of the worker.
    pub fn sync(&mut self) {
        self.push(Stmt::Sync);
    }

    /// Matrices from shared memory. See [`Expr::Matrix`].
    pub fn matrix(&self, buffer: BufferId, index: &[Expr], matrices: u16, trans: bool) -> Expr {
        Expr::Matrix { buffer, index: index.to_vec(), matrices, trans }
    }

    /// Begins to copy 16 bytes. See [`Stmt::Copy`].
    pub fn copy(&mut self, to: (BufferId, &[Expr]), from: (BufferId, &[Expr]), count: Expr) {
        let lanes = (16 / self.kernel[to.0].dtype.bytes(1)) as u16;
        let (at, index) = (to.1.to_vec(), from.1.to_vec());
        self.push(Stmt::Copy { to: to.0, at, from: from.0, index, lanes, count });
    }

    /// Ends a group of copies.
    pub fn commit(&mut self) {
        self.push(Stmt::Commit);
    }

    /// Waits for all groups of copies but the newest so many.
    pub fn wait(&mut self, newest: usize) {
        self.push(Stmt::Wait(newest as u16));
    }

    /// Waits for all workers.
    pub fn barrier(&mut self) {
        self.push(Stmt::Barrier);
    }
}
