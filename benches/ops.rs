//! Two tables a device: attention, and every other operation, ours and composed of Burn's in the same run.
//!
//! `cargo bench --bench ops -- [--device vulkan] [attention] [operations] [B,H,T,D ...]`: both tables, or those named; shapes are
//! attention's. Its TFLOP/s count 4 B H T² D / 2 forward and 2.5 times that backward, whatever a variant really computes, so that the
//! rows compare. Of the other operations a rate is the FLOPs of its products, or the bytes that it has to read and write once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use burn::backend::DispatchTensorKind;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use gpt_wgpu::device;
use gpt_wgpu::kernel::{self, Kernels};
use gpt_wgpu::ops::adamw::{AdamW, AdamWOps, launch_update};
use gpt_wgpu::ops::attention::AttentionOps;
use gpt_wgpu::ops::attention::tiles::{self, Variant};
use gpt_wgpu::ops::cast::CastOps;
use gpt_wgpu::ops::cross_entropy::CrossEntropyOps;
use gpt_wgpu::ops::dropout::{Dropout, DropoutOps};
use gpt_wgpu::ops::embedding::EmbeddingOps;
use gpt_wgpu::ops::layer_norm::LayerNormOps;
use gpt_wgpu::ops::linear::{Gelu, LinearOps};
use gpt_wgpu::ops::verdict::VERDICT;
use gpt_wgpu::ops::{Optional, Tensors};

type B = CubeBackend;

/// Batch, heads, time, head dimension: char-Shakespeare's, GPT-2's, and one long context.
const SHAPES: [[usize; 4]; 3] = [[64, 6, 256, 64], [16, 12, 1024, 64], [1, 12, 16384, 64]];

/// Batch, time, channels, vocabulary: char-Shakespeare's and GPT-2's.
const MODELS: [[usize; 4]; 2] = [[64, 256, 384, 65], [8, 1024, 768, 50304]];

fn main() -> Result<()> {
    let (mut spec, mut shapes, mut tables) = ("auto".to_string(), Vec::new(), Vec::new());
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--device" => spec = args.next().context("--device needs a value")?,
            "attention" | "operations" => tables.push(arg),
            text => {
                let numbers: Result<Vec<usize>, _> = text.split(',').map(str::parse).collect();
                match <[usize; 4]>::try_from(numbers.context("a shape is B,H,T,D")?) {
                    Ok(shape) => shapes.push(shape),
                    Err(_) => bail!("{text}: a shape is B,H,T,D"),
                }
            }
        }
    }
    let chosen = device::choose(spec.parse()?)?;
    println!("{chosen}");
    if chosen.adapter.is_none() {
        bail!("these are GPU kernels; name an adapter with --device");
    }
    let wants = |table: &str| tables.iter().any(|name| name == table) || (tables.is_empty() && shapes.is_empty());
    if wants("attention") || !shapes.is_empty() {
        println!(
            "| attention B,H,T,D | dtype | variant | forward ms | TFLOP/s | backward ms | TFLOP/s | memory MB | timer |"
        );
        println!("|---|---|---|---|---|---|---|---|---|");
        for &shape in if shapes.is_empty() { &SHAPES[..] } else { &shapes } {
            for dtype in [DType::F32, DType::F16] {
                rows(&chosen.device, shape, dtype)?;
            }
        }
    }
    if wants("operations") {
        println!("| operation | sizes | dtype | variant | ms | rate | timer |\n|---|---|---|---|---:|---:|---|");
        for model in MODELS {
            for dtype in [DType::F32, DType::F16] {
                operations(&chosen.device, model, dtype)?;
            }
            mixed(&chosen.device, model)?;
        }
    }
    Ok(())
}

fn primitive<const D: usize>(tensor: Tensor<D>) -> Result<CubeTensor> {
    match tensor.into_dispatch().kind {
        DispatchTensorKind::Cube(tensor) => Ok(tensor.float()),
        _ => bail!("not a GPU tensor"),
    }
}

/// A tensor of numbers in [-1, 1).
fn random(shape: &[usize], dtype: DType, device: &Device) -> Result<CubeTensor> {
    let mut state = 1u32;
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    let flat = [values.len()];
    let tensor = Tensor::<1>::from_data(TensorData::new(values, flat), device);
    let tensor = primitive(if dtype == DType::F16 { tensor.cast(FloatDType::F16) } else { tensor })?;
    let CubeTensor { client, device, handle, dtype, .. } = tensor;
    Ok(CubeTensor::new_contiguous(client, device, shape.to_vec().into(), handle, dtype))
}

/// The kinds of kernels of ours that serve a tensor, with their names.
fn ours(tensor: &CubeTensor) -> Vec<(Kernels, String)> {
    let supported = tiles::supported(&kernel::capabilities(tensor), tensor.dtype == DType::F16);
    let mut choices = vec![(Kernels::Scalar, "scalar".to_string())];
    if let Some(Variant::Coop { edge, f16 }) = supported.iter().find(|v| matches!(v, Variant::Coop { .. })) {
        choices.push((Kernels::Coop, format!("coop {edge}, {} products", if *f16 { "f16" } else { "f32" })));
    }
    choices
}

fn rows(device: &Device, shape: [usize; 4], dtype: DType) -> Result<()> {
    let [batch, heads, time, head_dim] = shape;
    let f16 = dtype == DType::F16;
    let random = |width: usize| random(&[batch, time, width], dtype, device);
    let qkv = random(3 * heads * head_dim)?;
    let dout = random(heads * head_dim)?;
    let mut choices = ours(&qkv);
    // The composed version's scores (B, H, T, T) are one buffer.
    let scores = (batch * heads * time * time * dtype.size()) as u64;
    if scores <= kernel::largest_buffer(&qkv) && !f16 {
        choices.push((Kernels::Composed, "composed".to_string()));
    }
    let flops = 2.0 * (batch * heads * head_dim) as f64 * (time as f64).powi(2);
    for (choice, name) in choices {
        kernel::choose(choice);
        device.memory_cleanup();
        let off = Dropout::OFF;
        let (out, lse) = <CubeBackend as AttentionOps>::causal_attention(qkv.clone(), heads, off, false);
        let (forward, timer) = time_of(device, || {
            let (out, _) = <CubeBackend as AttentionOps>::causal_attention(qkv.clone(), heads, off, false);
            drop(out);
        })?;
        let (backward, _) = time_of(device, || {
            let (out, lse) = (out.clone(), lse.clone());
            let dqkv = <CubeBackend as AttentionOps>::causal_attention_backward(
                dout.clone(),
                qkv.clone(),
                out,
                lse,
                heads,
                off,
                None,
            );
            drop(dqkv);
        })?;
        let memory = device.memory_pool_usage().map_or("-".into(), |m| format!("{:.0}", m.bytes_reserved as f64 / 1e6));
        println!(
            "| {batch},{heads},{time},{head_dim} | {} | {name} | {forward:.3} | {:.1} | {backward:.3} | {:.1} | {memory} | {timer} |",
            if f16 { "f16" } else { "f32" },
            flops / forward / 1e9,
            2.5 * flops / backward / 1e9,
        );
    }
    Ok(())
}

/// What an operation does at least.
#[derive(Clone, Copy)]
enum Least {
    /// Floating-point operations of its products.
    Flops(usize),
    /// Bytes that it reads and writes once.
    Bytes(usize),
}

/// Prints a row: name, type of activations and variant of an operation, its sizes, and what it takes.
fn operation(
    device: &Device,
    [name, dtype, variant]: [&str; 3],
    sizes: &[usize],
    least: Least,
    call: &(dyn Fn() + Sync),
) -> Result<()> {
    let (ms, timer) = time_of(device, call)?;
    let sizes = sizes.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
    let rate = match least {
        Least::Flops(flops) => format!("{:.1} TFLOP/s", flops as f64 / ms / 1e9),
        Least::Bytes(bytes) => format!("{:.0} GB/s", bytes as f64 / ms / 1e6),
    };
    println!("| {name} | {sizes} | {dtype} | {variant} | {ms:.4} | {rate} | {timer} |");
    Ok(())
}

/// A row for each operation inside of half a block of f32 that stores what only products read in f16, where products round to it.
fn mixed(device: &Device, [batch, time, c, _]: [usize; 4]) -> Result<()> {
    const HELD: Option<f32> = Some(16384.0);
    let rows = batch * time;
    let whole = |shape: &[usize]| random(shape, DType::F32, device);
    let half = |shape: &[usize]| random(shape, DType::F16, device);
    let x = whole(&[rows, c])?;
    let Some((choice, variant)) = ours(&x).into_iter().find(|(choice, _)| *choice == Kernels::Coop) else {
        return Ok(());
    };
    kernel::choose(choice);
    if !kernel::variant(&x).is_some_and(Variant::rounds_f32) {
        return Ok(());
    }
    let row = |name: &str, sizes: &[usize], least: Least, call: &(dyn Fn() + Sync)| {
        operation(device, [name, "f32, f16", &variant], sizes, least, call)
    };
    let dropout = Dropout { probability: 0.2, seed: 1, step: 0, site: 1 };
    let (one, flops) = (rows * c, |outputs: usize, inputs: usize| Least::Flops(2 * rows * inputs * outputs));
    let weight = whole(&[c])?;
    row("layer norm", &[rows, c], Least::Bytes(6 * one), &|| {
        drop(B::layer_norm_forward(x.clone(), weight.clone(), Optional::Absent, true));
    })?;
    for (name, dropout) in [("gradient, rounded", Dropout::OFF), ("gradient, dropped and rounded", dropout)] {
        row(name, &[rows, c], Least::Bytes(6 * one), &|| drop(B::dropout(x.clone(), dropout, HELD)))?;
    }
    let (x16, dy16, hidden) = (half(&[rows, c])?, half(&[rows, c])?, whole(&[rows, 4 * c])?);
    let (wide16, w_in, w_out) = (half(&[rows, 4 * c])?, half(&[4 * c, c])?, half(&[c, 4 * c])?);
    row("gelu(x wT)", &[rows, 4 * c, c], flops(4 * c, c), &|| {
        drop(B::linear_gelu(x16.clone(), w_in.clone(), Optional::Absent, Gelu::Erf, true));
    })?;
    for (name, dropout) in [("r + x wT", Dropout::OFF), ("r + dropout(x wT)", dropout)] {
        row(name, &[rows, c, 4 * c], flops(c, 4 * c), &|| {
            drop(B::linear_residual(wide16.clone(), w_out.clone(), Optional::Absent, x.clone(), dropout));
        })?;
    }
    row("dy w", &[rows, 4 * c, c], flops(c, 4 * c), &|| drop(B::linear_dx(dy16.clone(), w_out.clone(), HELD)))?;
    row("dy gelu'(h)", &[rows, 4 * c], Least::Bytes(40 * one), &|| {
        drop(B::gelu_dh(hidden.clone(), hidden.clone(), Gelu::Erf, HELD));
    })?;
    row("dyT x", &[c, 4 * c, rows], flops(c, 4 * c), &|| drop(B::linear_dw(dy16.clone(), wide16.clone(), HELD)))?;
    row("dyT heads", &[c, c, rows], flops(c, c), &|| drop(B::linear_dw(dy16.clone(), x.clone(), HELD)))?;
    row("sum of rows", &[rows, 4 * c], Least::Bytes(8 * one), &|| drop(B::linear_db(wide16.clone(), HELD)))?;
    let heads = c / 64;
    let (qkv, dout) = (half(&[batch, time, 3 * c])?, whole(&[batch, time, c])?);
    let (out, lse) = B::causal_attention(qkv.clone(), heads, Dropout::OFF, true);
    let attention = 2 * rows * time * c;
    row("attention", &[batch, heads, time, 64], Least::Flops(attention), &|| {
        drop(B::causal_attention(qkv.clone(), heads, Dropout::OFF, true));
    })?;
    row("attention's gradients", &[batch, heads, time, 64], Least::Flops(attention / 2 * 5), &|| {
        let (dout, out, lse) = (dout.clone(), out.clone(), lse.clone());
        drop(B::causal_attention_backward(dout, qkv.clone(), out, lse, heads, Dropout::OFF, HELD));
    })?;
    device.memory_cleanup();
    Ok(())
}

/// A row for each operation but attention, at a model's sizes (batch, time, channels, vocabulary) and in its type of activations.
fn operations(device: &Device, [batch, time, c, vocab]: [usize; 4], dtype: DType) -> Result<()> {
    const F32: usize = size_of::<f32>();
    let f16 = dtype == DType::F16;
    let (rows, elem) = (batch * time, dtype.size());
    let stored = |shape: &[usize]| random(shape, dtype, device);
    let single = |shape: &[usize]| random(shape, DType::F32, device);
    let dropout = Dropout { probability: 0.2, seed: 1, step: 0, site: 1 };
    let dtype_name = if f16 { "f16" } else { "f32" };
    let row = |name: &str, sizes: &[usize], variant: &str, least: Least, call: &(dyn Fn() + Sync)| {
        operation(device, [name, dtype_name, variant], sizes, least, call)
    };
    let composed = (Kernels::Composed, "composed".to_string());

    // Products: of a block's four layers, out of `inputs` channels.
    let x = stored(&[rows, c])?;
    let mut choices = ours(&x);
    if !f16 {
        choices.push(composed.clone());
    }
    for (choice, variant) in &choices {
        kernel::choose(*choice);
        for (outputs, inputs) in [(3 * c, c), (c, c), (4 * c, c), (c, 4 * c)] {
            let (x, dy, w) = (stored(&[rows, inputs])?, stored(&[rows, outputs])?, stored(&[outputs, inputs])?);
            let least = Least::Flops(2 * rows * inputs * outputs);
            let forward = [rows, outputs, inputs];
            row("x wT", &forward, variant, least, &|| {
                drop(B::linear_forward(x.clone(), w.clone(), Optional::Absent));
            })?;
            if outputs == 4 * c {
                row("gelu(x wT)", &forward, variant, least, &|| {
                    drop(B::linear_gelu(x.clone(), w.clone(), Optional::Absent, Gelu::Erf, false));
                })?;
            }
            if outputs == c {
                let residual = stored(&[rows, c])?;
                for (name, dropout) in [("r + x wT", Dropout::OFF), ("r + dropout(x wT)", dropout)] {
                    row(name, &forward, variant, least, &|| {
                        let (x, w, residual) = (x.clone(), w.clone(), residual.clone());
                        drop(B::linear_residual(x, w, Optional::Absent, residual, dropout));
                    })?;
                }
            }
            let backward = [rows, inputs, outputs];
            row("dy w", &backward, variant, least, &|| drop(B::linear_dx(dy.clone(), w.clone(), None)))?;
            if inputs == 4 * c {
                row("(dy w) gelu'(h)", &backward, variant, least, &|| {
                    drop(B::linear_dh(dy.clone(), w.clone(), x.clone(), Gelu::Erf, None));
                })?;
            }
            row("dyT x", &[outputs, inputs, rows], variant, least, &|| {
                drop(B::linear_dw(dy.clone(), x.clone(), None))
            })?;
        }
        let (w, tokens) = (stored(&[vocab, c])?, tokens(rows, vocab, device)?);
        row("loss and its gradients", &[rows, vocab, c], variant, Least::Flops(6 * rows * vocab * c), &|| {
            drop(B::cross_entropy_gradients(x.clone(), w.clone(), tokens.clone(), Optional::Absent));
        })?;
        device.memory_cleanup();
    }

    // What memory bounds; it has one kind of kernels.
    for (choice, variant) in [(Kernels::Scalar, "ours"), (Kernels::Composed, "composed")] {
        if f16 && choice == Kernels::Composed {
            continue;
        }
        kernel::choose(choice);
        let (dy, hidden, w) = (stored(&[rows, c])?, stored(&[rows, 4 * c])?, single(&[c])?);
        let (one, wide) = (rows * c * elem, 4 * rows * c * elem);
        row("layer norm", &[rows, c], variant, Least::Bytes(2 * one), &|| {
            drop(B::layer_norm_forward(x.clone(), w.clone(), Optional::Absent, false));
        })?;
        let (_, mean, rstd) = B::layer_norm_forward(x.clone(), w.clone(), Optional::Absent, false);
        row("layer norm's gradients, added", &[rows, c], variant, Least::Bytes(4 * one), &|| {
            let past = Optional::Present(dy.clone());
            drop(B::layer_norm_backward(dy.clone(), x.clone(), w.clone(), mean.clone(), rstd.clone(), past));
        })?;
        row("dy gelu'(h)", &[rows, 4 * c], variant, Least::Bytes(3 * wide), &|| {
            drop(B::gelu_dh(hidden.clone(), hidden.clone(), Gelu::Erf, None));
        })?;
        row("sum of rows", &[rows, 4 * c], variant, Least::Bytes(wide), &|| drop(B::linear_db(hidden.clone(), None)))?;
        if choice != Kernels::Composed {
            row("dropout", &[rows, c], variant, Least::Bytes(2 * one), &|| drop(B::dropout(x.clone(), dropout, None)))?;
        }
        let (wte, wpe) = (single(&[vocab, c])?, single(&[time, c])?);
        let tokens = tokens(rows, vocab, device)?;
        let by_batch = CubeTensor::new_contiguous(
            tokens.client.clone(),
            tokens.device.clone(),
            [batch, time].into(),
            tokens.handle.clone(),
            tokens.dtype,
        );
        row("embedding", &[rows, c], variant, Least::Bytes(rows * c * F32 + one), &|| {
            drop(B::embed(by_batch.clone(), wte.clone(), wpe.clone(), Dropout::OFF, f16));
        })?;
        let dx = stored(&[batch, time, c])?;
        row("embedding's gradients", &[vocab, c], variant, Least::Bytes(one + (vocab + time) * c * F32), &|| {
            drop(B::embed_backward(dx.clone(), by_batch.clone(), vocab, time, Dropout::OFF));
        })?;

        // The optimizer's, over the weights of a block, in f32 whatever the activations are.
        if f16 {
            let weights = single(&[12 * c, c])?;
            row("cast", &[12 * c, c], variant, Least::Bytes(12 * c * c * (F32 + elem)), &|| {
                drop(B::to_f16(Tensors(vec![weights.clone()])));
            })?;
            continue;
        }
        let weights = || single(&[12 * c, c]);
        let [p, g, m, v] = [weights()?, weights()?, weights()?, weights()?];
        row("sum of squares", &[12 * c, c], variant, Least::Bytes(12 * c * c * F32), &|| {
            drop(B::square_sums(Tensors(vec![g.clone()])));
        })?;
        let verdict = single(&[VERDICT])?;
        let hyper = AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8 };
        row("adamw", &[12 * c, c], variant, Least::Bytes(7 * 12 * c * c * F32), &|| match choice {
            // As in training, where nobody else holds the tensors: in place.
            Kernels::Scalar => launch_update(&[([&p, &g, &m, &v], true)], &verdict, hyper, 1),
            _ => {
                let [p, g, m, v] = [&p, &g, &m, &v].map(|tensor| Tensors(vec![tensor.clone()]));
                drop(B::adamw(p, g, m, v, verdict.clone(), vec![true], hyper));
            }
        })?;
    }
    device.memory_cleanup();
    Ok(())
}

/// Tokens (rows) below `vocab`.
fn tokens(rows: usize, vocab: usize, device: &Device) -> Result<CubeTensor> {
    let ids: Vec<i32> = (0..rows).map(|i| (i * 7919 % vocab) as i32).collect();
    match Tensor::<1, Int>::from_data(TensorData::new(ids, [rows]), device).into_dispatch().kind {
        DispatchTensorKind::Cube(tensor) => Ok(tensor.int()),
        _ => bail!("not a GPU tensor"),
    }
}

/// The least of several rounds, milliseconds a call, and which clock measured it.
///
/// A GPU with nothing to do lowers its clock, an H200 to a sixth, and takes its time to raise it again: rounds are long, and some
/// go before.
fn time_of(device: &Device, call: impl Fn() + Sync) -> Result<(f64, String)> {
    const ROUNDS: usize = 7;
    const ROUND: Duration = Duration::from_millis(20);
    const WARM_UP: Duration = Duration::from_millis(200);
    let run = |calls: u32| -> Result<Duration> {
        let start = Instant::now();
        (0..calls).for_each(|_| call());
        device::wait(device)?;
        Ok(start.elapsed())
    };
    run(1)?; // compiles
    let one = run(1)?.max(Duration::from_micros(1));
    let calls = (ROUND.as_secs_f64() / one.as_secs_f64()).clamp(1.0, 200.0) as u32;
    let start = Instant::now();
    while start.elapsed() < WARM_UP {
        run(calls)?;
    }
    let (mut best, mut timer) = (f64::INFINITY, String::new());
    for _ in 0..ROUNDS {
        let round = || (0..calls).for_each(|_| call());
        let ((), profile) = device.profile(round).map_err(|e| anyhow::anyhow!("{e:?}"))?;
        let method = profile.timing_method();
        device::wait(device)?;
        let ticks = pollster::block_on(profile.resolve()).context("the profile is empty")?;
        timer = format!("{method:?}").to_lowercase();
        best = best.min(ticks.duration().as_secs_f64() * 1e3 / f64::from(calls));
    }
    Ok((best, timer))
}
