//! Extents of tensors: constants, or affine forms in a few named symbols.
//!
//! A graph has at most [`MAX_SYMBOLS`] symbols (`T`: tokens in this step, `P`: tokens already in the cache),
//! so a [`Dim`] is a small `Copy` value that compares by meaning.

use std::ops::{Add, Mul, Sub};

/// How many symbols a graph or kernel may name.
pub const MAX_SYMBOLS: usize = 4;

/// Index of a symbol in its graph's [`Symbols`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sym(pub u8);

/// An extent `base + sum(coef[i] * symbol[i])`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Dim {
    /// The part without a symbol.
    pub base: i64,
    /// Coefficient of each symbol.
    pub coef: [i32; MAX_SYMBOLS],
}

impl Dim {
    /// A constant extent.
    pub const fn of(base: i64) -> Dim {
        Dim { base, coef: [0; MAX_SYMBOLS] }
    }

    /// The value, if no symbol is in it.
    pub fn constant(self) -> Option<i64> {
        (self.coef == [0; MAX_SYMBOLS]).then_some(self.base)
    }

    /// The value for given symbols.
    pub fn eval(self, symbols: &[i64; MAX_SYMBOLS]) -> i64 {
        self.base + self.coef.iter().zip(symbols).map(|(&c, &s)| i64::from(c) * s).sum::<i64>()
    }
}

impl From<usize> for Dim {
    fn from(value: usize) -> Dim {
        Dim::of(value as i64)
    }
}

impl From<Sym> for Dim {
    fn from(sym: Sym) -> Dim {
        let mut dim = Dim::of(0);
        dim.coef[sym.0 as usize] = 1;
        dim
    }
}

impl Add for Dim {
    type Output = Dim;
    fn add(mut self, other: Dim) -> Dim {
        self.base += other.base;
        self.coef.iter_mut().zip(other.coef).for_each(|(a, b)| *a += b);
        self
    }
}

impl Sub for Dim {
    type Output = Dim;
    fn sub(self, other: Dim) -> Dim {
        self + other * -1
    }
}

impl Mul<i64> for Dim {
    type Output = Dim;
    fn mul(mut self, factor: i64) -> Dim {
        self.base *= factor;
        self.coef.iter_mut().for_each(|c| *c *= factor as i32);
        self
    }
}

/// The symbols of a graph: names and inclusive ranges.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Symbols(pub Vec<Symbol>);

/// One named extent with the values that it may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// As written in text.
    pub name: String,
    /// Smallest value.
    pub min: i64,
    /// Largest value.
    pub max: i64,
}

impl Symbols {
    /// Adds a symbol.
    ///
    /// # Panics
    ///
    /// When there are [`MAX_SYMBOLS`] already.
    pub fn add(&mut self, name: &str, min: i64, max: i64) -> Sym {
        assert!(self.0.len() < MAX_SYMBOLS, "too many symbols");
        self.0.push(Symbol { name: name.to_string(), min, max });
        Sym(self.0.len() as u8 - 1)
    }

    /// The symbol of that name.
    pub fn find(&self, name: &str) -> Option<Sym> {
        self.0.iter().position(|s| s.name == name).map(|i| Sym(i as u8))
    }

    /// Every symbol's largest value.
    pub fn max(&self) -> [i64; MAX_SYMBOLS] {
        std::array::from_fn(|i| self.0.get(i).map_or(0, |s| s.max))
    }

    /// Every symbol's smallest value.
    pub fn min(&self) -> [i64; MAX_SYMBOLS] {
        std::array::from_fn(|i| self.0.get(i).map_or(0, |s| s.min))
    }

    /// `dim` as text: `T`, `2048`, `T + 1`, `2*T - 1`.
    pub fn show(&self, dim: Dim) -> String {
        let mut out = String::new();
        for (symbol, &coef) in self.0.iter().zip(&dim.coef).filter(|(_, c)| **c != 0) {
            let sign = match (out.is_empty(), coef < 0) {
                (true, false) => "",
                (true, true) => "-",
                (false, false) => " + ",
                (false, true) => " - ",
            };
            let times = if coef.abs() == 1 { String::new() } else { format!("{}*", coef.abs()) };
            out += &format!("{sign}{times}{}", symbol.name);
        }
        match (out.is_empty(), dim.base) {
            (true, base) => base.to_string(),
            (false, 0) => out,
            (false, base) if base < 0 => format!("{out} - {}", -base),
            (false, base) => format!("{out} + {base}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn affine_forms() {
        let mut symbols = Symbols::default();
        let (t, p) = (Dim::from(symbols.add("T", 1, 8)), Dim::from(symbols.add("P", 0, 100)));
        let dim = t * 2 + p - Dim::of(3);
        assert_eq!(symbols.show(dim), "2*T + P - 3");
        assert_eq!(dim.eval(&[5, 7, 0, 0]), 14);
        assert_eq!((dim - t - t - p).constant(), Some(-3));
        assert_eq!(symbols.show(t * -1 + Dim::of(1)), "-T + 1");
    }
}
