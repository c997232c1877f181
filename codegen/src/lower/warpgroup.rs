//! What warpgroups of sm_90a do, as LLVM's intrinsics and, where it has none, inline assembly.
//!
//! Three things that LLVM and ptxas would not keep of themselves (both were watched doing it):
//!
//! * The sums of a product are operands of its assembly tied to its results, so that they stay where they are; `retire` takes
//!   and gives back the sums that it completes, so that nobody uses them above it.
//! * A product needs the optimiser of LLVM's code generator: without it sums are copied, and ptxas serialises products.
//! * What shall be computed while products go on is named by `retire`. ptxas hoists the wait over arithmetic all the same,
//!   but not over a branch that depends on a value of it: the last one is compared with zero, and nothing follows from it.

use super::{Function, REGISTERS, SHARED, llvm_elem, vector};
use ir::dtype::DType;
use ir::kernel::warpgroup::{Left, MapId, MbarrierAt, MbarrierId, ROW_BYTES, Warpgroup};
use ir::kernel::{Arith, Buffer, BufferId, Expr, Kernel, RegId, Type};
use std::fmt::Write;

/// Rows of swizzled memory among which chunks are swizzled.
const SWIZZLED_ROWS: usize = 8;

/// Bits of a matrix descriptor (PTX ISA, "Matrix Descriptor Format"): the swizzle of 128 bytes; the distance of groups of eight
/// rows, in 16 bytes, above its low half.
const DESCRIPTOR: u64 = 1 << 62 | ((SWIZZLED_ROWS * ROW_BYTES / 16) as u64) << 32;

/// Registers that each thread of a kernel has when it begins.
pub(super) fn registers(kernel: &Kernel) -> u32 {
    let most = (REGISTERS / u32::from(kernel.threads)).min(255);
    // They are handed out by eights.
    if kernel.mbarriers.is_empty() { most } else { most / 8 * 8 }
}

/// `ptr byval([128 x i8]) ... %map0, `: a tensor map lies in the parameters themselves, where bulk copies read it.
pub(super) fn map_params(kernel: &Kernel) -> String {
    let one = |n| format!("ptr byval([128 x i8]) align 64 \"nvvm.grid_constant\" %map{n}, ");
    (0..kernel.maps.len()).map(one).collect()
}

impl Function<'_> {
    /// One thread makes the mbarriers, and has the tensor maps fetched; then all go on.
    pub(super) fn make_mbarriers(&mut self) {
        if self.kernel.mbarriers.is_empty() {
            return;
        }
        let (make, made) = (self.label(), self.label());
        let first = self.emit("icmp eq i32 %thread, 0".to_string());
        self.line(&format!("br i1 {first}, label %{make}, label %{made}"));
        self.begin(&make);
        let kernel = self.kernel;
        for (id, row) in (0..).map(MbarrierId).zip(&kernel.mbarriers) {
            for n in 0..row.count {
                let at = self.mbarrier(&(id, Expr::Int(n.into())));
                self.line(&format!("call void @llvm.nvvm.mbarrier.init.shared({at}, i32 {})", row.arrivals));
            }
        }
        self.line("call void @llvm.nvvm.fence.mbarrier_init.release.cluster()");
        for map in 0..kernel.maps.len() {
            // As a generic address it would be fetched under both.
            let param = self.emit(format!("addrspacecast ptr %map{map} to ptr addrspace(101)"));
            self.line(&format!("call void @llvm.nvvm.prefetch.tensormap.p101(ptr addrspace(101) {param})"));
        }
        self.line(&format!("br label %{made}"));
        self.begin(&made);
        self.line("call void @llvm.nvvm.barrier.cta.sync.aligned.all(i32 0)");
    }

    /// An mbarrier's address, with its type.
    fn mbarrier(&mut self, (id, index): &MbarrierAt) -> String {
        let (mut terms, mut bytes) = (Vec::new(), self.kernel.mbarrier_offset(*id));
        self.affine(index, 8, &mut terms, &mut bytes);
        let offset = self.sum(terms);
        let at = self.shared_at(offset, bytes);
        format!("ptr addrspace(3) {at}")
    }

    /// The address of a byte of shared memory.
    fn shared_at(&mut self, offset: Option<String>, bytes: i64) -> String {
        let base = match offset {
            Some(offset) => self.emit(format!("getelementptr i8, ptr addrspace(3) {SHARED}, i32 {offset}")),
            None => SHARED.to_string(),
        };
        self.emit(format!("getelementptr i8, ptr addrspace(3) {base}, i32 {bytes}"))
    }

    /// Adds `scale` times an index: what is constant of it apart, so that unrolled statements share the rest.
    fn affine(&mut self, expr: &Expr, scale: i64, terms: &mut Vec<(String, i64)>, constant: &mut i64) {
        match expr {
            Expr::Int(x) => *constant += scale * x,
            Expr::Arith(Arith::Add, a, b) => {
                self.affine(a, scale, terms, constant);
                self.affine(b, scale, terms, constant);
            }
            Expr::Arith(Arith::Sub, a, b) => {
                self.affine(a, scale, terms, constant);
                self.affine(b, -scale, terms, constant);
            }
            _ => {
                let value = self.expr(expr);
                match value.parse::<i64>() {
                    Ok(x) => *constant += scale * x,
                    Err(_) => terms.push((value, scale)),
                }
            }
        }
    }

    fn sum(&mut self, terms: Vec<(String, i64)>) -> Option<String> {
        let scaled = terms.into_iter().map(|(value, scale)| match scale {
            1 => value,
            _ => self.emit(format!("mul nsw i32 {value}, {scale}")),
        });
        let scaled: Vec<String> = scaled.collect();
        scaled.into_iter().reduce(|a, b| self.emit(format!("add nsw i32 {a}, {b}")))
    }

    /// Bytes from the beginning of shared memory to an element of swizzled memory, as if no chunk were swizzled: what varies, and what
    /// is constant.
    fn swizzled_bytes(&mut self, buffer: BufferId, index: &[Expr]) -> (Option<String>, i64) {
        let kernel = self.kernel;
        let begin = kernel.shared_offsets().find(|(id, _)| *id == buffer);
        let (_, mut bytes) = begin.expect("swizzled memory is shared");
        let Buffer { dtype, strides, .. } = &kernel[buffer];
        let mut terms = Vec::new();
        for (i, stride) in index.iter().zip(strides) {
            self.affine(i, stride * dtype.bytes(1) as i64, &mut terms, &mut bytes);
        }
        (self.sum(terms), bytes)
    }

    /// The address of an element of swizzled memory: the number of its chunk is xored with that of its row in eight. Constant
    /// multiples of eight rows change neither: added last, they leave the rest to be shared by unrolled accesses.
    pub(super) fn swizzled_address(&mut self, buffer: BufferId, index: &[Expr]) -> String {
        let (offset, bytes) = self.swizzled_bytes(buffer, index);
        let alike = (SWIZZLED_ROWS * ROW_BYTES) as i64;
        let inside = bytes.rem_euclid(alike);
        let linear = match offset {
            Some(offset) => self.emit(format!("add i32 {offset}, {inside}")),
            None => inside.to_string(),
        };
        let row = self.emit(format!("lshr i32 {linear}, {}", ROW_BYTES.trailing_zeros() - 4));
        let row = self.emit(format!("and i32 {row}, {}", 16 * (SWIZZLED_ROWS - 1)));
        let place = self.emit(format!("xor i32 {linear}, {row}"));
        self.shared_at(Some(place), bytes - inside)
    }

    /// A descriptor of a matrix in swizzled memory. The next columns of a transposed one lie a panel further.
    fn descriptor(&mut self, buffer: BufferId, index: &[Expr], trans: bool) -> String {
        let (offset, bytes) = self.swizzled_bytes(buffer, index);
        let Buffer { dtype, strides, .. } = &self.kernel[buffer];
        let panel = strides[strides.len() - 3] * dtype.bytes(1) as i64;
        let apart = if trans { panel / 16 } else { 1 };
        let base = format!("ptrtoint (ptr addrspace(3) {SHARED} to i32)");
        let base = match offset {
            Some(offset) => self.emit(format!("add i32 {offset}, {base}")),
            None => self.emit(format!("add i32 0, {base}")),
        };
        let sixteens = self.emit(format!("lshr i32 {base}, 4"));
        let low = self.emit(format!("add i32 {sixteens}, {}", bytes / 16 + (apart << 16)));
        let low = self.emit(format!("zext i32 {low} to i64"));
        self.emit(format!("or i64 {low}, {DESCRIPTOR}"))
    }

    /// The sums of registers from `slot` on, four each.
    fn sums(&mut self, reg: RegId, slots: std::ops::Range<usize>) -> Vec<String> {
        let mut sums = Vec::new();
        for slot in slots {
            let four = self.emit(format!("load <4 x float>, ptr %r{}.{slot}", reg.0));
            sums.extend((0..4).map(|i| self.pick(DType::F32, 4, &four, i, 1)));
        }
        sums
    }

    /// Takes the results of an assembly as the new content of registers.
    fn set_sums(&mut self, reg: RegId, slots: std::ops::Range<usize>, made: &str, ty: &str, first: usize) {
        for (number, slot) in slots.enumerate() {
            let parts: Vec<String> = (0..4)
                .map(|i| self.emit(format!("extractvalue {ty} {made}, {}", first + 4 * number + i)))
                .collect();
            let four = self.gather("float", &parts);
            self.line(&format!("store <4 x float> {four}, ptr %r{}.{slot}", reg.0));
        }
    }

    pub(super) fn warpgroup(&mut self, stmt: &Warpgroup) {
        match stmt {
            Warpgroup::Registers(count) => {
                let way = if u32::from(*count) > registers(self.kernel) { "inc" } else { "dec" };
                self.line(&format!("call void @llvm.nvvm.setmaxnreg.{way}.sync.aligned.u32(i32 {count})"));
            }
            Warpgroup::Meet { id, threads } | Warpgroup::Pass { id, threads } => {
                let way = if matches!(stmt, Warpgroup::Meet { .. }) { "sync" } else { "arrive" };
                let id = self.expr(id);
                self.line(&format!(
                    "call void @llvm.nvvm.barrier.cta.{way}.aligned.count(i32 {id}, i32 {threads})"
                ));
            }
            Warpgroup::Expect { at, bytes } => {
                let at = self.mbarrier(at);
                let name = "llvm.nvvm.mbarrier.arrive.expect.tx.scope.cta.space.cta";
                self.emit(format!("call i64 @{name}({at}, i32 {bytes})"));
            }
            Warpgroup::Arrive(at) => {
                let at = self.mbarrier(at);
                self.emit(format!("call i64 @llvm.nvvm.mbarrier.arrive.shared({at})"));
            }
            Warpgroup::Await { at, parity } => self.await_phase(at, parity),
            Warpgroup::Fetch { to, place, map, index, at } => self.fetch(*to, place, *map, index, at),
            Warpgroup::AwaitGrids => {
                // Not before the wait: so at most two grids are on the machine, and what this one must not touch is what the
                // one before does.
                self.line("call void asm sideeffect \"griddepcontrol.wait;\", \"~{memory}\"() nounwind");
                self.line("call void asm sideeffect \"griddepcontrol.launch_dependents;\", \"\"() nounwind");
            }
            Warpgroup::FenceRegisters => self.line("call void @llvm.nvvm.wgmma.fence.sync.aligned()"),
            Warpgroup::FenceAsync => self.line("call void @llvm.nvvm.fence.proxy.async.shared_cta()"),
            Warpgroup::Product { sums, index, add, left, right, place, trans } => {
                let left = self.left(left);
                let dtype = if self.kernel[*right].dtype == DType::F16 { "f16" } else { "bf16" };
                let right = self.descriptor(*right, place, *trans);
                self.product((*sums, index), *add, left, &right, dtype, *trans);
            }
            Warpgroup::Close => self.line("call void @llvm.nvvm.wgmma.commit_group.sync.aligned()"),
            Warpgroup::Retire { newest, sums, after } => self.retire(*newest, sums, after),
        }
    }

    fn await_phase(&mut self, at: &MbarrierAt, parity: &Expr) {
        let (at, parity) = (self.mbarrier(at), self.expr(parity));
        let (again, over) = (self.label(), self.label());
        self.line(&format!("br label %{again}"));
        self.begin(&again);
        let name = "llvm.nvvm.mbarrier.try.wait.parity.scope.cta.space.cta";
        let ended = self.emit(format!("call i1 @{name}({at}, i32 {parity})"));
        self.line(&format!("br i1 {ended}, label %{over}, label %{again}"));
        self.begin(&over);
    }

    fn fetch(&mut self, to: BufferId, place: &[Expr], map: MapId, index: &[Expr], at: &MbarrierAt) {
        let (offset, bytes) = self.swizzled_bytes(to, place);
        let to = self.shared_at(offset, bytes);
        let to = self.emit(format!("addrspacecast ptr addrspace(3) {to} to ptr addrspace(7)"));
        let at = self.mbarrier(at);
        // A map's dimensions go from the innermost outwards.
        let mut coordinates = String::new();
        for i in index.iter().rev() {
            let i = self.expr(i);
            let _ = write!(coordinates, "i32 {i}, ");
        }
        self.line(&format!(
            "call void @llvm.nvvm.cp.async.bulk.tensor.g2s.tile.{}d(ptr addrspace(7) {to}, {at}, ptr %map{}, {coordinates}\
             i16 0, i64 0, i1 false, i1 false, i32 0)",
            index.len(),
            map.0
        ));
    }

    /// A left operand: LLVM values with their types and constraints.
    fn left(&mut self, left: &Left) -> Vec<(&'static str, String)> {
        match left {
            Left::Shared(buffer, index) => vec![("i64", self.descriptor(*buffer, index, false))],
            Left::Registers(value) => {
                let Type::Vector { dtype, lanes } = self.type_of(value) else { panic!("verified: a vector") };
                let value = self.expr(value);
                let ty = vector(llvm_elem(dtype), lanes);
                let words = self.emit(format!("bitcast {ty} {value} to <4 x i32>"));
                (0..4).map(|i| ("i32", self.pick(DType::I32, 4, &words, i, 1))).collect()
            }
        }
    }

    fn product(
        &mut self,
        (reg, index): (RegId, &[Expr]),
        add: bool,
        left: Vec<(&'static str, String)>,
        right: &str,
        dtype: &str,
        trans: bool,
    ) {
        let blocks = usize::from(*self.kernel[reg].dims.last().expect("verified: a file"));
        let mut first: Vec<Expr> = index.to_vec();
        first.push(Expr::Int(0));
        let first = self.slot_number(reg, &first);
        let slots = first..first + blocks;
        let sums = if add { self.sums(reg, slots.clone()) } else { Vec::new() };
        let count = 4 * blocks;
        let list =
            |from: usize, n: usize| (from..from + n).map(|i| format!("${i}")).collect::<Vec<_>>().join(",");
        let from = count + sums.len();
        let registers = left.len() > 1;
        let operand = match registers {
            true => format!("{{{}}}", list(from, left.len())),
            false => format!("${from}"),
        };
        let right_at = from + left.len();
        // Signs of both operands, then which of those in shared memory are transposed.
        let flags = if registers { "1, 1" } else { "1, 1, 0" };
        let text = format!(
            "wgmma.mma_async.sync.aligned.m64n{}k16.f32.{dtype}.{dtype} {{{}}}, {operand}, ${right_at}, {}, {flags}, {};",
            8 * blocks,
            list(0, count),
            u8::from(add),
            u8::from(trans)
        );
        let tied: Vec<String> = (0..sums.len()).map(|i| format!("{i},")).collect();
        let lefts: String = left.iter().map(|(ty, _)| if *ty == "i32" { "r," } else { "l," }).collect();
        let constraints = format!("{}{}{lefts}l,~{{memory}}", "=f,".repeat(count), tied.concat());
        let mut args: Vec<String> = sums.iter().map(|x| format!("float {x}")).collect();
        args.extend(left.iter().map(|(ty, value)| format!("{ty} {value}")));
        args.push(format!("i64 {right}"));
        let (made, ty) = self.assembly(&text, &constraints, count, &args);
        self.set_sums(reg, slots, &made, &ty, 0);
    }

    fn retire(&mut self, newest: u16, sums: &[RegId], after: &[Expr]) {
        if sums.is_empty() && after.is_empty() {
            return self.line(&format!("call void @llvm.nvvm.wgmma.wait_group.sync.aligned(i64 {newest})"));
        }
        let mut held = Vec::new();
        for &reg in sums {
            held.extend(self.sums(reg, 0..self.kernel[reg].len()));
        }
        let count = held.len();
        let mut before = Vec::new();
        for value in after {
            let lanes = self.type_of(value).lanes();
            let value = self.expr(value);
            before.extend((0..lanes).map(|lane| self.pick(DType::F32, lanes, &value, lane, 1)));
        }
        let mut text = String::new();
        if !before.is_empty() {
            let last = 2 * count + before.len() - 1;
            let _ = write!(
                text,
                "{{ .reg .pred p; setp.ge.f32 p, ${last}, 0f00000000; @p bra L${{:uid}}; nanosleep.u32 0; L${{:uid}}: }} "
            );
        }
        let _ = write!(text, "wgmma.wait_group.sync.aligned {newest};");
        let tied: String = (0..count).map(|i| format!("{i},")).collect();
        let constraints = format!("{}{tied}{}~{{memory}}", "=f,".repeat(count), "f,".repeat(before.len()));
        let args: Vec<String> = held.iter().chain(&before).map(|x| format!("float {x}")).collect();
        let (made, ty) = self.assembly(&text, &constraints, count, &args);
        let mut first = 0;
        for &reg in sums {
            let slots = self.kernel[reg].len();
            self.set_sums(reg, 0..slots, &made, &ty, first);
            first += 4 * slots;
        }
    }

    /// Inline assembly with so many floats as results: their struct and its type.
    fn assembly(&mut self, text: &str, constraints: &str, count: usize, args: &[String]) -> (String, String) {
        let args = args.join(", ");
        let call = |ty: &str| {
            format!("call {ty} asm sideeffect \"{text}\", \"{constraints}\"({args}) convergent nounwind")
        };
        if count == 0 {
            self.line(&call("void"));
            return (String::new(), String::new());
        }
        let ty = format!("{{ {} }}", vec!["float"; count].join(", "));
        let made = self.emit(call(&ty));
        (made, ty)
    }
}
