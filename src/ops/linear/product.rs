//! One matrix product on the GPU: out (M, N) = epilogue(A · B).

use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;

use super::tiles::{self, Access, Epilogue, Layout, Ragged, Spec, Tile};
use crate::kernel::lanes::Lanes;
use crate::kernel::{self, Kernel, Variant, Work, fold};
use crate::ops::dropout::Dropout;

/// An H200's, standing for a large GPU's (wgpu does not tell a device's); a smaller one is full long before.
const PROCESSORS: usize = 132;

/// Workgroups that a large GPU wants at least: a tall K is split until there are as many.
const ENOUGH_GROUPS: usize = 2 * PROCESSORS;

/// Threads of the scalar kernel that one processor holds: registers allow 128 for each of 512.
const SCALAR_THREADS: usize = 512;

/// Least steps over K that are worth a workgroup of their own.
const LEAST_STEPS: usize = 8;

/// What a workgroup of the scalar kernel costs beside its steps, in steps: the first fetch, the sums' way to memory, and
/// there and back again when the parts are added.
const STEPS_BESIDE: usize = 4;

/// A product's factors. A and B are stored as `layout` says, each row `strides` elements after the one before.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// How A and B are stored.
    pub layout: Layout,
    /// A.
    pub a: &'a CubeTensor,
    /// B.
    pub b: &'a CubeTensor,
    /// Rows of A and of out.
    pub m: usize,
    /// Columns of B and of out.
    pub n: usize,
    /// What is summed over.
    pub k: usize,
    /// Elements from row to row of A, B and out (and of the epilogue's extra matrix).
    pub strides: [usize; 3],
    /// What A is multiplied by before it is rounded to f16, and the sums divided by; 1 changes nothing.
    pub scale: f32,
    /// What follows the sums.
    pub epilogue: Epilogue,
    /// Added to every row (N), f32.
    pub bias: Option<&'a CubeTensor>,
    /// The epilogue's second matrix, read or written.
    pub extra: Option<&'a CubeTensor>,
    /// The residual epilogue's dropout.
    pub dropout: Dropout,
}

impl<'a> Product<'a> {
    /// Contiguous matrices and nothing behind the sums.
    pub fn plain(layout: Layout, a: &'a CubeTensor, b: &'a CubeTensor, m: usize, n: usize, k: usize) -> Self {
        let strides = match layout {
            Layout::Nt => [k, k, n],
            Layout::Nn => [k, n, n],
            Layout::Tn => [m, n, n],
        };
        let (scale, epilogue, dropout) = (1.0, Epilogue::Plain, Dropout::OFF);
        Self { layout, a, b, m, n, k, strides, scale, epilogue, bias: None, extra: None, dropout }
    }

    /// Queues the product into `out`, M rows of `strides[2]` elements.
    pub fn launch(&self, variant: Variant, out: &CubeTensor) {
        self.launch_split(variant, self.k, out);
    }

    /// Queues the product into `out` with K split over workgroups where M × N alone gives too few of them: a weight's
    /// gradient, or what comes back through a head. The parts are added in a fixed order. `accumulate` adds to what
    /// `out` (without padding) holds.
    pub fn launch_tall(&self, variant: Variant, out: &CubeTensor, accumulate: bool) {
        let f16 = self.a.dtype == DType::F16;
        let (splits, k_split) = splits(variant, f16, [self.m, self.n, self.k]);
        if splits <= 1 && !accumulate {
            return self.launch(variant, out);
        }
        let parts = kernel::empty_of(out, Shape::new([splits, self.m, self.n]), DType::F32);
        self.launch_split(variant, k_split, &parts);
        sum_parts(&parts, splits, out, accumulate);
    }

    fn launch_split(&self, variant: Variant, k_split: usize, out: &CubeTensor) {
        let f16 = |tensor: &CubeTensor| tensor.dtype == DType::F16;
        let plan = Plan {
            variant,
            layout: self.layout,
            sizes: [self.m, self.n, self.k],
            strides: self.strides,
            k_split,
            scale: self.scale,
            epilogue: self.epilogue,
            bias: self.bias.is_some(),
            f16: [f16(self.a), f16(self.b), f16(out)],
            dropout: self.dropout,
        };
        if self.m * self.n == 0 {
            return;
        }
        let mut tensors = vec![self.a, self.b, out];
        tensors.extend(self.bias);
        tensors.extend(self.extra);
        plan.kernel().launch(fold(plan.groups()), &tensors, &plan.params());
    }
}

/// How many parts a tall product (M, N) over K of factors in f16 (or f32) is split into, and what of K each of them sums.
pub fn splits(variant: Variant, f16: bool, [m, n, k]: [usize; 3]) -> (usize, usize) {
    let tile = tiles::choose(variant, f16, m, n);
    let (blocks, steps) = (tile.blocks(m, n).max(1), k.div_ceil(tile.k as usize));
    let most = steps.div_ceil(LEAST_STEPS).max(1);
    let wanted = match variant {
        // Rounds of workgroups, as many at once as fit: a last round of few costs as much as a full one.
        Variant::Scalar => {
            let at_once = PROCESSORS * SCALAR_THREADS / (tile.grid.0 * tile.grid.1) as usize;
            let time = |parts: &usize| (blocks * parts).div_ceil(at_once) * (steps.div_ceil(*parts) + STEPS_BESIDE);
            (1..=most).min_by_key(time).unwrap_or(1)
        }
        Variant::Coop { .. } => ENOUGH_GROUPS.div_ceil(blocks).min(most),
    };
    let k_split = steps.div_ceil(wanted) * tile.k as usize;
    (k.div_ceil(k_split.max(1)), k_split)
}

/// One launch, but for its buffers: A, B, out (splits, M, N), then the bias and the extra matrix where there are any.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How the products are made.
    pub variant: Variant,
    /// How A and B are stored.
    pub layout: Layout,
    /// M, N and K.
    pub sizes: [usize; 3],
    /// Elements from row to row of A, B and out.
    pub strides: [usize; 3],
    /// What of K a workgroup sums: all of it, or a multiple of the tile's depth.
    pub k_split: usize,
    /// What A is multiplied by before it is rounded to f16.
    pub scale: f32,
    /// What follows the sums.
    pub epilogue: Epilogue,
    /// Whether there is a bias.
    pub bias: bool,
    /// Whether A, B and out are f16.
    pub f16: [bool; 3],
    /// The residual epilogue's dropout.
    pub dropout: Dropout,
}

impl Plan {
    fn tile(&self) -> Tile {
        tiles::choose(self.variant, self.f16[0], self.sizes[0], self.sizes[1])
    }

    fn is_scaled(&self) -> bool {
        self.scale != 1.0 && self.variant.rounds_f32()
    }

    /// The kernel, with what it computes.
    pub fn kernel(&self) -> Kernel {
        let ([m, n, k], tile) = (self.sizes, self.tile());
        let multiples_of = |pack| self.strides.iter().all(|stride| stride.is_multiple_of(pack));
        // Eight at a time exist for f16 alone, and the scalar kernels compute in f32 anyway.
        let by_eight = self.variant != Variant::Scalar && self.f16[0] && self.f16[1];
        let access = match multiples_of(4) {
            false => Access::Singles,
            true if !by_eight => Access::Quads,
            true if multiples_of(8) => Access::Octs,
            true => Access::Singles,
        };
        let fits = |size: usize, tile: u32| size.is_multiple_of(tile as usize);
        let ragged = match fits(m, tile.m) && fits(n, tile.n) {
            _ if access == Access::Singles || !fits(k, tile.k) => Ragged::Sums,
            true => Ragged::Nothing,
            false => Ragged::Output,
        };
        let spec = Spec {
            variant: self.variant,
            layout: self.layout,
            epilogue: self.epilogue,
            bias: self.bias,
            f16: self.f16,
            access,
            ragged,
            scaled: self.is_scaled(),
            tile,
        };
        let work = Work { flops: 2.0 * (m * n) as f64 * k as f64, sizes: Some(self.sizes) };
        tiles::kernel(&spec).with_work(work)
    }

    /// Workgroups.
    pub fn groups(&self) -> u32 {
        let [m, n, k] = self.sizes;
        (self.tile().blocks(m, n) * k.div_ceil(self.k_split.max(1)).max(1)) as u32
    }

    /// The words of linear_params.wgsl.
    pub fn params(&self) -> Vec<u32> {
        let ([m, n, k], strides) = (self.sizes, self.strides);
        let scale = if self.is_scaled() { self.scale } else { 1.0 };
        let (a_rows, b_rows) = match self.layout {
            Layout::Nt => (m, n),
            Layout::Nn => (m, k),
            Layout::Tn => (k, k),
        };
        let sizes = [m, n, k, self.k_split, strides[0], strides[1], strides[2]];
        let mut params = sizes.map(|size| size as u32).to_vec();
        params.extend([a_rows * strides[0], b_rows * strides[1]].map(|elements| (elements as u32).saturating_sub(1)));
        params.extend([scale.to_bits(), scale.recip().to_bits()]);
        let [seed_lo, seed_hi, step, site, threshold, keep_scale] = self.dropout.params();
        params.extend([threshold, seed_lo, seed_hi, step, site, keep_scale, 0, 0, 0]);
        params
    }
}

/// The kernel that adds parts of this many elements into f16 (or f32), and how many of them an invocation sums.
pub fn sum_parts_kernel(elements: usize, accumulate: bool, f16: bool) -> (Kernel, usize) {
    let lanes = Lanes::of(elements);
    let constants = format!("const ACCUMULATE: bool = {accumulate};\n");
    let kernel = lanes.kernel("sum_parts", f16, &constants, &[include_str!("../../../wgsl/sum_parts.wgsl")], 256);
    (kernel, elements / lanes.count.max(1))
}

/// out = Σ parts (parts, ...), added to what out holds where `accumulate` says so. The parts are f32.
pub fn sum_parts(parts: &CubeTensor, count: usize, out: &CubeTensor, accumulate: bool) {
    let elements = out.meta.shape().num_elements();
    let (kernel, width) = sum_parts_kernel(elements, accumulate, out.dtype == DType::F16);
    let groups = (elements / width).div_ceil(256);
    kernel.launch(fold(groups as u32), &[parts, out], &[(elements / width) as u32, count as u32]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The weights' gradients of both configurations: all of K in whole steps, and no round of workgroups that leaves more than
    /// an eighth of the processors idle.
    #[test]
    fn the_parts_of_a_scalar_product_fill_their_rounds() {
        let at_once = PROCESSORS * SCALAR_THREADS / 256;
        for sizes in [
            [1536, 384, 16384],
            [1152, 384, 16384],
            [384, 384, 16384],
            [768, 768, 8192],
            [2304, 768, 8192],
            [3072, 768, 8192],
        ] {
            let (parts, k_split) = splits(Variant::Scalar, false, sizes);
            let tile = tiles::choose(Variant::Scalar, false, sizes[0], sizes[1]);
            assert!(parts * k_split >= sizes[2] && (parts - 1) * k_split < sizes[2], "{sizes:?}: {parts} x {k_split}");
            assert!(k_split.is_multiple_of(tile.k as usize), "{sizes:?}: {k_split}");
            let groups = parts * tile.blocks(sizes[0], sizes[1]);
            let room = groups.next_multiple_of(at_once);
            assert!(8 * groups >= 7 * room, "{sizes:?}: {groups} workgroups in {room} places");
        }
    }
}
