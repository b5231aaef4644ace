//! Exponentials, GELU and sums in f32. Without branches or calls, so that the compiler makes vectors of the loops around them;
//! what is not a number stays none.

use crate::ops::linear::{Gelu, TANH_CUBIC, TANH_SCALE};

/// e^x for x in [-87, 88], to 2 units in the last place; beyond, the value at the end.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// 1.5 · 2^23: a small number added to it is rounded to an integer, which its lowest bits then hold.
    const MAGIC: f32 = 12_582_912.0;
    /// ln 2 in two parts; the first has few bits, so that its product with an integer is exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = (x - n * LN2[0]) - n * LN2[1];
    // Taylor's series: |r| is at most ln 2 / 2
    let mut sum = 1.0 / 5040.0;
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * r + factor;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits())); // 2^n
    sum * power
}

/// (e^(-h²/2), the normal distribution's tail beyond |h|), the tail to a relative 4e-7 and what the exponential adds.
#[inline(always)]
fn normal(h: f32) -> (f32, f32) {
    /// Tail / e^(-h²/2) as a polynomial without constant in t = 1 / (1 + 0.27 |h|): fitted over [0, 14] for the smallest
    /// relative error, 2.4e-8.
    const TAIL: [f32; 9] = [
        0.028_914_673,
        -0.126_252_56,
        0.169_286_22,
        -0.068_615_49,
        0.107_395_92,
        0.072_241_68,
        0.101_758_83,
        0.107_550_55,
        0.107_720_18,
    ];
    let bell = exp(-0.5 * h * h);
    let t = 1.0 / (1.0 + 0.27 * h.abs());
    let mut sum = 0.0;
    for factor in TAIL {
        sum = (sum + factor) * t;
    }
    (bell, bell * sum)
}

/// The logistic function of tanh-GELU's argument, doubled.
#[inline(always)]
fn gate(h: f32) -> f32 {
    let argument = TANH_SCALE as f32 * h * (1.0 + TANH_CUBIC as f32 * h * h);
    1.0 / (1.0 + exp(-2.0 * argument))
}

/// gelu(h).
#[inline(always)]
pub fn gelu(h: f32, kind: Gelu) -> f32 {
    match kind {
        Gelu::Erf => {
            let (_, tail) = normal(h);
            if h < 0.0 { h * tail } else { h - h * tail }
        }
        // (1 + tanh(a)) / 2 is the logistic function of 2a.
        Gelu::Tanh => h * gate(h),
    }
}

/// gelu'(h).
#[inline(always)]
pub fn gelu_slope(h: f32, kind: Gelu) -> f32 {
    match kind {
        Gelu::Erf => {
            /// 1 / √(2π).
            const DENSITY: f32 = 0.398_942_3;
            let (bell, tail) = normal(h);
            let below = if h < 0.0 { tail } else { 1.0 - tail };
            below + h * bell * DENSITY
        }
        Gelu::Tanh => {
            let gate = gate(h);
            let slope = 2.0 * TANH_SCALE as f32 * (1.0 + 3.0 * TANH_CUBIC as f32 * h * h);
            gate + h * gate * (1.0 - gate) * slope
        }
    }
}

/// Partial sums that a row has at a time: the widest vector's.
const LANES: usize = 16;

/// `value` of element i of all rows is joined with lane i mod [`LANES`], and the lanes then with each other, as a tree.
/// The order is the same for vectors of any width.
#[inline(always)]
fn reduce<const N: usize>(
    rows: [&[f32]; N],
    start: f32,
    value: impl Fn([f32; N]) -> f32,
    join: impl Fn(f32, f32) -> f32,
) -> f32 {
    let mut lanes = [start; LANES];
    let whole = rows[0].len() / LANES;
    let chunks = rows.map(|row| row.as_chunks::<LANES>());
    for chunk in 0..whole {
        let here = chunks.map(|(chunks, _)| chunks[chunk]);
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane = join(*lane, value(here.map(|row| row[i])));
        }
    }
    for i in whole * LANES..rows[0].len() {
        let lane = &mut lanes[i % LANES];
        *lane = join(*lane, value(rows.map(|row| row[i])));
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Σ `value` of the elements of rows of one length, place by place.
#[inline(always)]
pub fn sum<const N: usize>(rows: [&[f32]; N], value: impl Fn([f32; N]) -> f32) -> f32 {
    reduce(rows, 0.0, value, |a, b| a + b)
}

/// The largest element, of a finite row.
#[inline(always)]
pub fn max(row: &[f32]) -> f32 {
    reduce([row], f32::NEG_INFINITY, |[x]| x, |a, b| if b > a { b } else { a })
}
