//! One table a device: attention forward and backward, fused and composed in the same run.
//!
//! `cargo bench --bench ops -- [--device vulkan] [B,H,T,D ...]`. TFLOP/s count 4 B H T² D / 2 forward and 2.5 times that
//! backward, whatever a variant really computes, so that the rows compare.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use burn::backend::DispatchTensorKind;
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use gpt_wgpu::device;
use gpt_wgpu::kernel::{self, Kernels};
use gpt_wgpu::ops::attention::AttentionOps;
use gpt_wgpu::ops::attention::tiles::{self, Variant};
use gpt_wgpu::ops::dropout::Dropout;

/// Batch, heads, time, head dimension: char-Shakespeare's, GPT-2's, and one long context.
const SHAPES: [[usize; 4]; 3] = [[64, 6, 256, 64], [16, 12, 1024, 64], [1, 12, 16384, 64]];

fn main() -> Result<()> {
    let (mut spec, mut shapes) = ("auto".to_string(), Vec::new());
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--device" => spec = args.next().context("--device needs a value")?,
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
    println!(
        "| attention B,H,T,D | dtype | variant | forward ms | TFLOP/s | backward ms | TFLOP/s | memory MB | timer |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for shape in if shapes.is_empty() { SHAPES.to_vec() } else { shapes } {
        for dtype in [DType::F32, DType::F16] {
            rows(&chosen.device, shape, dtype)?;
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

fn rows(device: &Device, shape: [usize; 4], dtype: DType) -> Result<()> {
    let [batch, heads, time, head_dim] = shape;
    let f16 = dtype == DType::F16;
    let random = |width: usize| -> Result<CubeTensor> {
        let mut state = 1u32;
        let values: Vec<f32> = (0..batch * time * width)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        let tensor = Tensor::<3>::from_data(TensorData::new(values, [batch, time, width]), device);
        primitive(if f16 { tensor.cast(FloatDType::F16) } else { tensor })
    };
    let qkv = random(3 * heads * head_dim)?;
    let dout = random(heads * head_dim)?;
    let supported = tiles::supported(&kernel::capabilities(&qkv), f16);
    let mut choices = vec![(Kernels::Scalar, "scalar".to_string())];
    if let Some(Variant::Coop { edge, f16 }) = supported.iter().find(|v| matches!(v, Variant::Coop { .. })) {
        choices.push((Kernels::Coop, format!("coop {edge}, {} products", if *f16 { "f16" } else { "f32" })));
    }
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
        let (out, lse) = <CubeBackend as AttentionOps>::causal_attention(qkv.clone(), heads, off);
        let (forward, timer) = time_of(device, || {
            let (out, _) = <CubeBackend as AttentionOps>::causal_attention(qkv.clone(), heads, off);
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
