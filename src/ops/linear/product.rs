//! One matrix product on the GPU: out (M, N) = epilogue(A · B).

use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;

use super::tiles::{self, Access, Epilogue, Factor, Layout, Ragged, Spec, Tile, groups_at_a_time};
use crate::kernel::lanes::Lanes;
use crate::kernel::{self, Kernel, Variant, Work, fold};
use crate::ops::dropout::Dropout;
use crate::ops::gradient_scale;

/// Steps over K that a workgroup's first loads and its epilogue take as long as.
const OVERHEAD_STEPS: usize = 2;

/// Least steps over K that are worth a workgroup of their own.
const LEAST_STEPS: usize = 8;

/// Bytes of parts that the device writes and reads again in the time of one step: a step takes about a microsecond on matrices,
/// three where it is scalar, and memory moves 3 TB/s.
fn bytes_a_step(variant: Variant) -> usize {
    match variant {
        Variant::Coop { .. } => 3_000_000,
        Variant::Scalar => 9_000_000,
    }
}

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
    /// Whether A is stored times `scale`, so that only the sums are divided.
    pub is_held: bool,
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
        let is_held = false;
        Self { layout, a, b, m, n, k, strides, scale, is_held, epilogue, bias: None, extra: None, dropout }
    }

    /// The same where A is a gradient of so many rows, which may be stored `held` times itself.
    pub fn of_gradient(self, rows: usize, held: Option<f32>) -> Self {
        let scale = held.unwrap_or_else(|| gradient_scale(self.a, rows));
        Self { scale, is_held: held.is_some(), ..self }
    }

    /// Whether both factors are f16.
    fn is_f16(&self) -> bool {
        [self.a, self.b].iter().all(|factor| factor.dtype == DType::F16)
    }

    /// Queues the product into `out`, M rows of `strides[2]` elements.
    pub fn launch(&self, variant: Variant, out: &CubeTensor) {
        let few_registers = kernel::few_registers(self.a);
        let tile = tiles::choose(variant, few_registers, self.is_f16(), self.m, self.n, false);
        self.launch_split(variant, tile, self.k, out);
    }

    /// Queues the product into `out` with K split over workgroups where M × N alone gives too few of them: a weight's
    /// gradient, or what comes back through a head. The parts are added in a fixed order. `accumulate` adds to what
    /// `out` (f32, without padding) holds. Nothing else follows the sums.
    pub fn launch_tall(&self, variant: Variant, out: &CubeTensor, accumulate: bool) {
        self.launch_tall_with(variant, kernel::few_registers(self.a), out, accumulate);
    }

    /// The same as if a thread of the device had few registers, or more: for the tests.
    pub fn launch_tall_with(&self, variant: Variant, few_registers: bool, out: &CubeTensor, accumulate: bool) {
        let tile = tiles::choose(variant, few_registers, self.is_f16(), self.m, self.n, true);
        let (splits, k_split) = splits(variant, tile, [self.m, self.n, self.k]);
        if splits <= 1 {
            let epilogue = if accumulate { Epilogue::Added } else { self.epilogue };
            return Self { epilogue, ..*self }.launch_split(variant, tile, self.k, out);
        }
        let parts = kernel::empty_of(out, Shape::new([splits, self.m, self.n]), DType::F32);
        self.launch_split(variant, tile, k_split, &parts);
        sum_parts(&parts, splits, out, accumulate);
    }

    fn launch_split(&self, variant: Variant, tile: Tile, k_split: usize, out: &CubeTensor) {
        let f16 = |tensor: &CubeTensor| tensor.dtype == DType::F16;
        let plan = Plan {
            variant,
            tile,
            layout: self.layout,
            sizes: [self.m, self.n, self.k],
            strides: self.strides,
            k_split,
            scale: self.scale,
            is_held: self.is_held,
            epilogue: self.epilogue,
            bias: self.bias.is_some(),
            f16: [f16(self.a), f16(self.b), f16(out), f16(self.extra.unwrap_or(out))],
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

/// How many parts a tall product (M, N) over K is split into, and what of K each of them sums: what takes least, counted in steps. Workgroups run in waves of as many as the device holds, and a last wave that is half empty
/// takes as long as a full one: 36 blocks in 8 parts are three waves, in 7 parts two.
pub fn splits(variant: Variant, tile: Tile, [m, n, k]: [usize; 3]) -> (usize, usize) {
    let blocks = tile.blocks(m, n).max(1);
    let steps = k.div_ceil(tile.k as usize);
    let cost = |splits: usize| {
        let waves = (blocks * splits).div_ceil(groups_at_a_time(variant, tile));
        let parts = if splits > 1 { splits * m * n * 2 * size_of::<f32>() / bytes_a_step(variant) } else { 0 };
        waves * (steps.div_ceil(splits) + OVERHEAD_STEPS) + parts
    };
    let best = (1..=(steps / LEAST_STEPS).max(1)).min_by_key(|&splits| cost(splits)).unwrap_or(1);
    let k_split = steps.div_ceil(best) * tile.k as usize;
    (k.div_ceil(k_split.max(1)), k_split)
}

/// One launch, but for its buffers: A, B, out (splits, M, N), then the bias and the extra matrix where there are any.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How the products are made.
    pub variant: Variant,
    /// What a workgroup computes: what [`tiles::choose`] gives.
    pub tile: Tile,
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
    /// Whether A is stored times `scale`.
    pub is_held: bool,
    /// What follows the sums.
    pub epilogue: Epilogue,
    /// Whether there is a bias.
    pub bias: bool,
    /// Whether A, B, out and the extra matrix (out again where there is none) are f16.
    pub f16: [bool; 4],
    /// The residual epilogue's dropout.
    pub dropout: Dropout,
}

impl Plan {
    fn factor(&self) -> Factor {
        match self.scale {
            1.0 => Factor::One,
            _ if self.is_held => Factor::Held,
            _ if self.variant.rounds_f32() => Factor::Applied,
            _ => Factor::One,
        }
    }

    /// The kernel, with what it computes.
    pub fn kernel(&self) -> Kernel {
        let ([m, n, k], tile) = (self.sizes, self.tile);
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
            factor: self.factor(),
            tile,
        };
        let epilogue = self.epilogue.name();
        let work = Work { flops: 2.0 * (m * n) as f64 * k as f64, sizes: Some(self.sizes), epilogue };
        tiles::kernel(&spec).with_work(work)
    }

    /// Workgroups.
    pub fn groups(&self) -> u32 {
        let [m, n, k] = self.sizes;
        (self.tile.blocks(m, n) * k.div_ceil(self.k_split.max(1)).max(1)) as u32
    }

    /// The words of linear_params.wgsl.
    pub fn params(&self) -> Vec<u32> {
        let ([m, n, k], strides) = (self.sizes, self.strides);
        let scale = if self.factor() == Factor::One { 1.0 } else { self.scale };
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
    let kernel = lanes.kernel("sum_parts", [f16; 2], &constants, &[include_str!("../../../wgsl/sum_parts.wgsl")], 256);
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

    /// The weight gradients of char-Shakespeare and GPT-2: all of K in whole steps, and a fifth of the last wave stays empty at most.
    #[test]
    fn tall_products_fill_their_waves() {
        let matrices = Variant::Coop { edge: 16, f16: true };
        let shapes = [
            [1536, 384, 16384],
            [1152, 384, 16384],
            [384, 384, 16384],
            [768, 768, 8192],
            [2304, 768, 8192],
            [3072, 768, 8192],
        ];
        for (variant, f16) in [(matrices, true), (Variant::Scalar, false)] {
            for [m, n, k] in shapes {
                let tile = tiles::choose(variant, false, f16, m, n, true);
                let (parts, k_split) = splits(variant, tile, [m, n, k]);
                assert!(parts * k_split >= k && (parts - 1) * k_split < k, "{parts} parts of {k_split} of {k}");
                assert!(k_split.is_multiple_of(tile.k as usize), "{k_split}");
                let (groups, room) = (parts * tile.blocks(m, n), groups_at_a_time(variant, tile));
                let filled = groups as f64 / groups.next_multiple_of(room) as f64;
                assert!(filled > 0.8, "{m} x {n}: {groups} workgroups fill {filled} of their waves");
            }
        }
        let tile = tiles::choose(matrices, false, true, 50304, 768, true);
        assert_eq!(splits(matrices, tile, [50304, 768, 2496]).0, 1);
    }
}
