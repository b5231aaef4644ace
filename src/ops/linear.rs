//! Linear layers with what follows them: bias, bias + GELU, bias + dropout + residual.

mod beside;
mod composed;
mod gradient;
mod header;
pub mod product;
pub mod tiles;

use burn::backend::{Dispatch, Flex, TensorMetadata, backend_extension, ops::FloatTensorOps, tensor::FloatTensor};
use burn::tensor::{DType, FloatDType, Shape, Tensor};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};
use serde::{Deserialize, Serialize};

pub(super) use self::beside::elem;
pub use self::beside::{BLOCK_ROWS, column_sum_kernel, gelu_gradient_kernel, kernels};
use self::product::{Product, sum_parts};
use self::tiles::{Epilogue, Layout, has_slopes};
use super::dropout::{Dropout, DropoutOps};
use super::{Optional, hold};
use crate::cpu::{
    self,
    product::{Matrix, MatrixMut, product, product_of},
};
use crate::kernel::{self, Variant, fold, matrix};

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

/// y = x Wᵀ + b and its three gradients. W is (out, in), row-major. Results are of the type of what they are made from, gradients of
/// weights and biases f32. A dy that is `held` times itself is f16, as its other factor may be, and what is made of it f32.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait LinearOps: DropoutOps {
    /// x (..., K), w (N, K), b (N) -> (..., N).
    fn linear_forward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] b: Optional<Self>,
    ) -> FloatTensor<Self> {
        composed::forward::<Self>(x, w, b)
    }

    /// dx (..., K) = dy (..., N) · w (N, K).
    fn linear_dx(dy: FloatTensor<Self>, w: FloatTensor<Self>, held: Option<f32>) -> FloatTensor<Self> {
        composed::dx::<Self>(dy, w, held)
    }

    /// dw (N, K) = dyᵀ · x over all rows.
    fn linear_dw(dy: FloatTensor<Self>, x: FloatTensor<Self>, held: Option<f32>) -> FloatTensor<Self> {
        composed::dw::<Self>(dy, x, held)
    }

    /// db (N) = sum of dy over all rows.
    fn linear_db(dy: FloatTensor<Self>, held: Option<f32>) -> FloatTensor<Self> {
        composed::db::<Self>(dy, held)
    }

    /// h = x Wᵀ + b, y = gelu(h). Returns (y, h): the backward needs h. It is of x's type, or f32 where `whole`.
    fn linear_gelu(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] b: Optional<Self>,
        gelu: Gelu,
        whole: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed::gelu::<Self>(x, w, b, gelu, whole)
    }

    /// dh = dy · gelu'(h), `held` times itself in f16 or of h's type.
    fn gelu_dh(dy: FloatTensor<Self>, h: FloatTensor<Self>, gelu: Gelu, held: Option<f32>) -> FloatTensor<Self> {
        hold::<Self>(composed::gelu_dh::<Self>(dy, h, gelu), held)
    }

    /// dh (..., K) = (dy (..., N) · w (N, K)) · gelu'(h (..., K)): through a layer whose input is gelu(h). Where dy is held, dh is too.
    fn linear_dh(
        dy: FloatTensor<Self>,
        w: FloatTensor<Self>,
        h: FloatTensor<Self>,
        gelu: Gelu,
        held: Option<f32>,
    ) -> FloatTensor<Self> {
        Self::gelu_dh(Self::linear_dx(dy, w, held), h, gelu, held)
    }

    /// y = residual + dropout(x Wᵀ + b), of the residual's type.
    fn linear_residual(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] b: Optional<Self>,
        residual: FloatTensor<Self>,
        dropout: Dropout,
    ) -> FloatTensor<Self> {
        composed::residual::<Self>(x, w, b, residual, dropout)
    }
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
            return composed::forward::<Self>(x, w, b);
        }
        cpu_forward(x, w, b)
    }

    fn linear_dx(dy: FloatTensor<Self>, w: FloatTensor<Self>, held: Option<f32>) -> FloatTensor<Self> {
        if !cpu::serves(&[&dy, &w]) {
            return composed::dx::<Self>(dy, w, held);
        }
        let (dy, w) = (cpu::contiguous(dy), cpu::contiguous(w));
        let ([rows, outputs], [_, inputs]) = (cpu::matrix(&dy), cpu::matrix(&w));
        let (dys, ws) =
            (Matrix::dense(cpu::values(&dy), rows, outputs), Matrix::dense(cpu::values(&w), outputs, inputs));
        cpu::tensor(product_of(dys, ws), cpu::with_columns(&dy, inputs))
    }

    fn linear_dw(dy: FloatTensor<Self>, x: FloatTensor<Self>, held: Option<f32>) -> FloatTensor<Self> {
        if !cpu::serves(&[&dy, &x]) {
            return composed::dw::<Self>(dy, x, held);
        }
        let (dy, x) = (cpu::contiguous(dy), cpu::contiguous(x));
        let ([rows, outputs], [_, inputs]) = (cpu::matrix(&dy), cpu::matrix(&x));
        let (dys, xs) = (Matrix::dense(cpu::values(&dy), rows, outputs), Matrix::dense(cpu::values(&x), rows, inputs));
        cpu::tensor(product_of(dys.t(), xs), Shape::new([outputs, inputs]))
    }

    fn linear_db(dy: FloatTensor<Self>, held: Option<f32>) -> FloatTensor<Self> {
        if !cpu::serves(&[&dy]) {
            return composed::db::<Self>(dy, held);
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
        whole: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !cpu::serves(&[&x, &w]) {
            return composed::gelu::<Self>(x, w, b, gelu, whole);
        }
        let h = cpu_forward(x, w, b);
        (cpu::tensor(cpu::elementwise::gelu_of(cpu::values(&h), gelu), h.shape()), h)
    }

    fn gelu_dh(dy: FloatTensor<Self>, h: FloatTensor<Self>, gelu: Gelu, held: Option<f32>) -> FloatTensor<Self> {
        if held.is_some() || !cpu::serves(&[&dy, &h]) {
            return hold::<Self>(composed::gelu_dh::<Self>(dy, h, gelu), held);
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
            return composed::residual::<Self>(x, w, b, residual, dropout);
        }
        let mut y = cpu_forward(x, w, b);
        let [_, columns] = cpu::matrix(&y);
        let residual = cpu::contiguous(residual);
        cpu::elementwise::drop_and_add(y.storage_mut::<f32>(), cpu::values(&residual), columns, dropout);
        y
    }
}

/// A tensor (..., columns) with the leading dimensions of `like`.
fn empty_with_columns(like: &CubeTensor, columns: usize, dtype: DType) -> CubeTensor {
    let mut shape = like.meta.shape().clone();
    let last = shape.num_dims() - 1;
    shape[last] = columns;
    kernel::empty_of(like, shape, dtype)
}

/// epilogue(x wᵀ + b) into a new tensor, of extra's type where that is read, else of x's.
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
    let dtype = match (epilogue, extra) {
        (Epilogue::Residual { .. }, Some(residual)) => residual.dtype,
        _ => x.dtype,
    };
    let y = empty_with_columns(x, n, dtype);
    let product =
        Product { epilogue, bias: bias.as_ref(), extra, dropout, ..Product::plain(Layout::Nt, x, &w, m, n, k) };
    product.launch(variant, &y);
    y
}

/// epilogue(dy w) into a new tensor. Where dy is `held` times itself, in f16, dx is f32 and without that factor.
fn input_gradient(
    variant: Variant,
    dy: CubeTensor,
    w: CubeTensor,
    (epilogue, extra): (Epilogue, Option<&CubeTensor>),
    held: Option<f32>,
) -> CubeTensor {
    let (dy, w) = (into_contiguous(dy), into_contiguous(w));
    let ((rows, outputs), inputs) = (matrix(&dy), w.meta.shape()[1]);
    let dx = empty_with_columns(&dy, inputs, if held.is_some() { DType::F32 } else { dy.dtype });
    let product = Product::plain(Layout::Nn, &dy, &w, rows, inputs, outputs);
    Product { epilogue, extra, ..product.of_gradient(rows, held) }.launch(variant, &dx);
    dx
}

impl LinearOps for CubeBackend {
    fn linear_forward(x: FloatTensor<Self>, w: FloatTensor<Self>, b: Optional<Self>) -> FloatTensor<Self> {
        let Some(variant) = kernel::variant(&x) else {
            return composed::forward::<Self>(x, w, b);
        };
        layer(variant, &into_contiguous(x), w, b, Epilogue::Plain, None, Dropout::OFF)
    }

    fn linear_dx(dy: FloatTensor<Self>, w: FloatTensor<Self>, held: Option<f32>) -> FloatTensor<Self> {
        let Some(variant) = kernel::variant(&dy) else {
            return composed::dx::<Self>(dy, w, held);
        };
        input_gradient(variant, dy, w, (Epilogue::Plain, None), held)
    }

    fn linear_dh(
        dy: FloatTensor<Self>,
        w: FloatTensor<Self>,
        h: FloatTensor<Self>,
        gelu: Gelu,
        held: Option<f32>,
    ) -> FloatTensor<Self> {
        let Some(variant) = kernel::variant(&dy).filter(|&variant| has_slopes(variant)) else {
            return Self::gelu_dh(Self::linear_dx(dy, w, held), h, gelu, held);
        };
        let epilogue = Epilogue::GeluSlope { tanh: gelu == Gelu::Tanh };
        // A held dy's factor goes on to dh.
        input_gradient(variant, dy, w, (epilogue, Some(&into_contiguous(h))), None)
    }

    fn linear_dw(dy: FloatTensor<Self>, x: FloatTensor<Self>, held: Option<f32>) -> FloatTensor<Self> {
        let Some(variant) = kernel::variant(&dy) else {
            return composed::dw::<Self>(dy, x, held);
        };
        let (dy, x) = (into_contiguous(dy), into_contiguous(x));
        let ((rows, outputs), (_, inputs)) = (matrix(&dy), matrix(&x));
        let dw = kernel::empty_of(&dy, Shape::new([outputs, inputs]), DType::F32);
        let product = Product::plain(Layout::Tn, &dy, &x, outputs, inputs, rows);
        product.of_gradient(rows, held).launch_tall(variant, &dw, false);
        dw
    }

    fn linear_db(dy: FloatTensor<Self>, held: Option<f32>) -> FloatTensor<Self> {
        if kernel::variant(&dy).is_none() {
            return composed::db::<Self>(dy, held);
        }
        let dy = into_contiguous(dy);
        let (rows, columns) = matrix(&dy);
        let blocks = rows.div_ceil(BLOCK_ROWS);
        let parts = kernel::empty_of(&dy, Shape::new([blocks, columns]), DType::F32);
        let groups = blocks * columns.div_ceil(64);
        let kernel = column_sum_kernel(dy.dtype == DType::F16);
        let factor = held.map_or(1.0, f32::recip);
        kernel.launch(fold(groups as u32), &[&dy, &parts], &[rows as u32, columns as u32, factor.to_bits()]);
        let db = kernel::empty_of(&dy, Shape::new([columns]), DType::F32);
        sum_parts(&parts, blocks, &db, false);
        db
    }

    fn linear_gelu(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: Optional<Self>,
        gelu: Gelu,
        whole: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let Some(variant) = kernel::variant(&x) else {
            return composed::gelu::<Self>(x, w, b, gelu, whole);
        };
        let x = into_contiguous(x);
        let h = empty_with_columns(&x, w.meta.shape()[0], if whole { DType::F32 } else { x.dtype });
        let epilogue = Epilogue::Gelu { tanh: gelu == Gelu::Tanh };
        let y = layer(variant, &x, w, b, epilogue, Some(&h), Dropout::OFF);
        (y, h)
    }

    fn gelu_dh(dy: FloatTensor<Self>, h: FloatTensor<Self>, gelu: Gelu, held: Option<f32>) -> FloatTensor<Self> {
        let elements = h.meta.shape().num_elements();
        if kernel::variant(&dy).is_none() || !elements.is_multiple_of(4) {
            // In f32: the square of h leaves f16 from 256 on.
            let dtype = dy.dtype.into();
            let [dy, h] = [dy, h].map(|tensor| Self::float_cast(tensor, FloatDType::F32));
            return hold::<Self>(Self::float_cast(composed::gelu_dh::<Self>(dy, h, gelu), dtype), held);
        }
        let (dy, h) = (into_contiguous(dy), into_contiguous(h));
        let dh = kernel::empty_of(&h, h.meta.shape().clone(), if held.is_some() { DType::F16 } else { h.dtype });
        let groups = (elements / 4).div_ceil(256);
        let kernel = gelu_gradient_kernel(gelu, [&h, &dh].map(|tensor| tensor.dtype == DType::F16));
        let factor = held.unwrap_or(1.0);
        kernel.launch(fold(groups as u32), &[&dy, &h, &dh], &[(elements / 4) as u32, factor.to_bits()]);
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
            return composed::residual::<Self>(x, w, b, residual, dropout);
        };
        let residual = into_contiguous(residual);
        let epilogue = Epilogue::Residual { dropout: dropout.is_on() };
        layer(variant, &into_contiguous(x), w, b, epilogue, Some(&residual), dropout)
    }
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
    let (y, _) =
        <Dispatch as LinearOps>::linear_gelu(x.into_dispatch(), w.into_dispatch(), Optional::of(b), gelu, false);
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
