//! The matrix products on the adapter present, every variant it supports, against f64 loops: every layout, ragged sizes, rows
//! with and without padding, split sums, every epilogue; guards around every output, and equal bits from equal runs.

mod common;

use burn::tensor::Device;
use burn_cubecl::tensor::CubeTensor;
use common::guarded::{Guarded, primitive};
use common::*;
use gpt_wgpu::kernel::{self, Variant};
use gpt_wgpu::ops::dropout::Dropout;
use gpt_wgpu::ops::linear::Gelu;
use gpt_wgpu::ops::linear::product::Product;
use gpt_wgpu::ops::linear::tiles::{Epilogue, Layout};

const DROPOUT: Dropout = Dropout { probability: 0.25, seed: 0xfeed_beef_cafe, step: 3, site: 0x101 };
const LAYOUTS: [Layout; 3] = [Layout::Nt, Layout::Nn, Layout::Tn];

/// Runs `test` for every variant that the adapter supports, with its tolerance: sums of f32 products, in another order.
fn on_gpu(test: impl Fn(&Device, Variant)) {
    let Some(device) = gpu() else {
        eprintln!("SKIPPED: no GPU adapter");
        return;
    };
    let probe = primitive(tensor(&[0.0], [1], &device));
    let supported = kernel::supported(&kernel::capabilities(&probe), false);
    assert!(supported.contains(&Variant::Scalar));
    supported.into_iter().for_each(|variant| test(&device, variant));
}

/// Values that the variant's products do not round: what is left is the order of the sums.
fn exact(values: Vec<f64>, variant: Variant) -> Vec<f64> {
    let round = |v: f64| if variant.rounds_f32() { half::f16::from_f64(v).to_f64() } else { v };
    values.into_iter().map(round).collect()
}

/// A matrix (rows, columns) of `values`, each row followed by `stride - columns` poisoned elements.
fn matrix(values: &[f64], columns: usize, stride: usize, device: &Device) -> CubeTensor {
    let padded: Vec<f64> = values
        .chunks(columns)
        .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(f64::NAN, stride - columns)))
        .collect();
    primitive(tensor(&padded, [padded.len() / stride, stride], device))
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
    fn new(layout: Layout, sizes: [usize; 3], variant: Variant) -> Self {
        let [m, n, k] = sizes;
        let mut random = Random((m * 7 + n * 3 + k) as u64);
        let (a, b) = (exact(random.vec(m * k), variant), exact(random.vec(k * n), variant));
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

    fn what(&self, variant: Variant, more: &str) -> String {
        format!("{variant:?} {:?} {:?} {more}", self.layout, self.sizes)
    }
}

/// The rows of an output without their padding.
fn unpad(values: &[f64], columns: usize, stride: usize) -> Vec<f64> {
    values.chunks(stride).flat_map(|row| row[..columns].to_vec()).collect()
}

#[test]
fn every_layout_at_every_edge() {
    on_gpu(|device, variant| {
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
                let case = Case::new(layout, sizes, variant);
                let [m, n, k] = sizes;
                let [a_columns, b_columns] = case.columns();
                // Rows as they are, and rows padded to quads, the padding poisoned.
                for pad in [false, true] {
                    let stride = |columns: usize| if pad { columns.next_multiple_of(4) } else { columns };
                    let strides = [stride(a_columns), stride(b_columns), stride(n)];
                    let what = case.what(variant, if pad { "padded" } else { "" });
                    let a = matrix(&case.a, a_columns, strides[0], device);
                    let b = matrix(&case.b, b_columns, strides[1], device);
                    let run = || {
                        let out = Guarded::new([m, strides[2]], device);
                        let product = Product { strides, ..Product::plain(layout, &a, &b, m, n, k) };
                        product.launch(variant, &out.inside);
                        unpad(&out.values(&what), n, strides[2])
                    };
                    let got = run();
                    assert_close(&what, &got, &case.product, 1e-5);
                    if !pad {
                        assert_eq!(got, run(), "{what} differs from run to run");
                    }
                }
            }
        }
    });
}

#[test]
fn a_tall_sum_is_split_and_added_in_order() {
    on_gpu(|device, variant| {
        for sizes in [[1, 1, 1], [64, 64, 2048], [65, 30, 1031], [128, 4, 4096], [12, 260, 700]] {
            let case = Case::new(Layout::Tn, sizes, variant);
            let [m, n, k] = sizes;
            let (a, b) = (matrix(&case.a, m, m, device), matrix(&case.b, n, n, device));
            let before = Random(7).vec(m * n);
            for accumulate in [false, true] {
                let what = case.what(variant, if accumulate { "accumulated" } else { "" });
                let run = || {
                    let content = if accumulate { before.clone() } else { vec![f64::NAN; m * n] };
                    let out = Guarded::holding(&content, [m, n], device);
                    // The scale is a power of two: it changes no bit unless something under- or overflows.
                    let product = Product { scale: 64.0, ..Product::plain(Layout::Tn, &a, &b, m, n, k) };
                    product.launch_tall(variant, &out.inside, accumulate);
                    out.values(&what)
                };
                let got = run();
                let old = |i: usize| if accumulate { before[i] } else { 0.0 };
                let want: Vec<f64> = case.product.iter().enumerate().map(|(i, v)| v + old(i)).collect();
                assert_close(&what, &got, &want, 3e-5);
                assert_eq!(got, run(), "{what} differs from run to run");
            }
        }
    });
}

#[test]
fn every_epilogue_with_and_without_a_bias() {
    on_gpu(|device, variant| {
        for sizes in [[5, 3, 2], [65, 68, 32], [66, 260, 20]] {
            let case = Case::new(Layout::Nt, sizes, variant);
            let [m, n, k] = sizes;
            let mut random = Random(n as u64);
            let (bias, extra) = (random.vec(n), random.vec(m * n));
            let (a, b) = (matrix(&case.a, k, k, device), matrix(&case.b, k, k, device));
            let bias_tensor = primitive(tensor(&bias, [n], device));
            let factors = DROPOUT.factors(m, n);
            for with_bias in [false, true] {
                let sum = |i: usize| case.product[i] + if with_bias { bias[i % n] } else { 0.0 };
                let all = |value: &dyn Fn(usize) -> f64| (0..m * n).map(value).collect::<Vec<_>>();
                let plain =
                    Product { bias: with_bias.then_some(&bias_tensor), ..Product::plain(Layout::Nt, &a, &b, m, n, k) };
                let what = |name: &str| case.what(variant, &format!("{name} bias {with_bias}"));

                let out = Guarded::new([m, n], device);
                plain.launch(variant, &out.inside);
                assert_close(&what("plain"), &out.values("plain"), &all(&sum), 1e-5);

                for kind in [Gelu::Erf, Gelu::Tanh] {
                    let (out, hidden) = (Guarded::new([m, n], device), Guarded::new([m, n], device));
                    let epilogue = Epilogue::Gelu { tanh: kind == Gelu::Tanh };
                    Product { epilogue, extra: Some(&hidden.inside), ..plain }.launch(variant, &out.inside);
                    assert_close(&what("gelu's hidden"), &hidden.values("hidden"), &all(&sum), 1e-5);
                    let want = all(&|i| common::twins::gelu(sum(i), kind));
                    assert_close(&what("gelu"), &out.values("gelu"), &want, 1e-5);
                }

                for dropout in [Dropout::OFF, DROPOUT] {
                    let (out, extra_tensor) = (Guarded::new([m, n], device), matrix(&extra, n, n, device));
                    let epilogue = Epilogue::Residual { dropout: dropout.is_on() };
                    Product { epilogue, extra: Some(&extra_tensor), dropout, ..plain }.launch(variant, &out.inside);
                    let factor = |i: usize| if dropout.is_on() { f64::from(factors[i]) } else { 1.0 };
                    let want = all(&|i| extra[i] + sum(i) * factor(i));
                    assert_close(&what("residual"), &out.values("residual"), &want, 1e-5);
                }
            }
        }
    });
}
