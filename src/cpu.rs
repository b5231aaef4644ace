//! The CPU's kernels: loops over slices of f32, each one pass over memory where Burn's primitives take several. Matrix products
//! are the `gemm` crate's.
//!
//! Work is cut into parts that the sizes alone decide, and every sum has an order of its own: the bits of a result do not depend on
//! how many threads there are. Operations come here with tensors that [`serves`] has accepted.

pub mod attention;
pub mod cross_entropy;
pub mod elementwise;
pub mod layer_norm;
pub mod math;
pub mod product;

use std::mem::MaybeUninit;

use burn::backend::{Flex, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{DType, Shape, TensorData};
use rayon::iter::{IndexedParallelIterator, ParallelIterator};

use crate::kernel::{Kernels, choice};

/// A tensor of Burn's CPU backend.
pub type CpuTensor = FloatTensor<Flex>;

/// Whether the loops serve an operation on `tensors`: the user wants them, and there is something to do, in f32.
pub fn serves(tensors: &[&CpuTensor]) -> bool {
    let fits = |tensor: &&CpuTensor| tensor.dtype() == DType::F32 && tensor.layout().num_elements() > 0;
    choice() != Kernels::Composed && tensors.iter().all(fits)
}

/// The tensor itself where its elements stand in their order, else a copy in which they do.
pub fn contiguous(tensor: CpuTensor) -> CpuTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The elements of a tensor that is [`contiguous`].
pub fn values(tensor: &CpuTensor) -> &[f32] {
    let first = tensor.layout().start_offset();
    &tensor.storage::<f32>()[first..first + tensor.layout().num_elements()]
}

/// A tensor that `storage_mut` has all elements of and nothing else; that one copies where somebody else holds them.
pub fn own(tensor: CpuTensor) -> CpuTensor {
    let tensor = contiguous(tensor);
    if tensor.storage::<f32>().len() == tensor.layout().num_elements() {
        return tensor;
    }
    let shape = tensor.shape();
    self::tensor(values(&tensor).to_vec(), shape)
}

/// A new tensor.
pub fn tensor(values: Vec<f32>, shape: Shape) -> CpuTensor {
    CpuTensor::from_data(TensorData::new(values, shape))
}

/// A vector of `len` elements: what writes all of them needs no zeros before.
///
/// # Safety
/// `fill` writes every element.
pub unsafe fn filled(len: usize, fill: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    fill(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: there is room for them, and `fill` has written them.
    unsafe { values.set_len(len) };
    values
}

/// A tensor (..., K) as (rows, K).
pub fn matrix(tensor: &CpuTensor) -> [usize; 2] {
    let shape = tensor.shape();
    let columns = shape[shape.num_dims() - 1];
    [shape.num_elements() / columns, columns]
}

/// The shape of `like` with another last dimension.
pub fn with_columns(like: &CpuTensor, columns: usize) -> Shape {
    let mut shape = like.shape();
    let last = shape.num_dims() - 1;
    shape[last] = columns;
    shape
}

/// Elements of a pass over memory from which on it is shared by threads: waking one takes as long as some ten thousand.
const WORTH_A_THREAD: usize = 32 << 10;

/// Elements of a part of an element-wise pass: what fits into the first cache with its operands.
pub const PART: usize = 4 << 10;

/// Rows that are summed before the sums are: a sum over rows is one over blocks of so many.
pub const BLOCK_ROWS: usize = 64;

/// `work` on every part, of `elements` in all.
pub fn each<I: IndexedParallelIterator>(parts: I, elements: usize, work: impl Fn(I::Item) + Send + Sync) {
    let fewest = if elements < WORTH_A_THREAD { usize::MAX } else { 1 };
    parts.with_min_len(fewest).for_each(work);
}

/// Does `work`, compiled for the widest vectors that the processor has. The closure has to be `#[inline(always)]`, and so has what
/// it calls. The arithmetic is the same for every width: no products are fused with sums.
#[inline(always)]
pub fn wide<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
        fn avx512<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        #[target_feature(enable = "avx2")]
        fn avx2<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        let has_512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if has_512 {
            // SAFETY: the processor has just said that it has them.
            return unsafe { avx512(work) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { avx2(work) };
        }
    }
    work()
}

/// The blocks' sums (blocks, columns), added up in their order: (columns).
pub fn add_blocks(blocks: &[f32], columns: usize) -> Vec<f32> {
    let mut sums = vec![0.0; columns];
    wide(
        #[inline(always)]
        || {
            for block in blocks.chunks_exact(columns) {
                for (sum, value) in sums.iter_mut().zip(block) {
                    *sum += value;
                }
            }
        },
    );
    sums
}
