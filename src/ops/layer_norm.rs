//! Layer normalisation over the last dimension, with an optional bias.

use burn::backend::{
    Autodiff, Backend, Dispatch, Flex, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    tensor::FloatTensor,
};
use burn::tensor::{DType, FloatDType, Shape, Tensor};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};

use super::{Optional, flatten};
use crate::cpu;
use crate::kernel::lanes::{Lanes, serves};
use crate::kernel::{Kernel, empty, empty_like, empty_of, fold, matrix};

/// GPT-2's and nanoGPT's epsilon.
pub const EPSILON: f64 = 1e-5;

/// y = (x - mean) · rstd · w + b, rstd = 1 / √(variance + ε), each row by itself.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait LayerNormOps: Backend {
    /// x (..., C), w (C), b (C) -> (y (..., C), mean (rows, 1), rstd (rows, 1)). y is of x's type, or `rounded` to f16.
    fn layer_norm_forward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] b: Optional<Self>,
        rounded: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed_forward::<Self>(x, w, b, rounded)
    }

    /// dy, x (..., C), w (C), mean and rstd (rows, 1) -> (dx (..., C), dw (C), db (C)). What comes to x past the norm, `past`
    /// (..., C), is added to dx.
    fn layer_norm_backward(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        mean: FloatTensor<Self>,
        rstd: FloatTensor<Self>,
        #[extension_type] past: Optional<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed_backward::<Self>(dy, x, w, mean, rstd, past)
    }
}

impl LayerNormOps for Flex {
    fn layer_norm_forward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Optional<Self>,
        rounded: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if rounded || !cpu::serves(&[&x, &w]) {
            return composed_forward::<Self>(x, w, b, rounded);
        }
        let (x, w, b) = (cpu::contiguous(x), cpu::contiguous(w), b.map(cpu::contiguous));
        let (y, mean, rstd) = cpu::layer_norm::forward(cpu::values(&x), cpu::values(&w), b.as_ref().map(cpu::values));
        let column = Shape::new([mean.len(), 1]);
        (cpu::tensor(y, x.shape()), cpu::tensor(mean, column.clone()), cpu::tensor(rstd, column))
    }

    fn layer_norm_backward(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        mean: FloatTensor<Self>,
        rstd: FloatTensor<Self>,
        past: Optional<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if !cpu::serves(&[&dy, &x, &w]) {
            return composed_backward::<Self>(dy, x, w, mean, rstd, past);
        }
        let [dy, x, w, mean, rstd] = [dy, x, w, mean, rstd].map(cpu::contiguous);
        let past = past.map(cpu::contiguous);
        let (dx, dw, db) = cpu::layer_norm::backward(cpu::layer_norm::Backward {
            dy: cpu::values(&dy),
            x: cpu::values(&x),
            w: cpu::values(&w),
            mean: cpu::values(&mean),
            rstd: cpu::values(&rstd),
            past: past.as_ref().map(cpu::values),
        });
        (cpu::tensor(dx, x.shape()), cpu::tensor(dw, w.shape()), cpu::tensor(db, w.shape()))
    }
}

/// The whole of [`LayerNormOps::layer_norm_forward`]'s default, for the GPU path to fall back on.
fn composed_forward<B: Backend>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    b: Optional<B>,
    rounded: bool,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let shape = x.shape();
    let row = Shape::new([1, w.shape()[0]]);
    let x = flatten::<B>(x);
    let mean = B::float_mean_dim(x.clone(), 1);
    let centred = B::float_sub(x, mean.clone());
    let variance = B::float_mean_dim(B::float_mul(centred.clone(), centred.clone()), 1);
    let rstd = B::float_recip(B::float_sqrt(B::float_add_scalar(variance, EPSILON.into())));
    let normed = B::float_mul(centred, rstd.clone());
    let y = B::float_mul(normed, B::float_reshape(w, row.clone()));
    let y = match b {
        Optional::Present(b) => B::float_add(y, B::float_reshape(b, row)),
        Optional::Absent => y,
    };
    let y = B::float_reshape(y, shape);
    (if rounded { B::float_cast(y, FloatDType::F16) } else { y }, mean, rstd)
}

/// The whole of [`LayerNormOps::layer_norm_backward`]'s default.
fn composed_backward<B: Backend>(
    dy: FloatTensor<B>,
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    mean: FloatTensor<B>,
    rstd: FloatTensor<B>,
    past: Optional<B>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let shape = x.shape();
    let features = w.shape();
    let row = Shape::new([1, features[0]]);
    let (dy, x) = (flatten::<B>(dy), flatten::<B>(x));
    let normed = B::float_mul(B::float_sub(x, mean), rstd.clone()); // y = normed · w + b
    let dw = B::float_sum_dim(B::float_mul(dy.clone(), normed.clone()), 0);
    let db = B::float_sum_dim(dy.clone(), 0);
    let dnormed = B::float_mul(dy, B::float_reshape(w, row));
    // normed = (x - mean) rstd  =>  dx = rstd (dnormed - mean(dnormed) - normed · mean(dnormed · normed))
    let average = B::float_mean_dim(dnormed.clone(), 1);
    let along = B::float_mean_dim(B::float_mul(dnormed.clone(), normed.clone()), 1);
    let dx = B::float_sub(B::float_sub(dnormed, average), B::float_mul(normed, along));
    let dx = B::float_reshape(B::float_mul(dx, rstd), shape);
    let dx = match past {
        Optional::Present(past) => B::float_add(dx, past),
        Optional::Absent => dx,
    };
    (dx, B::float_reshape(dw, features.clone()), B::float_reshape(db, features))
}

/// Threads that share a row: each holds up to four lanes of it, more only where a row is longer than 1024 lanes.
fn team(lanes: Lanes) -> u32 {
    [32, 64, 128].into_iter().find(|team| lanes.count <= 4 * team).unwrap_or(256) as u32
}

/// The forward kernel for x and for y in f16 (or f32), and the rows of a workgroup.
pub fn forward_kernel(columns: usize, f16: [bool; 2], bias: bool) -> (Kernel, usize) {
    let lanes = Lanes::of(columns);
    let team = team(lanes);
    let threads = team.max(64); // small workgroups: a row waits for few others
    let constants = format!(
        "const LANES: u32 = {}u;\nconst TEAM: u32 = {team}u;\nconst THREADS: u32 = {threads}u;\n\
         const BIAS: bool = {bias};\nconst EPSILON: f32 = {EPSILON:e};\n",
        lanes.count
    );
    let files = [include_str!("../../wgsl/layer_norm_forward.wgsl")];
    (lanes.kernel("layer_norm_forward", f16, &constants, &files, threads), (threads / team) as usize)
}

/// The backward kernel, and the rows that a workgroup handles at a time; `past`: whether something is added to dx.
pub fn backward_kernel(columns: usize, f16: bool, past: bool) -> (Kernel, usize) {
    let lanes = Lanes::of(columns);
    let team = team(lanes);
    let threads = team.max(128);
    let constants = format!(
        "const LANES: u32 = {}u;\nconst TEAM: u32 = {team}u;\nconst THREADS: u32 = {threads}u;\nconst PAST: bool = {past};\n",
        lanes.count
    );
    let files = [include_str!("../../wgsl/layer_norm_backward.wgsl")];
    (lanes.kernel("layer_norm_backward", [f16; 2], &constants, &files, threads), (threads / team) as usize)
}

/// The kernel that adds up the partial sums of dw and db.
pub fn sums_kernel(lanes: Lanes) -> Kernel {
    lanes.kernel("column_sums", [false; 2], "", &[include_str!("../../wgsl/column_sums.wgsl")], 256)
}

/// Widths that stand for all: every size of team, lanes of one and of four columns, teams that a row fills and that it
/// does not. Another width of the same kind changes one constant, the number of lanes.
pub const WIDTHS: [usize; 5] = [67, 384, 768, 1600, 1031];

/// Every kernel of layer normalisation, for rows of the [`WIDTHS`].
pub fn kernels() -> Vec<Kernel> {
    let by_width = WIDTHS.into_iter().flat_map(|columns| {
        [false, true].into_iter().flat_map(move |f16| {
            let types = if f16 { vec![[true; 2]] } else { vec![[false; 2], [false, true]] };
            let forward =
                types.into_iter().flat_map(move |f16| [false, true].map(|bias| forward_kernel(columns, f16, bias).0));
            forward.chain([false, true].map(|past| backward_kernel(columns, f16, past).0))
        })
    });
    by_width.chain([1, 4].map(|columns| sums_kernel(Lanes::of(columns)))).collect()
}

/// Most workgroups of the backward: enough to fill a large GPU, few enough that their partial sums are small beside x.
pub const BACKWARD_GROUPS: usize = 1024;

/// Queues the forward: x (..., C), w and b (C) -> y (..., C), mean and rstd (rows); all contiguous.
///
/// For the tests, which give their own outputs; the model calls [`layer_norm`].
pub fn launch_forward(
    x: &CubeTensor,
    w: &CubeTensor,
    b: Option<&CubeTensor>,
    y: &CubeTensor,
    mean: &CubeTensor,
    rstd: &CubeTensor,
) {
    let (rows, columns) = matrix(x);
    let f16 = [x, y].map(|tensor| tensor.dtype == DType::F16);
    let (kernel, group_rows) = forward_kernel(columns, f16, b.is_some());
    let groups = rows.div_ceil(group_rows) as u32;
    kernel.launch(fold(groups), &[x, w, b.unwrap_or(w), y, mean, rstd], &[rows as u32]);
}

/// Queues the backward: dy, x (..., C), w (C), mean and rstd (rows) -> dx (..., C), to which `past` (..., C) is added, dw and
/// db (C); all contiguous.
pub fn launch_backward(
    dy: &CubeTensor,
    x: &CubeTensor,
    w: &CubeTensor,
    [mean, rstd]: [&CubeTensor; 2],
    past: Option<&CubeTensor>,
    [dx, dw, db]: [&CubeTensor; 3],
) {
    let (rows, columns) = matrix(x);
    let (kernel, group_rows) = backward_kernel(columns, x.dtype == DType::F16, past.is_some());
    let groups = rows.div_ceil(group_rows).min(BACKWARD_GROUPS);
    let partials = empty(w, Shape::new([groups, 2, columns]));
    kernel.launch((groups as u32, 1, 1), &[dy, x, w, mean, rstd, past.unwrap_or(dy), dx, &partials], &[rows as u32]);
    let lanes = Lanes::of(columns);
    let sum_groups = (2 * lanes.count).div_ceil(8) as u32;
    sums_kernel(lanes).launch(fold(sum_groups), &[&partials, dw, db], &[groups as u32, lanes.count as u32]);
}

impl LayerNormOps for CubeBackend {
    fn layer_norm_forward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Optional<Self>,
        rounded: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if !serves(&x, Ok(())) {
            return composed_forward::<Self>(x, w, b, rounded);
        }
        let (x, w) = (into_contiguous(x), into_contiguous(w));
        let b = match b {
            Optional::Present(b) => Some(into_contiguous(b)),
            Optional::Absent => None,
        };
        let (rows, _) = matrix(&x);
        let y = empty_of(&x, x.meta.shape().clone(), if rounded { DType::F16 } else { x.dtype });
        let [mean, rstd] = [(); 2].map(|()| empty(&w, Shape::new([rows, 1])));
        launch_forward(&x, &w, b.as_ref(), &y, &mean, &rstd);
        (y, mean, rstd)
    }

    fn layer_norm_backward(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        mean: FloatTensor<Self>,
        rstd: FloatTensor<Self>,
        past: Optional<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if !serves(&x, Ok(())) {
            return composed_backward::<Self>(dy, x, w, mean, rstd, past);
        }
        let [dy, x, w, mean, rstd] = [dy, x, w, mean, rstd].map(into_contiguous);
        let past = match past {
            Optional::Present(past) => Some(into_contiguous(past)),
            Optional::Absent => None,
        };
        let (dx, dw, db) = (empty_like(&x), empty_like(&w), empty_like(&w));
        launch_backward(&dy, &x, &w, [&mean, &rstd], past.as_ref(), [&dx, &dw, &db]);
        (dx, dw, db)
    }
}

/// x, w, mean, rstd.
type Saved<B> = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);

/// Parents: x, w, then the bias where there is one.
#[derive(Debug)]
struct LayerNormBackward<const N: usize>;

impl<B: LayerNormOps, const N: usize> Backward<B, N> for LayerNormBackward<N> {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Saved<B>, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (x, w, mean, rstd) = ops.state;
        let (dx, dw, db) = B::layer_norm_backward(dy, x, w, mean, rstd, Optional::Absent);
        for (parent, gradient) in ops.parents.into_iter().zip([dx, dw, db]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

impl<B: LayerNormOps, C: CheckpointStrategy> LayerNormOps for Autodiff<B, C> {
    fn layer_norm_forward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Optional<Self>,
        rounded: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (xi, wi) = (x.primitive().clone(), w.primitive().clone());
        let (y, mean, rstd) = B::layer_norm_forward(xi.clone(), wi.clone(), b.inner(), rounded);
        let saved = (xi, wi, mean.clone(), rstd.clone());
        let y = match b {
            Optional::Present(b) => {
                let parents = [x.node(), w.node(), b.node()];
                match LayerNormBackward::<3>.prepare::<C>(parents).compute_bound().stateful() {
                    OpsKind::Tracked(prepared) => prepared.finish(saved, y),
                    OpsKind::UnTracked(prepared) => prepared.finish(y),
                }
            }
            Optional::Absent => {
                let parents = [x.node(), w.node()];
                match LayerNormBackward::<2>.prepare::<C>(parents).compute_bound().stateful() {
                    OpsKind::Tracked(prepared) => prepared.finish(saved, y),
                    OpsKind::UnTracked(prepared) => prepared.finish(y),
                }
            }
        };
        let constant = <Self as burn::backend::AutodiffBackend>::from_inner;
        (y, constant(mean), constant(rstd))
    }
}

/// Layer normalisation of x (..., C) with weight w (C) and bias b (C); ε is [`EPSILON`].
pub fn layer_norm<const D: usize>(x: Tensor<D>, w: Tensor<1>, b: Option<Tensor<1>>) -> Tensor<D> {
    let (y, _, _) =
        <Dispatch as LayerNormOps>::layer_norm_forward(x.into_dispatch(), w.into_dispatch(), Optional::of(b), false);
    Tensor::from_dispatch(y)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every shape of team is valid WGSL and keeps Metal's 32 KiB, in both storage types.
    #[test]
    fn every_width_is_valid_and_fits() {
        for columns in [1, 3, 33, 128, 129, 384, 768, 1600, 4096, 8191, 8192] {
            for f16 in [false, true] {
                let kernels = [
                    forward_kernel(columns, [f16; 2], false).0,
                    forward_kernel(columns, [f16; 2], true).0,
                    forward_kernel(columns, [false, f16], true).0,
                    backward_kernel(columns, f16, false).0,
                    backward_kernel(columns, f16, true).0,
                    sums_kernel(Lanes::of(columns)),
                ];
                for kernel in kernels {
                    let bytes =
                        kernel.workgroup_memory().unwrap_or_else(|error| panic!("{columns} f16 {f16}: {error}"));
                    assert!(bytes <= 32 << 10, "{columns} f16 {f16}: {bytes} bytes of workgroup memory");
                }
            }
        }
    }
}
