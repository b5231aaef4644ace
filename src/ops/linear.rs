//! Linear layers with what follows them: bias, bias + GELU, bias + dropout + residual.

pub mod product;
pub mod tiles;

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    ops::FloatTensorOps,
    tensor::FloatTensor,
};
use burn::tensor::{DType, FloatDType, Shape, Tensor};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};
use serde::{Deserialize, Serialize};

use self::product::{Product, sum_parts, sum_parts_kernel};
use self::tiles::{Epilogue, Layout};
use super::dropout::{Dropout, DropoutOps};
use super::{Optional, flatten, gradient_scale};
use crate::cpu::{
    self,
    product::{Matrix, MatrixMut, product, product_of},
};
use crate::kernel::{self, Capabilities, Kernel, Made, Variant, fold, matrix};

/// Which GELU: GPT-2 was trained with the tanh approximation, nanoGPT uses the exact one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Gelu {
    /// x Φ(x) with the error function.
    #[default]
    Erf,
    /// x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))).
    Tanh,
}

/// √(2/π), the constant of the tanh GELU.
pub(crate) const TANH_SCALE: f64 = 0.797_884_560_802_865_4;
pub(crate) const TANH_CUBIC: f64 = 0.044_715;

/// y = x Wᵀ + b and its three gradients. W is (out, in), row-major.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait LinearOps: DropoutOps {
    /// x (..., K), w (N, K), b (N) -> (..., N).
    fn linear_forward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] b: Optional<Self>,
    ) -> FloatTensor<Self> {
        composed_forward::<Self>(x, w, b)
    }

    /// dx (..., K) = dy (..., N) · w (N, K).
    fn linear_dx(dy: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        composed_dx::<Self>(dy, w)
    }

    /// dw (N, K) = dyᵀ · x over all rows.
    fn linear_dw(dy: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self> {
        composed_dw::<Self>(dy, x)
    }

    /// db (N) = sum of dy over all rows.
    fn linear_db(dy: FloatTensor<Self>) -> FloatTensor<Self> {
        composed_db::<Self>(dy)
    }

    /// h = x Wᵀ + b, y = gelu(h). Returns (y, h): the backward needs h.
    fn linear_gelu(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] b: Optional<Self>,
        gelu: Gelu,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed_gelu::<Self>(x, w, b, gelu)
    }

    /// dh = dy · gelu'(h).
    fn gelu_dh(dy: FloatTensor<Self>, h: FloatTensor<Self>, gelu: Gelu) -> FloatTensor<Self> {
        composed_gelu_dh::<Self>(dy, h, gelu)
    }

    /// y = residual + dropout(x Wᵀ + b).
    fn linear_residual(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] b: Optional<Self>,
        residual: FloatTensor<Self>,
        dropout: Dropout,
    ) -> FloatTensor<Self> {
        composed_residual::<Self>(x, w, b, residual, dropout)
    }
}

/// [`LinearOps::linear_forward`] in Burn primitives, for the GPU path to fall back on; so are the next ones.
fn composed_forward<B: Backend>(x: FloatTensor<B>, w: FloatTensor<B>, b: Optional<B>) -> FloatTensor<B> {
    let mut shape = x.shape();
    let outputs = w.shape()[0];
    let y = B::float_matmul(flatten::<B>(x), B::float_transpose(w)); // (M, N)
    let y = match b {
        Optional::Present(b) => B::float_add(y, B::float_reshape(b, Shape::new([1, outputs]))),
        Optional::Absent => y,
    };
    let last = shape.num_dims() - 1;
    shape[last] = outputs;
    B::float_reshape(y, shape)
}

fn composed_dx<B: Backend>(dy: FloatTensor<B>, w: FloatTensor<B>) -> FloatTensor<B> {
    let mut shape = dy.shape();
    let last = shape.num_dims() - 1;
    shape[last] = w.shape()[1];
    B::float_reshape(B::float_matmul(flatten::<B>(dy), w), shape)
}

fn composed_dw<B: Backend>(dy: FloatTensor<B>, x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_matmul(B::float_transpose(flatten::<B>(dy)), flatten::<B>(x))
}

fn composed_db<B: Backend>(dy: FloatTensor<B>) -> FloatTensor<B> {
    let outputs = dy.shape()[dy.shape().num_dims() - 1];
    B::float_reshape(B::float_sum_dim(flatten::<B>(dy), 0), Shape::new([outputs]))
}

fn composed_gelu<B: Backend>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    b: Optional<B>,
    gelu: Gelu,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let h = composed_forward::<B>(x, w, b);
    let y = match gelu {
        Gelu::Erf => B::gelu(h.clone()),
        Gelu::Tanh => {
            let tanh = B::float_tanh(tanh_argument::<B>(h.clone()));
            let half = B::float_mul_scalar(h.clone(), 0.5.into());
            B::float_mul(half, B::float_add_scalar(tanh, 1.0.into()))
        }
    };
    (y, h)
}

fn composed_residual<B: DropoutOps>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    b: Optional<B>,
    residual: FloatTensor<B>,
    dropout: Dropout,
) -> FloatTensor<B> {
    let y = composed_forward::<B>(x, w, b);
    let y = if dropout.is_on() { B::dropout(y, dropout) } else { y };
    B::float_add(residual, y)
}

/// dh = dy · gelu'(h) in Burn primitives.
fn composed_gelu_dh<B: Backend>(dy: FloatTensor<B>, h: FloatTensor<B>, gelu: Gelu) -> FloatTensor<B> {
    match gelu {
        Gelu::Erf => {
            // gelu' = Φ(h) + h φ(h). Burn's own gelu_backward is that of the tanh approximation on wgpu.
            let scaled = B::float_mul_scalar(h.clone(), FRAC_1_SQRT_2.into());
            let twice_cdf = B::float_add_scalar(B::float_erf(scaled), 1.0.into());
            let cdf = B::float_mul_scalar(twice_cdf, 0.5.into());
            let square = B::float_mul(h.clone(), h.clone());
            let pdf = B::float_exp(B::float_mul_scalar(square, (-0.5).into()));
            let pdf = B::float_mul_scalar(pdf, (0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2).into());
            B::float_mul(dy, B::float_add(cdf, B::float_mul(h, pdf)))
        }
        Gelu::Tanh => {
            // gelu' = (1 + t)/2 + h/2 (1 - t²) √(2/π) (1 + 3 · 0.044715 h²), t = tanh(argument)
            let t = B::float_tanh(tanh_argument::<B>(h.clone()));
            let half = B::float_mul_scalar(B::float_add_scalar(t.clone(), 1.0.into()), 0.5.into());
            let sech2 = B::float_add_scalar(B::float_neg(B::float_mul(t.clone(), t)), 1.0.into());
            let square = B::float_mul(h.clone(), h.clone());
            let slope = B::float_add_scalar(B::float_mul_scalar(square, (3.0 * TANH_CUBIC).into()), 1.0.into());
            let inner = B::float_mul(B::float_mul(h, sech2), slope);
            let inner = B::float_mul_scalar(inner, (0.5 * TANH_SCALE).into());
            B::float_mul(dy, B::float_add(half, inner))
        }
    }
}

/// √(2/π) (h + 0.044715 h³).
fn tanh_argument<B: Backend>(h: FloatTensor<B>) -> FloatTensor<B> {
    let square = B::float_mul(h.clone(), h.clone());
    let factor = B::float_add_scalar(B::float_mul_scalar(square, TANH_CUBIC.into()), 1.0.into());
    B::float_mul_scalar(B::float_mul(h, factor), TANH_SCALE.into())
}

/// x wᵀ + b, (..., N), by the CPU's loops.
fn cpu_forward(x: FloatTensor<Flex>, w: FloatTensor<Flex>, b: Optional<Flex>) -> FloatTensor<Flex> {
    let (x, w) = (cpu::contiguous(x), cpu::contiguous(w));
    let ([rows, inputs], [outputs, _]) = (cpu::matrix(&x), cpu::matrix(&w));
    let (xs, ws) = (Matrix::dense(cpu::values(&x), rows, inputs), Matrix::dense(cpu::values(&w), outputs, inputs));
    let y = match b.map(cpu::contiguous) {
        Some(b) => {
            let mut y = cpu::elementwise::repeat(cpu::values(&b), rows);
            product(xs, ws.t(), MatrixMut::dense(&mut y, rows, outputs), true);
            y
        }
        None => product_of(xs, ws.t()),
    };
    cpu::tensor(y, cpu::with_columns(&x, outputs))
}

impl LinearOps for Flex {
    fn linear_forward(x: FloatTensor<Self>, w: FloatTensor<Self>, b: Optional<Self>) -> FloatTensor<Self> {
        if !cpu::serves(&[&x, &w]) {
            return composed_forward::<Self>(x, w, b);
        }
        cpu_forward(x, w, b)
    }

    fn linear_dx(dy: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        if !cpu::serves(&[&dy, &w]) {
            return composed_dx::<Self>(dy, w);
        }
        let (dy, w) = (cpu::contiguous(dy), cpu::contiguous(w));
        let ([rows, outputs], [_, inputs]) = (cpu::matrix(&dy), cpu::matrix(&w));
        let (dys, ws) =
            (Matrix::dense(cpu::values(&dy), rows, outputs), Matrix::dense(cpu::values(&w), outputs, inputs));
        cpu::tensor(product_of(dys, ws), cpu::with_columns(&dy, inputs))
    }

    fn linear_dw(dy: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self> {
        if !cpu::serves(&[&dy, &x]) {
            return composed_dw::<Self>(dy, x);
        }
        let (dy, x) = (cpu::contiguous(dy), cpu::contiguous(x));
        let ([rows, outputs], [_, inputs]) = (cpu::matrix(&dy), cpu::matrix(&x));
        let (dys, xs) = (Matrix::dense(cpu::values(&dy), rows, outputs), Matrix::dense(cpu::values(&x), rows, inputs));
        cpu::tensor(product_of(dys.t(), xs), Shape::new([outputs, inputs]))
    }

    fn linear_db(dy: FloatTensor<Self>) -> FloatTensor<Self> {
        if !cpu::serves(&[&dy]) {
            return composed_db::<Self>(dy);
        }
        let dy = cpu::contiguous(dy);
        let [_, outputs] = cpu::matrix(&dy);
        cpu::tensor(cpu::elementwise::column_sums(cpu::values(&dy), outputs), Shape::new([outputs]))
    }

    fn linear_gelu(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Optional<Self>,
        gelu: Gelu,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !cpu::serves(&[&x, &w]) {
            return composed_gelu::<Self>(x, w, b, gelu);
        }
        let h = cpu_forward(x, w, b);
        (cpu::tensor(cpu::elementwise::gelu_of(cpu::values(&h), gelu), h.shape()), h)
    }

    fn gelu_dh(dy: FloatTensor<Self>, h: FloatTensor<Self>, gelu: Gelu) -> FloatTensor<Self> {
        if !cpu::serves(&[&dy, &h]) {
            return composed_gelu_dh::<Self>(dy, h, gelu);
        }
        let (mut dh, h) = (cpu::own(dy), cpu::contiguous(h));
        cpu::elementwise::times_gelu_slope(dh.storage_mut::<f32>(), cpu::values(&h), gelu);
        dh
    }

    fn linear_residual(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Optional<Self>,
        residual: FloatTensor<Self>,
        dropout: Dropout,
    ) -> FloatTensor<Self> {
        if !cpu::serves(&[&x, &w, &residual]) {
            return composed_residual::<Self>(x, w, b, residual, dropout);
        }
        let mut y = cpu_forward(x, w, b);
        let [_, columns] = cpu::matrix(&y);
        let residual = cpu::contiguous(residual);
        cpu::elementwise::drop_and_add(y.storage_mut::<f32>(), cpu::values(&residual), columns, dropout);
        y
    }
}

/// A tensor (..., columns) with the leading dimensions of `like`.
fn empty_with_columns(like: &CubeTensor, columns: usize) -> CubeTensor {
    let mut shape = like.meta.shape().clone();
    let last = shape.num_dims() - 1;
    shape[last] = columns;
    kernel::empty(like, shape)
}

/// The type of a kernel's elements, as its header begins.
pub(super) fn elem(f16: bool) -> &'static str {
    if f16 { "enable f16;\nalias elem = f16;\n" } else { "alias elem = f32;\n" }
}

/// Rows that one invocation of [`column_sum_kernel`] sums.
pub const BLOCK_ROWS: usize = 128;

/// The kernel of a bias's gradient: the columns' sums over blocks of [`BLOCK_ROWS`] rows.
pub fn column_sum_kernel(f16: bool) -> Kernel {
    static MADE: Made<bool> = Made::new();
    MADE.get(f16, |&f16| make_column_sum(f16))
}

fn make_column_sum(f16: bool) -> Kernel {
    let header = format!("{}const BLOCK_ROWS: u32 = {BLOCK_ROWS}u;\n", elem(f16));
    Kernel::new("column_sum", header, vec![include_str!("../../wgsl/column_sum.wgsl")], (64, 1, 1))
}

/// The kernel of GELU's gradient, four elements an invocation.
pub fn gelu_gradient_kernel(gelu: Gelu, f16: bool) -> Kernel {
    static MADE: Made<(Gelu, bool)> = Made::new();
    MADE.get((gelu, f16), |&(gelu, f16)| make_gelu_gradient(gelu, f16))
}

fn make_gelu_gradient(gelu: Gelu, f16: bool) -> Kernel {
    let header = format!("{}const GELU_TANH: bool = {};\n", elem(f16), gelu == Gelu::Tanh);
    let files = vec![include_str!("../../wgsl/gelu.wgsl"), include_str!("../../wgsl/gelu_gradient.wgsl")];
    Kernel::new("gelu_gradient", header, files, (256, 1, 1))
}

/// Every kernel of linear layers that a device with these capabilities can be given.
pub fn kernels(capabilities: &Capabilities) -> Vec<Kernel> {
    let mut kernels = tiles::kernels(capabilities);
    for f16 in [false, true] {
        kernels.push(column_sum_kernel(f16));
        kernels.extend([Gelu::Erf, Gelu::Tanh].map(|gelu| gelu_gradient_kernel(gelu, f16)));
    }
    for elements in [1, 4] {
        kernels.extend([false, true].map(|accumulate| sum_parts_kernel(elements, accumulate, false).0));
        kernels.push(sum_parts_kernel(elements, false, true).0);
    }
    kernels
}

/// epilogue(x wᵀ + b) into a new tensor.
fn layer(
    variant: Variant,
    x: &CubeTensor,
    w: CubeTensor,
    b: Optional<CubeBackend>,
    epilogue: Epilogue,
    extra: Option<&CubeTensor>,
    dropout: Dropout,
) -> CubeTensor {
    let (w, (m, k)) = (into_contiguous(w), matrix(x));
    let n = w.meta.shape()[0];
    let bias = match b {
        Optional::Present(b) => Some(into_contiguous(b)),
        Optional::Absent => None,
    };
    let y = empty_with_columns(x, n);
    let product =
        Product { epilogue, bias: bias.as_ref(), extra, dropout, ..Product::plain(Layout::Nt, x, &w, m, n, k) };
    product.launch(variant, &y);
    y
}

impl LinearOps for CubeBackend {
    fn linear_forward(x: FloatTensor<Self>, w: FloatTensor<Self>, b: Optional<Self>) -> FloatTensor<Self> {
        let Some(variant) = kernel::variant(&x) else {
            return composed_forward::<Self>(x, w, b);
        };
        layer(variant, &into_contiguous(x), w, b, Epilogue::Plain, None, Dropout::OFF)
    }

    fn linear_dx(dy: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        let Some(variant) = kernel::variant(&dy) else {
            return composed_dx::<Self>(dy, w);
        };
        let (dy, w) = (into_contiguous(dy), into_contiguous(w));
        let ((rows, outputs), inputs) = (matrix(&dy), w.meta.shape()[1]);
        let dx = empty_with_columns(&dy, inputs);
        let product = Product::plain(Layout::Nn, &dy, &w, rows, inputs, outputs);
        Product { scale: gradient_scale(&dy, rows), ..product }.launch(variant, &dx);
        dx
    }

    fn linear_dw(dy: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self> {
        let Some(variant) = kernel::variant(&dy) else {
            return composed_dw::<Self>(dy, x);
        };
        let (dy, x) = (into_contiguous(dy), into_contiguous(x));
        let ((rows, outputs), (_, inputs)) = (matrix(&dy), matrix(&x));
        let dw = kernel::empty_of(&dy, Shape::new([outputs, inputs]), DType::F32);
        let product = Product::plain(Layout::Tn, &dy, &x, outputs, inputs, rows);
        Product { scale: gradient_scale(&dy, rows), ..product }.launch_tall(variant, &dw, false);
        dw
    }

    fn linear_db(dy: FloatTensor<Self>) -> FloatTensor<Self> {
        if kernel::variant(&dy).is_none() {
            return composed_db::<Self>(dy);
        }
        let dy = into_contiguous(dy);
        let (rows, columns) = matrix(&dy);
        let blocks = rows.div_ceil(BLOCK_ROWS);
        let parts = kernel::empty_of(&dy, Shape::new([blocks, columns]), DType::F32);
        let groups = blocks * columns.div_ceil(64);
        let kernel = column_sum_kernel(dy.dtype == DType::F16);
        kernel.launch(fold(groups as u32), &[&dy, &parts], &[rows as u32, columns as u32]);
        let db = kernel::empty_of(&dy, Shape::new([columns]), DType::F32);
        sum_parts(&parts, blocks, &db, false);
        db
    }

    fn linear_gelu(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Optional<Self>,
        gelu: Gelu,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let Some(variant) = kernel::variant(&x) else {
            return composed_gelu::<Self>(x, w, b, gelu);
        };
        let x = into_contiguous(x);
        let h = empty_with_columns(&x, w.meta.shape()[0]);
        let epilogue = Epilogue::Gelu { tanh: gelu == Gelu::Tanh };
        let y = layer(variant, &x, w, b, epilogue, Some(&h), Dropout::OFF);
        (y, h)
    }

    fn gelu_dh(dy: FloatTensor<Self>, h: FloatTensor<Self>, gelu: Gelu) -> FloatTensor<Self> {
        let elements = h.meta.shape().num_elements();
        if kernel::variant(&dy).is_none() || !elements.is_multiple_of(4) {
            // In f32: the square of h leaves f16 from 256 on.
            let dtype = dy.dtype.into();
            let [dy, h] = [dy, h].map(|tensor| Self::float_cast(tensor, FloatDType::F32));
            return Self::float_cast(composed_gelu_dh::<Self>(dy, h, gelu), dtype);
        }
        let (dy, h) = (into_contiguous(dy), into_contiguous(h));
        let dh = kernel::empty_like(&h);
        let groups = (elements / 4).div_ceil(256);
        let kernel = gelu_gradient_kernel(gelu, h.dtype == DType::F16);
        kernel.launch(fold(groups as u32), &[&dy, &h, &dh], &[(elements / 4) as u32]);
        dh
    }

    fn linear_residual(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Optional<Self>,
        residual: FloatTensor<Self>,
        dropout: Dropout,
    ) -> FloatTensor<Self> {
        let Some(variant) = kernel::variant(&x) else {
            return composed_residual::<Self>(x, w, b, residual, dropout);
        };
        let residual = into_contiguous(residual);
        let epilogue = Epilogue::Residual { dropout: dropout.is_on() };
        layer(variant, &into_contiguous(x), w, b, epilogue, Some(&residual), dropout)
    }
}

/// What stands between the product and the output.
#[derive(Clone, Debug)]
enum After<B: LinearOps> {
    None,
    Gelu(Gelu, FloatTensor<B>),
    Residual(Dropout),
}

#[derive(Clone, Debug)]
struct LinearState<B: LinearOps> {
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    has_bias: bool,
    after: After<B>,
}

/// Parents: x, w, then the bias and the residual where there are any.
#[derive(Debug)]
struct LinearBackward<const N: usize>;

impl<B: LinearOps, const N: usize> Backward<B, N> for LinearBackward<N> {
    type State = LinearState<B>;

    fn backward(self, ops: Ops<LinearState<B>, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let LinearState { x, w, has_bias, after } = ops.state;
        let dy = grads.consume::<B>(&ops.node);
        let dy = match after {
            After::None => dy,
            After::Gelu(gelu, h) => B::gelu_dh(dy, h, gelu), // y = gelu(h)  =>  dh = dy gelu'(h)
            After::Residual(dropout) => {
                if let Some(residual) = &ops.parents[2 + usize::from(has_bias)] {
                    grads.register::<B>(residual.id, dy.clone()); // y = residual + ...
                }
                if dropout.is_on() { B::dropout(dy, dropout) } else { dy }
            }
        };
        if has_bias && let Some(b) = &ops.parents[2] {
            grads.register::<B>(b.id, B::linear_db(dy.clone())); // h = ... + b  =>  db = Σ dh
        }
        if let Some(node) = &ops.parents[1] {
            grads.register::<B>(node.id, B::linear_dw(dy.clone(), x)); // h = x wᵀ  =>  dw = dhᵀ x
        }
        if let Some(node) = &ops.parents[0] {
            grads.register::<B>(node.id, B::linear_dx(dy, w)); // h = x wᵀ  =>  dx = dh w
        }
    }
}

/// Ends the recording of one node.
fn record<B: LinearOps, C: CheckpointStrategy, const N: usize>(
    node: OpsKind<LinearBackward<N>, B, LinearState<B>, C, N>,
    y: FloatTensor<B>,
    state: LinearState<B>,
) -> FloatTensor<Autodiff<B, C>> {
    match node {
        OpsKind::Tracked(prepared) => prepared.finish(state, y),
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    }
}

impl<B: LinearOps, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn linear_forward(x: FloatTensor<Self>, w: FloatTensor<Self>, b: Optional<Self>) -> FloatTensor<Self> {
        let (xi, wi, bi) = inner::<B, C>(&x, &w, &b);
        let y = B::linear_forward(xi.clone(), wi.clone(), bi);
        let state = state(xi, wi, has_bias(&b), After::None);
        match b {
            Optional::Present(b) => record(
                LinearBackward::<3>.prepare::<C>([x.node(), w.node(), b.node()]).compute_bound().stateful(),
                y,
                state,
            ),
            Optional::Absent => {
                record(LinearBackward::<2>.prepare::<C>([x.node(), w.node()]).compute_bound().stateful(), y, state)
            }
        }
    }

    fn linear_gelu(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Optional<Self>,
        gelu: Gelu,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (xi, wi, bi) = inner::<B, C>(&x, &w, &b);
        let (y, h) = B::linear_gelu(xi.clone(), wi.clone(), bi, gelu);
        let state = state(xi, wi, has_bias(&b), After::Gelu(gelu, h.clone()));
        let y = match b {
            Optional::Present(b) => record(
                LinearBackward::<3>.prepare::<C>([x.node(), w.node(), b.node()]).compute_bound().stateful(),
                y,
                state,
            ),
            Optional::Absent => {
                record(LinearBackward::<2>.prepare::<C>([x.node(), w.node()]).compute_bound().stateful(), y, state)
            }
        };
        (y, <Self as AutodiffBackend>::from_inner(h))
    }

    fn linear_residual(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Optional<Self>,
        residual: FloatTensor<Self>,
        dropout: Dropout,
    ) -> FloatTensor<Self> {
        let (xi, wi, bi) = inner::<B, C>(&x, &w, &b);
        let ri = <Self as AutodiffBackend>::inner(residual.clone());
        let y = B::linear_residual(xi.clone(), wi.clone(), bi, ri, dropout);
        let state = state(xi, wi, has_bias(&b), After::Residual(dropout));
        let (x, w, r) = (x.node(), w.node(), residual.node());
        match b {
            Optional::Present(b) => {
                record(LinearBackward::<4>.prepare::<C>([x, w, b.node(), r]).compute_bound().stateful(), y, state)
            }
            Optional::Absent => {
                record(LinearBackward::<3>.prepare::<C>([x, w, r]).compute_bound().stateful(), y, state)
            }
        }
    }
}

/// The tensors of the backend below.
fn inner<B: LinearOps, C: CheckpointStrategy>(
    x: &FloatTensor<Autodiff<B, C>>,
    w: &FloatTensor<Autodiff<B, C>>,
    b: &Optional<Autodiff<B, C>>,
) -> (FloatTensor<B>, FloatTensor<B>, Optional<B>) {
    (x.primitive().clone(), w.primitive().clone(), b.inner())
}

fn has_bias<B: Backend>(bias: &Optional<B>) -> bool {
    matches!(bias, Optional::Present(_))
}

fn state<B: LinearOps>(x: FloatTensor<B>, w: FloatTensor<B>, has_bias: bool, after: After<B>) -> LinearState<B> {
    LinearState { x, w, has_bias, after }
}

/// x (..., K), w (N, K), b (N) -> x wᵀ + b, (..., N).
pub fn linear<const D: usize>(x: Tensor<D>, w: Tensor<2>, b: Option<Tensor<1>>) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as LinearOps>::linear_forward(
        x.into_dispatch(),
        w.into_dispatch(),
        Optional::of(b),
    ))
}

/// gelu(x wᵀ + b): x (..., K), w (N, K), b (N) -> (..., N).
pub fn linear_gelu<const D: usize>(x: Tensor<D>, w: Tensor<2>, b: Option<Tensor<1>>, gelu: Gelu) -> Tensor<D> {
    let (y, _) = <Dispatch as LinearOps>::linear_gelu(x.into_dispatch(), w.into_dispatch(), Optional::of(b), gelu);
    Tensor::from_dispatch(y)
}

/// residual + dropout(x wᵀ + b): x (..., K), w (N, K), b (N), residual (..., N) -> (..., N).
pub fn linear_residual<const D: usize>(
    x: Tensor<D>,
    w: Tensor<2>,
    b: Option<Tensor<1>>,
    residual: Tensor<D>,
    dropout: Dropout,
) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as LinearOps>::linear_residual(
        x.into_dispatch(),
        w.into_dispatch(),
        Optional::of(b),
        residual.into_dispatch(),
        dropout,
    ))
}
