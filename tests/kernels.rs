//! The kernels of layer norm, embedding and AdamW on the adapter present against the f64 twins: every edge of their tiles,
//! guards around every output, outputs that start as NaN, and equal bits from equal runs.

mod common;

use burn::tensor::Device;
use burn_cubecl::tensor::CubeTensor;
use common::guarded::{Guarded, primitive};
use common::twins::{self, EmbeddingShape};
use common::*;
use gpt_wgpu::ops::adamw::{self, AdamW, global_norm};
use gpt_wgpu::ops::dropout::Dropout;
use gpt_wgpu::ops::{embedding, layer_norm};

const DROPOUT: Dropout = Dropout { probability: 0.25, seed: 0xfeed_beef_cafe, step: 3, site: 0x101 };

fn on_gpu(test: impl Fn(&Device)) {
    match gpu() {
        Some(device) => test(&device),
        None => eprintln!("SKIPPED: no GPU adapter"),
    }
}

fn int_primitive<const D: usize>(values: &[i32], shape: [usize; D], device: &Device) -> CubeTensor {
    match int_tensor(values, shape, device).into_dispatch().kind {
        burn::backend::DispatchTensorKind::Cube(tensor) => tensor.int(),
        _ => panic!("not a GPU tensor"),
    }
}

#[test]
fn layer_norm_at_every_edge() {
    on_gpu(|device| {
        let columns = [1, 3, 4, 5, 64, 128, 384, 768, 1600];
        let mut shapes: Vec<_> = [1, 2, 63, 64, 65, 257, 1009].iter().flat_map(|r| columns.map(|c| (*r, c))).collect();
        shapes.extend([(3, 8191), (3, 8192), (2500, 36)]);
        for (rows, c) in shapes {
            let what = |part: &str| format!("({rows}, {c}) {part}");
            let mut random = Random((rows * 131 + c) as u64);
            // Far from zero a variance made as a difference of squares would lose its digits; only few rows, since the rounding
            // of their means adds up in dw. A handful of columns is kept apart: where they lie close together f32 is not enough.
            let offset = if c >= 64 && rows <= 2 { 100.0 } else { 0.0 };
            let apart = |i: usize| if c < 64 { 3.0 * (i % c) as f64 } else { 0.0 };
            let x = random.vec(rows * c).into_iter().enumerate();
            let x: Vec<f64> = x.map(|(i, v)| f64::from((v + offset + apart(i)) as f32)).collect();
            let (w, b, dy) = (random.vec(c), random.vec(c), random.vec(rows * c));
            let (want, want_mean, want_rstd) = twins::layer_norm(&x, &w, Some(&b), c);
            let [want_dx, want_dw, want_db] = twins::layer_norm_backward(&dy, &x, &w, c);

            let put = |values: &[f64]| primitive(tensor(values, [values.len() / c, c], device));
            let [x, w, b, dy] = [&x, &w, &b, &dy].map(|values| put(values));
            let run = || {
                let [y, dx] = [(); 2].map(|()| Guarded::new([rows, c], device));
                let [mean, rstd] = [(); 2].map(|()| Guarded::new([rows, 1], device));
                let [dw, db] = [(); 2].map(|()| Guarded::new([c], device));
                layer_norm::launch_forward(&x, &w, Some(&b), &y.inside, &mean.inside, &rstd.inside);
                let gradients = [&dx.inside, &dw.inside, &db.inside];
                layer_norm::launch_backward(&dy, &x, &w, &mean.inside, &rstd.inside, gradients);
                [(y, "y"), (mean, "mean"), (rstd, "rstd"), (dx, "dx"), (dw, "dw"), (db, "db")]
                    .map(|(output, name)| output.values(&what(name)))
            };
            let got = run();
            let near = if offset > 0.0 { 1e-4 } else { 2e-5 }; // a mean of 100 is rounded to 2⁻¹⁸
            assert_close(&what("y"), &got[0], &want, near);
            assert_close(&what("mean"), &got[1], &want_mean, 1e-6);
            assert_close(&what("rstd"), &got[2], &want_rstd, near);
            assert_close(&what("dx"), &got[3], &want_dx, near);
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
    on_gpu(|device| {
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
                let what = |part: &str| format!("B {batch} {s:?} dropout {} {part}", dropout.is_on());
                let mut random = Random((time + vocab) as u64);
                let (wte, wpe) = (random.vec(vocab * c), random.vec(block_size * c));
                let dx = random.vec(batch * time * c);
                let ids = tokens(batch * time, vocab, &mut random);
                let want_x = twins::embedding(&ids, &wte, &wpe, s, dropout);
                let [want_dwte, want_dwpe] = twins::embedding_backward(&dx, &ids, s, dropout);

                let ids = int_primitive(&ids, [batch, time], device);
                let [wte, wpe] = [&wte, &wpe].map(|w| primitive(tensor(w, [w.len() / c, c], device)));
                let dx = primitive(tensor(&dx, [batch, time, c], device));
                let run = || {
                    let x = Guarded::new([batch, time, c], device);
                    let (dwte, dwpe) = (Guarded::new([vocab, c], device), Guarded::new([block_size, c], device));
                    embedding::launch_forward(&ids, &wte, &wpe, dropout, &x.inside);
                    embedding::launch_backward(&dx, &ids, dropout, &dwte.inside, &dwpe.inside);
                    [(x, "x"), (dwte, "dwte"), (dwpe, "dwpe")].map(|(output, name)| output.values(&what(name)))
                };
                let got = run();
                let dropped = |values: &[f64]| values.iter().map(|v| *v == 0.0).collect::<Vec<_>>();
                assert_eq!(dropped(&got[0]), dropped(&want_x), "{}", what("mask"));
                assert_close(&what("x"), &got[0], &want_x, 1e-6);
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

fn hyper(step: u64, weight_decay: f64) -> AdamW {
    AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay, step }
}

#[test]
fn adamw_steps_in_place() {
    on_gpu(|device| {
        for count in [1, 3, 4, 5, 64, 1023, 1024, 1025, 100_003] {
            let mut random = Random(count as u64);
            let mut p = random.vec(count);
            let (mut m, mut v) = (vec![0.0; count], vec![0.0; count]);
            let [gp, gm, gv] = [&p, &m, &v].map(|content| Guarded::holding(content, [count], device));
            let scale = primitive(tensor(&[0.37], [1], device));
            for step in 1..=5 {
                let g = random.vec(count);
                let hyper = hyper(step, if step % 2 == 0 { 0.1 } else { 0.0 });
                twins::adamw(&mut p, &g, &mut m, &mut v, f64::from(0.37f32), hyper);
                let g = primitive(tensor(&g, [count], device));
                adamw::launch_update(&gp.inside, &g, &gm.inside, &gv.inside, &scale, hyper);
            }
            for (got, want, name) in [(gp, p, "p"), (gm, m, "m"), (gv, v, "v")] {
                let what = format!("{count} {name}");
                assert_close(&what, &got.values(&what), &want, 1e-6);
            }
        }
    });
}

/// In place must not mean under somebody's hands: a checkpoint being written holds the tensors too.
#[test]
fn adamw_leaves_a_shared_tensor_alone() {
    for (name, device) in devices() {
        let mut random = Random(5);
        let [p, g, m, v] = [(); 4].map(|()| random.vec(77));
        let v: Vec<f64> = v.iter().map(|v| v.abs()).collect();
        let [pt, gt, mt, vt] = [&p, &g, &m, &v].map(|values| tensor::<1>(values, [77], &device));
        let held = [pt.clone(), mt.clone(), vt.clone()];
        let scale = tensor(&[1.0], [1], &device);
        let updated = adamw::adamw(pt, gt, mt, vt, scale, hyper(3, 0.1));
        for (held, before) in held.into_iter().zip([&p, &m, &v]) {
            assert_eq!(&values(held), before, "{name}");
        }
        assert_ne!(values(updated.0), p, "{name}");
    }
}

#[test]
fn the_norm_and_the_scale_of_all_gradients() {
    for (name, device) in devices() {
        // Around a workgroup's share, and one gradient with more than the most workgroups.
        let counts = [1, 3, 4, 8191, 8192, 8193, 40_000, if name == "gpu" { 8_400_001 } else { 100_000 }];
        let mut random = Random(11);
        let gradients: Vec<_> = counts.iter().map(|&count| random.vec(count)).collect();
        let want = gradients.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let tensors: Vec<_> = gradients.iter().map(|g| tensor::<1>(g, [g.len()], &device)).collect();
        for limit in [0.0, 1.0, 1e6] {
            let run = || {
                let (norm, scale) = global_norm(tensors.iter(), limit).unwrap();
                (values(norm), values(scale))
            };
            let (norm, scale) = run();
            let what = format!("{name} limit {limit}");
            assert_close(&format!("{what}: norm"), &norm, &[want], 1e-6);
            let factor = if limit == 0.0 { 1.0 } else { (limit / (want + 1e-6)).min(1.0) };
            assert_close(&format!("{what}: scale"), &[scale[0] / factor], &[1.0], 1e-6);
            assert_eq!(run(), (norm, scale), "{what}: differs from run to run");
        }
        assert!(global_norm([].iter(), 1.0).is_none());
    }
}

#[test]
fn the_norms_kernels_stay_inside_their_outputs() {
    on_gpu(|device| {
        let g = Random(2).vec(20_000);
        let gradient = primitive(tensor(&g, [20_000], device));
        let sums = Guarded::holding(&[0.0; 5], [5], device);
        let (norm, scale) = (Guarded::new([1], device), Guarded::new([1], device));
        adamw::launch_square_sums(&gradient, &sums.inside, 1);
        adamw::launch_norm(&sums.inside, 2.0, &norm.inside, &scale.inside);
        let want = g.iter().map(|g| g * g).sum::<f64>();
        let sums = sums.values("sums");
        assert_eq!((sums[0], sums[4]), (0.0, 0.0), "the places of other gradients");
        assert_close("sums", &[sums.iter().sum::<f64>() / want], &[1.0], 1e-6);
        assert_close("norm", &norm.values("norm"), &[want.sqrt()], 1e-6);
        assert_close("scale", &scale.values("scale"), &[2.0 / want.sqrt()], 1e-6);
    });
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
