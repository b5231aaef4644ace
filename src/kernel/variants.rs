//! Which kernels a device can run, and which of them were chosen.

use std::sync::{PoisonError, RwLock};

use burn::tensor::DType;
use burn_cubecl::{CubeDevice, tensor::CubeTensor};
use serde::{Deserialize, Serialize};

/// What of a device decides which kernels it can run.
#[derive(Clone, Debug, Default)]
pub struct Capabilities {
    /// The subgroup's size where it is always the same.
    pub subgroup_size: Option<u32>,
    /// Cooperative matrices with f32 sums: (edge, whether f16 is multiplied; else f32).
    pub matrices: Vec<(u32, bool)>,
    /// Whether shaders have f16.
    pub f16: bool,
    /// Whether shaders have 64-bit integers.
    pub int64: bool,
    /// Whether a thread has 128 registers and no more (Apple's GPUs; a CPU, which has fewer), where others have 255.
    pub few_registers: bool,
    /// Bytes of the largest buffer that can be bound; 0: not known, and then 128 MiB, what every device of WebGPU's has.
    pub largest_buffer: u64,
}

impl Capabilities {
    /// Bytes of the largest buffer that can be bound.
    pub fn largest_buffer(&self) -> u64 {
        if self.largest_buffer == 0 { 128 << 20 } else { self.largest_buffer }
    }
}

/// Which kernels the user wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kernels {
    /// The fastest that keeps the tensors' precision.
    #[default]
    Auto,
    /// Burn primitives only.
    Composed,
    /// Our kernels without subgroups and cooperative matrices.
    Scalar,
    /// Our kernels with cooperative matrices; f32 tensors are multiplied in f16 where the device has no f32 matrices.
    Coop,
}

/// How products are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variant {
    /// f32 arithmetic, no subgroups: runs everywhere.
    Scalar,
    /// Cooperative matrices of this edge; what is multiplied is f16 or f32, sums are f32.
    Coop {
        /// Rows and columns of a matrix, 8 or 16.
        edge: u32,
        /// Whether f16 is multiplied, else f32.
        f16: bool,
    },
}

impl Variant {
    /// Whether f32 tensors lose bits before they are multiplied.
    pub fn rounds_f32(self) -> bool {
        matches!(self, Self::Coop { f16: true, .. })
    }
}

impl std::fmt::Display for Variant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Scalar => f.write_str("scalar f32"),
            Self::Coop { edge, f16 } => {
                let products = if *f16 { "f16" } else { "f32" };
                write!(f, "{edge}x{edge} cooperative matrices, products in {products}")
            }
        }
    }
}

/// Exact size of a subgroup that the cooperative kernels are made for.
pub const SUBGROUP_SIZE: u32 = 32;

/// The variants that a device can run, best first, for tensors of f16 (or f32).
pub fn supported(capabilities: &Capabilities, f16_storage: bool) -> Vec<Variant> {
    const ALL: [Variant; 4] = [
        Variant::Coop { edge: 16, f16: true },
        Variant::Coop { edge: 8, f16: true },
        Variant::Coop { edge: 8, f16: false },
        Variant::Scalar,
    ];
    let can = |variant: &Variant| match *variant {
        Variant::Scalar => !f16_storage || capabilities.f16,
        Variant::Coop { edge, f16 } => {
            let has = capabilities.matrices.contains(&(edge, f16));
            has && capabilities.subgroup_size == Some(SUBGROUP_SIZE) && (f16 || !f16_storage)
        }
    };
    ALL.into_iter().filter(can).collect()
}

/// `auto` multiplies f32 tensors in f32, and does not take edge 8 by itself: no Mac has run it yet.
fn pick(choice: Kernels, supported: &[Variant], f16_storage: bool) -> Option<Variant> {
    let coop = |v: &&Variant| matches!(v, Variant::Coop { .. });
    let found = match choice {
        Kernels::Composed => None,
        Kernels::Scalar => supported.iter().find(|v| **v == Variant::Scalar),
        Kernels::Coop => supported.iter().find(coop).or(supported.first()),
        Kernels::Auto if f16_storage => supported.iter().find(|v| !matches!(v, Variant::Coop { edge: 8, .. })),
        Kernels::Auto => supported.iter().find(|v| **v == Variant::Scalar),
    };
    found.copied()
}

/// The variant that a device with these capabilities runs for tensors of f16 (or f32) under the user's choice; none: the composed
/// version.
pub fn chosen(capabilities: &Capabilities, f16: bool) -> Option<Variant> {
    pick(choice(), &supported(capabilities, f16), f16)
}

/// The kernels that serve `tensor` under the user's choice; none: the composed version.
pub fn variant(tensor: &CubeTensor) -> Option<Variant> {
    let f16 = match tensor.dtype {
        DType::F16 => true,
        DType::F32 => false,
        _ => return None,
    };
    with_capabilities(tensor, |device| pick(choice(), &supported(device, f16), f16))
}

/// What will run on a device with these capabilities, for the line at start-up and for reports.
pub fn describe(capabilities: &Capabilities, f16: bool) -> String {
    chosen(capabilities, f16).map_or("Burn's own".to_string(), |variant| variant.to_string())
}

/// What the operations know of a device.
pub(super) struct Registered {
    device: CubeDevice,
    pub(super) capabilities: Capabilities,
    pub(super) submit_limit: f64,
}

/// The devices that were opened, and the choice for this process.
static DEVICES: RwLock<Vec<Registered>> = RwLock::new(Vec::new());
static CHOICE: RwLock<Kernels> = RwLock::new(Kernels::Auto);

/// Makes a device's capabilities known to the operations, and the work that it may be given at once
/// ([`submit_limit`](super::submit_limit)).
pub fn register(device: CubeDevice, capabilities: Capabilities, submit_limit: f64) {
    let registered = Registered { device, capabilities, submit_limit };
    DEVICES.write().unwrap_or_else(PoisonError::into_inner).push(registered);
}

/// The capabilities of a tensor's device; nothing special where it was opened by other means than [`crate::device`].
pub fn capabilities(tensor: &CubeTensor) -> Capabilities {
    with_capabilities(tensor, Capabilities::clone)
}

/// Operations that a tensor's device may be given at once ([`submit_limit`](super::submit_limit)).
pub fn work_limit(tensor: &CubeTensor) -> f64 {
    with_device(tensor, |device| device.map_or(f64::INFINITY, |device| device.submit_limit))
}

/// Bytes of the largest buffer that can be bound on a tensor's device.
pub fn largest_buffer(tensor: &CubeTensor) -> u64 {
    with_capabilities(tensor, Capabilities::largest_buffer)
}

/// Whether a thread of a tensor's device has few registers.
pub fn few_registers(tensor: &CubeTensor) -> bool {
    with_capabilities(tensor, |device| device.few_registers)
}

/// What `look` sees in the capabilities of a tensor's device, without a copy of them.
fn with_capabilities<T>(tensor: &CubeTensor, look: impl FnOnce(&Capabilities) -> T) -> T {
    with_device(tensor, |device| match device {
        Some(device) => look(&device.capabilities),
        None => look(&Capabilities::default()),
    })
}

/// What `look` sees of a tensor's device, where it was opened by [`crate::device`].
pub(super) fn with_device<T>(tensor: &CubeTensor, look: impl FnOnce(Option<&Registered>) -> T) -> T {
    let devices = DEVICES.read().unwrap_or_else(PoisonError::into_inner);
    look(devices.iter().find(|registered| registered.device == tensor.device))
}

/// Chooses the kernels of this process.
pub fn choose(kernels: Kernels) {
    *CHOICE.write().unwrap_or_else(PoisonError::into_inner) = kernels;
}

/// The kernels that were chosen.
pub fn choice() -> Kernels {
    *CHOICE.read().unwrap_or_else(PoisonError::into_inner)
}
