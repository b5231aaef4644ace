//! Which matrix-product kernel runs with which tiles: tables of data. header.rs makes the kernels' texts from them.

use std::collections::HashSet;

use super::header;
use crate::kernel::{Capabilities, Kernel, Made, Variant, supported};

/// How the two factors of out (M, N) = A (M, K) · B (K, N) are stored; every matrix is row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// A (M, K), B (N, K): a layer forward, x wᵀ.
    Nt,
    /// A (M, K), B (K, N): the gradient of its input, dy w.
    Nn,
    /// A (K, M), B (K, N): the gradient of its weight, dyᵀ x.
    Tn,
}

/// What follows the sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Nothing but the bias.
    Plain,
    /// extra = sum + bias, out = gelu(extra); whether by tanh.
    Gelu {
        /// The tanh approximation, else the error function.
        tanh: bool,
    },
    /// out = extra + dropout(sum + bias).
    Residual {
        /// Whether anything is dropped.
        dropout: bool,
    },
    /// out = sum · gelu'(extra), where [`has_slopes`]; whether by tanh.
    GeluSlope {
        /// The tanh approximation, else the error function.
        tanh: bool,
    },
    /// out = out + sum + bias.
    Added,
}

impl Epilogue {
    /// Whether a second matrix is read or written.
    pub fn has_extra(self) -> bool {
        !matches!(self, Self::Plain | Self::Added)
    }

    /// Whether what is stored depends on a matrix that is read.
    pub(super) fn is_fed(self) -> bool {
        matches!(self, Self::Residual { .. } | Self::GeluSlope { .. } | Self::Added)
    }

    /// What follows the sums, for profiles; empty where nothing does.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Gelu { .. } => "gelu",
            Self::Residual { .. } => "residual",
            Self::GeluSlope { .. } => "gelu slope",
            Self::Added => "added",
        }
    }
}

/// Which of a product's sizes are no multiples of the tile's. Masks over K cost a third of the speed, clamps of rows and columns
/// little.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ragged {
    /// None.
    Nothing,
    /// M or N.
    Output,
    /// K, and perhaps M or N.
    Sums,
}

/// How many neighbours move between storage and registers at once: what every row of every matrix begins at a multiple of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// One.
    Singles,
    /// Four.
    Quads,
    /// Eight of f16, for the cooperative kernels; out moves by four.
    Octs,
}

/// The factor on A, a power of two by which gradients are brought into f16's range. The sums are divided by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Factor {
    /// None.
    One,
    /// A is multiplied by it before it is rounded for the matrices.
    Applied,
    /// A is stored times it.
    Held,
}

/// Everything that makes one kernel's text differ from another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Spec {
    /// How the products are made.
    pub variant: Variant,
    /// How A and B are stored.
    pub layout: Layout,
    /// What follows the sums.
    pub epilogue: Epilogue,
    /// Whether a bias is added.
    pub bias: bool,
    /// Whether A, B, out and the epilogue's second matrix are stored in f16, else f32.
    pub f16: [bool; 4],
    /// How storage is reached.
    pub access: Access,
    /// What is no multiple of the tile; everything by singles.
    pub ragged: Ragged,
    /// The factor on A.
    pub factor: Factor,
    /// The tile.
    pub tile: Tile,
}

/// What one workgroup computes: `m` × `n` of the output, `k` at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Rows.
    pub m: u32,
    /// Columns.
    pub n: u32,
    /// Depth of a step.
    pub k: u32,
    /// Subgroups over the rows and columns (cooperative), or threads over them (scalar).
    pub grid: (u32, u32),
    /// Floats behind each row of a subgroup's scratch (cooperative).
    pub pad: u32,
}

const fn tile(m: u32, n: u32, k: u32, rows: u32, cols: u32, pad: u32) -> Tile {
    Tile { m, n, k, grid: (rows, cols), pad }
}

impl Tile {
    /// Workgroups that cover (m, n) once.
    pub fn blocks(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.m as usize) * n.div_ceil(self.n as usize)
    }
}

/// Processors of an H200, for which tiles are chosen and tall products are split (wgpu does not tell a device's).
const PROCESSORS: usize = 132;

/// Eight subgroups of 64 x 64 each: the best ratio of products to loads. It counts in f32, which loads twice the bytes of what it
/// multiplies. 39 to 43 KB of workgroup memory.
const WIDE: Tile = tile(128, 256, 32, 2, 4, 8);
/// Twice the depth a step: the barriers of a step cost as much as its products. 48 KB of workgroup memory.
pub(super) const DEEP: Tile = tile(128, 128, 64, 2, 4, 8);
/// 24 KB of workgroup memory and at most 255 registers for each of 128 threads: two workgroups share a processor, and one multiplies
/// while the other loads. For f32 the next tile would take 32 registers more.
const PAIRED: Tile = tile(128, 128, 32, 2, 2, 0);

/// Scalar, 8 x 16 sums a thread instead of 8 x 8: six loads from workgroup memory for 128 products instead of eight. 208 registers leave four
/// subgroups a workgroup and two workgroups a processor, which is too little where the last of them run alone: 5 to 9 % faster where K is split so
/// that few do, 15 to 25 % slower where M x N leaves half a wave.
const BROAD: Tile = tile(128, 128, 16, 16, 8, 0);

/// What a round of as many workgroups as the device holds takes with [`PAIRED`], by what it takes with [`DEEP`]: twice the output in 1.8
/// of the time.
const PAIRED_ROUND: (usize, usize) = (9, 5);

/// The tile for a product of this shape with both factors in f16 (or one in f32); `tall`: K is split over workgroups until the device is full.
/// `few_registers` is its device's ([`Capabilities`]). Measured on an H200 (docs/measurements/linear-h200.md), edge 8 on nothing yet.
pub fn choose(variant: Variant, few_registers: bool, f16: bool, m: usize, n: usize, tall: bool) -> Tile {
    let rounds = |tile: Tile| tile.blocks(m, n).div_ceil(groups_at_a_time(variant, tile));
    match variant {
        Variant::Scalar if m.min(n) >= 128 && tall && !few_registers => BROAD,
        Variant::Scalar if m.min(n) >= 128 => tile(128, 128, 16, 16, 16, 0),
        Variant::Scalar => tile(64, 64, 16, 8, 8, 0),
        Variant::Coop { edge: 8, .. } => tile(64, 64, 32, 2, 2, 8),
        Variant::Coop { .. } if m.min(n) < 128 => tile(64, 64, 32, 1, 2, 8),
        Variant::Coop { .. } if f16 => {
            let pays = rounds(PAIRED) * PAIRED_ROUND.0 < rounds(DEEP) * PAIRED_ROUND.1;
            if tall || pays { PAIRED } else { DEEP }
        }
        // An eighth of its columns at most may lie beyond the matrix.
        Variant::Coop { .. } if WIDE.blocks(m, n) >= 3 * PROCESSORS && n.next_multiple_of(256) <= n + n / 8 => WIDE,
        Variant::Coop { .. } => DEEP,
    }
}

/// Whether the product that makes the gradient of GELU's output multiplies by its slope too. On matrix units it does not: they wait for
/// the slope's load and arithmetic, which made 16384 x 1536 x 384 in f16 0.156 ms, where both apart take 0.139. In f32 it is 0.463 instead
/// of 0.508.
pub fn has_slopes(variant: Variant) -> bool {
    variant == Variant::Scalar
}

/// Workgroups of a product that run at a time: where it multiplies on matrices, as many as 48 KB of workgroup memory a processor hold;
/// of the scalar kernel 512 threads a processor, whose 128 registers each are all it has, or half of that with twice the registers.
pub fn groups_at_a_time(variant: Variant, tile: Tile) -> usize {
    match variant {
        Variant::Coop { .. } if tile == PAIRED => 2 * PROCESSORS,
        Variant::Coop { .. } => PROCESSORS,
        Variant::Scalar if tile == BROAD => 2 * PROCESSORS,
        Variant::Scalar => PROCESSORS * 512 / (tile.grid.0 * tile.grid.1) as usize,
    }
}

/// Every kernel that a device with these capabilities can be given, for f32 tensors and for f16.
pub fn kernels(capabilities: &Capabilities) -> Vec<Kernel> {
    let stored = |f16| supported(capabilities, f16).into_iter().map(move |variant| (variant, f16));
    let few = capabilities.few_registers;
    stored(false).chain(stored(true)).flat_map(|(variant, f16)| kernels_of(variant, few, f16)).collect()
}

/// Every kernel of `variant` for tensors of f16 (or f32).
fn kernels_of(variant: Variant, few_registers: bool, f16: bool) -> Vec<Kernel> {
    let mut kernels = Vec::new();
    let packs = match variant {
        Variant::Coop { .. } if f16 => Access::Octs,
        _ => Access::Quads,
    };
    // Every outcome of `choose`.
    let sizes = [(1, false), (128, false), (128, true), (4096, false)];
    let tiles: HashSet<Tile> = sizes.map(|(size, tall)| choose(variant, few_registers, f16, size, size, tall)).into();
    for tile in tiles {
        for (access, ragged) in
            [(packs, Ragged::Nothing), (packs, Ragged::Output), (packs, Ragged::Sums), (Access::Singles, Ragged::Sums)]
        {
            let plain = Spec {
                variant,
                layout: Layout::Nt,
                epilogue: Epilogue::Plain,
                bias: false,
                f16: [f16; 4],
                access,
                ragged,
                factor: Factor::One,
                tile,
            };
            let forward = [
                Epilogue::Plain,
                Epilogue::Gelu { tanh: false },
                Epilogue::Gelu { tanh: true },
                Epilogue::Residual { dropout: false },
                Epilogue::Residual { dropout: true },
            ];
            for epilogue in forward {
                kernels.extend([false, true].map(|bias| kernel(&Spec { epilogue, bias, ..plain })));
            }
            // A weight's gradient is added to another where a head has several chunks.
            let mut backward =
                vec![(Layout::Nn, Epilogue::Plain), (Layout::Tn, Epilogue::Plain), (Layout::Tn, Epilogue::Added)];
            if has_slopes(variant) {
                backward.extend([false, true].map(|tanh| (Layout::Nn, Epilogue::GeluSlope { tanh })));
            }
            for (layout, epilogue) in backward {
                let plain = Spec { layout, epilogue, ..plain };
                if f16 {
                    // A gradient in f16 comes scaled; sums over parts, and a weight's gradient, leave in f32.
                    let outputs: &[bool] = match (layout, epilogue) {
                        (Layout::Tn, _) => &[false],
                        (_, Epilogue::Plain) => &[false, true],
                        _ => &[true],
                    };
                    kernels.extend(outputs.iter().map(|&out| kernel(&Spec { f16: [true, true, out, out], ..plain })));
                } else {
                    // A gradient of few rows is brought into f16's range by 1.
                    kernels.push(kernel(&plain));
                    kernels.extend(variant.rounds_f32().then(|| kernel(&Spec { factor: Factor::Applied, ..plain })));
                }
            }
            if variant.rounds_f32() {
                kernels.extend(mixed(&plain).iter().map(kernel));
            }
        }
    }
    kernels
}

/// The products inside of half a block of f32 ([`held`](super::super::held)), by what is `plain` between tensors of f16, or of f32.
fn mixed(plain: &Spec) -> Vec<Spec> {
    let held = [Factor::One, Factor::Held]; // of few rows the factor is 1
    if !plain.f16[0] {
        // The heads are f32: attention's backward sums them.
        return held
            .map(|factor| Spec { layout: Layout::Tn, f16: [true, false, false, false], factor, ..*plain })
            .into();
    }
    let forward = [
        (Epilogue::Gelu { tanh: false }, true),
        (Epilogue::Gelu { tanh: true }, true),
        (Epilogue::Residual { dropout: false }, false),
        (Epilogue::Residual { dropout: true }, false),
    ];
    // A head's: its logits in f32, and its weight's gradient over several chunks.
    let head = [
        Spec { f16: [true, true, false, false], ..*plain },
        Spec {
            layout: Layout::Tn,
            epilogue: Epilogue::Added,
            f16: [true, true, false, false],
            factor: Factor::Held,
            ..*plain
        },
    ];
    let biased =
        |(epilogue, out)| [false, true].map(|bias| Spec { epilogue, bias, f16: [true, true, out, false], ..*plain });
    let backward = [Layout::Nn, Layout::Tn].map(|layout| Spec {
        layout,
        f16: [true, true, false, false],
        factor: Factor::Held,
        ..*plain
    });
    forward.into_iter().flat_map(biased).chain(backward).chain(head).collect()
}

/// The kernel of `spec`.
pub fn kernel(spec: &Spec) -> Kernel {
    static MADE: Made<Spec> = Made::new();
    MADE.get(*spec, header::make)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::SUBGROUP_SIZE;

    /// Every kernel of the table is valid WGSL, and keeps Metal's 32 KiB where Metal can reach it; elsewhere 48 KiB, what
    /// NVIDIA's Vulkan has.
    #[test]
    fn every_row_of_the_table_is_valid_and_fits() {
        let device = |matrices: &[(u32, bool)]| Capabilities {
            subgroup_size: Some(SUBGROUP_SIZE),
            matrices: matrices.to_vec(),
            f16: true,
            ..Default::default()
        };
        for (device, limit) in [(device(&[(8, true), (8, false)]), 32 << 10), (device(&[(16, true)]), 48 << 10)] {
            for kernel in kernels(&device) {
                let bytes = kernel.workgroup_memory().unwrap_or_else(|error| panic!("{}{error}", kernel.header()));
                assert!(bytes <= limit, "{}: {bytes} bytes of workgroup memory", kernel.header());
            }
        }
    }

    /// Two workgroups of it fit into the 48 KB that a processor has for all.
    #[test]
    fn paired_workgroups_share_a_processor() {
        let matrices = Variant::Coop { edge: 16, f16: true };
        let paired =
            kernels_of(matrices, false, true).into_iter().filter(|kernel| kernel.workgroup().0 == 4 * SUBGROUP_SIZE);
        let bytes: Vec<u32> =
            paired.map(|kernel| kernel.workgroup_memory().unwrap_or_else(|error| panic!("{error}"))).collect();
        assert!(!bytes.is_empty() && bytes.iter().all(|&bytes| bytes <= 24 << 10), "{bytes:?}");
    }
}
