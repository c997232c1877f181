//! What counts as right: the only place with tolerances.
//!
//! A model ([`f32_bound`], [`bf16_bound`], [`perplexity_bound`], [`greedy`]) is judged against reference logits in f64; a kernel
//! ([`group::expect`], [`Expected::check`]) against the oracle of its group. Every bound follows from a count of
//! roundings; none was picked until a test passed.
//!
//! `u` is the unit roundoff of a dtype ([`DType::roundoff`]): f32 2^-24, bf16 2^-8, f16 2^-11.

pub mod chain;
pub mod group;

use ir::DType;
use ir::interp::Tensor;
use ir::op::Unary;

/// Largest error of a logit that an f32 program may have at one position:
/// `2 * reference_error + 1e-5 * rms`.
///
/// * `reference_error`: the reference library's own largest f32 error for the prompt (`f32_max_error`): another order of
///   summation, as honest as ours.
/// * `rms`: of that position's logits in f64.
pub fn f32_bound(reference_error: f64, rms: f64) -> f64 {
    2.0 * reference_error + 1e-5 * rms
}

/// Largest rms error of logits, over all prompts and positions, that a bf16 (or f16) program may have against the f64
/// reference: `1.5` times that of the unfused graph in that dtype, run by the interpreter, in which each stored value
/// is rounded and nothing else.
pub fn bf16_bound(interpreter_rms: f64) -> f64 {
    1.5 * interpreter_rms
}

/// Largest rms error against the f64 reference that the interpreter's own logits in bf16 (or f16) may have, if it runs the
/// reference's weights: `1.5 * sqrt(2) * rounding_rms`.
///
/// * `rounding_rms`: what rounding each stored value makes of the logits, with the weights as they are.
/// * A weight is rounded once and each operand that meets it at least once, by the same unit: weights add at most as much
///   again, and errors of random sign add as squares. 1.5 is [`bf16_bound`]'s.
pub fn weights_bound(rounding_rms: f64) -> f64 {
    bf16_bound(std::f64::consts::SQRT_2 * rounding_rms)
}

/// Largest difference of a logit between two devices at one position: each may err by the bound.
pub fn devices_bound(bound: f64) -> f64 {
    2.0 * bound
}

/// How far apart one stored value may be on two devices. Each may err as a model's logits may, for which the interpreter,
/// with the same weights and dtypes, stands for the reference library: in f32 by [`f32_bound`] in each element, else by
/// [`bf16_bound`] over all elements. Of a few elements an rms says nothing: those of a sample are each held to the former.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoredBound {
    element: f64,
    /// `None` in f32.
    spread: Option<f64>,
}

impl StoredBound {
    /// From the interpreter's value in f64, and what it computes where it rounds what it stores, in a program of `dtype`.
    pub fn new(dtype: DType, exact: &[f64], stored: &[f64]) -> StoredBound {
        let errors = || exact.iter().zip(stored).map(|(a, b)| (a - b).abs());
        let element = f32_bound(errors().fold(0.0, f64::max), rms(exact.iter().copied()));
        let spread = (dtype != DType::F32).then(|| devices_bound(bf16_bound(rms(errors()))));
        StoredBound { element: devices_bound(element), spread }
    }

    /// The share of the bound that differences have; `whole`: of every element, and no sample.
    pub fn share(&self, differences: &[f64], whole: bool) -> f64 {
        let (size, bound) = match self.spread {
            Some(spread) if whole => (rms(differences.iter().copied()), spread),
            _ => (differences.iter().copied().fold(0.0, f64::max), self.element),
        };
        if size == 0.0 { 0.0 } else { size / bound }
    }

    /// Largest difference of an element.
    pub fn element(&self) -> f64 {
        self.element
    }
}

/// Largest relative error of a perplexity against the reference's in f64, over the same windows: 0.01 % in f32, where
/// only the order of sums differs, 0.5 % where stored values are rounded to 8 bits.
pub fn perplexity_bound(dtype: DType) -> f64 {
    if dtype == DType::F32 { 1e-4 } else { 5e-3 }
}

/// What a greedy choice is beside the reference's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greedy {
    /// The same token.
    Equal,
    /// The reference's second best, and nearer to its best than errors are: go on with the reference's token.
    NearTie,
    /// Another token.
    Wrong,
}

/// One step of a greedy continuation in f64.
#[derive(Clone, Copy, Debug)]
pub struct ReferenceStep {
    /// The best token.
    pub token: i32,
    /// The second best.
    pub second: i32,
    /// Its distance from the best.
    pub margin: f64,
}

/// Judges the `chosen` token. A near tie is a margin below `2 * largest_error`: the largest error of a logit in the same
/// run, once for each of the two tokens.
pub fn greedy(reference: ReferenceStep, chosen: i32, largest_error: f64) -> Greedy {
    if chosen == reference.token {
        return Greedy::Equal;
    }
    let near = reference.margin < 2.0 * largest_error;
    if near && chosen == reference.second { Greedy::NearTie } else { Greedy::Wrong }
}

/// Largest error of a vector function in f32, in units in the last place, over all arguments; where the result is below
/// 2^-126, in units of 2^-149. `codegen::math` promises it and a test over every binade holds it to that.
pub fn function_ulp(op: Unary) -> f64 {
    match op {
        Unary::Neg | Unary::Abs => 0.0,
        Unary::Sqrt | Unary::Recip => 0.5,
        Unary::Rsqrt => 1.0,
        Unary::Sin | Unary::Cos | Unary::Log | Unary::Tanh => 0.51,
        Unary::Exp => 1.5,
    }
}

/// What the elements of one result of a kernel must be near to.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    /// As what it is stored.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The oracle's value before the final rounding, `e`.
    pub exact: Vec<f64>,
    /// Largest error that any order of roundings can leave before the last: `K u_acc s`, and what the dtypes inside add.
    pub hard: Vec<f64>,
    /// The same as roundings of random sign add up: `sqrt(K) u_acc s`, and what the dtypes inside add.
    pub typical: Vec<f64>,
}

/// How near a result came.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shares {
    /// Largest share of the hard bound that an element has used: at most 1.
    pub hard: f64,
    /// Root mean square of the shares of the statistical bound: at most 1.
    pub typical: f64,
    /// Elements.
    pub elems: usize,
    /// Elements of which nothing can be said: the operands' errors make any result possible.
    pub open: usize,
}

impl Shares {
    /// The worse of both; elements are added.
    pub fn worst(self, other: Shares) -> Shares {
        let (hard, typical) = (self.hard.max(other.hard), self.typical.max(other.typical));
        Shares { hard, typical, elems: self.elems + other.elems, open: self.open + other.open }
    }
}

/// Why a result is wrong.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum Mismatch {
    #[error("{found_dtype}{found:?}, expected {expected_dtype}{expected:?}")]
    Type { found_dtype: DType, found: Vec<usize>, expected_dtype: DType, expected: Vec<usize> },
    #[error(
        "element {index:?} is {found:e}, expected {expected:e} within {bound:e} ({share:.2} of the hard bound)"
    )]
    Element { index: Vec<usize>, found: f64, expected: f64, bound: f64, share: f64 },
    #[error("rms of the errors is {share:.2} of the statistical bound")]
    Spread { share: f64 },
}

impl Mismatch {
    /// How far beyond the bounds it is.
    pub fn shares(&self) -> Shares {
        let (hard, typical) = match self {
            Mismatch::Element { share, .. } => (*share, 0.0),
            Mismatch::Spread { share } => (0.0, *share),
            Mismatch::Type { .. } => (f64::INFINITY, 0.0),
        };
        Shares { hard, typical, ..Shares::default() }
    }
}

impl Expected {
    /// Judges what a kernel stored.
    ///
    /// * hard, each element: `|y - e| <= u_out |e| + hard`;
    /// * statistical, all of them: `rms((y - e) / (u_out |e| + typical)) <= 1`.
    ///
    /// Storing adds what is lost near zero (bf16: its subnormals). What is infinite or NaN must be that; a number beyond the dtype's
    /// largest may be infinite.
    ///
    /// # Errors
    ///
    /// The worst element, or the whole.
    pub fn check(&self, found: &Tensor) -> Result<Shares, Mismatch> {
        if found.dtype != self.dtype || found.shape != self.shape {
            return Err(Mismatch::Type {
                found_dtype: found.dtype,
                found: found.shape.clone(),
                expected_dtype: self.dtype,
                expected: self.shape.clone(),
            });
        }
        let (u, least) = (self.dtype.roundoff(), near_zero(self.dtype));
        let mut shares = Shares { elems: self.exact.len(), ..Shares::default() };
        let (mut squares, mut worst) = (0.0, None);
        for (at, (&y, &e)) in found.data.iter().zip(&self.exact).enumerate() {
            let stored = u * e.abs() + least;
            let (hard, typical) = (stored + (1.0 + u) * self.hard[at], stored + (1.0 + u) * self.typical[at]);
            if e.is_finite() && !hard.is_finite() {
                shares.open += 1;
                continue;
            }
            let share = |bound: f64| match (y - e).abs() {
                _ if y == e || y.is_nan() && e.is_nan() => 0.0,
                _ if !e.is_finite() || y.is_nan() => f64::INFINITY,
                _ if y.is_infinite() && self.dtype.round(e + hard.copysign(e)) == y => 0.0,
                _ if y == self.dtype.round(e) && bound == 0.0 => 0.0,
                error => error / bound,
            };
            let (of_hard, of_typical) = (share(hard), share(typical));
            if of_hard > shares.hard {
                shares.hard = of_hard;
                worst = Some((at, y, e, hard));
            }
            squares += of_typical * of_typical;
        }
        shares.typical = (squares / (shares.elems - shares.open).max(1) as f64).sqrt();
        if let (Some((at, found, expected, bound)), true) = (worst, shares.hard > 1.0) {
            let (index, share) = (index_of(at, &self.shape), shares.hard);
            return Err(Mismatch::Element { index, found, expected, bound, share });
        }
        if shares.typical > 1.0 {
            return Err(Mismatch::Spread { share: shares.typical });
        }
        Ok(shares)
    }
}

/// What storing may cost near zero, where the relative bound says nothing: half of the dtype's smallest number. bf16 loses
/// all below its smallest normal one: `vcvtneps2bf16` takes subnormals for zero (Intel SDM, vol. 2).
fn near_zero(dtype: DType) -> f64 {
    match dtype {
        DType::F64 | DType::I32 | DType::I8 | DType::U8 | DType::Bool | DType::Block(_) => 0.0,
        DType::F32 => 2f64.powi(-150),
        DType::BF16 => 2f64.powi(-126),
        DType::F16 => 2f64.powi(-25),
    }
}

/// The index of element `at`, counted in row-major order.
pub(crate) fn index_of(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for axis in (0..shape.len()).rev() {
        index[axis] = at % shape[axis];
        at /= shape[axis];
    }
    index
}

/// Root mean square.
pub fn rms(values: impl IntoIterator<Item = f64>) -> f64 {
    let (mut squares, mut count) = (0.0, 0usize);
    for x in values {
        squares += x * x;
        count += 1;
    }
    (squares / count.max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected(exact: &[f64], hard: f64, typical: f64) -> Expected {
        let n = exact.len();
        let (hard, typical) = (vec![hard; n], vec![typical; n]);
        Expected { dtype: DType::F32, shape: vec![n], exact: exact.to_vec(), hard, typical }
    }

    fn check(expected: &Expected, found: &[f64]) -> Result<Shares, Mismatch> {
        expected.check(&Tensor::new(DType::F32, &[found.len()], found))
    }

    #[test]
    fn one_bad_element_is_found() {
        let expected = expected(&[1.0, 2.0, 3.0], 1e-6, 1e-6);
        assert_eq!(check(&expected, &[1.0, 2.0, 3.0]).unwrap().hard, 0.0);
        let Err(Mismatch::Element { index, .. }) = check(&expected, &[1.0, 2.00001, 3.0]) else { panic!() };
        assert_eq!(index, [1]);
        assert!(check(&expected, &[1.0, f64::NAN, 3.0]).is_err());
        assert!(check(&expected, &[1.0, f64::INFINITY, 3.0]).is_err());
    }

    #[test]
    fn many_small_errors_of_one_sign_are_found() {
        let expected = expected(&[1.0; 4], 1e-3, 1e-5);
        let error = check(&expected, &[1.0 + 2e-5; 4]).unwrap_err();
        assert!(matches!(error, Mismatch::Spread { share } if share > 1.9), "{error}");
        assert!(check(&expected, &[1.0 + 2e-5, 1.0, 1.0, 1.0 - 1e-6]).is_ok());
    }

    #[test]
    fn what_is_not_finite_must_be_that() {
        let bound = expected(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY], 0.0, 0.0);
        assert!(check(&bound, &[f64::NAN, f64::INFINITY, f64::NEG_INFINITY]).is_ok());
        assert!(check(&bound, &[0.0, f64::INFINITY, f64::NEG_INFINITY]).is_err());
        assert!(check(&bound, &[f64::NAN, f64::INFINITY, f64::INFINITY]).is_err());
        assert!(check(&expected(&[1e39], 0.0, 0.0), &[f64::INFINITY]).is_ok());
        assert!(check(&expected(&[1e38], 0.0, 0.0), &[f64::INFINITY]).is_err());
    }

    #[test]
    fn two_devices_may_be_as_far_apart_as_both_err() {
        let (exact, stored) = ([1.0, -1.0, 1.0, -1.0], [1.1, -1.0, 1.0, -1.0]);
        let f32 = StoredBound::new(DType::F32, &exact, &stored);
        // Twice (twice the interpreter's error, and a little).
        assert!(
            f32.share(&[0.4, 0.0, 0.0, 0.0], true) < 1.0 && f32.share(&[0.41, 0.0, 0.0, 0.0], true) > 1.0
        );
        let bf16 = StoredBound::new(DType::BF16, &exact, &stored);
        // Twice 1.5 times the rms of its errors, which is half of the one.
        assert!(bf16.share(&[0.14; 4], true) < 1.0 && bf16.share(&[0.16; 4], true) > 1.0);
        assert!(bf16.share(&[0.16], false) < 1.0 && bf16.share(&[0.41], false) > 1.0);
        assert_eq!(f32.share(&[f64::INFINITY], true), f64::INFINITY);
    }

    #[test]
    fn near_ties_are_of_two_tokens() {
        let reference = ReferenceStep { token: 7, second: 9, margin: 0.01 };
        assert_eq!(greedy(reference, 7, 0.0), Greedy::Equal);
        assert_eq!(greedy(reference, 9, 0.006), Greedy::NearTie);
        assert_eq!(greedy(reference, 9, 0.004), Greedy::Wrong);
        assert_eq!(greedy(reference, 8, 0.006), Greedy::Wrong);
    }
}
