//! The model's operations, one a file. Each file holds, in this order: what the operation is (a trait whose default bodies
//! compose Burn primitives: the definition and the first oracle of the tests), its paths on the CPU and on a GPU, its gradient as
//! a node of Burn's autodiff graph, and the function that the model calls.

pub mod adamw;
pub mod attention;
pub mod block;
pub mod cast;
pub mod cotangent;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod layer_norm;
pub mod linear;
pub mod verdict;

use burn::backend::{
    Autodiff, Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind,
    ExtensionType, TensorMetadata, autodiff::checkpoint::strategy::CheckpointStrategy, tensor::FloatTensor,
};
use burn::tensor::{DType, FloatDType, Shape, Tensor};
use burn_cubecl::tensor::CubeTensor;

use crate::kernel::{Capabilities, Kernel};

/// Every kernel that the operations can give a device with these capabilities. An operation adds its own here; the tests
/// of Metal hold this list against the files in wgsl/. What draws random numbers is listed in both of its texts where the
/// device has 64-bit integers.
pub fn kernels(capabilities: &Capabilities) -> Vec<Kernel> {
    let mut kernels = [
        attention::tiles::kernels(capabilities),
        linear::kernels(capabilities),
        dropout::kernels(),
        cast::kernels(),
        layer_norm::kernels(),
        embedding::kernels(),
        adamw::kernels(),
        vec![verdict::kernel()],
        cross_entropy::kernels(),
    ]
    .concat();
    kernels.retain(|kernel| capabilities.f16 || !kernel.header().contains("enable f16;"));
    if capabilities.int64 {
        let texts = kernels.iter().map(|kernel| (kernel.text(), kernel.clone().with_int64(true)));
        let others: Vec<_> = texts.filter(|(text, other)| *text != other.text()).map(|(_, other)| other).collect();
        kernels.extend(others);
    }
    kernels
}

/// A tensor that an operation may be without, as a bias.
#[derive(ExtensionType, Clone, Debug)]
pub enum Optional<B: Backend> {
    /// There is none.
    Absent,
    /// The tensor.
    Present(FloatTensor<B>),
}

impl Optional<Dispatch> {
    fn of<const D: usize>(tensor: Option<Tensor<D>>) -> Self {
        tensor.map_or(Self::Absent, |tensor| Self::Present(tensor.into_dispatch()))
    }
}

impl<B: Backend> Optional<B> {
    /// `f` of the tensor where there is one.
    fn map<T>(self, f: impl FnOnce(FloatTensor<B>) -> T) -> Option<T> {
        match self {
            Self::Absent => None,
            Self::Present(tensor) => Some(f(tensor)),
        }
    }

    fn unwrap_or(self, other: FloatTensor<B>) -> FloatTensor<B> {
        match self {
            Self::Absent => other,
            Self::Present(tensor) => tensor,
        }
    }
}

impl<B: Backend, C: CheckpointStrategy> Optional<Autodiff<B, C>> {
    /// The tensor of the backend below.
    fn inner(&self) -> Optional<B> {
        match self {
            Self::Absent => Optional::Absent,
            Self::Present(tensor) => Optional::Present(tensor.primitive().clone()),
        }
    }
}

/// As many tensors as an operation is given, all of one device.
#[derive(Clone, Debug)]
pub struct Tensors<B: Backend>(pub Vec<FloatTensor<B>>);

impl Tensors<Dispatch> {
    fn of<const D: usize>(tensors: impl IntoIterator<Item = Tensor<D>>) -> Self {
        Self(tensors.into_iter().map(Tensor::into_dispatch).collect())
    }

    fn into_tensors<const D: usize>(self) -> impl Iterator<Item = Tensor<D>> {
        self.0.into_iter().map(Tensor::from_dispatch)
    }
}

/// By hand, since Burn derives it for a fixed number of tensors only.
impl<B: Backend> ExtensionType<B> for Tensors<B> {
    type Target = Tensors<Dispatch>;

    fn map_to_dispatch<F>(self, map_kind: F, autodiff: DispatchAutodiffContext) -> Self::Target
    where
        F: Fn(BackendTensor<B>) -> DispatchTensorKind,
    {
        let tensor = |tensor| DispatchTensor { kind: map_kind(BackendTensor::Float(tensor)), autodiff };
        Tensors(self.0.into_iter().map(tensor).collect())
    }

    fn map_from_dispatch<F>(target: Self::Target, unwrap_kind: F) -> Self
    where
        F: Fn(DispatchTensor) -> BackendTensor<B>,
    {
        Self(target.0.into_iter().map(|tensor| unwrap_kind(tensor).float()).collect())
    }

    fn routing_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn routing_float_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn autodiff_context(target: &Self::Target) -> DispatchAutodiffContext {
        let merge = |context: DispatchAutodiffContext, tensor: &DispatchTensor| context.merge(tensor.autodiff);
        target.0.iter().fold(DispatchAutodiffContext::Disabled, merge)
    }
}

/// Views `tensor` (..., K) as a matrix (rows, K).
fn flatten<B: Backend>(tensor: FloatTensor<B>) -> FloatTensor<B> {
    let shape = tensor.shape();
    let columns = shape[shape.num_dims() - 1];
    let rows = shape.num_elements() / columns.max(1);
    B::float_reshape(tensor, Shape::new([rows, columns]))
}

/// What the cooperative kernels multiply an f32 gradient by before they round it to f16, and divide out again in f32.
///
/// The loss is a mean over `rows` tokens, so a token's gradient is about 1 / rows: in f16 most of it would be lost below 6e-8,
/// and training with it diverged. The next power of two undoes the mean and costs no bit. f16 tensors come scaled.
fn gradient_scale(tensor: &CubeTensor, rows: usize) -> f32 {
    if tensor.dtype == DType::F16 { 1.0 } else { held(rows) }
}

/// How many times itself a gradient of so many rows is stored in f16, where everything else is f32 and only products read it.
///
/// Cooperative products round both factors, so what nothing else reads may as well be stored as they round it: the results are the same
/// to the bit, and it is half the bytes. Inside of half a block these are the norm's output, qkv (attention's products round likewise),
/// GELU's output, and the gradients of what the products make. What sums and slopes are made from stays f32: the block's input and
/// output, what goes into GELU, the heads and their gradient. Biases' gradients alone differ, being sums of what was rounded.
fn held(rows: usize) -> f32 {
    rows.next_power_of_two() as f32
}

/// A gradient as it is stored `held` times itself, or as it is.
fn hold<B: Backend>(gradient: FloatTensor<B>, held: Option<f32>) -> FloatTensor<B> {
    match held {
        Some(factor) => B::float_cast(B::float_mul_scalar(gradient, factor.into()), FloatDType::F16),
        None => gradient,
    }
}

/// The gradient, f32, that is stored `held` times itself, or as it is.
fn release<B: Backend>(stored: FloatTensor<B>, held: Option<f32>) -> FloatTensor<B> {
    match held {
        Some(factor) => B::float_mul_scalar(B::float_cast(stored, FloatDType::F32), factor.recip().into()),
        None => stored,
    }
}

/// The tensor in f32 where `whole` says so, else as it is.
fn widen<B: Backend>(tensor: FloatTensor<B>, whole: bool) -> FloatTensor<B> {
    if whole { B::float_cast(tensor, FloatDType::F32) } else { tensor }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use cubecl::prelude::KernelMetadata;

    use super::*;
    use crate::kernel::SUBGROUP_SIZE;

    /// CubeCL compiles a text once for an identity and never looks at it again.
    #[test]
    fn kernels_of_one_identity_have_one_text() {
        let matrices = vec![(16, true), (8, true), (8, false)];
        let capabilities =
            Capabilities { subgroup_size: Some(SUBGROUP_SIZE), matrices, f16: true, int64: true, ..Default::default() };
        let mut texts = HashMap::new();
        for kernel in kernels(&capabilities).into_iter().chain(kernels(&capabilities)) {
            let text = kernel.text();
            let first = texts.entry(kernel.id()).or_insert_with(|| text.clone());
            assert!(*first == text, "{} has two texts:\n{}", kernel.name(), kernel.header());
        }
        assert!(texts.len() > 100, "{} identities", texts.len());
    }
}
