//! What the tests share: the devices, and the library's f64 twins with their comparer.

#![allow(dead_code, unused_imports)] // each test binary uses its part

pub mod guarded;
pub mod program;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use gpt_wgpu::device::{self, DeviceSpec};
use gpt_wgpu::kernel::{self, Capabilities};
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

/// What the adapter of `device` can do.
pub fn capabilities(device: &Device) -> Capabilities {
    kernel::capabilities(&guarded::primitive(tensor(&[0.0], [1], device)))
}

/// The adapter, if its shaders have f16.
pub fn gpu_with_f16() -> Option<Device> {
    let device = gpu().filter(|device| capabilities(device).f16);
    if device.is_none() {
        eprintln!("SKIPPED in f16: no GPU adapter whose shaders have it");
    }
    device
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

    /// Values that are exact in f16.
    pub fn halves(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| to_half(self.next())).collect()
    }

    /// Values that are exact in f16 (or f32).
    pub fn of(&mut self, f16: bool, count: usize) -> Vec<f64> {
        if f16 { self.halves(count) } else { self.vec(count) }
    }

    pub fn below(&mut self, n: usize) -> usize {
        (((self.next() + 1.0) / 2.0) * n as f64) as usize % n
    }
}

/// The f16 nearest to `value`.
pub fn to_half(value: f64) -> f64 {
    half::f16::from_f64(value).to_f64()
}

pub fn tensor<const D: usize>(values: &[f64], shape: [usize; D], device: &Device) -> Tensor<D> {
    tensor_of(false, values, shape, device)
}

/// A tensor stored in f16 (or f32), rounded on the host.
pub fn tensor_of<const D: usize>(f16: bool, values: &[f64], shape: [usize; D], device: &Device) -> Tensor<D> {
    if f16 {
        let values: Vec<_> = values.iter().map(|&v| half::f16::from_f64(v)).collect();
        Tensor::from_data(TensorData::new(values, shape), (device, DType::F16))
    } else {
        let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    }
}

pub fn int_tensor<const D: usize>(values: &[i32], shape: [usize; D], device: &Device) -> Tensor<D, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

/// A tensor's values; f16 is widened on the host.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    let data = tensor.try_into_data().unwrap().convert_dtype(DType::F32);
    data.try_into_vec::<f32>().unwrap().into_iter().map(f64::from).collect()
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
