//! Tensors as kernels want them: contiguous, new or nobody else's, and seen as matrices.

use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;

/// (rows, columns) of a tensor (..., columns) seen as a matrix.
pub fn matrix(tensor: &CubeTensor) -> (usize, usize) {
    let shape = tensor.meta.shape();
    let columns = shape[shape.num_dims() - 1];
    (shape.num_elements() / columns.max(1), columns)
}

/// A contiguous tensor of `tensor`'s type and device with undefined content.
pub fn empty_like(tensor: &CubeTensor) -> CubeTensor {
    empty(tensor, tensor.meta.shape().clone())
}

/// A contiguous tensor of `shape` with undefined content, of `tensor`'s element type and on its device.
pub fn empty(tensor: &CubeTensor, shape: Shape) -> CubeTensor {
    empty_of(tensor, shape, tensor.dtype)
}

/// A contiguous tensor of `shape` and `dtype` with undefined content, on `tensor`'s device.
pub fn empty_of(tensor: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    let buffer = tensor.client.empty(shape.num_elements() * dtype.size());
    CubeTensor::new_contiguous(tensor.client.clone(), tensor.device.clone(), shape, buffer, dtype)
}

/// A contiguous tensor of this content that nobody else sees: itself where that is so already.
pub fn own(tensor: CubeTensor) -> CubeTensor {
    let tensor = burn_cubecl::kernel::into_contiguous(tensor);
    if tensor.can_mut() { tensor } else { tensor.copy() }
}
