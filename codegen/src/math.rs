//! Vector functions as LLVM IR, so that no library is called. f32 in, f32 out; scalar and vector lanes give equal bits.
//!
//! Largest errors, in units in the last place of the result, over all f32 (tested on every binade and at 0, ±inf, NaN and
//! subnormals in `tests/it/math.rs`):
//!
//! | function | error | where | method |
//! |---|---|---|---|
//! | `exp` | 1.5 ulp (results below 2^-126: 1.5 units of 2^-149) | everywhere | `2^n e^r`, `|r| <= ln 2 / 2`, polynomial of degree 6, Cody and Waite reduction by FMA |
//! | `sqrt`, `recip` | 0.5 ulp | everywhere | IEEE |
//! | `rsqrt` | 1.0 ulp | everywhere | IEEE `1 / sqrt(x)`, rounded twice |
//! | `sin`, `cos` | 0.51 ulp | `|x| <= 2^31`, NaN beyond | reduction and polynomial in f64 |
//! | `log` | 0.51 ulp | everywhere | exponent and `atanh` series in f64 |
//! | `tanh` | 0.51 ulp | everywhere | `(e^2x - 1) / (e^2x + 1)` in f64, `x - x^3/3` near 0 |
//! | `neg`, `abs` | exact | everywhere | IEEE |

use crate::lower::{float_bits, suffix};
use ir::op::Unary;
use std::fmt::Write;

/// The function's name in the module.
pub fn symbol(op: Unary, lanes: u16) -> String {
    format!("@m.{}.{lanes}", op.facts().name)
}

/// The function's text.
pub fn function(op: Unary, lanes: u16) -> String {
    let mut m = Math { lanes, body: String::new(), next: 0 };
    let result = match op {
        Unary::Neg => m.emit("f32", "fneg {f32} %x"),
        Unary::Abs => m.call("fabs", "f32", &["%x"]),
        Unary::Sqrt => m.call("sqrt", "f32", &["%x"]),
        Unary::Recip => m.op("fdiv", "f32", &m.f32(1.0), "%x"),
        Unary::Rsqrt => {
            let root = m.call("sqrt", "f32", &["%x"]);
            m.op("fdiv", "f32", &m.f32(1.0), &root)
        }
        Unary::Exp => exp(&mut m),
        Unary::Sin => circular(&mut m, 0),
        Unary::Cos => circular(&mut m, 1),
        Unary::Log => log(&mut m),
        Unary::Tanh => tanh(&mut m),
    };
    let ty = m.ty("f32");
    format!(
        "\ndefine internal {ty} {}({ty} %x) #1 {{\n{}  ret {ty} {result}\n}}\n",
        symbol(op, lanes),
        m.body
    )
}

/// Writes straight-line vector code; types are named by element: `f32 f64 i32 i64 i1`.
struct Math {
    lanes: u16,
    body: String,
    next: usize,
}

impl Math {
    fn ty(&self, elem: &str) -> String {
        let llvm = match elem {
            "f32" => "float",
            "f64" => "double",
            other => other,
        };
        if self.lanes == 1 { llvm.to_string() } else { format!("<{} x {llvm}>", self.lanes) }
    }

    fn splat(&self, elem: &str, text: &str) -> String {
        if self.lanes == 1 { text.to_string() } else { format!("splat ({elem} {text})") }
    }

    fn f32(&self, x: f64) -> String {
        self.splat("float", &float_bits(x))
    }

    fn f64(&self, x: f64) -> String {
        self.splat("double", &format!("0x{:016X}", x.to_bits()))
    }

    fn i32(&self, x: i64) -> String {
        self.splat("i32", &x.to_string())
    }

    fn i64(&self, x: i64) -> String {
        self.splat("i64", &x.to_string())
    }

    /// `%tN = text`, with `{f32}` and the like replaced by types; the result's element type is only for the reader.
    fn emit(&mut self, _elem: &str, text: &str) -> String {
        let mut text = text.to_string();
        for elem in ["f32", "f64", "i32", "i64", "i1"] {
            text = text.replace(&format!("{{{elem}}}"), &self.ty(elem));
        }
        let _ = writeln!(self.body, "  %t{} = {text}", self.next);
        self.next += 1;
        format!("%t{}", self.next - 1)
    }

    fn op(&mut self, op: &str, elem: &str, a: &str, b: &str) -> String {
        self.emit(elem, &format!("{op} {{{elem}}} {a}, {b}"))
    }

    fn convert(&mut self, op: &str, from: &str, to: &str, x: &str) -> String {
        self.emit(to, &format!("{op} {{{from}}} {x} to {{{to}}}"))
    }

    fn call(&mut self, name: &str, elem: &str, args: &[&str]) -> String {
        let typed: Vec<String> = args.iter().map(|a| format!("{{{elem}}} {a}")).collect();
        let overload = suffix(elem, self.lanes);
        self.emit(elem, &format!("call {{{elem}}} @llvm.{name}.{overload}({})", typed.join(", ")))
    }

    fn fma(&mut self, elem: &str, a: &str, b: &str, c: &str) -> String {
        self.call("fma", elem, &[a, b, c])
    }

    fn select(&mut self, elem: &str, flag: &str, a: &str, b: &str) -> String {
        self.emit(elem, &format!("select {{i1}} {flag}, {{{elem}}} {a}, {{{elem}}} {b}"))
    }

    /// `c[0] + x (c[1] + x (c[2] + ...))`.
    fn polynomial(&mut self, elem: &str, x: &str, coefficients: &[f64]) -> String {
        let literal = |m: &Math, c: f64| if elem == "f64" { m.f64(c) } else { m.f32(c) };
        let (last, rest) = coefficients.split_last().expect("a polynomial has coefficients");
        let mut sum = literal(self, *last);
        for &c in rest.iter().rev() {
            let c = literal(self, c);
            sum = self.fma(elem, &sum, x, &c);
        }
        sum
    }
}

/// `e^x = 2^n e^r`. The scale is applied in two halves, so that results near the ends of the range are right.
fn exp(m: &mut Math) -> String {
    // Beyond these the result is 0 or infinity anyway; a NaN passes, since every comparison with it is false.
    let (low, high) = (m.f32(-104.0), m.f32(89.0));
    let flag = m.op("fcmp olt", "f32", "%x", &low);
    let x = m.select("f32", &flag, &low, "%x");
    let flag = m.op("fcmp ogt", "f32", &x, &high);
    let x = m.select("f32", &flag, &high, &x);
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    let (magic, log2e) = (m.f32(12_582_912.0), m.f32(std::f64::consts::LOG2_E));
    let shifted = m.fma("f32", &x, &log2e, &magic);
    let n = m.op("fsub", "f32", &shifted, &magic);
    let negated = m.emit("f32", &format!("fneg {{f32}} {n}"));
    // ln 2 in two parts: 0.693359375 has few bits, so its product with n is exact.
    let (ln2_high, ln2_low) = (m.f32(0.693359375), m.f32(-2.121_944_4e-4));
    let r = m.fma("f32", &negated, &ln2_high, &x);
    let r = m.fma("f32", &negated, &ln2_low, &r);
    let p = m.polynomial("f32", &r, &[1.0, 1.0, 0.5, 0.166_666_66, 0.041_666_57, 0.008_333_6, 0.001_393_3]);
    let (bits, magic_bits) = (m.convert("bitcast", "f32", "i32", &shifted), m.i32(0x4B40_0000));
    let n = m.op("sub", "i32", &bits, &magic_bits);
    let (one, bias, mantissa) = (m.i32(1), m.i32(127), m.i32(23));
    let half = m.op("ashr", "i32", &n, &one);
    let rest = m.op("sub", "i32", &n, &half);
    let mut result = p;
    for part in [half, rest] {
        let exponent = m.op("add", "i32", &part, &bias);
        let exponent = m.op("shl", "i32", &exponent, &mantissa);
        let scale = m.convert("bitcast", "i32", "f32", &exponent);
        result = m.op("fmul", "f32", &result, &scale);
    }
    result
}

/// Sine (`quarter` 0) or cosine (1): reduced by quarter turns in f64.
fn circular(m: &mut Math, quarter: i64) -> String {
    let x = m.convert("fpext", "f32", "f64", "%x");
    // Adding 1.5 * 2^52 leaves the nearest integer in the low bits.
    let (magic, per_turn) = (m.f64(6_755_399_441_055_744.0), m.f64(std::f64::consts::FRAC_2_PI));
    let shifted = m.fma("f64", &x, &per_turn, &magic);
    let n = m.op("fsub", "f64", &shifted, &magic);
    let negated = m.emit("f64", &format!("fneg {{f64}} {n}"));
    // pi / 2 in two parts of 53 bits.
    let (high, low) = (m.f64(std::f64::consts::FRAC_PI_2), m.f64(6.123_233_995_736_766e-17));
    let r = m.fma("f64", &negated, &high, &x);
    let r = m.fma("f64", &negated, &low, &r);
    let square = m.op("fmul", "f64", &r, &r);
    let sine = m.polynomial(
        "f64",
        &square,
        &[1.0, -1.0 / 6.0, 1.0 / 120.0, -1.0 / 5040.0, 1.0 / 362_880.0, -1.0 / 39_916_800.0],
    );
    let sine = m.op("fmul", "f64", &sine, &r);
    let cosine = m.polynomial(
        "f64",
        &square,
        &[1.0, -0.5, 1.0 / 24.0, -1.0 / 720.0, 1.0 / 40_320.0, -1.0 / 3_628_800.0, 1.0 / 479_001_600.0],
    );
    let bits = m.convert("bitcast", "f64", "i64", &shifted);
    let (offset, one, two, zero) = (m.i64(quarter), m.i64(1), m.i64(2), m.i64(0));
    let turn = m.op("add", "i64", &bits, &offset);
    let odd = m.op("and", "i64", &turn, &one);
    let odd = m.op("icmp ne", "i64", &odd, &zero);
    let value = m.select("f64", &odd, &cosine, &sine);
    let back = m.op("and", "i64", &turn, &two);
    let back = m.op("icmp ne", "i64", &back, &zero);
    let negated = m.emit("f64", &format!("fneg {{f64}} {value}"));
    let value = m.select("f64", &back, &negated, &value);
    // Beyond the range of the reduction (and for infinities) there is no value.
    let size = m.call("fabs", "f64", &[&x]);
    let limit = m.f64((1u64 << 31) as f64);
    let inside = m.op("fcmp ole", "f64", &size, &limit);
    let nan = m.f64(f64::NAN);
    let value = m.select("f64", &inside, &value, &nan);
    let value = m.convert("fptrunc", "f64", "f32", &value);
    if quarter == 1 {
        return value;
    }
    // The sine of -0 is -0, which the sums above lose.
    let zero = m.f32(0.0);
    let at_zero = m.op("fcmp oeq", "f32", "%x", &zero);
    m.select("f32", &at_zero, "%x", &value)
}

/// `ln x = n ln 2 + 2 atanh((f - 1) / (f + 1))`, `f` within a factor of the square root of two of 1.
fn log(m: &mut Math) -> String {
    let x = m.convert("fpext", "f32", "f64", "%x"); // Subnormals of f32 are normal here.
    let bits = m.convert("bitcast", "f64", "i64", &x);
    // The exponent of x / sqrt(1/2), rounded down.
    let (root, shift) = (m.i64(0x3FE6_A09E_667F_3BCD), m.i64(52));
    let above = m.op("sub", "i64", &bits, &root);
    let n = m.op("ashr", "i64", &above, &shift);
    let exponent = m.op("shl", "i64", &n, &shift);
    let mantissa = m.op("sub", "i64", &bits, &exponent);
    let f = m.convert("bitcast", "i64", "f64", &mantissa);
    let one = m.f64(1.0);
    let (below, over) = (m.op("fsub", "f64", &f, &one), m.op("fadd", "f64", &f, &one));
    let s = m.op("fdiv", "f64", &below, &over);
    let square = m.op("fmul", "f64", &s, &s);
    let series: Vec<f64> = (0..8).map(|k| 2.0 / f64::from(2 * k + 1)).collect();
    let series = m.polynomial("f64", &square, &series);
    let series = m.op("fmul", "f64", &series, &s);
    let n = m.convert("sitofp", "i64", "f64", &n);
    let ln2 = m.f64(std::f64::consts::LN_2);
    let value = m.fma("f64", &n, &ln2, &series);
    let value = m.convert("fptrunc", "f64", "f32", &value);
    let (zero, infinity, nan) = (m.f32(0.0), m.f32(f64::INFINITY), m.f32(f64::NAN));
    let minus_infinity = m.f32(f64::NEG_INFINITY);
    let at_zero = m.op("fcmp oeq", "f32", "%x", &zero);
    let value = m.select("f32", &at_zero, &minus_infinity, &value);
    let at_infinity = m.op("fcmp oeq", "f32", "%x", &infinity);
    let value = m.select("f32", &at_infinity, &infinity, &value);
    let wrong = m.op("fcmp ult", "f32", "%x", &zero); // Negative, or NaN.
    m.select("f32", &wrong, &nan, &value)
}

/// By `e^2x` in f64; near 0, where that cancels, by the series.
fn tanh(m: &mut Math) -> String {
    let x = m.convert("fpext", "f32", "f64", "%x");
    let (low, high, two) = (m.f64(-10.0), m.f64(10.0), m.f64(2.0));
    let flag = m.op("fcmp olt", "f64", &x, &low);
    let y = m.select("f64", &flag, &low, &x);
    let flag = m.op("fcmp ogt", "f64", &y, &high);
    let y = m.select("f64", &flag, &high, &y);
    let twice = m.op("fmul", "f64", &y, &two);
    let (magic, log2e, ln2) =
        (m.f64(6_755_399_441_055_744.0), m.f64(std::f64::consts::LOG2_E), m.f64(std::f64::consts::LN_2));
    let shifted = m.fma("f64", &twice, &log2e, &magic);
    let n = m.op("fsub", "f64", &shifted, &magic);
    let negated = m.emit("f64", &format!("fneg {{f64}} {n}"));
    let r = m.fma("f64", &negated, &ln2, &twice);
    let mut factorial = 1.0;
    let series: Vec<f64> = (0..12)
        .map(|k| {
            factorial *= f64::from(k).max(1.0);
            1.0 / factorial
        })
        .collect();
    let p = m.polynomial("f64", &r, &series);
    let (bits, magic_bits) = (m.convert("bitcast", "f64", "i64", &shifted), m.i64(0x4338_0000_0000_0000));
    let n = m.op("sub", "i64", &bits, &magic_bits);
    let (bias, mantissa) = (m.i64(1023), m.i64(52));
    let exponent = m.op("add", "i64", &n, &bias);
    let exponent = m.op("shl", "i64", &exponent, &mantissa);
    let scale = m.convert("bitcast", "i64", "f64", &exponent);
    let e = m.op("fmul", "f64", &p, &scale);
    let one = m.f64(1.0);
    let (below, over) = (m.op("fsub", "f64", &e, &one), m.op("fadd", "f64", &e, &one));
    let far = m.op("fdiv", "f64", &below, &over);
    let square = m.op("fmul", "f64", &x, &x);
    let third = m.f64(-1.0 / 3.0);
    let near = m.fma("f64", &square, &third, &one);
    let near = m.op("fmul", "f64", &near, &x);
    let (size, limit) = (m.call("fabs", "f64", &[&x]), m.f64(1e-3));
    let small = m.op("fcmp olt", "f64", &size, &limit);
    let value = m.select("f64", &small, &near, &far);
    m.convert("fptrunc", "f64", "f32", &value)
}
