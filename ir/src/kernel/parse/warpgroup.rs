//! Declarations and statements of warpgroups, from text.

use super::{Named, ParseErrorKind, Parser, Result, Token};
use crate::kernel::RegId;
use crate::kernel::warpgroup::{Left, MapId, MbarrierAt, MbarrierId, Mbarriers, TensorMap, Warpgroup};

impl Parser {
    /// `%full[4] of 1`.
    pub(super) fn mbarriers(&mut self) -> Result<()> {
        let (at, name) = (self.at, self.value_name()?);
        self.declare(at, &name, Named::Mbarriers(MbarrierId(self.kernel.mbarriers.len() as u32)))?;
        self.sign("[")?;
        let count = self.small()?;
        self.sign("]")?;
        self.word("of")?;
        let arrivals = self.small()?;
        self.kernel.mbarriers.push(Mbarriers { name, count, arrivals });
        Ok(())
    }

    /// `%tiles : %x[128, 64]`.
    pub(super) fn map(&mut self) -> Result<()> {
        let (at, name) = (self.at, self.value_name()?);
        self.declare(at, &name, Named::Map(MapId(self.kernel.maps.len() as u32)))?;
        self.sign(":")?;
        let buffer = self.buffer()?;
        let extents = self.list(Parser::small)?;
        self.kernel.maps.push(TensorMap { name, buffer, extents });
        Ok(())
    }

    /// The statement that a word begins, if it begins one of warpgroups.
    pub(super) fn warpgroup(&mut self, word: &str) -> Result<Option<Warpgroup>> {
        Ok(Some(match word {
            "registers" => Warpgroup::Registers(self.small()?),
            "meet" | "pass" => {
                let id = self.expr()?;
                self.sign(",")?;
                let threads = self.small()?;
                if word == "meet" { Warpgroup::Meet { id, threads } } else { Warpgroup::Pass { id, threads } }
            }
            "expect" => {
                let at = self.mbarrier()?;
                self.sign(",")?;
                let place = self.at;
                let bytes = self.int()?;
                match u32::try_from(bytes) {
                    Ok(bytes) => Warpgroup::Expect { at, bytes },
                    Err(_) => return self.error(place, ParseErrorKind::Range),
                }
            }
            "arrive" => Warpgroup::Arrive(self.mbarrier()?),
            "await" if self.found_word("grids") => Warpgroup::AwaitGrids,
            "await" => {
                let at = self.mbarrier()?;
                self.sign(",")?;
                Warpgroup::Await { at, parity: self.expr()? }
            }
            "fetch" => {
                let (to, place) = (self.buffer()?, self.index_list()?);
                self.sign("=")?;
                let name = self.value_name()?;
                let Named::Map(map) = self.resolve(&name)? else { return self.not_a(name, "map") };
                let index = self.index_list()?;
                self.sign(",")?;
                Warpgroup::Fetch { to, place, map, index, at: self.mbarrier()? }
            }
            "fence" if self.found_word("registers") => Warpgroup::FenceRegisters,
            "fence" if self.found_word("async") => Warpgroup::FenceAsync,
            "fence" => return self.expected("`registers` or `async`"),
            "product" | "product.t" => self.tiles(word == "product.t")?,
            "close" => Warpgroup::Close,
            "retire" => {
                let newest = self.small()?;
                let mut sums = Vec::new();
                while self.found_sign(",") {
                    sums.push(self.file()?);
                }
                let after = if self.found_word("after") { self.list(Parser::expr)? } else { Vec::new() };
                Warpgroup::Retire { newest, sums, after }
            }
            _ => return Ok(None),
        }))
    }

    /// `%sums[0] += %a[%i, 0], %b[%j, 0]`.
    fn tiles(&mut self, trans: bool) -> Result<Warpgroup> {
        let (sums, index) = (self.file()?, self.register_index()?);
        let add = self.found_sign("+=");
        if !add {
            self.sign("=")?;
        }
        let named = match self.peek() {
            Token::Value(name) => self.names.get(name).copied(),
            _ => None,
        };
        let left = match named {
            Some(Named::Buffer(buffer)) => {
                self.at += 1;
                Left::Shared(buffer, self.index_list()?)
            }
            _ => Left::Registers(self.expr()?),
        };
        self.sign(",")?;
        let (right, place) = (self.buffer()?, self.index_list()?);
        Ok(Warpgroup::Product { sums, index, add, left, right, place, trans })
    }

    /// `%sums`, a register file.
    fn file(&mut self) -> Result<RegId> {
        let name = self.value_name()?;
        match self.resolve(&name)? {
            Named::Reg(reg) => Ok(reg),
            _ => self.not_a(name, "register"),
        }
    }

    /// `%full[%s]`.
    fn mbarrier(&mut self) -> Result<MbarrierAt> {
        let name = self.value_name()?;
        let Named::Mbarriers(id) = self.resolve(&name)? else { return self.not_a(name, "mbarrier") };
        self.sign("[")?;
        let index = self.expr()?;
        self.sign("]")?;
        Ok((id, index))
    }
}
