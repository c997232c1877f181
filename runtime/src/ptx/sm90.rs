//! Instructions that sm_90 and sm_90a added, as [`Op`]s: `mbarrier`, bulk copies and tensor maps, `wgmma`, clusters.

use super::PtxError;
use super::op::*;
use super::opcode::{
    MOST_GROUPS, Mods, atomic_op, between, cache_hints, cache_policy, count, matrix_type, need, plain, pred,
    space,
};
use super::parser::{Arg, Parser};

/// The space of an address of shared memory: it may be of the cluster, or generic if nothing is said.
fn shared(m: &mut Mods<'_>) -> Result<Space, PtxError> {
    match space(m) {
        space @ (Space::Shared | Space::SharedCluster | Space::Generic) => Ok(space),
        Space::Global | Space::Param | Space::Const => Err(m.unknown()),
    }
}

/// Takes what says how far an order reaches: that of the whole cluster is what is emulated.
fn order_of_cluster(m: &mut Mods<'_>) {
    m.find(|part| matches!(part, "release" | "acquire").then_some(()));
    m.find(|part| matches!(part, "cta" | "cluster").then_some(()));
}

pub fn mbarrier<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let names = ["init", "inval", "arrive", "test_wait", "try_wait", "expect_tx", "complete_tx"];
    let Some(name) = m.find(|part| names.into_iter().find(|name| *name == part)) else {
        return Err(m.unknown());
    };
    if matches!(name, "arrive" | "test_wait" | "try_wait") {
        order_of_cluster(m);
    } else if matches!(name, "expect_tx" | "complete_tx") {
        need(m, "relaxed")?;
        m.find(|part| matches!(part, "cta" | "cluster").then_some(()));
    }
    let (expects, no_complete, parity) =
        (name == "arrive" && m.has("expect_tx"), name == "arrive" && m.has("noComplete"), m.has("parity"));
    let space = shared(m)?;
    need(m, "b64")?;
    if parity && !name.ends_with("wait") || space == Space::SharedCluster && name.starts_with("in") {
        return Err(m.unknown());
    }
    let (op, address) = match name {
        "init" => {
            count(p, args, 2)?;
            (MbarrierOp::Init(p.source(&args[1], Type::U32)?), &args[0])
        }
        "inval" => {
            count(p, args, 1)?;
            (MbarrierOp::Inval, &args[0])
        }
        "expect_tx" | "complete_tx" => {
            count(p, args, 2)?;
            let bytes = p.source(&args[1], Type::U32)?;
            let op = if name == "expect_tx" { MbarrierOp::ExpectTx } else { MbarrierOp::CompleteTx };
            (op(bytes), &args[0])
        }
        "arrive" => {
            let must = usize::from(expects || no_complete);
            between(p, args, 2 + must, 3)?;
            let state = p.reg_or_sink(&args[0], 64)?;
            if space == Space::SharedCluster && state.is_some() {
                return p.wrong_operand(&args[0], "`_`, as another CTA's mbarrier gives no state");
            }
            let last = match args.get(2) {
                Some(arg) => Some(p.source(arg, Type::U32)?),
                None => None,
            };
            let (expect, count) = if expects { (last, None) } else { (None, last) };
            (MbarrierOp::Arrive { state, expect, count, no_complete }, &args[1])
        }
        // `try_wait` may have a limit of time; it may give up at any time anyway.
        _ => {
            let block = name == "try_wait";
            between(p, args, 3, if block { 4 } else { 3 })?;
            let phase = p.source(&args[2], if parity { Type::B32 } else { Type::B64 })?;
            if let Some(limit) = args.get(3) {
                p.source(limit, Type::U32)?;
            }
            (MbarrierOp::Wait { d: p.pred(&args[0])?, phase, block }, &args[1])
        }
    };
    Ok(Op::Mbarrier { op, space, address: p.address(address)? })
}

fn tile<'t>(p: &mut Parser<'t>, arg: &Arg<'t>, dims: usize) -> Result<Tile, PtxError> {
    let Arg::Tile { map, coordinates } = arg else {
        return p.wrong_operand(arg, "`[map, {coordinates}]`");
    };
    let coordinates = p.sources(&Arg::Vector(coordinates.clone()), Type::S32, dims)?;
    Ok(Tile { map: p.source(&plain(map), Type::B64)?, coordinates })
}

/// `cp.async.bulk`, `cp.reduce.async.bulk.tensor`, `cp.async.mbarrier.arrive`.
pub fn copy<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    need(m, "async")?;
    if m.has("mbarrier") {
        need(m, "arrive")?;
        let (noinc, space) = (m.has("noinc"), shared(m)?);
        need(m, "b64")?;
        count(p, args, 1)?;
        return Ok(Op::Mbarrier {
            op: MbarrierOp::CopyArrive { noinc },
            space,
            address: p.address(&args[0])?,
        });
    }
    need(m, "bulk")?;
    if m.has("commit_group") {
        count(p, args, 0)?;
        return Ok(Op::BulkCommit);
    }
    if m.has("wait_group") {
        count(p, args, 1)?;
        return Ok(Op::BulkWait { keep: p.immediate(&args[0], MOST_GROUPS)?, read: m.has("read") });
    }
    let policy = cache_hints(m);
    let extra = usize::from(policy);
    cache_policy(p, policy, args)?;
    let dims = if m.has("tensor") {
        let dims = m.find(|part| ["1d", "2d", "3d", "4d", "5d"].iter().position(|known| *known == part));
        // `tile` is what there is if nothing is said.
        m.has("tile");
        Some(dims.ok_or_else(|| m.unknown())? + 1)
    } else {
        None
    };
    if let Some(dims) = dims
        && m.has("prefetch")
    {
        need(m, "L2")?;
        need(m, "global")?;
        count(p, args, 1 + extra)?;
        return tile(p, &args[0], dims).map(|_| Op::Hint);
    }
    need(m, "global")?;
    if m.has("bulk_group") {
        need(m, "shared::cta")?;
        let reduce = if m.has("reduce") {
            let Some(op) = m.find(atomic_op) else { return Err(m.unknown()) };
            if dims.is_none() || matches!(op, AtomicOp::Exch | AtomicOp::Cas) {
                return Err(m.unknown());
            }
            Some(op)
        } else {
            None
        };
        return match dims {
            Some(dims) => {
                count(p, args, 2 + extra)?;
                Ok(Op::TileStore { tile: tile(p, &args[0], dims)?, a: p.address(&args[1])?, reduce })
            }
            None => {
                count(p, args, 3 + extra)?;
                let (d, a) = (p.address(&args[0])?, p.address(&args[1])?);
                Ok(Op::BulkStore { d, a, bytes: p.source(&args[2], Type::U32)? })
            }
        };
    }
    if !m.has("shared::cluster") {
        need(m, "shared::cta")?;
    }
    need(m, "mbarrier::complete_tx::bytes")?;
    let cast = m.has("multicast::cluster");
    let before = if dims.is_some() { 3 } else { 4 };
    count(p, args, before + usize::from(cast) + extra)?;
    let d = p.address(&args[0])?;
    let mbarrier = p.address(&args[before - 1])?;
    let multicast = if cast { Some(p.source(&args[before], Type::B16)?) } else { None };
    match dims {
        Some(dims) => Ok(Op::TileLoad { d, tile: tile(p, &args[1], dims)?, mbarrier, multicast }),
        None => {
            let (a, bytes) = (p.address(&args[1])?, p.source(&args[2], Type::U32)?);
            Ok(Op::BulkLoad { d, a, bytes, mbarrier, multicast })
        }
    }
}

pub fn wgmma<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    need(m, "sync")?;
    need(m, "aligned")?;
    if m.has("fence") {
        count(p, args, 0)?;
        return Ok(Op::WgmmaFence);
    }
    if m.has("commit_group") {
        count(p, args, 0)?;
        return Ok(Op::WgmmaCommit);
    }
    if m.has("wait_group") {
        count(p, args, 1)?;
        return Ok(Op::WgmmaWait(p.immediate(&args[0], 7)?));
    }
    need(m, "mma_async")?;
    let satfinite = m.has("satfinite");
    let shape = m.find(|part| {
        let (n, k) = part.strip_prefix("m64n")?.split_once('k')?;
        Some((n.parse::<u32>().ok()?, k.parse::<u32>().ok()?))
    });
    // What is left: the types of D, A, B.
    let (Some((n, k)), [d, a, b]) = (shape, &m.left[..]) else { return Err(m.unknown()) };
    let (Some(a_ty), Some(b_ty)) = (matrix_type(a), matrix_type(b)) else { return Err(m.unknown()) };
    let float = matches!(a_ty, MatrixType::Bf16 | MatrixType::F16);
    // Above 32 columns integers come in steps of 16 (PTX ISA, "wgmma", "Shape and data types").
    let step = if float || n <= 32 { 8 } else { 16 };
    let fits = if float {
        k == 16 && *d == "f32" && a_ty == b_ty && !satfinite
    } else {
        k == 32 && *d == "s32" && matches!(b_ty, MatrixType::S8 | MatrixType::U8)
    };
    if !fits || n == 0 || n > 256 || !n.is_multiple_of(step) {
        return Err(m.unknown());
    }
    m.left.clear();
    let registers = matches!(args.get(1), Some(Arg::Vector(_)));
    count(
        p,
        args,
        if !float {
            4
        } else if registers {
            7
        } else {
            8
        },
    )?;
    let flag = |p: &Parser<'t>, at: usize| p.immediate(&args[at], 1).map(|value| value == 1);
    let negated = |p: &Parser<'t>, at: usize| match args[at] {
        Arg::Int(1) => Ok(false),
        Arg::Int(value) if value as i64 == -1 => Ok(true),
        _ => p.wrong_operand(&args[at], "1 or -1"),
    };
    let d = p.regs(&args[0], 32, n as usize / 2)?;
    let a = match registers {
        true => MatrixA::Registers(p.regs(&args[1], 32, 4)?),
        false => MatrixA::Shared(p.source(&args[1], Type::B64)?, float && flag(p, 6)?),
    };
    Ok(Op::Wgmma(Box::new(Wgmma {
        n,
        types: (a_ty, b_ty),
        satfinite,
        d,
        a,
        b: p.source(&args[2], Type::B64)?,
        trans_b: float && flag(p, args.len() - 1)?,
        scale_d: pred(p, &args[3])?,
        negate: if float { (negated(p, 4)?, negated(p, 5)?) } else { (false, false) },
    })))
}

pub fn set_max_registers<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let (increase, decrease) = (m.has("inc"), m.has("dec"));
    need(m, "sync")?;
    need(m, "aligned")?;
    need(m, "u32")?;
    if increase == decrease {
        return Err(m.unknown());
    }
    count(p, args, 1)?;
    match p.immediate(&args[0], 256)? {
        registers if registers >= 24 && registers.is_multiple_of(8) => {
            Ok(Op::SetMaxRegisters { increase, registers })
        }
        _ => p.wrong_operand(&args[0], "a multiple of 8 from 24 to 256"),
    }
}

pub fn elect<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    need(m, "sync")?;
    count(p, args, 2)?;
    let Arg::Pair(d, elected) = args[0] else {
        return p.wrong_operand(&args[0], "a register and a predicate, `d|p`");
    };
    let d = p.reg_or_sink(&plain(d), 32)?;
    Ok(Op::Elect { d, p: p.pred(&plain(elected))?, mask: p.source(&args[1], Type::B32)? })
}

/// `mapa`, `getctarank`.
pub fn rank<'t>(p: &mut Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let map = m.opcode.starts_with("mapa");
    let (space, ty) = (space(m), m.ty()?);
    if !matches!(ty, Type::U32 | Type::U64) || !matches!(space, Space::SharedCluster | Space::Generic) {
        return Err(m.unknown());
    }
    if map {
        count(p, args, 3)?;
        let (a, rank) = (p.source(&args[1], ty)?, p.source(&args[2], Type::U32)?);
        return Ok(Op::MapA { space, d: p.reg(&args[0], ty.bits())?, a, rank });
    }
    count(p, args, 2)?;
    Ok(Op::GetCtaRank { space, d: p.reg(&args[0], 32)?, a: p.source(&args[1], ty)? })
}

/// `griddepcontrol`.
pub fn grid_dependency<'t>(p: &Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    let waits = m.has("wait");
    if !waits {
        need(m, "launch_dependents")?;
    }
    count(p, args, 0).map(|()| if waits { Op::WaitForGrids } else { Op::Hint })
}

/// `fence.proxy.async`, `fence.mbarrier_init`.
pub fn fence(m: &mut Mods<'_>) -> Result<Op, PtxError> {
    if m.has("mbarrier_init") {
        need(m, "release")?;
        return need(m, "cluster").map(|()| Op::FenceMbarrierInit);
    }
    need(m, "proxy")?;
    need(m, "async")?;
    Ok(Op::FenceProxyAsync(m.find(|part| match part {
        "global" => Some(Space::Global),
        "shared::cta" | "shared::cluster" => Some(Space::Shared),
        _ => None,
    })))
}

/// `barrier.cluster`.
pub fn cluster_barrier<'t>(p: &Parser<'t>, m: &mut Mods<'t>, args: &[Arg<'t>]) -> Result<Op, PtxError> {
    count(p, args, 0)?;
    if m.has("wait") {
        m.has("acquire");
        return Ok(Op::ClusterWait);
    }
    need(m, "arrive")?;
    let relaxed = m.has("relaxed");
    if !relaxed {
        m.has("release");
    }
    Ok(Op::ClusterArrive { releases: !relaxed })
}
