//! Linear layers: the matrix products in every layout and with every epilogue, and what adds up and differentiates.

use gpt_wgpu::kernel::{Kernel, Variant, fold, supported};
use gpt_wgpu::ops::dropout::Dropout;
use gpt_wgpu::ops::linear::product::{Plan, sum_parts_kernel};
use gpt_wgpu::ops::linear::tiles::{Epilogue, Layout, choose};
use gpt_wgpu::ops::linear::{BLOCK_ROWS, Gelu, column_sum_kernel, gelu_gradient_kernel};

use super::{Buffer, Case, Elem, two_rows};
use crate::apple;
use crate::common::{Random, to_half, twins};

const DROPOUT: Dropout = Dropout { probability: 0.25, seed: 0xfeed_beef_cafe, step: 3, site: 0x101 };
const PLAIN: Epilogue = Epilogue::Plain;
const ERF: Epilogue = Epilogue::Gelu { tanh: false };
const TANH: Epilogue = Epilogue::Gelu { tanh: true };
const KEEP: Epilogue = Epilogue::Residual { dropout: false };
const DROP: Epilogue = Epilogue::Residual { dropout: true };
const ERF_SLOPE: Epilogue = Epilogue::GeluSlope { tanh: false };
const TANH_SLOPE: Epilogue = Epilogue::GeluSlope { tanh: true };
const ADDED: Epilogue = Epilogue::Added;

/// How a product is asked for.
#[derive(Clone, Copy)]
struct Ask {
    layout: Layout,
    /// M, N and K.
    sizes: [usize; 3],
    /// Whether rows are padded to whole packs (four neighbours, eight of f16 for matrices), the padding poisoned.
    padded: bool,
    k_split: usize,
    scale: f32,
    epilogue: Epilogue,
    bias: bool,
    /// Whether A is stored times `scale`.
    is_held: bool,
    /// Whether A and B are f16.
    f16: [bool; 2],
    /// Whether out and the extra matrix are.
    out_f16: [bool; 2],
}

/// A product of everything with nothing behind it.
const fn ask(layout: Layout, sizes: [usize; 3]) -> Ask {
    let (f16, out_f16) = ([false; 2], [false; 2]);
    let (epilogue, bias) = (PLAIN, false);
    Ask { layout, sizes, padded: false, k_split: sizes[2], scale: 1.0, epilogue, bias, is_held: false, f16, out_f16 }
}

/// The same of f16; sums over parts of K, and a weight's gradient, leave in f32.
const fn half(layout: Layout, sizes: [usize; 3]) -> Ask {
    let out_f16 = [!matches!(layout, Layout::Tn); 2];
    Ask { f16: [true; 2], out_f16, ..ask(layout, sizes) }
}

/// The same between f16 and f32: a gradient in f16 that is held, or a layer that leaves in f32.
const fn mixed(layout: Layout, sizes: [usize; 3]) -> Ask {
    let is_held = !matches!(layout, Layout::Nt);
    Ask { is_held, scale: if is_held { 64.0 } else { 1.0 }, out_f16: [false; 2], ..half(layout, sizes) }
}

pub fn cases() -> Vec<Case> {
    [sums_and_slopes(), products(), products_of_f16(), mixed_products()].concat()
}

fn products() -> Vec<Case> {
    use Layout::{Nn, Nt, Tn};
    let mut cases = Vec::new();
    for variant in supported(&apple(), false) {
        // Shapes of one kind share a kernel: whole tiles; ragged ones of whole quads; rows of any length.
        let mut asks = vec![
            ask(Nt, [64, 128, 64]),
            Ask { bias: true, ..ask(Nt, [70, 67, 33]) },
            Ask { bias: true, ..ask(Nt, [1, 1, 1]) },
            Ask { bias: true, ..ask(Nt, [5, 130, 31]) },
            ask(Nn, [64, 64, 32]),
            Ask { scale: 64.0, padded: true, ..ask(Nn, [65, 66, 35]) },
            Ask { scale: 64.0, ..ask(Nn, [3, 68, 36]) },
            ask(Nn, [67, 65, 34]),
            // Ragged in M and N alone
            ask(Nn, [65, 68, 64]),
            ask(Tn, [68, 72, 32]),
            // K in whole parts, and one too short
            Ask { k_split: 64, scale: 64.0, ..ask(Tn, [64, 64, 192]) },
            Ask { k_split: 32, ..ask(Tn, [5, 70, 71]) },
            Ask { epilogue: ERF, bias: true, padded: true, ..ask(Nt, [65, 70, 36]) },
            Ask { epilogue: TANH, ..ask(Nt, [66, 65, 30]) },
            Ask { epilogue: KEEP, bias: true, ..ask(Nt, [66, 67, 20]) },
            Ask { epilogue: DROP, ..ask(Nt, [65, 68, 32]) },
            Ask { epilogue: ADDED, scale: 64.0, ..ask(Tn, [68, 72, 36]) },
            Ask { epilogue: ADDED, ..ask(Tn, [66, 65, 30]) },
        ];
        if variant == Variant::Scalar {
            // The large tile of 128 x 128
            asks.extend([
                ask(Nt, [128, 128, 32]),
                Ask { bias: true, ..ask(Nt, [130, 132, 36]) },
                ask(Nn, [129, 130, 20]),
                ask(Tn, [131, 129, 33]),
                Ask { epilogue: ERF_SLOPE, padded: true, ..ask(Nn, [65, 70, 36]) },
                Ask { epilogue: TANH_SLOPE, ..ask(Nn, [66, 65, 30]) },
                // More rows of blocks than are walked down before a step to the right
                Ask { bias: true, ..ask(Nt, [577, 66, 3]) },
            ]);
        }
        cases.extend(asks.iter().map(|ask| ask.case(variant)));
        let dropping = Ask { epilogue: DROP, bias: true, ..ask(Nt, [66, 67, 20]) };
        cases.push(dropping.case(variant).with_int64());
    }
    cases
}

fn products_of_f16() -> Vec<Case> {
    use Layout::{Nn, Nt, Tn};
    let mut cases = Vec::new();
    for variant in supported(&apple(), true) {
        let mut asks = vec![
            half(Nt, [64, 128, 64]),
            Ask { bias: true, ..half(Nt, [70, 67, 33]) },
            Ask { bias: true, padded: true, ..half(Nt, [70, 67, 33]) },
            Ask { padded: true, ..half(Nt, [1, 1, 1]) },
            // Ragged in M and N alone
            Ask { bias: true, ..half(Nt, [65, 72, 64]) },
            half(Nn, [64, 64, 32]),
            half(Nn, [67, 65, 34]),
            half(Nn, [65, 72, 64]),
            Ask { padded: true, ..half(Nn, [65, 66, 35]) },
            // K in parts: whole ones, and one too short
            Ask { k_split: 32, out_f16: [false; 2], ..half(Nn, [64, 64, 64]) },
            Ask { k_split: 32, out_f16: [false; 2], padded: true, ..half(Nn, [65, 66, 35]) },
            Ask { k_split: 32, out_f16: [false; 2], ..half(Nn, [67, 65, 34]) },
            half(Tn, [64, 64, 64]),
            Ask { k_split: 64, ..half(Tn, [72, 64, 192]) },
            Ask { k_split: 32, padded: true, ..half(Tn, [5, 70, 71]) },
            Ask { k_split: 32, ..half(Tn, [5, 70, 71]) },
            Ask { epilogue: ERF, bias: true, padded: true, ..half(Nt, [65, 70, 36]) },
            Ask { epilogue: TANH, ..half(Nt, [66, 65, 30]) },
            Ask { epilogue: KEEP, bias: true, padded: true, ..half(Nt, [66, 67, 20]) },
            Ask { epilogue: DROP, ..half(Nt, [65, 72, 32]) },
            Ask { epilogue: ADDED, ..half(Tn, [72, 64, 40]) },
            Ask { epilogue: ADDED, ..half(Tn, [66, 65, 30]) },
        ];
        if variant == Variant::Scalar {
            // The large tile of 128 x 128
            asks.extend([half(Nt, [128, 128, 32]), half(Nn, [129, 130, 20]), half(Tn, [131, 129, 33])]);
            asks.push(Ask { epilogue: ERF_SLOPE, padded: true, ..half(Nn, [65, 70, 36]) });
            asks.push(Ask { epilogue: TANH_SLOPE, ..half(Nn, [66, 65, 30]) });
        }
        cases.extend(asks.iter().map(|ask| ask.case(variant)));
    }
    cases
}

/// Those inside of half a block of f32, with what only products read in f16.
fn mixed_products() -> Vec<Case> {
    use Layout::{Nn, Nt, Tn};
    let hidden = [true, false];
    let mut cases = Vec::new();
    for variant in supported(&apple(), false).into_iter().filter(|variant| variant.rounds_f32()) {
        let beside_f32 = |sizes| Ask { f16: [true, false], ..mixed(Tn, sizes) };
        let asks = [
            Ask { epilogue: ERF, bias: true, padded: true, out_f16: hidden, ..mixed(Nt, [65, 70, 36]) },
            Ask { epilogue: ERF, out_f16: hidden, ..mixed(Nt, [64, 64, 64]) },
            Ask { epilogue: TANH, out_f16: hidden, ..mixed(Nt, [66, 65, 30]) },
            Ask { epilogue: KEEP, bias: true, padded: true, ..mixed(Nt, [66, 67, 20]) },
            Ask { epilogue: DROP, ..mixed(Nt, [65, 72, 32]) },
            Ask { epilogue: DROP, bias: true, ..mixed(Nt, [66, 65, 30]) },
            mixed(Nt, [64, 64, 64]),
            Ask { padded: true, ..mixed(Nt, [65, 70, 36]) },
            mixed(Nt, [65, 72, 64]),
            mixed(Nt, [66, 65, 30]),
            Ask { epilogue: ADDED, ..mixed(Tn, [64, 64, 64]) },
            Ask { epilogue: ADDED, ..mixed(Tn, [72, 64, 40]) },
            Ask { epilogue: ADDED, ..mixed(Tn, [65, 72, 64]) },
            Ask { epilogue: ADDED, ..mixed(Tn, [66, 65, 30]) },
            mixed(Nn, [64, 64, 32]),
            mixed(Nn, [65, 72, 64]),
            mixed(Nn, [67, 65, 34]),
            Ask { padded: true, ..mixed(Nn, [65, 66, 35]) },
            mixed(Tn, [64, 64, 64]),
            Ask { k_split: 64, ..mixed(Tn, [72, 64, 192]) },
            Ask { k_split: 32, ..mixed(Tn, [5, 70, 71]) },
            beside_f32([64, 64, 64]),
            Ask { scale: 1.0, ..beside_f32([68, 72, 32]) },
            Ask { k_split: 64, padded: true, ..beside_f32([70, 66, 190]) },
            Ask { k_split: 32, ..beside_f32([5, 70, 71]) },
        ];
        cases.extend(asks.iter().map(|ask| ask.case(variant)));
    }
    cases
}

impl Ask {
    fn case(&self, variant: Variant) -> Case {
        let Self { layout, sizes: [m, n, k], padded, k_split, scale, epilogue, bias, is_held, f16, out_f16 } = *self;
        let all_f16 = f16 == [true; 2];
        let mut random = Random((m * 7 + n * 3 + k) as u64);
        // What is multiplied in f16 is given in f16: the rest of the difference is the order of the sums.
        let round = |v: f64| if all_f16 || variant.rounds_f32() { to_half(v) } else { v };
        let mut values = |count: usize| random.vec(count).into_iter().map(round).collect::<Vec<_>>();
        let (a, b, bias_values) = (values(m * k), values(k * n), values(n));
        // What is added to the sums is not multiplied.
        let extra: Vec<f64> = random.vec(m * n).into_iter().map(|v| if out_f16[1] { to_half(v) } else { v }).collect();
        let term = |row: usize, column: usize, i: usize| match layout {
            Layout::Nt => a[row * k + i] * b[column * k + i],
            Layout::Nn => a[row * k + i] * b[i * n + column],
            Layout::Tn => a[i * m + row] * b[i * n + column],
        };
        let [a_columns, b_columns] = match layout {
            Layout::Nt => [k, k],
            Layout::Nn => [k, n],
            Layout::Tn => [m, n],
        };
        let pack = if all_f16 && variant != Variant::Scalar { 8 } else { 4 };
        let strides = [a_columns, b_columns, n].map(|c| if padded { c.next_multiple_of(pack) } else { c });
        let dropout = if epilogue == DROP { DROPOUT } else { Dropout::OFF };
        let plan = Plan {
            variant,
            tile: choose(variant, true, all_f16, m, n, k_split < k),
            layout,
            sizes: self.sizes,
            strides,
            k_split,
            scale,
            is_held,
            epilogue,
            bias,
            f16: [f16[0], f16[1], out_f16[0], out_f16[1]],
            dropout,
        };

        // One matrix for every part of K.
        let mut sums = Vec::new();
        for start in (0..k).step_by(k_split) {
            for (row, column) in (0..m * n).map(|i| (i / n, i % n)) {
                let sum: f64 = (start..k.min(start + k_split)).map(|i| term(row, column, i)).sum();
                sums.push(sum + if bias { bias_values[column] } else { 0.0 });
            }
        }
        let factors = DROPOUT.factors(m, n);
        let map =
            |value: &dyn Fn(usize, f64) -> f64| sums.iter().enumerate().map(|(i, v)| value(i, *v)).collect::<Vec<_>>();
        let want: Vec<f64> = match epilogue {
            Epilogue::Plain => sums.clone(),
            Epilogue::Gelu { tanh } => map(&|_, v| twins::gelu(v, if tanh { Gelu::Tanh } else { Gelu::Erf })),
            Epilogue::Residual { dropout: false } => map(&|i, v| extra[i] + v),
            Epilogue::Residual { dropout: true } => map(&|i, v| extra[i] + v * f64::from(factors[i])),
            Epilogue::GeluSlope { tanh } => {
                map(&|i, v| v * twins::gelu_slope(extra[i], if tanh { Gelu::Tanh } else { Gelu::Erf }))
            }
            Epilogue::Added => map(&|i, v| extra[i] + v),
        };
        let input = |name, f16, values: &[f64], columns, stride| {
            let (elem, _) = Elem::activation(f16, 0.0);
            Buffer::input(name, elem, &pad(values, columns, stride, f64::NAN))
        };
        // The padding of a row may be written.
        let output = |name, f16, values: &[f64]| {
            let (elem, tolerance) = Elem::activation(f16, 1e-5);
            Buffer::output(name, elem, pad(values, n, strides[2], f64::INFINITY), tolerance)
        };
        let a_stored: Vec<f64> = a.iter().map(|v| if is_held { v * f64::from(scale) } else { *v }).collect();
        let mut buffers = vec![
            input("a", f16[0], &a_stored, a_columns, strides[0]),
            input("b", f16[1], &b, b_columns, strides[1]),
            output("out", out_f16[0], &want),
        ];
        if epilogue == ADDED {
            buffers[2].before = pad(&extra, n, strides[2], f64::NAN);
        }
        if bias {
            buffers.push(Buffer::input("bias", Elem::F32, &bias_values));
        }
        match epilogue {
            Epilogue::Plain | Epilogue::Added => {}
            Epilogue::Gelu { .. } => buffers.push(output("extra", out_f16[1], &sums)),
            Epilogue::Residual { .. } | Epilogue::GeluSlope { .. } => {
                buffers.push(input("extra", out_f16[1], &extra, n, strides[2]))
            }
        }
        let what = format!("{:?} padded {padded} split {k_split} scale {scale}", self.sizes);
        Case { kernel: plan.kernel(), what, grid: two_rows(plan.groups()), buffers, params: plan.params() }
    }
}

/// Rows of `columns` elements, each followed by `filler` up to `stride`.
fn pad(values: &[f64], columns: usize, stride: usize, filler: f64) -> Vec<f64> {
    let rows = values.chunks(columns);
    rows.flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(filler, stride - columns))).collect()
}

/// The kernels beside the products.
fn sums_and_slopes() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |kernel: Kernel, what: String, grid, buffers, params: &[usize]| {
        let params = params.iter().map(|&word| word as u32).collect();
        cases.push(Case { kernel, what, grid, buffers, params });
    };
    let sizes = [(1, 1), (BLOCK_ROWS, 64), (2 * BLOCK_ROWS + 3, 67)];
    for (rows, columns, f16) in [false, true].into_iter().flat_map(|f16| sizes.map(|(r, c)| (r, c, f16))) {
        let x = Random(3).of(f16, rows * columns);
        let blocks = x.chunks(BLOCK_ROWS * columns);
        let parts = blocks
            .flat_map(|block| twins::linear_backward(block, &[], &[], block.len() / columns, 0, columns)[2].clone());
        let factor = if f16 { 0.125f32 } else { 1.0 };
        let parts = Buffer::output("parts", Elem::F32, parts.map(|sum| sum * f64::from(factor)).collect(), 1e-5);
        let groups = rows.div_ceil(BLOCK_ROWS) * columns.div_ceil(64);
        let buffers = vec![Buffer::input("x", Elem::activation(f16, 0.0).0, &x), parts];
        let what = format!("({rows}, {columns})");
        let params = [rows, columns, factor.to_bits() as usize];
        add(column_sum_kernel(f16), what, two_rows(groups as u32), buffers, &params);
    }
    let types = [[false; 2], [true; 2], [false, true]];
    for (gelu, f16) in [Gelu::Erf, Gelu::Tanh].into_iter().flat_map(|gelu| types.map(|f16| (gelu, f16))) {
        for quads in [1usize, 259] {
            let [(elem, _), (dh_elem, tolerance)] = f16.map(|f16| Elem::activation(f16, 1e-5));
            let factor = if f16[0] == f16[1] { 1.0 } else { 64.0f32 };
            let round = |v: f64| if f16[0] { to_half(v) } else { v };
            let mut random = Random(11);
            let mut pair = || (round(random.next()), round(5.0 * random.next()));
            let (dy, h): (Vec<_>, Vec<_>) = (0..4 * quads).map(|_| pair()).unzip();
            let slope = |h| f64::from(factor) * twins::gelu_slope(h, gelu);
            let dh = dy.iter().zip(&h).map(|(dy, h)| dy * slope(*h)).collect();
            let buffers = vec![
                Buffer::input("dy", elem, &dy),
                Buffer::input("h", elem, &h),
                Buffer::output("dh", dh_elem, dh, tolerance),
            ];
            let grid = two_rows(quads.div_ceil(256) as u32);
            let params = [quads, factor.to_bits() as usize];
            add(gelu_gradient_kernel(gelu, f16), format!("{quads} quads"), grid, buffers, &params);
        }
    }
    for (elements, parts) in [(4 * 257, 3), (261, 1), (1, 5)] {
        for (accumulate, f16) in [(false, false), (true, false), (false, true)] {
            let (elem, tolerance) = Elem::activation(f16, 1e-6);
            let mut random = Random(13);
            let (values, old) = (random.vec(parts * elements), random.vec(elements));
            let sum = |i: usize| (0..parts).map(|part| values[part * elements + i]).sum::<f64>();
            let want = (0..elements).map(|i| sum(i) + if accumulate { old[i] } else { 0.0 }).collect();
            let mut out = Buffer::output("out", elem, want, tolerance);
            if accumulate {
                out.before = old;
            }
            let (kernel, width) = sum_parts_kernel(elements, accumulate, f16);
            let groups = (elements / width).div_ceil(256) as u32;
            let grid = if parts == 3 { two_rows(groups) } else { fold(groups) };
            let buffers = vec![Buffer::input("parts", Elem::F32, &values), out];
            add(kernel, format!("{parts} parts of {elements}"), grid, buffers, &[elements / width, parts]);
        }
    }
    cases
}
