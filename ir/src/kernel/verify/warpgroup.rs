//! The rules of what warpgroups do.

use super::{Checked, Ctx, Rule, bounds, operand, rank, rule, same};
use crate::dtype::DType;
use crate::kernel::warpgroup::{Left, MapId, MbarrierAt, ROW_BYTES, WARPGROUP, Warpgroup};
use crate::kernel::{Buffer, BufferId, Expr, Kernel, RegId, Space, Type, WARP, row_major_checked};

/// Axes of a tensor map.
const MAX_AXES: usize = 5;
/// Elements of a box on an axis.
const MAX_EXTENT: u16 = 256;
/// Mbarriers of a row, and arrivals of one: more than threads there cannot be.
const MAX_COUNT: i64 = 1024;
/// Registers of a thread that a warpgroup may ask for.
const REGISTERS: (i64, i64) = (24, 240);
/// Columns of a product.
const MAX_COLUMNS: i64 = 256;
/// Groups of products that may go on.
const MAX_GROUPS: i64 = 7;

/// What a kernel declares for warpgroups.
pub(super) fn declarations(kernel: &Kernel) -> Checked<()> {
    let swizzled = kernel.buffers.iter().any(|b| b.space == Space::Swizzled);
    if kernel.threads == 1 && (swizzled || !kernel.mbarriers.is_empty() || !kernel.maps.is_empty()) {
        return rule(Rule::OneThread("swizzled memory, mbarriers and maps"));
    }
    for buffer in kernel.buffers.iter().filter(|b| b.space == Space::Swizzled) {
        let last = buffer.shape.last().and_then(|dim| dim.constant()).unwrap_or(0);
        let rows = last * buffer.dtype.bytes(1) as i64 == ROW_BYTES as i64;
        let dense = row_major_checked(&buffer.shape).as_ref() == Some(&buffer.strides);
        if buffer.shape.len() < 3 || !rows || !dense {
            return rule(Rule::Swizzled(buffer.name.clone()));
        }
    }
    for row in &kernel.mbarriers {
        range("mbarriers", row.count.into(), 1, MAX_COUNT)?;
        range("arrivals", row.arrivals.into(), 1, MAX_COUNT)?;
    }
    kernel.maps.iter().try_for_each(|map| {
        let Some(buffer) = kernel.buffers.get(map.buffer.0 as usize) else { return rule(Rule::Dangling) };
        if !matches!(buffer.space, Space::Global(_)) {
            return rule(Rule::Space { name: buffer.name.clone(), expected: "global" });
        }
        rank(&buffer.name, buffer.shape.len(), map.extents.len())?;
        let wrong = |what| rule(Rule::Map { name: map.name.clone(), what });
        let bytes = buffer.dtype.bytes(1);
        if buffer.shape.is_empty() || buffer.shape.len() > MAX_AXES {
            return wrong("a tensor has 1 to 5 axes");
        }
        if map.extents.iter().any(|&n| n == 0 || n > MAX_EXTENT) {
            return wrong("a box has 1 to 256 elements on an axis");
        }
        if map.extents.last().is_some_and(|&n| usize::from(n) * bytes != ROW_BYTES) {
            return wrong("a row of a box has 128 bytes, as a row of swizzled memory");
        }
        let outer = &buffer.strides[..buffer.strides.len() - 1];
        if outer.iter().any(|&stride| (stride * bytes as i64) % 16 != 0) {
            return wrong("rows of the param do not begin at multiples of 16 bytes");
        }
        Ok(())
    })
}

fn range(what: &'static str, found: i64, least: i64, most: i64) -> Checked<()> {
    if (least..=most).contains(&found) { Ok(()) } else { rule(Rule::Range { what, found, least, most }) }
}

/// Is an index a multiple, as far as constants say?
fn multiple(what: &'static str, index: Option<i64>, of: i64) -> Checked<()> {
    match index {
        Some(at) if at % of != 0 => rule(Rule::Multiple { what, found: at, of }),
        _ => Ok(()),
    }
}

impl Ctx<'_> {
    pub(super) fn warpgroup(&self, stmt: &Warpgroup) -> Checked<()> {
        self.many("warpgroups")?;
        match stmt {
            Warpgroup::Registers(count) => {
                self.whole_groups()?;
                range("registers", (*count).into(), REGISTERS.0, REGISTERS.1)?;
                multiple("the number of registers", Some((*count).into()), 8)
            }
            Warpgroup::Meet { id, threads } | Warpgroup::Pass { id, threads } => {
                same("the number", self.whole(id)?, Type::Index)?;
                if let Some(id) = self.constant(id) {
                    range("barriers", id, 1, 15)?;
                }
                multiple("the number of threads", Some((*threads).into()), WARP.into())?;
                range("threads", (*threads).into(), WARP.into(), self.kernel.threads.into())
            }
            Warpgroup::Expect { at, bytes } => {
                self.mbarrier(at)?;
                multiple("the number of bytes", Some((*bytes).into()), 16)?;
                range("bytes", (*bytes).into(), 16, (1 << 20) - 1)
            }
            Warpgroup::Arrive(at) => self.mbarrier(at),
            Warpgroup::Await { at, parity } => {
                self.mbarrier(at)?;
                same("the parity", self.whole(parity)?, Type::Index)
            }
            Warpgroup::Fetch { to, place, map, index, at } => self.fetch(*to, place, *map, index, at),
            Warpgroup::AwaitGrids | Warpgroup::FenceAsync => Ok(()),
            Warpgroup::FenceRegisters | Warpgroup::Close => self.whole_groups(),
            Warpgroup::Product { sums, index, add: _, left, right, place, trans } => {
                self.whole_groups()?;
                let columns = self.sums(*sums, Some(index))?;
                let (dtype, rows, across) = self.operand_in(*right, place)?;
                let k = if *trans { rows } else { across };
                let n = if *trans { across } else { rows };
                multiple(if *trans { "the row" } else { "the column" }, self.constant(k), 16)?;
                multiple(if *trans { "the column" } else { "the row" }, self.constant(n), 8)?;
                let buffer = &self.kernel[*right];
                let extent = |axis: usize| {
                    buffer.shape[buffer.shape.len() - axis]
                        .constant()
                        .expect("shared memory is of constant extents")
                };
                let has = if *trans { extent(3) * extent(1) } else { extent(2) };
                if columns > has {
                    return rule(Rule::Columns { columns, has });
                }
                match left {
                    Left::Shared(buffer, index) => {
                        let (found, row, column) = self.operand_in(*buffer, index)?;
                        multiple("the row", self.constant(row), 8)?;
                        multiple("the column", self.constant(column), 16)?;
                        let ty = |dtype| Type::Vector { dtype, lanes: 1 };
                        same("the left operand", ty(found), ty(dtype))
                    }
                    Left::Registers(value) => {
                        same("the left operand", self.whole(value)?, Type::Vector { dtype, lanes: 8 })
                    }
                }
            }
            Warpgroup::Retire { newest, sums, after } => {
                self.whole_groups()?;
                range("groups", (*newest).into(), 0, MAX_GROUPS)?;
                sums.iter().try_for_each(|&reg| self.sums(reg, None).map(|_| ()))?;
                after.iter().try_for_each(|value| match self.whole(value)? {
                    Type::Vector { dtype: DType::F32, .. } => Ok(()),
                    found => operand("after", found),
                })
            }
        }
    }

    fn whole_groups(&self) -> Checked<()> {
        match self.kernel.threads.is_multiple_of(WARPGROUP) {
            true => Ok(()),
            false => rule(Rule::Warpgroups(self.kernel.threads)),
        }
    }

    fn mbarrier(&self, at: &MbarrierAt) -> Checked<()> {
        let Some(row) = self.kernel.mbarriers.get(at.0.0 as usize) else { return rule(Rule::Dangling) };
        same("the index", self.whole(&at.1)?, Type::Index)?;
        match self.constant(&at.1).filter(|_| !self.under_if) {
            Some(index) => bounds(&row.name, 0, index, 1, row.count.into()),
            None => Ok(()),
        }
    }

    /// Columns of a file of sums: of the part at an index, or of the whole.
    fn sums(&self, reg: RegId, index: Option<&Vec<Expr>>) -> Checked<i64> {
        let Some(file) = self.kernel.regs.get(reg.0 as usize) else { return rule(Rule::Dangling) };
        same("the sums", file.ty, Type::f32(4))?;
        let Some(blocks) = file.dims.last() else {
            return rule(Rule::Rank { name: file.name.clone(), axes: 0, found: 1 });
        };
        // The last axis is taken whole: its first register stands for it.
        let mut whole = index.cloned().unwrap_or_else(|| vec![Expr::Int(0); file.dims.len() - 1]);
        whole.push(Expr::Int(0));
        self.register(reg, &whole)?;
        let columns = 8 * i64::from(*blocks);
        if index.is_some() {
            range("columns", columns, 8, MAX_COLUMNS)?;
        }
        Ok(columns)
    }

    /// An operand in swizzled memory: its dtype, and the indices of row and column.
    fn operand_in<'e>(&self, buffer: BufferId, index: &'e [Expr]) -> Checked<(DType, &'e Expr, &'e Expr)> {
        let found = self.swizzled(buffer, index)?;
        if !matches!(found.dtype, DType::BF16 | DType::F16) {
            return operand("product", Type::Vector { dtype: found.dtype, lanes: 1 });
        }
        Ok((found.dtype, &index[index.len() - 2], &index[index.len() - 1]))
    }

    fn swizzled(&self, buffer: BufferId, index: &[Expr]) -> Checked<&Buffer> {
        let found = self.element(buffer, index, 1)?;
        match found.space {
            Space::Swizzled => Ok(found),
            Space::Global(_) | Space::Local | Space::Shared => {
                rule(Rule::Space { name: found.name.clone(), expected: "swizzled" })
            }
        }
    }

    fn fetch(
        &self,
        to: BufferId,
        place: &[Expr],
        map: MapId,
        index: &[Expr],
        at: &MbarrierAt,
    ) -> Checked<()> {
        let target = self.swizzled(to, place)?;
        let Some(map) = self.kernel.maps.get(map.0 as usize) else { return rule(Rule::Dangling) };
        let from = &self.kernel[map.buffer];
        rank(&map.name, map.extents.len(), index.len())?;
        index.iter().try_for_each(|i| same("the index", self.whole(i)?, Type::Index))?;
        let ty = |dtype| Type::Vector { dtype, lanes: 1 };
        same("the source", ty(from.dtype), ty(target.dtype))?;
        multiple("the row", self.constant(&place[place.len() - 2]), 8)?;
        multiple(
            "the column",
            self.constant(&place[place.len() - 1]),
            target.shape[place.len() - 1].constant().unwrap_or(1),
        )?;
        let rows = map.extents[..map.extents.len() - 1].iter().fold(1i64, |n, &e| n.saturating_mul(e.into()));
        let has = target.shape[place.len() - 2].constant().unwrap_or(0);
        if rows > has {
            return rule(Rule::Map { name: map.name.clone(), what: "a box has more rows than a panel" });
        }
        self.mbarrier(at)
    }
}
