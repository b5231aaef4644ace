//! What a device can do at most: its matrix peak and its bandwidth as measured here, and the peak that its vendor published.

use std::time::Instant;

use anyhow::Result;
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::device::{Chosen, wait};
use crate::ops::linear::linear;
use crate::report::Dtype;

/// The fastest of several runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Peak {
    /// FLOP/s, or bytes/s.
    pub per_second: f64,
    /// How it was measured.
    pub how: String,
}

/// A product that takes longer ends the search for a faster one: a software rasteriser is not to be kept busy for minutes.
const LONG: f64 = 0.1;

/// Rounds, of which the fastest counts, and how long one lasts, s.
const ROUNDS: usize = 5;
const ROUND: f64 = 0.02;

/// The matrix peak in FLOP/s for tensors of f16 (or f32): the fastest of square products of growing size, made by the model's own
/// linear layer.
///
/// # Errors
/// When the device fails.
pub fn matrix(chosen: &Chosen, f16: bool) -> Result<Peak> {
    let device = &chosen.device;
    let storage = if f16 { " in f16" } else { "" };
    let mut best = Peak { per_second: 0.0, how: String::new() };
    for n in [256, 512, 1024, 2048, 4096] {
        let operand = || {
            let values = random::<2>([n, n], device);
            if f16 { values.cast(DType::F16) } else { values }
        };
        let (x, w) = (operand(), operand());
        let seconds = fastest(device, || drop(linear(x.clone(), w.clone(), None)))?;
        let flops = 2.0 * (n as f64).powi(3) / seconds;
        if flops > best.per_second {
            let how = format!("the model's own linear layer{storage}, {n}x{n}x{n}, fastest of {ROUNDS} rounds");
            best = Peak { per_second: flops, how };
        }
        if seconds > LONG {
            break;
        }
    }
    Ok(best)
}

/// The bandwidth in bytes/s: an array larger than any cache is read, doubled and written.
///
/// # Errors
/// When the device fails.
pub fn bandwidth(chosen: &Chosen) -> Result<Peak> {
    // A GPU's level-2 cache holds up to 100 MB; a CPU is not to wait for a gigabyte.
    let software = chosen.adapter.as_ref().is_none_or(|adapter| adapter.kind == "software");
    let megabytes = if software { 64 } else { 512 };
    let elements = megabytes << 18;
    let x = random::<1>([1 << 18], &chosen.device).repeat(&[megabytes]);
    let seconds = fastest(&chosen.device, || drop(x.clone().mul_scalar(2.0)))?;
    let how = format!("{megabytes} MiB read and as many written, fastest of {ROUNDS} rounds");
    Ok(Peak { per_second: 8.0 * elements as f64 / seconds, how })
}

/// Values in [-1, 1), since products of zeros take less power and run faster.
fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    let mut state = 1u32;
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// The least seconds that one call took, over rounds of as many calls as fill [`ROUND`].
fn fastest(device: &Device, call: impl Fn()) -> Result<f64> {
    let time = |calls: u32| -> Result<f64> {
        let start = Instant::now();
        (0..calls).for_each(|_| call());
        wait(device)?;
        Ok(start.elapsed().as_secs_f64() / f64::from(calls))
    };
    time(1)?; // compiles
    let mut best = time(1)?;
    let calls = (ROUND / best).clamp(1.0, 100.0) as u32;
    for _ in 1..ROUNDS {
        best = best.min(time(calls)?);
    }
    Ok(best)
}

/// Dense peaks in TFLOP/s: f32 without tensor cores, and f16 products with f32 sums on them.
struct Published {
    name: &'static str,
    f32: f64,
    f16: Option<f64>,
    source: &'static str,
}

#[rustfmt::skip] // a table
const PUBLISHED: [Published; 15] = {
    const fn row(name: &'static str, f32: f64, f16: Option<f64>, source: &'static str) -> Published {
        Published { name, f32, f16, source }
    }
    [
        row("NVIDIA H200", 67.0, Some(989.5), "NVIDIA's H200 data sheet"),
        row("NVIDIA H100 80GB HBM3", 67.0, Some(989.5), "NVIDIA's H100 data sheet"),
        row("NVIDIA A100-SXM4-40GB", 19.5, Some(312.0), "NVIDIA's A100 data sheet"),
        row("NVIDIA A100-SXM4-80GB", 19.5, Some(312.0), "NVIDIA's A100 data sheet"),
        row("NVIDIA A100 80GB PCIe", 19.5, Some(312.0), "NVIDIA's A100 data sheet"),
        row("NVIDIA L40S", 91.6, Some(362.0), "NVIDIA's L40S data sheet"),
        row("NVIDIA L4", 30.3, Some(121.0), "NVIDIA's L4 data sheet"),
        row("Tesla T4", 8.1, Some(65.0), "NVIDIA's T4 data sheet"),
        row("NVIDIA GeForce RTX 4090", 82.6, Some(165.2), "NVIDIA's Ada white paper"),
        row("NVIDIA GeForce RTX 3090", 35.6, Some(71.0), "NVIDIA's GA102 white paper"),
        // Apple publishes f32 only, and none from the M2 Pro on. Its GPUs multiply f16 at f32's rate.
        row("Apple M1", 2.6, None, "Apple's announcement"),
        row("Apple M1 Pro", 5.2, None, "Apple's announcement"),
        row("Apple M1 Max", 10.4, None, "Apple's announcement"),
        row("Apple M1 Ultra", 21.0, None, "Apple's announcement"),
        row("Apple M2", 3.6, None, "Apple's announcement"),
    ]
};

/// The published peak of an adapter of exactly this name, FLOP/s: a name that only resembles another (a laptop's version)
/// has other numbers.
pub fn published(name: &str, dtype: Dtype) -> Option<Peak> {
    let row = PUBLISHED.iter().find(|row| row.name == name)?;
    let (tera, what) = match dtype {
        Dtype::Fp32 => (row.f32, "f32"),
        Dtype::Fp16 => (row.f16?, "f16 with f32 sums"),
        Dtype::Tf32 | Dtype::Bf16 => return None,
    };
    Some(Peak { per_second: tera * 1e12, how: format!("{}, dense {what}", row.source) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_peaks_are_found_by_the_whole_name() {
        assert_eq!(published("NVIDIA H200", Dtype::Fp32).unwrap().per_second, 67e12);
        assert_eq!(published("Apple M1 Max", Dtype::Fp32).unwrap().per_second, 10.4e12);
        assert_eq!(published("NVIDIA GeForce RTX 4090 Laptop GPU", Dtype::Fp32), None);
        assert_eq!(published("Apple M2", Dtype::Fp16), None);
    }
}
