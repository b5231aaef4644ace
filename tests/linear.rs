//! The matrix products on the adapter present, every variant it supports, against f64 loops: every layout, ragged sizes, rows
//! with and without padding, split sums, every epilogue, in f32 and in f16; guards around every output, and equal bits from
//! equal runs.

mod common;

use burn::tensor::Device;
use burn_cubecl::tensor::CubeTensor;
use common::guarded::{Guarded, primitive};
use common::*;
use gpt_wgpu::kernel::{self, Variant};
use gpt_wgpu::ops::dropout::Dropout;
use gpt_wgpu::ops::linear::Gelu;
use gpt_wgpu::ops::linear::product::Product;
use gpt_wgpu::ops::linear::tiles::{Epilogue, Layout, has_slopes};

const DROPOUT: Dropout = Dropout { probability: 0.25, seed: 0xfeed_beef_cafe, step: 3, site: 0x101 };
const LAYOUTS: [Layout; 3] = [Layout::Nt, Layout::Nn, Layout::Tn];

/// How a product is made.
#[derive(Clone, Copy, Debug)]
struct Mode {
    variant: Variant,
    /// Whether A and B are stored in f16, else f32.
    f16: bool,
    /// Whether out is.
    out_f16: bool,
}

impl Mode {
    /// Values that neither the storage nor the products round: what is left is the order of the sums.
    fn exact(self, values: Vec<f64>) -> Vec<f64> {
        let rounds = self.f16 || self.variant.rounds_f32();
        values.into_iter().map(|v| if rounds { to_half(v) } else { v }).collect()
    }

    /// What an output may differ: by its own rounding to f16, else by `near`.
    fn tolerance(self, near: f64) -> f64 {
        if self.out_f16 { 1e-3 } else { near }
    }

    /// What rows are padded to: nothing, and every number of neighbours that move at once.
    fn pads(self) -> &'static [usize] {
        if self.f16 && self.variant != Variant::Scalar { &[1, 4, 8] } else { &[1, 4] }
    }
}

/// Runs `test` for every variant that the adapter supports, with f32 matrices, f16 ones, and f16 ones with an output in f32.
fn on_gpu(test: impl Fn(&Device, Mode)) {
    let Some(device) = gpu() else {
        eprintln!("SKIPPED: no GPU adapter");
        return;
    };
    let capabilities = capabilities(&device);
    let mut modes = Vec::new();
    for (f16, out_f16) in [(false, false), (true, true), (true, false)] {
        let variants = kernel::supported(&capabilities, f16);
        assert!(variants.contains(&Variant::Scalar) || f16);
        modes.extend(variants.into_iter().map(|variant| Mode { variant, f16, out_f16 }));
    }
    if !capabilities.f16 {
        eprintln!("SKIPPED in f16: the adapter's shaders have none");
    }
    modes.into_iter().for_each(|mode| test(&device, mode));
}

/// A matrix (rows, columns) of `values`, each row followed by `stride - columns` poisoned elements.
fn matrix(f16: bool, values: &[f64], columns: usize, stride: usize, device: &Device) -> CubeTensor {
    let padded: Vec<f64> = values
        .chunks(columns)
        .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(f64::NAN, stride - columns)))
        .collect();
    primitive(tensor_of(f16, &padded, [padded.len() / stride, stride], device))
}

/// The factors of one product and their product in f64.
struct Case {
    layout: Layout,
    sizes: [usize; 3],
    a: Vec<f64>,
    b: Vec<f64>,
    product: Vec<f64>,
}

impl Case {
    fn new(layout: Layout, sizes: [usize; 3], mode: Mode) -> Self {
        let [m, n, k] = sizes;
        let mut random = Random((m * 7 + n * 3 + k) as u64);
        let (a, b) = (mode.exact(random.vec(m * k)), mode.exact(random.vec(k * n)));
        Self::of(layout, sizes, a, b)
    }

    fn of(layout: Layout, sizes: [usize; 3], a: Vec<f64>, b: Vec<f64>) -> Self {
        let [m, n, k] = sizes;
        let mut product = vec![0.0; m * n];
        for row in 0..m {
            for column in 0..n {
                let term = |i: usize| match layout {
                    Layout::Nt => a[row * k + i] * b[column * k + i],
                    Layout::Nn => a[row * k + i] * b[i * n + column],
                    Layout::Tn => a[i * m + row] * b[i * n + column],
                };
                product[row * n + column] = (0..k).map(term).sum();
            }
        }
        Self { layout, sizes, a, b, product }
    }

    /// Columns of A and B as they are stored.
    fn columns(&self) -> [usize; 2] {
        let [m, n, k] = self.sizes;
        match self.layout {
            Layout::Nt => [k, k],
            Layout::Nn => [k, n],
            Layout::Tn => [m, n],
        }
    }

    /// Of the product.
    fn largest(&self) -> f64 {
        self.product.iter().fold(0.0, |largest, v| v.abs().max(largest))
    }

    fn what(&self, mode: Mode, more: &str) -> String {
        format!("{mode:?} {:?} {:?} {more}", self.layout, self.sizes)
    }
}

/// The rows of an output without their padding.
fn unpad(values: &[f64], columns: usize, stride: usize) -> Vec<f64> {
    values.chunks(stride).flat_map(|row| row[..columns].to_vec()).collect()
}

#[test]
fn every_layout_at_every_edge() {
    on_gpu(|device, mode| {
        for layout in LAYOUTS {
            for sizes in [
                [1, 1, 1],
                [4, 4, 4],
                [5, 3, 2],
                [64, 64, 32],
                [65, 63, 33],
                [3, 130, 31],
                [131, 4, 64],
                [128, 128, 64],
                [129, 257, 40],
            ] {
                let case = Case::new(layout, sizes, mode);
                let [m, n, k] = sizes;
                let [a_columns, b_columns] = case.columns();
                // Rows as they are, and rows padded to packs, the padding poisoned.
                for &pad in mode.pads() {
                    let strides = [a_columns, b_columns, n].map(|columns| columns.next_multiple_of(pad));
                    let what = case.what(mode, &format!("padded to {pad}"));
                    let a = matrix(mode.f16, &case.a, a_columns, strides[0], device);
                    let b = matrix(mode.f16, &case.b, b_columns, strides[1], device);
                    let run = || {
                        let out = Guarded::of(mode.out_f16, [m, strides[2]], device);
                        let product = Product { strides, ..Product::plain(layout, &a, &b, m, n, k) };
                        product.launch(mode.variant, &out.inside);
                        unpad(&out.values(&what), n, strides[2])
                    };
                    let got = run();
                    assert_close(&what, &got, &case.product, mode.tolerance(1e-5));
                    if pad != 4 {
                        assert_eq!(got, run(), "{what} differs from run to run");
                    }
                }
            }
        }
    });
}

#[test]
fn a_tall_sum_is_split_and_added_in_order() {
    on_gpu(|device, mode| {
        // The layouts of a weight's gradient and of what comes back through a head
        for (layout, sizes) in [
            (Layout::Tn, [1, 1, 1]),
            (Layout::Tn, [64, 64, 2048]),
            (Layout::Tn, [65, 30, 1031]),
            (Layout::Tn, [128, 4, 4096]),
            (Layout::Tn, [12, 260, 700]),
            (Layout::Nn, [33, 24, 3000]),
            // The large tiles: whole ones, ragged ones of quads, and rows of any length
            (Layout::Tn, [128, 256, 512]),
            (Layout::Tn, [132, 196, 330]),
            (Layout::Tn, [129, 131, 70]),
            (Layout::Nn, [256, 128, 512]),
            (Layout::Nn, [130, 196, 332]),
        ] {
            let case = Case::new(layout, sizes, mode);
            let [m, n, k] = sizes;
            let [a_columns, b_columns] = case.columns();
            let a = matrix(mode.f16, &case.a, a_columns, a_columns, device);
            let b = matrix(mode.f16, &case.b, b_columns, b_columns, device);
            let before = Random(7).vec(m * n);
            // Nothing adds to f16: it would be rounded every time.
            let accumulates = if mode.out_f16 { vec![false] } else { vec![false, true] };
            let registers = if mode.variant == Variant::Scalar { vec![false, true] } else { vec![false] };
            let both = |accumulate| registers.iter().map(move |&few| (accumulate, few));
            for (accumulate, few_registers) in accumulates.into_iter().flat_map(both) {
                let how = if accumulate { "accumulated" } else { "" };
                let what = case.what(mode, &format!("{how}, few registers: {few_registers}"));
                let run = || {
                    let out = match accumulate {
                        true => Guarded::holding(&before, [m, n], device),
                        false => Guarded::of(mode.out_f16, [m, n], device),
                    };
                    // The scale is a power of two: it changes no bit unless something under- or overflows. f16 comes scaled.
                    let scale = if mode.f16 { 1.0 } else { 64.0 };
                    let product = Product { scale, ..Product::plain(layout, &a, &b, m, n, k) };
                    product.launch_tall_with(mode.variant, few_registers, &out.inside, accumulate);
                    out.values(&what)
                };
                let got = run();
                let old = |i: usize| if accumulate { before[i] } else { 0.0 };
                let want: Vec<f64> = case.product.iter().enumerate().map(|(i, v)| v + old(i)).collect();
                assert_close(&what, &got, &want, mode.tolerance(3e-5));
                assert_eq!(got, run(), "{what} differs from run to run");
            }
        }
    });
}

/// An input's gradient through the GELU before it.
#[test]
fn a_gradient_goes_on_through_gelus_slope() {
    on_gpu(|device, mode| {
        // h has the type of what leaves.
        if !has_slopes(mode.variant) || mode.f16 != mode.out_f16 {
            return;
        }
        for sizes in [[5, 3, 2], [65, 68, 32], [66, 264, 24], [128, 128, 64]] {
            let case = Case::new(Layout::Nn, sizes, mode);
            let [m, n, k] = sizes;
            // Far out too, where the slope is 0 or 1.
            let h: Vec<f64> = Random(n as u64).of(mode.out_f16, m * n).iter().map(|v| v * 8.0).collect();
            let a = matrix(mode.f16, &case.a, k, k, device);
            let [b, h_tensor] = [(mode.f16, &case.b), (mode.out_f16, &h)].map(|(f16, v)| matrix(f16, v, n, n, device));
            for kind in [Gelu::Erf, Gelu::Tanh] {
                let what = case.what(mode, &format!("{kind:?}"));
                let epilogue = Epilogue::GeluSlope { tanh: kind == Gelu::Tanh };
                let run = || {
                    let out = Guarded::of(mode.out_f16, [m, n], device);
                    let product = Product::plain(Layout::Nn, &a, &b, m, n, k);
                    Product { epilogue, extra: Some(&h_tensor), ..product }.launch(mode.variant, &out.inside);
                    out.values(&what)
                };
                let got = run();
                let slope = |(v, h): (&f64, &f64)| v * common::twins::gelu_slope(*h, kind);
                let want: Vec<f64> = case.product.iter().zip(&h).map(slope).collect();
                assert_close(&what, &got, &want, mode.tolerance(1e-5));
                assert_eq!(got, run(), "{what} differs from run to run");
            }
        }
    });
}

/// Gradients in f16 reach down to 6e-8: neither an input nor an output may be flushed to zero.
#[test]
fn subnormal_numbers_of_f16_count() {
    let least = 2f64.powi(-24);
    on_gpu(|device, mode| {
        if !mode.f16 {
            return;
        }
        for layout in LAYOUTS {
            for sizes in [[64, 64, 512], [65, 24, 136], [5, 7, 33]] {
                let [m, n, k] = sizes;
                let mut random = Random(k as u64);
                // A all subnormal, B large, so that the sums are about 1; then sums that are subnormal themselves.
                let subnormal: Vec<f64> = (0..m * k).map(|_| (random.next() * 1023.0).round() * least).collect();
                let large: Vec<f64> = random.halves(k * n).iter().map(|v| v * 2048.0).collect();
                let small: Vec<f64> = random.halves(m * k).iter().map(|v| v * least * 16.0).collect();
                let small: Vec<f64> = small.into_iter().map(to_half).collect();
                let unit = random.halves(k * n);
                for (name, a, b) in [("inputs", subnormal, large), ("sums", small, unit)] {
                    let case = Case::of(layout, sizes, a, b);
                    let [a_columns, b_columns] = case.columns();
                    let what = case.what(mode, &format!("subnormal {name}"));
                    let a = matrix(true, &case.a, a_columns, a_columns, device);
                    let b = matrix(true, &case.b, b_columns, b_columns, device);
                    let out = Guarded::of(mode.out_f16, [m, n], device);
                    Product::plain(layout, &a, &b, m, n, k).launch(mode.variant, &out.inside);
                    for (i, (got, want)) in out.values(&what).iter().zip(&case.product).enumerate() {
                        let rounding = if mode.out_f16 { (want.abs() * 2f64.powi(-11)).max(0.5 * least) } else { 0.0 };
                        // The order of f32 sums
                        let near = rounding + 3e-6 * case.largest();
                        assert!((got - want).abs() <= near, "{what}: element {i} is {got:e}, wanted {want:e}");
                    }
                    assert!(case.largest() > 4.0 * least, "{what}: nothing to see");
                }
            }
        }
    });
}

#[test]
fn every_epilogue_with_and_without_a_bias() {
    on_gpu(|device, mode| {
        for sizes in [[5, 3, 2], [65, 68, 32], [66, 264, 24]] {
            let case = Case::new(Layout::Nt, sizes, mode);
            let [m, n, k] = sizes;
            let mut random = Random(n as u64);
            let (bias, extra) = (random.vec(n), random.of(mode.out_f16, m * n));
            let [a, b] = [&case.a, &case.b].map(|values| matrix(mode.f16, values, k, k, device));
            let bias_tensor = primitive(tensor(&bias, [n], device));
            let factors = DROPOUT.factors(m, n);
            for with_bias in [false, true] {
                let sum = |i: usize| case.product[i] + if with_bias { bias[i % n] } else { 0.0 };
                let all = |value: &dyn Fn(usize) -> f64| (0..m * n).map(value).collect::<Vec<_>>();
                let plain =
                    Product { bias: with_bias.then_some(&bias_tensor), ..Product::plain(Layout::Nt, &a, &b, m, n, k) };
                let what = |name: &str| case.what(mode, &format!("{name} bias {with_bias}"));
                let output = || Guarded::of(mode.out_f16, [m, n], device);
                let near = mode.tolerance(1e-5);

                let out = output();
                plain.launch(mode.variant, &out.inside);
                assert_close(&what("plain"), &out.values("plain"), &all(&sum), near);

                for kind in [Gelu::Erf, Gelu::Tanh] {
                    let (out, hidden) = (output(), output());
                    let epilogue = Epilogue::Gelu { tanh: kind == Gelu::Tanh };
                    Product { epilogue, extra: Some(&hidden.inside), ..plain }.launch(mode.variant, &out.inside);
                    assert_close(&what("gelu's hidden"), &hidden.values("hidden"), &all(&sum), near);
                    let want = all(&|i| common::twins::gelu(sum(i), kind));
                    assert_close(&what("gelu"), &out.values("gelu"), &want, near);
                }

                for dropout in [Dropout::OFF, DROPOUT] {
                    let (out, extra_tensor) = (output(), matrix(mode.out_f16, &extra, n, n, device));
                    let epilogue = Epilogue::Residual { dropout: dropout.is_on() };
                    Product { epilogue, extra: Some(&extra_tensor), dropout, ..plain }
                        .launch(mode.variant, &out.inside);
                    let factor = |i: usize| if dropout.is_on() { f64::from(factors[i]) } else { 1.0 };
                    let want = all(&|i| extra[i] + sum(i) * factor(i));
                    assert_close(&what("residual"), &out.values("residual"), &want, near);
                }
            }
        }
    });
}
