//! Attention's kernels queued: which tensors, how many heads at a time, and what is kept between two of them.

use std::ops::Range;

use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;

use super::tiles::{self, Pass, Variant, Version};
use crate::kernel::{self, Work, fold};
use crate::ops::dropout::Dropout;
use crate::ops::gradient_scale;

/// Sizes and dropout as the attention kernels' `Params` for some of the batch * heads, and the factor of a gradient of `out`'s type, which one
/// of qkv in f16 keeps.
fn params(qkv: &CubeTensor, out: &CubeTensor, n_head: usize, heads: Range<usize>, dropout: Dropout) -> Vec<u32> {
    let [batch, time, _] = qkv.meta.shape().dims::<3>();
    let mut params = vec![heads.len() as u32, n_head as u32, time as u32, heads.start as u32];
    params.extend(dropout.params());
    let scale = gradient_scale(out, batch * time);
    let result = if qkv.dtype == DType::F16 { 1.0 } else { scale.recip() };
    params.extend([scale, result].map(f32::to_bits));
    params
}

/// Queues one of the tiled kernels over `tensors`, bound in the order that its file states; all are contiguous. Cooperative ones take an
/// f32 out or dout beside qkv in f16 too, and dqkv is held then.
///
/// For the tests and benchmarks, which give their own outputs; the model calls [`causal_attention`](super::causal_attention).
pub fn launch(pass: Pass, version: Version, n_head: usize, dropout: Dropout, tensors: &[&CubeTensor]) {
    let heads = 0..tensors[0].meta.shape()[0] * n_head;
    launch_heads(pass, version, n_head, heads, dropout, tensors, tensors[1]);
}

/// The same for some of the batch * heads. `out` is what stands for the type of out: it or its gradient.
fn launch_heads(
    pass: Pass,
    version: Version,
    n_head: usize,
    heads: Range<usize>,
    dropout: Dropout,
    tensors: &[&CubeTensor],
    out: &CubeTensor,
) {
    let qkv = tensors[0];
    let [_, time, width] = qkv.meta.shape().dims::<3>();
    let head_dim = width / 3 / n_head;
    let f16 = [qkv, out].map(|tensor| tensor.dtype == DType::F16);
    let (kernel, rows) = tiles::kernel(pass, version, head_dim, f16, dropout.is_on());
    let groups = heads.len() * time.div_ceil(rows as usize);
    // Products of the lower triangle: two forward; backward five, of which dQ and dK/dV share S and dP where both make them.
    let products = match pass {
        Pass::Forward => 2.0,
        Pass::Dq | Pass::Dkv => 2.5,
        Pass::DkvDs => 4.0,
        Pass::DqOfDs => 1.0,
    };
    let flops = products * (heads.len() * head_dim) as f64 * (time as f64).powi(2);
    let params = params(qkv, out, n_head, heads, dropout);
    kernel.with_work(Work { flops, ..Work::default() }).launch(fold(groups as u32), tensors, &params);
}

/// Queues delta = rowsum(dout · out) over [dout, out, delta].
pub fn launch_delta(n_head: usize, qkv: &CubeTensor, tensors: &[&CubeTensor]) {
    let [batch, time, width] = qkv.meta.shape().dims::<3>();
    let (kernel, rows) = tiles::delta_kernel(width / 3 / n_head, tensors[0].dtype == DType::F16);
    let groups = (batch * time * n_head).div_ceil(rows as usize);
    let params = params(qkv, tensors[0], n_head, 0..batch * n_head, Dropout::OFF);
    kernel.launch(fold(groups as u32), tensors, &params);
}

/// Queues the gradients over [qkv, dout, lse, delta, dqkv], with dS kept between dK/dV and dQ for `heads_kept` of the batch * heads at a
/// time; 0: not at all, dQ computes it again.
pub fn launch_gradients(
    version: Version,
    n_head: usize,
    dropout: Dropout,
    heads_kept: usize,
    tensors: [&CubeTensor; 5],
) {
    let [qkv, dout, lse, delta, dqkv] = tensors;
    if heads_kept == 0 {
        for pass in [Pass::Dq, Pass::Dkv] {
            launch(pass, version, n_head, dropout, &tensors);
        }
        return;
    }
    let [batch, time, _] = qkv.meta.shape().dims::<3>();
    let (dtype, [keys, queries]) = tiles::kept(version.variant, time);
    let kept = kernel::empty_of(qkv, Shape::new([heads_kept, keys, queries]), dtype);
    for first in (0..batch * n_head).step_by(heads_kept) {
        let heads = first..(first + heads_kept).min(batch * n_head);
        let all = [qkv, dout, lse, delta, dqkv, &kept];
        launch_heads(Pass::DkvDs, version, n_head, heads.clone(), dropout, &all, dout);
        launch_heads(Pass::DqOfDs, version, n_head, heads, dropout, &[qkv, &kept, dqkv], dout);
    }
}

/// Bytes of one head's dS.
fn head_kept(variant: Variant, time: usize) -> u64 {
    let (dtype, [keys, queries]) = tiles::kept(variant, time);
    (keys * queries * dtype.size()) as u64
}

/// Bytes of dS that are kept at once, of `heads` heads of `time` tokens.
pub fn bytes_kept(variant: Variant, heads: usize, time: usize, largest_buffer: u64) -> u64 {
    heads_kept(variant, heads, time, largest_buffer) as u64 * head_kept(variant, time)
}

/// Bytes of dS that are kept at once at most: room for the 96 heads of 1024 tokens of GPT-2's 8 sequences in f32. Half of it, and so two rounds
/// of half as many workgroups, cost 1.3 ms of 154 on an H200.
const LARGEST_KEPT: u64 = 512 << 20;

/// The longest sequences whose dS is kept. Twice as long, four heads are a round, 512 workgroups, and what is saved is lost by waiting for the
/// last of each round: 10.8 to 13.6 ms in f32 and 2.15 to 2.69 in f16 at (1, 12, 8192, 64) on an H200, 3.06 to 2.57 and 0.59 to 0.54 at 4096.
const LONGEST_KEPT: usize = 4096;

/// For how many of `heads` heads of `time` tokens dS is kept at once; 0: for none, as they are too long or not one fits.
///
/// dS costs a write and a read and saves two of nine products: D / 2 FLOPs for each byte of f32, D of f16. GPUs make 10 to 30 in the time of one.
pub fn heads_kept(variant: Variant, heads: usize, time: usize, largest_buffer: u64) -> usize {
    let most = (LARGEST_KEPT.min(largest_buffer) / head_kept(variant, time).max(1)) as usize;
    if most == 0 || time > LONGEST_KEPT { 0 } else { heads.div_ceil(heads.div_ceil(most).max(1)) } // rounds of one size
}
