//! Bulk copies between global and shared memory, of boxes of tensors and of bytes.
//!
//! Source: PTX ISA, "cp.async.bulk", "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor", "Tiled mode". A copy to shared
//! memory is known to have ended by its mbarrier, which counts the whole box, what lies outside the tensor too. A copy from
//! it is, for the lane that asked, by `cp.async.bulk.wait_group`.
//!
//! Bytes move when a copy begins. Whoever could tell that from a copy that ends later touches them while nothing orders it
//! with the copy, which is reported; only when the mbarrier hears of it is chosen by seed. Global memory that a copy
//! reads counts as read when the copy begins.

use super::Fault;
use super::access::{Checked, Found, Location, PARAM_WINDOW, Reach, Run, at_lane, lanes};
use super::cluster::{self, Landing};
use super::execute::combine;
use super::mbarrier::fault;
use super::program::Step;
use super::race::{How, Proxy, Stamp};
use super::warp::Warp;
use crate::ptx::{Address, AtomicOp, Reg, Space, Tile, Type};
use crate::tensor_map::{Element, Fill, TENSOR_MAP_ALIGN, TENSOR_MAP_BYTES, TensorMap};

/// What shared memory of a box is a multiple of.
const TILE_ALIGN: u64 = 128;
/// What addresses and bytes of a copy without a map are multiples of.
const BULK_ALIGN: u64 = 16;

/// Groups of bulk copies from shared memory that a lane has asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct BulkGroups {
    /// Groups that are closed.
    closed: u32,
    /// Groups of which the lane knows that they have read their source.
    read: u32,
    /// Has the open group a copy?
    open: bool,
}

impl BulkGroups {
    /// May shared memory still be read?
    pub fn unread(&self) -> bool {
        self.open || self.read < self.closed
    }
}

/// A row of a box: where it lies in the box's bytes, and in global memory, if it does.
struct Row {
    to: usize,
    /// Address and bytes; in the row's middle, as it may begin before the tensor.
    inside: Option<(u64, usize, usize)>,
}

/// The rows of a box.
fn rows(map: &TensorMap, at: &[i32]) -> Vec<Row> {
    let size = map.dtype.bytes();
    let copied = map.copied();
    let (columns, outer) = (copied[0] as usize, &copied[1..]);
    let row = |number: usize| {
        let (mut rest, mut address, mut outside) = (number, map.base, false);
        for (dim, &count) in outer.iter().enumerate() {
            let index = rest % count as usize;
            rest /= count as usize;
            let coordinate = i64::from(at[dim + 1]) + index as i64 * i64::from(map.element_strides[dim + 1]);
            outside |= coordinate < 0 || coordinate >= map.dims[dim + 1] as i64;
            address = address.wrapping_add_signed(coordinate * map.strides[dim] as i64);
        }
        let begin = i64::from(at[0]);
        let first = begin.max(0);
        let last = (begin + columns as i64).min(map.dims[0] as i64);
        let inside = (!outside && first < last).then(|| {
            let skipped = (first - begin) as usize * size as usize;
            (address + first as u64 * size, skipped, (last - first) as usize * size as usize)
        });
        Row { to: number * columns * size as usize, inside }
    };
    (0..outer.iter().product::<u32>() as usize).map(row).collect()
}

/// The fill of elements outside the tensor, as bytes of one.
fn filling(map: &TensorMap) -> [u8; 8] {
    match (map.fill, map.dtype) {
        (Fill::Nan, Element::F16 | Element::Bf16) => 0x7FFF_u64.to_le_bytes(),
        (Fill::Nan, Element::F32) => 0x7FFF_FFFF_u64.to_le_bytes(),
        (Fill::Nan, Element::F64) => 0x7FFF_FFFF_FFFF_FFFF_u64.to_le_bytes(),
        _ => [0; 8],
    }
}

/// How a reduction takes elements.
fn type_of(element: Element) -> Type {
    match element {
        Element::U8 => Type::U8,
        Element::U16 => Type::U16,
        Element::U32 => Type::U32,
        Element::S32 => Type::S32,
        Element::U64 => Type::U64,
        Element::S64 => Type::S64,
        Element::F16 => Type::F16,
        Element::Bf16 => Type::Bf16,
        Element::F32 => Type::F32,
        Element::F64 => Type::F64,
    }
}

/// An address that must be a multiple of `align`.
fn aligned(space: Space, address: u64, align: u64) -> Result<(), Fault> {
    match address.is_multiple_of(align) {
        true => Ok(()),
        false => Err(Fault::Misaligned { space, address, align: align as u32 }),
    }
}

impl Warp {
    /// The tensor map at a generic address, and where the box begins.
    fn tile(&self, tile: &Tile, lane: u32, reach: &Reach<'_>) -> Result<(TensorMap, Vec<i32>), Box<Found>> {
        let wrong = |fault| at_lane(lane, fault);
        let address = self.wide(tile.map)[lane as usize];
        let (space, address) = match address.checked_sub(PARAM_WINDOW) {
            Some(offset) if offset < TENSOR_MAP_BYTES as u64 * 256 => (Space::Param, offset),
            _ => (Space::Global, address),
        };
        aligned(space, address, TENSOR_MAP_ALIGN).map_err(wrong)?;
        let run = Run::one(lane, address);
        let spot = reach.spot(space, run, TENSOR_MAP_BYTES as u32)?;
        let map = TensorMap::decode(reach.read(&spot, run, TENSOR_MAP_BYTES as u32)?);
        let map = map.ok_or_else(|| wrong(Fault::NoTensorMap { address }))?;
        if map.dims.len() != tile.coordinates.len() {
            let (expected, found) = (map.dims.len() as u64, tile.coordinates.len() as u64);
            return Err(wrong(Fault::Launch { what: "dims of a tensor map", expected, found }));
        }
        let coordinate = |&reg: &Reg| self.narrow(reg)[lane as usize] as i32;
        Ok((map, tile.coordinates.iter().map(coordinate).collect()))
    }

    fn lane_address(&self, address: Address, lane: u32) -> u64 {
        self.addresses(address)[lane as usize]
    }

    /// `cp.async.bulk.tensor` to shared memory.
    pub fn load_tile(
        &mut self,
        step: &Step,
        (d, tile, mbarrier, multicast): (Address, &Tile, Address, Option<Reg>),
        active: u32,
        reach: &mut Reach<'_>,
    ) -> Checked<()> {
        for lane in lanes(active) {
            let (map, at) = self.tile(tile, lane, reach)?;
            let (rank, offset) = cluster::place(reach.rank, self.lane_address(d, lane));
            aligned(Space::Shared, offset, TILE_ALIGN).map_err(|fault| at_lane(lane, fault))?;
            let size = map.dtype.bytes() as usize;
            let bytes = map.copied().iter().product::<u32>() as usize * size;
            let mut data: Vec<u8> = filling(&map)[..size].iter().copied().cycle().take(bytes).collect();
            for row in rows(&map, &at) {
                if let Some((address, skipped, len)) = row.inside {
                    let from = self.read_global(step, lane, address, len, reach)?;
                    data[row.to + skipped..][..len].copy_from_slice(from);
                }
            }
            // Chunks of 16 bytes move within the box's bytes, as these begin with 128.
            let mut swizzled = vec![0; bytes];
            for (chunk, from) in data.chunks(16).enumerate() {
                let to = map.swizzle.place(offset + 16 * chunk as u64) - offset;
                swizzled[to as usize..][..from.len()].copy_from_slice(from);
            }
            let mbarrier = self.lane_address(mbarrier, lane);
            self.land(step, lane, (rank, offset), mbarrier, multicast, &swizzled, reach)?;
        }
        Ok(())
    }

    /// `cp.async.bulk` to shared memory.
    pub fn load_bulk(
        &mut self,
        step: &Step,
        (d, a, bytes, mbarrier, multicast): (Address, Address, Reg, Address, Option<Reg>),
        active: u32,
        reach: &mut Reach<'_>,
    ) -> Checked<()> {
        for lane in lanes(active) {
            let (from, bytes) = (self.lane_address(a, lane), self.narrow(bytes)[lane as usize]);
            let (rank, offset) = cluster::place(reach.rank, self.lane_address(d, lane));
            for (space, address) in
                [(Space::Global, from), (Space::Shared, offset), (Space::Shared, u64::from(bytes))]
            {
                aligned(space, address, BULK_ALIGN).map_err(|fault| at_lane(lane, fault))?;
            }
            let data = self.read_global(step, lane, from, bytes as usize, reach)?.to_vec();
            let mbarrier = self.lane_address(mbarrier, lane);
            self.land(step, lane, (rank, offset), mbarrier, multicast, &data, reach)?;
        }
        Ok(())
    }

    fn read_global<'r>(
        &self,
        step: &Step,
        lane: u32,
        address: u64,
        bytes: usize,
        reach: &'r mut Reach<'_>,
    ) -> Checked<&'r [u8]> {
        let run = Run::one(lane, address);
        let spot = reach.spot(Space::Global, run, bytes as u32)?;
        let stamp = Some(Stamp::lane(&self.knowledge, lane));
        let how = How { proxy: Proxy::Async, stamp, pc: step.pc, ..How::default() };
        reach.watch_bytes(&spot, run, how, &self.knowledge)?;
        reach.counts.moved(Space::Global, false, bytes as u64);
        reach.read(&spot, run, bytes as u32)
    }

    /// Bytes come to shared memory, of one CTA or, with `multicast`, of those that its mask names.
    #[allow(clippy::too_many_arguments, reason = "the operands of the instruction")]
    fn land(
        &mut self,
        step: &Step,
        lane: u32,
        (rank, offset): (usize, u64),
        mbarrier: u64,
        multicast: Option<Reg>,
        data: &[u8],
        reach: &mut Reach<'_>,
    ) -> Checked<()> {
        let (mbarrier_rank, mbarrier) = cluster::place(reach.rank, mbarrier);
        aligned(Space::Shared, mbarrier, 8).map_err(|fault| at_lane(lane, fault))?;
        let mask = multicast.map_or(1 << rank, |mask| self.narrow(mask)[lane as usize] & 0xFFFF);
        reach.counts.async_copies += 1;
        for to in lanes(mask) {
            let place: Location =
                (if multicast.is_some() { to as usize } else { mbarrier_rank }, mbarrier as usize);
            let spot = |reach: &Reach<'_>, rank: u32, offset: u64, bytes: u32| {
                let run = Run::one(lane, cluster::address(rank, offset));
                reach.spot(Space::SharedCluster, run, bytes).map(|spot| (run, spot))
            };
            let (run, object) = spot(reach, place.0 as u32, mbarrier, 8)?;
            let how = How { strong: true, proxy: Proxy::FarMbarrier, pc: step.pc, ..How::default() };
            reach.watch(&object, run, 8, how, &self.knowledge)?;
            let phase = reach.cluster[place.0].mbarriers.announce(place.1, data.len() as u32);
            let phase = phase.map_err(|problem| at_lane(lane, fault(place, problem)))?;
            let (run, spot) = spot(reach, to, offset, data.len() as u32)?;
            let how = How {
                write: true,
                proxy: Proxy::Async,
                stamp: Some(Stamp::mbarrier(place.0, place.1, phase)),
                pc: step.pc,
                ..How::default()
            };
            reach.watch_bytes(&spot, run, how, &self.knowledge)?;
            reach.write(&spot, run, data)?;
            reach.counts.moved(Space::Shared, true, data.len() as u64);
            reach.landings.push(Landing {
                place,
                bytes: data.len() as u32,
                rank: reach.rank,
                warp: self.number,
                line: step.line,
            });
        }
        Ok(())
    }

    /// `cp.async.bulk.tensor` and `cp.reduce.async.bulk.tensor` from shared memory.
    pub fn store_tile(
        &mut self,
        step: &Step,
        (tile, a, reduce): (&Tile, Address, Option<AtomicOp>),
        active: u32,
        reach: &mut Reach<'_>,
    ) -> Checked<()> {
        for lane in lanes(active) {
            let (map, at) = self.tile(tile, lane, reach)?;
            let offset = self.lane_address(a, lane);
            aligned(Space::Shared, offset, TILE_ALIGN).map_err(|fault| at_lane(lane, fault))?;
            let bytes = map.copied().iter().product::<u32>() as usize * map.dtype.bytes() as usize;
            let swizzled = self.read_shared(step, lane, offset, bytes, reach)?;
            let mut data = vec![0; bytes];
            for (chunk, to) in data.chunks_mut(16).enumerate() {
                let from = map.swizzle.place(offset + 16 * chunk as u64) - offset;
                to.copy_from_slice(&swizzled[from as usize..][..to.len()]);
            }
            for row in rows(&map, &at) {
                if let Some((address, skipped, len)) = row.inside {
                    let data = &data[row.to + skipped..][..len];
                    self.write_global(step, lane, address, data, (type_of(map.dtype), reduce), reach)?;
                }
            }
        }
        Ok(())
    }

    /// `cp.async.bulk` from shared memory.
    pub fn store_bulk(
        &mut self,
        step: &Step,
        (d, a, bytes): (Address, Address, Reg),
        active: u32,
        reach: &mut Reach<'_>,
    ) -> Checked<()> {
        for lane in lanes(active) {
            let (to, bytes) = (self.lane_address(d, lane), self.narrow(bytes)[lane as usize]);
            let offset = self.lane_address(a, lane);
            for (space, address) in
                [(Space::Global, to), (Space::Shared, offset), (Space::Shared, u64::from(bytes))]
            {
                aligned(space, address, BULK_ALIGN).map_err(|fault| at_lane(lane, fault))?;
            }
            let data = self.read_shared(step, lane, offset, bytes as usize, reach)?;
            self.write_global(step, lane, to, &data, (Type::B8, None), reach)?;
        }
        Ok(())
    }

    /// What a copy of the lane's open group reads.
    fn read_shared(
        &mut self,
        step: &Step,
        lane: u32,
        offset: u64,
        bytes: usize,
        reach: &mut Reach<'_>,
    ) -> Checked<Vec<u8>> {
        let group = self.bulk(lane);
        group.open = true;
        let closed = group.closed;
        let run = Run::one(lane, offset);
        let spot = reach.spot(Space::Shared, run, bytes as u32)?;
        let stamp = Some(Stamp::bulk(&self.knowledge, lane, true, closed));
        let how = How { proxy: Proxy::Async, stamp, pc: step.pc, ..How::default() };
        reach.watch_bytes(&spot, run, how, &self.knowledge)?;
        reach.counts.moved(Space::Shared, false, bytes as u64);
        reach.counts.async_copies += 1;
        reach.read(&spot, run, bytes as u32).map(<[u8]>::to_vec)
    }

    fn write_global(
        &mut self,
        step: &Step,
        lane: u32,
        address: u64,
        data: &[u8],
        (ty, reduce): (Type, Option<AtomicOp>),
        reach: &mut Reach<'_>,
    ) -> Checked<()> {
        let run = Run::one(lane, address);
        let spot = reach.spot(Space::Global, run, data.len() as u32)?;
        let closed = self.bulk(lane).closed;
        let how = How {
            write: true,
            // A reduction is relaxed, so it may meet others.
            strong: reduce.is_some(),
            proxy: Proxy::Async,
            stamp: Some(Stamp::bulk(&self.knowledge, lane, false, closed)),
            pc: step.pc,
            ..How::default()
        };
        reach.watch_bytes(&spot, run, how, &self.knowledge)?;
        reach.counts.moved(Space::Global, true, data.len() as u64);
        let Some(op) = reduce else { return reach.write(&spot, run, data) };
        let size = (ty.bits() / 8) as usize;
        let wide = |bytes: &[u8]| {
            let mut all = [0; 8];
            all[..size].copy_from_slice(bytes);
            u64::from_le_bytes(all)
        };
        let before = reach.read(&spot, run, data.len() as u32)?;
        let sums = before.chunks(size).zip(data.chunks(size));
        let sums = sums.flat_map(|(a, b)| combine(op, ty, wide(a), wide(b)).to_le_bytes()[..size].to_vec());
        let sums: Vec<u8> = sums.collect();
        reach.write(&spot, run, &sums)
    }

    /// `cp.async.bulk.commit_group`.
    pub fn commit_bulk(&mut self, active: u32) {
        for lane in lanes(active) {
            let group = self.bulk(lane);
            group.closed += 1;
            group.open = false;
        }
    }

    /// `cp.async.bulk.wait_group`.
    pub fn wait_bulk(&mut self, active: u32, keep: u32, read: bool) {
        for lane in lanes(active) {
            let group = self.bulk(lane);
            let Some(done) = group.closed.checked_sub(keep + 1) else { continue };
            group.read = group.read.max(done + 1);
            let mut learn = |reads| {
                let stamp = Stamp::bulk(&self.knowledge, lane, reads, done);
                self.knowledge.learn_stamp(1 << lane, false, stamp);
            };
            learn(true);
            if !read {
                learn(false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor_map::Swizzle;

    #[test]
    fn boxes_are_cut_at_the_tensor() {
        let map = TensorMap {
            dtype: Element::F32,
            base: 1024,
            dims: vec![6, 3],
            strides: vec![32],
            tile: vec![4, 2],
            element_strides: vec![1, 1],
            swizzle: Swizzle::None,
            fill: Fill::Zeros,
        };
        let inside = |map: &TensorMap, at: [i32; 2]| {
            rows(map, &at).iter().map(|row| (row.to, row.inside)).collect::<Vec<_>>()
        };
        assert_eq!(inside(&map, [0, 0]), [(0, Some((1024, 0, 16))), (16, Some((1056, 0, 16)))]);
        // Two columns behind the end, one row behind the end.
        assert_eq!(inside(&map, [4, 2]), [(0, Some((1104, 0, 8))), (16, None)]);
        // One column and one row before the beginning.
        assert_eq!(inside(&map, [-1, -1]), [(0, None), (16, Some((1024, 4, 12)))]);
        assert_eq!(inside(&map, [-4, 0]), [(0, None), (16, None)]);
        // Every second row.
        let every = TensorMap { tile: vec![4, 3], element_strides: vec![1, 2], ..map };
        assert_eq!(inside(&every, [0, 0]), [(0, Some((1024, 0, 16))), (16, Some((1088, 0, 16)))]);
    }
}
