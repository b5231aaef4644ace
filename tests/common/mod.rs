//! What the tests share: the devices, and the library's f64 twins with their comparer.

#![allow(dead_code, unused_imports)] // each test binary uses its part

pub mod guarded;

use burn::tensor::{Device, Int, Tensor, TensorData};
use gpt_wgpu::device::{self, DeviceSpec};
pub use gpt_wgpu::twins::{self, difference};

/// The devices of this machine that tests run on: the CPU, and the adapter that `GPT_WGPU_DEVICE` names (vulkan without it).
///
/// # Panics
/// When there is no adapter and `GPT_WGPU_REQUIRE_GPU=1`: a job that should have one must not pass without it.
pub fn devices() -> Vec<(&'static str, Device)> {
    let mut devices = vec![("cpu", Device::flex())];
    match gpu() {
        Some(device) => devices.push(("gpu", device)),
        None => eprintln!("SKIPPED on the GPU: no adapter (scripts/test installs lavapipe on Debian and Ubuntu)"),
    }
    devices
}

/// The adapter alone.
pub fn gpu() -> Option<Device> {
    static GPU: std::sync::OnceLock<Option<Device>> = std::sync::OnceLock::new();
    GPU.get_or_init(|| {
        let name = std::env::var("GPT_WGPU_DEVICE").unwrap_or_else(|_| "vulkan".into());
        let spec: DeviceSpec = name.parse().expect("GPT_WGPU_DEVICE");
        match device::choose(spec) {
            Ok(chosen) => {
                eprintln!("{chosen}");
                Some(chosen.device)
            }
            Err(error) => {
                let required = std::env::var("GPT_WGPU_REQUIRE_GPU").is_ok_and(|v| v == "1");
                assert!(!required, "GPT_WGPU_REQUIRE_GPU=1 and {error:#}");
                None
            }
        }
    })
    .clone()
}

/// What `--device` takes for the adapter that the tests run on.
pub fn adapter() -> Option<String> {
    if gpu().is_none() {
        eprintln!("SKIPPED: no GPU adapter");
        return None;
    }
    Some(std::env::var("GPT_WGPU_DEVICE").unwrap_or_else(|_| "vulkan".into()))
}

/// Reproducible values in about [-1, 1).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> f64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// Values that are exact in f32, so that both sides start equal.
    pub fn vec(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| f64::from(self.next() as f32)).collect()
    }

    pub fn below(&mut self, n: usize) -> usize {
        (((self.next() + 1.0) / 2.0) * n as f64) as usize % n
    }
}

pub fn tensor<const D: usize>(values: &[f64], shape: [usize; D], device: &Device) -> Tensor<D> {
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

pub fn int_tensor<const D: usize>(values: &[i32], shape: [usize; D], device: &Device) -> Tensor<D, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    gpt_wgpu::checkpoint::read(tensor).unwrap().into_iter().map(f64::from).collect()
}

#[track_caller]
pub fn assert_close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    if let Some(difference) = difference(got, want, tolerance) {
        panic!("{what}: {difference} (tolerance {tolerance:e})");
    }
}

#[track_caller]
pub fn assert_close_tensor<const D: usize>(what: &str, got: Tensor<D>, want: &[f64], tolerance: f64) {
    assert_close(what, &values(got), want, tolerance);
}
