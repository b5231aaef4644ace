//! Which attention kernel runs with which tiles: tables of data, and the headers made from them.
//!
//! Every row was measured on an NVIDIA H200 against its neighbours (docs/measurements/attention-h200.md); the rows for edge 8
//! are a start, not measured on any Mac. Small tiles win: 16 keys a tile beat 32, and less workgroup memory beats more.

use burn::tensor::DType;

use crate::kernel::{Capabilities, Kernel, Made, PHILOX, SUBGROUP_SIZE};
pub use crate::kernel::{Variant, supported};

/// Head dimensions that the kernels exist for; others take the composed version.
pub const HEAD_DIMS: [usize; 6] = [16, 32, 64, 80, 96, 128];

/// The kernels that have tiles; delta has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// out and lse.
    Forward,
    /// dQ.
    Dq,
    /// dK and dV.
    Dkv,
    /// dK, dV, and dS for the next.
    DkvDs,
    /// dQ out of dS.
    DqOfDs,
}

impl Pass {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Forward, Self::Dq, Self::Dkv, Self::DkvDs, Self::DqOfDs];
}

/// Tiles of a scalar kernel: threads over the rows that a workgroup owns (queries, or keys in dK/dV) and over the columns, and the
/// quads of each that a thread holds (wgsl/attention_scalar_products.wgsl).
struct Scalar {
    row_threads: u32,
    col_threads: u32,
    row_quads: u32,
    score_quads: u32,
}

impl Scalar {
    fn threads(&self) -> u32 {
        self.row_threads * self.col_threads
    }

    fn rows(&self) -> u32 {
        4 * self.row_quads * self.row_threads
    }
}

/// The forward's 8 x 8 sums a thread, twice, want 240 registers, dK/dV's 8 x 4, four times, 210. Where a thread has 128
/// (`few_registers`) it takes half the rows: at most 126 by NVIDIA's compiler, and 10 to 30 % slower on an H200.
#[rustfmt::skip] // a table
const fn scalar(head_dim: usize, pass: Pass, dropout: bool, few_registers: bool) -> Scalar {
    const fn row(row_threads: u32, col_threads: u32, row_quads: u32, score_quads: u32) -> Scalar {
        Scalar { row_threads, col_threads, row_quads, score_quads }
    }
    if few_registers {
        return match head_dim {
            16 => row(8, 4, 1, 2),
            32 => row(8, 8, 1, 1),
            80 => row(8, 20, 1, 1),
            96 => row(8, 24, 1, 1),
            _ => row(8, 16, 1, 1),
        };
    }
    match (pass, head_dim) {
        (Pass::Dq, 16) => row(16, 4, 2, 2),
        (Pass::DqOfDs, 16) => row(16, 4, 1, 2),
        (_, 16) => row(8, 4, 2, 2),
        (_, 32) => row(8, 8, 2, 2),
        (Pass::Forward | Pass::Dq, 64) if !dropout => row(8, 8, 2, 2),
        (Pass::Forward | Pass::Dq | Pass::DqOfDs, 80) => row(8, 20, 2, 1),
        (Pass::Dkv | Pass::DkvDs, 80) => row(8, 20, 1, 1),
        (Pass::Forward | Pass::Dq | Pass::DqOfDs, 96) => row(8, 8, 2, 2),
        (Pass::Dkv | Pass::DkvDs, 96) => row(8, 24, 1, 1),
        _ => row(8, 16, 2, 1),
    }
}

/// Tiles of a cooperative kernel: a workgroup owns subgroups · row_blocks · edge rows and streams `other` rows a tile.
struct Coop {
    subgroups: u32,
    row_blocks: u32,
    other: u32,
}

#[rustfmt::skip] // a table
const fn coop(edge: u32, head_dim: usize, pass: Pass, dropout: bool) -> Coop {
    const fn row(subgroups: u32, row_blocks: u32, other: u32) -> Coop {
        Coop { subgroups, row_blocks, other }
    }
    match (edge, pass, head_dim) {
        (8, _, _) => row(4, 2, 16),
        (_, Pass::DqOfDs, _) => row(2, 2, 32),
        (_, Pass::Forward, 16) => row(2, 2, 16),
        (_, Pass::Forward, 32) => row(4, 2, 16),
        (_, Pass::Forward | Pass::Dq, 64) if dropout => row(4, 1, 16),
        (_, Pass::Forward, 64 | 80) => row(8, 1, 16),
        (_, Pass::Forward, _) => row(4, 1, 16),
        (_, Pass::Dq, 16) => row(4, 2, 32),
        (_, Pass::Dq, 32) => row(4, 2, 16),
        (_, Pass::Dq, 64) => row(8, 1, 16),
        (_, Pass::Dq, _) => row(4, 1, 16),
        (_, Pass::Dkv | Pass::DkvDs, 16) => row(4, 2, 16),
        (_, Pass::Dkv | Pass::DkvDs, 32) => row(8, 1, 32),
        (_, Pass::Dkv | Pass::DkvDs, 64) => row(4, 1, 16),
        (_, Pass::Dkv | Pass::DkvDs, 80 | 96) => row(4, 1, 32),
        (_, Pass::Dkv | Pass::DkvDs, _) => row(8, 1, 16),
    }
}

/// Score columns that a subgroup handles at a time in the backward.
const SCORE_COLS: u32 = 16;

/// Which kernels run, and with which tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Version {
    /// How products are made.
    pub variant: Variant,
    /// Whether a thread has few registers ([`Capabilities`]), which concerns the scalar kernels.
    pub few_registers: bool,
}

/// The type that dS is kept in, what is multiplied, and the keys and queries of `time` tokens that it is kept for.
pub fn kept(variant: Variant, time: usize) -> (DType, [usize; 2]) {
    let dtype = if variant.rounds_f32() { DType::F16 } else { DType::F32 };
    let whole = time.next_multiple_of(16);
    (dtype, if variant == Variant::Scalar { [time, time.next_multiple_of(4)] } else { [whole; 2] })
}

/// One kernel of attention, and the rows that a workgroup of it owns. `f16`: whether qkv (and its gradient), and whether out (or its gradient)
/// is stored in f16.
pub fn kernel(pass: Pass, version: Version, head_dim: usize, f16: [bool; 2], dropout: bool) -> (Kernel, u32) {
    static MADE: Made<(Pass, Version, usize, [bool; 2], bool)> = Made::new();
    // dQ out of dS has nothing to do with out, nor with dropout.
    let (f16, dropout) = if pass == Pass::DqOfDs { ([f16[0]; 2], false) } else { (f16, dropout) };
    let Version { variant, few_registers } = version;
    let make = |_: &_| make(pass, version, head_dim, f16, dropout);
    let rows = match variant {
        Variant::Scalar => scalar(head_dim, pass, dropout, few_registers).rows(),
        Variant::Coop { edge, .. } => {
            let t = coop(edge, head_dim, pass, dropout);
            t.subgroups * t.row_blocks * edge
        }
    };
    (MADE.get((pass, version, head_dim, f16, dropout), make), rows)
}

fn make(pass: Pass, version: Version, head_dim: usize, f16_storage: [bool; 2], dropout: bool) -> Kernel {
    let Version { variant, few_registers } = version;
    let elems = f16_storage.map(|f16| if f16 { "f16" } else { "f32" });
    let mut common =
        format!("alias elem = {};\nconst DROPOUT: bool = {dropout};\nconst HEAD_DIM: u32 = {head_dim}u;\n", elems[0]);
    // dK/dV binds what it keeps before the last two.
    match pass {
        Pass::Dkv => common += &declare(&[("CLOCK", 5), ("PARAMS", 6)]),
        Pass::DkvDs => common += &declare(&[("KEPT", 5), ("CLOCK", 6), ("PARAMS", 7)]),
        Pass::DqOfDs => common += &declare(&[("KEPT", 1)]),
        Pass::Forward | Pass::Dq => {}
    }
    match variant {
        Variant::Scalar => {
            let t = scalar(head_dim, pass, dropout, few_registers);
            let constants = [
                ("ROW_THREADS", t.row_threads),
                ("COL_THREADS", t.col_threads),
                ("ROW_QUADS", t.row_quads),
                ("SCORE_QUADS", t.score_quads),
            ];
            let enable = if f16_storage[0] { "enable f16;\n" } else { "" };
            let header = format!("{enable}{common}{}", declare(&constants));
            let products = include_str!("../../../wgsl/attention_scalar_products.wgsl");
            let kept = include_str!("../../../wgsl/attention_scalar_kept.wgsl");
            let store_dq = include_str!("../../../wgsl/attention_scalar_store_dq.wgsl");
            let dkv = include_str!("../../../wgsl/attention_scalar_dkv.wgsl");
            let (name, files) = match pass {
                Pass::Forward => {
                    let forward = include_str!("../../../wgsl/attention_scalar_forward.wgsl");
                    ("attention_scalar_forward", vec![PHILOX, products, forward])
                }
                Pass::Dq => {
                    let dq = include_str!("../../../wgsl/attention_scalar_dq.wgsl");
                    ("attention_scalar_dq", vec![PHILOX, products, store_dq, dq])
                }
                Pass::Dkv => {
                    let no_ds = include_str!("../../../wgsl/attention_scalar_no_ds.wgsl");
                    ("attention_scalar_dkv", vec![PHILOX, products, no_ds, dkv])
                }
                Pass::DkvDs => {
                    let ds = include_str!("../../../wgsl/attention_scalar_ds.wgsl");
                    ("attention_scalar_dkv_ds", vec![PHILOX, products, kept, ds, dkv])
                }
                Pass::DqOfDs => {
                    let dq_of_ds = include_str!("../../../wgsl/attention_scalar_dq_of_ds.wgsl");
                    ("attention_scalar_dq_of_ds", vec![products, kept, store_dq, dq_of_ds])
                }
            };
            Kernel::new(name, header, files, (t.threads(), 1, 1))
        }
        Variant::Coop { edge, f16 } => {
            let t = coop(edge, head_dim, pass, dropout);
            // The name of a tile's size depends on which side a workgroup owns.
            let makes_dkv = matches!(pass, Pass::Dkv | Pass::DkvDs);
            let other_name = if makes_dkv { "BLOCK_Q" } else { "BLOCK_K" };
            let matrix = if f16 { "f16" } else { "f32" };
            let needs_f16 = f16 || f16_storage.contains(&true);
            // dK/dV of f32 tensors wants 32 queries a tile: half as many, and slower, conversions between barriers.
            let other = if makes_dkv && head_dim == 64 && edge == 16 && !f16_storage[0] { 32 } else { t.other };
            let mut constants = vec![
                ("EDGE", edge),
                ("SUBGROUP_SIZE", SUBGROUP_SIZE),
                ("SUBGROUPS", t.subgroups),
                ("ROW_BLOCKS", t.row_blocks),
                (other_name, other),
            ];
            if matches!(pass, Pass::Dq | Pass::Dkv | Pass::DkvDs) {
                constants.push(("SCORE_COLS", SCORE_COLS));
            }
            let header = format!(
                "{}enable wgpu_cooperative_matrix;\n{common}alias out_elem = {};\nalias mat_elem = {matrix};\n\
                 alias mat_a = coop_mat{edge}x{edge}<{matrix}, A>;\nalias mat_b = coop_mat{edge}x{edge}<{matrix}, B>;\n\
                 alias mat_c = coop_mat{edge}x{edge}<f32, C>;\n{}",
                if needs_f16 { "enable f16;\n" } else { "" },
                elems[1],
                declare(&constants)
            );
            let memory = include_str!("../../../wgsl/attention_coop_memory.wgsl");
            let kept = include_str!("../../../wgsl/attention_coop_kept.wgsl");
            let dkv = include_str!("../../../wgsl/attention_coop_dkv.wgsl");
            let (name, files) = match pass {
                Pass::Forward => {
                    let forward = include_str!("../../../wgsl/attention_coop_forward.wgsl");
                    ("attention_coop_forward", vec![PHILOX, memory, forward])
                }
                Pass::Dq => {
                    let dq = include_str!("../../../wgsl/attention_coop_dq.wgsl");
                    ("attention_coop_dq", vec![PHILOX, memory, dq])
                }
                Pass::Dkv => {
                    let no_ds = include_str!("../../../wgsl/attention_coop_no_ds.wgsl");
                    ("attention_coop_dkv", vec![PHILOX, memory, no_ds, dkv])
                }
                Pass::DkvDs => {
                    let ds = include_str!("../../../wgsl/attention_coop_ds.wgsl");
                    ("attention_coop_dkv_ds", vec![PHILOX, memory, kept, ds, dkv])
                }
                Pass::DqOfDs => {
                    let dq_of_ds = include_str!("../../../wgsl/attention_coop_dq_of_ds.wgsl");
                    ("attention_coop_dq_of_ds", vec![kept, dq_of_ds])
                }
            };
            let threads = t.subgroups * SUBGROUP_SIZE;
            Kernel::new(name, header, files, (threads, 1, 1))
        }
    }
}

/// Every kernel of attention that a device with these capabilities can be given.
pub fn kernels(capabilities: &Capabilities) -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for f16_storage in [false, true] {
        for head_dim in HEAD_DIMS {
            for variant in supported(capabilities, f16_storage) {
                let version = Version { variant, few_registers: capabilities.few_registers };
                for pass in Pass::ALL {
                    let kernel = |out, dropout| kernel(pass, version, head_dim, [f16_storage, out], dropout).0;
                    kernels.push(kernel(f16_storage, false));
                    if pass == Pass::DqOfDs {
                        continue; // one for all
                    }
                    kernels.push(kernel(f16_storage, true));
                    if f16_storage && variant.rounds_f32() {
                        kernels.extend([false, true].map(|dropout| kernel(false, dropout))); // inside of half a block
                    }
                }
            }
            if !f16_storage || capabilities.f16 {
                kernels.push(delta_kernel(head_dim, f16_storage).0);
            }
        }
    }
    kernels
}

/// delta = rowsum(dout · out), 64 rows a workgroup.
pub fn delta_kernel(head_dim: usize, f16_storage: bool) -> (Kernel, u32) {
    let (enable, elem) = if f16_storage { ("enable f16;\n", "f16") } else { ("", "f32") };
    let header = format!("{enable}alias elem = {elem};\nconst HEAD_DIM: u32 = {head_dim}u;\n");
    let file = include_str!("../../../wgsl/attention_delta.wgsl");
    (Kernel::new("attention_delta", header, vec![file], (256, 1, 1)), 64)
}

fn declare(constants: &[(&str, u32)]) -> String {
    constants.iter().map(|(name, value)| format!("const {name}: u32 = {value}u;\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row that any device can select is valid WGSL, and keeps Metal's 32 KiB where Metal can reach it.
    #[test]
    fn every_row_of_the_tables_is_valid_and_fits() {
        let variants = [
            Variant::Scalar,
            Variant::Coop { edge: 16, f16: true },
            Variant::Coop { edge: 8, f16: true },
            Variant::Coop { edge: 8, f16: false },
        ];
        for variant in variants {
            for head_dim in HEAD_DIMS {
                for pass in Pass::ALL {
                    let types = [[false; 2], [true; 2], [true, false]];
                    for (f16, dropout) in types.into_iter().flat_map(|f16| [(f16, false), (f16, true)]) {
                        if f16[0] && (!variant.rounds_f32() && (variant != Variant::Scalar || !f16[1])) {
                            continue; // never selected: f16 tensors take f16 matrices, and mixed ones none but those
                        }
                        for few_registers in [false, true] {
                            let version = Version { variant, few_registers };
                            let (kernel, _) = kernel(pass, version, head_dim, f16, dropout);
                            let what = format!("{pass:?} {variant:?} D {head_dim} f16 {f16:?}");
                            let bytes = kernel.workgroup_memory().unwrap_or_else(|error| panic!("{what}: {error}"));
                            assert!(bytes <= 32 << 10, "{what}: {bytes} bytes of workgroup memory");
                        }
                    }
                }
                for f16 in [false, true] {
                    delta_kernel(head_dim, f16).0.workgroup_memory().unwrap();
                }
            }
        }
    }
}
