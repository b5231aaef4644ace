//! The kernels of layer norm, embedding, dropout, the loss and the cast on the adapter present against the f64 twins, with
//! activations in f32 and in f16: every edge of their tiles, guards around every output, outputs that start as NaN, and equal
//! bits from equal runs.

mod common;

use burn::tensor::Device;
use burn_cubecl::tensor::CubeTensor;
use common::guarded::{Guarded, primitive};
use common::twins::{self, EmbeddingShape};
use common::*;
use gpt_wgpu::ops::cast::{self, all_to_f16, to_f16};
use gpt_wgpu::ops::cross_entropy::cross_entropy_scaled;
use gpt_wgpu::ops::dropout::{Dropout, dropout};
use gpt_wgpu::ops::{embedding, layer_norm};
use half::f16;

const DROPOUT: Dropout = Dropout { probability: 0.25, seed: 0xfeed_beef_cafe, step: 3, site: 0x101 };

fn on_gpu(test: impl Fn(&Device)) {
    match gpu() {
        Some(device) => test(&device),
        None => eprintln!("SKIPPED: no GPU adapter"),
    }
}

/// The same with whether activations are f16: in f32, and in f16 where the adapter has it.
fn on_gpu_by_type(test: impl Fn(&Device, bool)) {
    on_gpu(|device| test(device, false));
    if let Some(device) = gpu_with_f16() {
        test(&device, true);
    }
}

/// What an output in f16 (or f32) may differ: by its rounding to 11 bits, else by `near`.
fn tolerance(f16: bool, near: f64) -> f64 {
    if f16 { 1e-3 } else { near }
}

fn int_primitive<const D: usize>(values: &[i32], shape: [usize; D], device: &Device) -> CubeTensor {
    match int_tensor(values, shape, device).into_dispatch().kind {
        burn::backend::DispatchTensorKind::Cube(tensor) => tensor.int(),
        _ => panic!("not a GPU tensor"),
    }
}

#[test]
fn layer_norm_at_every_edge() {
    on_gpu_by_type(|device, f16| {
        let columns = [1, 3, 4, 5, 64, 128, 384, 768, 1600];
        let mut shapes: Vec<_> = [1, 2, 63, 64, 65, 257, 1009].iter().flat_map(|r| columns.map(|c| (*r, c))).collect();
        shapes.extend([(3, 8191), (3, 8192), (2500, 36)]);
        for (rows, c) in shapes {
            let what = |part: &str| format!("f16 {f16} ({rows}, {c}) {part}");
            let mut random = Random((rows * 131 + c) as u64);
            // Far from zero a variance made as a difference of squares would lose its digits; only few rows, since the rounding
            // of their means adds up in dw. A handful of columns is kept apart: where they lie close together f32 is not enough.
            let offset = if c >= 64 && rows <= 2 { 100.0 } else { 0.0 };
            let apart = |i: usize| if c < 64 { 3.0 * (i % c) as f64 } else { 0.0 };
            let x = random.vec(rows * c).into_iter().enumerate();
            let round = |v: f64| if f16 { to_half(v) } else { f64::from(v as f32) };
            let x: Vec<f64> = x.map(|(i, v)| round(v + offset + apart(i))).collect();
            let (w, b, dy) = (random.vec(c), random.vec(c), random.of(f16, rows * c));
            let (want, want_mean, want_rstd) = twins::layer_norm(&x, &w, Some(&b), c);
            let [mut want_dx, want_dw, want_db] = twins::layer_norm_backward(&dy, &x, &w, c);
            // Every other shape has something that comes to x past the norm.
            let past = (rows % 2 == 1).then(|| random.of(f16, rows * c));
            for (dx, past) in want_dx.iter_mut().zip(past.iter().flatten()) {
                *dx += past;
            }

            let put = |f16: bool, values: &[f64]| primitive(tensor_of(f16, values, [values.len() / c, c], device));
            let ([x, dy], [w, b]) = ([&x, &dy].map(|v| put(f16, v)), [&w, &b].map(|v| put(false, v)));
            let past = past.map(|past| put(f16, &past));
            let run = || {
                let [y, dx] = [(); 2].map(|()| Guarded::of(f16, [rows, c], device));
                let [mean, rstd] = [(); 2].map(|()| Guarded::new([rows, 1], device));
                let [dw, db] = [(); 2].map(|()| Guarded::new([c], device));
                layer_norm::launch_forward(&x, &w, Some(&b), &y.inside, &mean.inside, &rstd.inside);
                let gradients = [&dx.inside, &dw.inside, &db.inside];
                let stats = [&mean.inside, &rstd.inside];
                layer_norm::launch_backward(&dy, &x, &w, stats, past.as_ref(), gradients);
                [(y, "y"), (mean, "mean"), (rstd, "rstd"), (dx, "dx"), (dw, "dw"), (db, "db")]
                    .map(|(output, name)| output.values(&what(name)))
            };
            let got = run();
            let near = if offset > 0.0 { 1e-4 } else { 2e-5 }; // a mean of 100 is rounded to 2⁻¹⁸
            assert_close(&what("y"), &got[0], &want, tolerance(f16, near));
            assert_close(&what("mean"), &got[1], &want_mean, 1e-6);
            assert_close(&what("rstd"), &got[2], &want_rstd, near);
            assert_close(&what("dx"), &got[3], &want_dx, tolerance(f16, near));
            assert_close(&what("dw"), &got[4], &want_dw, near);
            assert_close(&what("db"), &got[5], &want_db, 1e-5);
            if rows >= 257 {
                assert_eq!(run(), got, "{}", what("differs from run to run"));
            }
        }
    });
}

/// Tokens of which half are one token, as a text has its most frequent one.
fn tokens(count: usize, vocab: usize, random: &mut Random) -> Vec<i32> {
    (0..count).map(|i| if i % 2 == 0 { vocab as i32 / 2 } else { random.below(vocab) as i32 }).collect()
}

#[test]
fn embedding_at_every_edge() {
    on_gpu_by_type(|device, f16| {
        // (B, T, V, block_size, C): one token; odd columns; several blocks of 1024 tokens with long lists for every row, then
        // with short ones; a full block; more columns than a tile.
        let shapes = [
            (1, 1, 1, 1, 1),
            (2, 7, 5, 9, 3),
            (3, 5, 11, 8, 6),
            (2, 33, 65, 64, 64),
            (3, 700, 13, 1024, 5),
            (2, 1025, 3000, 1100, 4),
            (12, 64, 700, 64, 40),
            (1, 1024, 2, 1024, 8),
            (2, 3, 50257, 3, 12),
            (1, 65, 300, 65, 768),
        ];
        for (batch, time, vocab, block_size, c) in shapes {
            for dropout in [Dropout::OFF, DROPOUT] {
                let s = EmbeddingShape { time, vocab, block_size, channels: c };
                let what = |part: &str| format!("f16 {f16} B {batch} {s:?} dropout {} {part}", dropout.is_on());
                let mut random = Random((time + vocab) as u64);
                let (wte, wpe) = (random.vec(vocab * c), random.vec(block_size * c));
                let dx = random.of(f16, batch * time * c);
                let ids = tokens(batch * time, vocab, &mut random);
                let want_x = twins::embedding(&ids, &wte, &wpe, s, dropout);
                let [want_dwte, want_dwpe] = twins::embedding_backward(&dx, &ids, s, dropout);

                let ids = int_primitive(&ids, [batch, time], device);
                let [wte, wpe] = [&wte, &wpe].map(|w| primitive(tensor(w, [w.len() / c, c], device)));
                let dx = primitive(tensor_of(f16, &dx, [batch, time, c], device));
                let run = || {
                    let x = Guarded::of(f16, [batch, time, c], device);
                    let (dwte, dwpe) = (Guarded::new([vocab, c], device), Guarded::new([block_size, c], device));
                    embedding::launch_forward(&ids, &wte, &wpe, dropout, &x.inside);
                    embedding::launch_backward(&dx, &ids, dropout, &dwte.inside, &dwpe.inside);
                    [(x, "x"), (dwte, "dwte"), (dwpe, "dwpe")].map(|(output, name)| output.values(&what(name)))
                };
                let got = run();
                let dropped = |values: &[f64]| values.iter().map(|v| *v == 0.0).collect::<Vec<_>>();
                assert_eq!(dropped(&got[0]), dropped(&want_x), "{}", what("mask"));
                assert_close(&what("x"), &got[0], &want_x, tolerance(f16, 1e-6));
                assert_close(&what("dwte"), &got[1], &want_dwte, 1e-5);
                assert_close(&what("dwpe"), &got[2], &want_dwpe, 1e-5);
                assert_eq!(run(), got, "{}", what("differs from run to run"));
            }
        }
    });
}

/// The contract forbids such tokens; the kernels must still stay inside their buffers.
#[test]
fn a_token_out_of_range_counts_as_the_last() {
    on_gpu(|device| {
        let (vocab, c) = (5, 4);
        let wte = Random(1).vec(vocab * c);
        let run = |ids: &[i32]| {
            let ids = int_primitive(ids, [1, 3], device);
            let w = primitive(tensor(&wte, [vocab, c], device));
            let x = Guarded::new([1, 3, c], device);
            let (dwte, dwpe) = (Guarded::new([vocab, c], device), Guarded::new([3, c], device));
            embedding::launch_forward(&ids, &w, &w, Dropout::OFF, &x.inside);
            embedding::launch_backward(&x.inside, &ids, Dropout::OFF, &dwte.inside, &dwpe.inside);
            [(x, "x"), (dwte, "dwte"), (dwpe, "dwpe")].map(|(output, name)| output.values(name))
        };
        assert_eq!(run(&[2, 5, -1]), run(&[2, 4, 4]));
    });
}

#[test]
fn dropout_at_every_edge() {
    on_gpu_by_type(|device, f16| {
        for (rows, columns) in [(1, 1), (7, 67), (33, 128), (1, 1025)] {
            let x = Random(columns as u64).of(f16, rows * columns);
            // One product, then one rounding
            let product = |(x, factor): (&f64, f32)| f64::from(*x as f32 * factor);
            let want = x.iter().zip(DROPOUT.factors(rows, columns)).map(product);
            let want: Vec<f64> = want.map(|v| if f16 { to_half(v) } else { v }).collect();
            let got = values(dropout(tensor_of(f16, &x, [rows, columns], device), DROPOUT));
            assert_eq!(got, want, "f16 {f16} ({rows}, {columns})");
        }
    });
}

/// f32 whose f16 is at an edge: ties, both ways; the largest, and what rounds to infinity; subnormals and what vanishes.
fn edges_of_f16() -> Vec<f64> {
    let ulp = f64::from(f16::EPSILON); // of 1
    let least = 2f64.powi(-24);
    let mut edges = vec![0.0, 1.0, 0.1, 65504.0, 65519.0, 65520.0, 65536.0, 1e9, 3e38];
    for odd in [0.5, 1.5, 2.5] {
        edges.extend([-1e-3, 0.0, 1e-3].map(|off| 1.0 + (odd + off) * ulp)); // near a tie of normal numbers
        edges.extend([-1e-3, 0.0, 1e-3].map(|off| (odd + off) * least)); // ... and of subnormal ones
    }
    edges.extend([1e-8, 1023.0 * least, 1023.5 * least, 1024.0 * least]);
    let mut random = Random(23);
    edges.extend((0..500).map(|i| f64::from((random.next() * 2f64.powi(i % 44 - 26)) as f32)));
    let negative: Vec<f64> = edges.iter().map(|v| -v).collect();
    edges.into_iter().chain(negative).map(|v| f64::from(v as f32)).collect()
}

#[test]
fn the_cast_rounds_to_nearest_even_and_flushes_nothing() {
    let Some(device) = gpu_with_f16() else { return };
    let edges = edges_of_f16();
    let even = edges.len() / 4 * 4;
    // More in a row than a launch has slots, and no multiples of four between them
    let counts = [4, 8, even, 64, 12, 4, 16, 20, 1, 3, even, 1001, 512, 513];
    let inputs = counts.map(|count| &edges[edges.len() - count..]);
    let want = inputs.map(|x| x.iter().map(|v| f64::from(f16::from_f32(*v as f32))).collect::<Vec<_>>());
    let tensors = || inputs.map(|x| tensor::<1>(x, [x.len()], &device));
    assert_eq!(all_to_f16(tensors()).map(values).collect::<Vec<_>>(), want);
    assert_eq!(tensors().map(|x| values(to_f16(x))), want);
    for most in [1, 3, 7] {
        let input = tensors().map(primitive);
        let output = counts.map(|count| Guarded::of(true, [count], &device));
        let casts: Vec<_> = input.iter().zip(output.iter().map(|y| &y.inside)).collect();
        cast::launch(&casts, most);
        for (i, (y, want)) in output.into_iter().zip(&want).enumerate() {
            assert_eq!(y.values("y"), *want, "{most} slots, tensor {i}");
        }
    }
}

/// Logits and their gradients are rounded to f16 on the way, so f32 sums of them are not exact either.
#[test]
fn the_loss_in_f16_with_a_loss_scale() {
    let Some(device) = gpu_with_f16() else { return };
    let autodiff = device.clone().autodiff();
    const SCALE: f64 = 1024.0;
    // Columns that are no multiple of eight, nanoGPT's characters, and more logits than one chunk holds
    for (batch, time, c, v) in [(1, 1, 3, 2), (2, 7, 16, 13), (3, 33, 32, 65), (5, 420, 4, 32_768)] {
        let what = |part: &str| format!("({batch}, {time}, {c}, {v}) {part}");
        let mut random = Random(v as u64);
        let (x, w) = (random.halves(batch * time * c), random.halves(v * c));
        let mut targets: Vec<i32> = (0..batch * time).map(|_| random.below(v) as i32).collect();
        if time > 1 {
            targets[1] = -1;
            targets[batch * time - 1] = -1;
        }
        let (want, dx, dw) = twins::cross_entropy(&x, &w, &targets, c, v);
        let scaled = |d: &[f64]| d.iter().map(|d| d * SCALE).collect::<Vec<_>>();
        let run = || {
            let xt = tensor_of::<3>(true, &x, [batch, time, c], &autodiff).require_grad();
            let wt = tensor_of::<2>(true, &w, [v, c], &autodiff).require_grad();
            let ids = int_tensor(&targets, [batch, time], &autodiff);
            // Only the first element counts.
            let scale = tensor(&[SCALE, 7.0], [2], &autodiff);
            let loss = cross_entropy_scaled(xt.clone(), wt.clone(), ids, Some(scale));
            let grads = loss.backward();
            [values(loss.inner()), values(xt.grad(&grads).unwrap()), values(wt.grad(&grads).unwrap())]
        };
        let got = run();
        assert_close(&what("loss"), &got[0], &[want], 1e-3);
        for (part, got, want) in [("dx", &got[1], scaled(&dx)), ("dw", &got[2], scaled(&dw))] {
            let distance = twins::distance(got, &want);
            assert!(distance < 3e-3, "{}: {distance:e}", what(part));
        }
        assert_eq!(run(), got, "{}", what("differs from run to run"));
    }
}

#[test]
fn the_guards_notice_a_write_behind_an_output() {
    on_gpu(|device| {
        let (rows, c) = (3, 4);
        let [x, w] = [rows, 1].map(|rows| primitive(tensor(&vec![1.0; rows * c], [rows, c], device)));
        let short = Guarded::new([rows - 1, c], device);
        let [mean, rstd] = [(); 2].map(|()| Guarded::new([rows, 1], device));
        layer_norm::launch_forward(&x, &w, None, &short.inside, &mean.inside, &rstd.inside);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| short.values("y")));
        assert!(caught.is_err(), "a row behind the output went unnoticed");
    });
}
