//! The type of activations and products, and why it is the one (docs/precision.md has the table of what is which).

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::device::Chosen;
use crate::kernel::{Kernels, Variant, supported};

/// `dtype` of the configuration, with PyTorch's names beside ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// By device.
    #[default]
    Auto,
    /// Everything in f32.
    #[serde(alias = "float32")]
    #[value(alias = "float32")]
    F32,
    /// Activations and products in f16; weights, moments, sums and the loss in f32; a loss scale.
    #[serde(alias = "float16")]
    #[value(alias = "float16")]
    F16,
}

/// A type with the reason for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Whether activations are f16, else f32.
    pub f16: bool,
    /// In a few words.
    pub reason: &'static str,
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "dtype: {} ({})", if self.f16 { "f16" } else { "f32" }, self.reason)
    }
}

impl Dtype {
    /// What a device computes in.
    ///
    /// # Errors
    /// When f16 is asked for and cannot be had: why, and what can.
    pub fn resolve(self, chosen: &Chosen, kernels: Kernels) -> Result<Precision> {
        let is_gpu = chosen.adapter.is_some();
        let variants = supported(&chosen.capabilities, true);
        let tensor_cores = variants.iter().any(|variant| matches!(variant, Variant::Coop { edge: 16, .. }));
        let precision = |f16, reason| Ok(Precision { f16, reason });
        match self {
            Self::F32 => precision(false, "asked for"),
            Self::F16 => {
                ensure!(
                    is_gpu,
                    "dtype = f16 needs a GPU, and this is {}; dtype = f32 runs everywhere, auto chooses",
                    chosen.name
                );
                ensure!(
                    chosen.capabilities.f16,
                    "dtype = f16: the shaders of {} have no f16; dtype = f32 runs everywhere, auto chooses",
                    chosen.name
                );
                ensure!(
                    kernels != Kernels::Composed,
                    "dtype = f16 has kernels of ours only; leave out kernels = composed, or take dtype = f32"
                );
                precision(true, "asked for")
            }
            Self::Auto if !is_gpu => precision(false, "auto: the CPU computes in f32"),
            Self::Auto if matches!(kernels, Kernels::Composed | Kernels::Scalar) => {
                precision(false, "auto: these kernels compute in f32")
            }
            Self::Auto if tensor_cores => precision(true, "auto: this GPU multiplies f16 fastest"),
            Self::Auto if chosen.backend == "metal" => precision(
                false,
                "auto: f16 is no faster on most Apple GPUs; dtype = f16 halves the activations' memory",
            ),
            Self::Auto => precision(false, "auto: no matrix units that our kernels use"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{self, AdapterReport, Limits};
    use crate::kernel::Capabilities;

    #[test]
    fn f16_on_the_cpu_is_refused_with_what_to_do() {
        let cpu = device::choose(device::DeviceSpec::Cpu).unwrap();
        let error = Dtype::F16.resolve(&cpu, Kernels::Auto).unwrap_err().to_string();
        assert!(error.starts_with("dtype = f16 needs a GPU") && error.contains("dtype = f32"), "{error}");
        assert!(!Dtype::Auto.resolve(&cpu, Kernels::Auto).unwrap().f16);
    }

    /// A GPU that nobody has, with f16 or without, and with cooperative matrices of these edges.
    fn gpu(backend: &'static str, f16: bool, edges: &[u32]) -> Chosen {
        let limits = Limits {
            workgroup_memory: 32 << 10,
            workgroup_invocations: 1024,
            subgroup_size: (32, 32),
            subgroups: true,
            f16,
            cooperative_matrices: Vec::new(),
            timestamps: true,
            max_binding: 1 << 30,
            max_buffer: 1 << 30,
        };
        let adapter = AdapterReport {
            device: format!("{backend}:0"),
            name: "Made up".into(),
            kind: "discrete",
            driver: String::new(),
            id: String::new(),
            pci_bus: None,
            memory_bytes: None,
            limits,
        };
        let matrices = edges.iter().map(|&edge| (edge, true)).collect();
        let capabilities = Capabilities { subgroup_size: Some(32), matrices, f16, int64: true, ..Default::default() };
        let cpu = device::choose(device::DeviceSpec::Cpu).unwrap();
        Chosen { name: "Made up".into(), backend, adapter: Some(adapter), capabilities, ..cpu }
    }

    #[test]
    fn auto_takes_f16_where_matrices_of_edge_16_multiply_it() {
        use Kernels::{Auto, Composed, Coop, Scalar};
        for (backend, f16, edges, kernels, want, because) in [
            ("vulkan", true, &[16][..], Auto, true, "fastest"),
            ("vulkan", true, &[16, 8], Coop, true, "fastest"),
            ("vulkan", true, &[16], Scalar, false, "these kernels"),
            ("vulkan", true, &[16], Composed, false, "these kernels"),
            ("vulkan", true, &[], Auto, false, "no matrix units"),
            ("vulkan", true, &[8], Auto, false, "no matrix units"),
            ("vulkan", false, &[], Auto, false, "no matrix units"),
            ("metal", true, &[8], Auto, false, "Apple"),
            ("metal", true, &[8], Coop, false, "Apple"),
        ] {
            let what = format!("{backend} f16 {f16} {edges:?} {kernels:?}");
            let got = Dtype::Auto.resolve(&gpu(backend, f16, edges), kernels).unwrap();
            assert!(got.f16 == want && got.reason.contains(because), "{what}: {got}");
        }
        // Without subgroups of a known size no matrices are used.
        let mut chosen = gpu("vulkan", true, &[16]);
        chosen.capabilities.subgroup_size = None;
        assert!(!Dtype::Auto.resolve(&chosen, Auto).unwrap().f16);
    }

    #[test]
    fn what_is_asked_for_is_done_or_refused() {
        let plain = gpu("vulkan", true, &[]);
        for kernels in [Kernels::Auto, Kernels::Scalar, Kernels::Coop] {
            let want = Precision { f16: true, reason: "asked for" };
            assert_eq!(Dtype::F16.resolve(&plain, kernels).unwrap(), want);
        }
        let refusal = |chosen, kernels| Dtype::F16.resolve(chosen, kernels).unwrap_err().to_string();
        assert!(refusal(&plain, Kernels::Composed).contains("leave out kernels = composed"));
        assert!(refusal(&gpu("vulkan", false, &[]), Kernels::Auto).contains("shaders of Made up have no f16"));
        for chosen in [gpu("vulkan", true, &[16]), device::choose(device::DeviceSpec::Cpu).unwrap()] {
            let got = Dtype::F32.resolve(&chosen, Kernels::Auto).unwrap();
            assert_eq!(got, Precision { f16: false, reason: "asked for" });
        }
    }
}
