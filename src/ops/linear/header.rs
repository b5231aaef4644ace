//! A matrix-product kernel put together: the header of constants and the files behind it.

use super::tiles::{Access, DEEP, Epilogue, Factor, Layout, Ragged, Spec, Tile};
use crate::kernel::{Kernel, PHILOX, SUBGROUP_SIZE, Variant};

/// Rows of a subgroup's matrices that the epilogue's second matrix is loaded ahead: where one workgroup fills a processor, nothing else
/// hides the time it takes, and a thread of [`DEEP`] has the registers for it in f16.
fn extra_rows(tile: Tile, f16: bool) -> u32 {
    u32::from(f16 && tile == DEEP)
}

/// What the scalar kernel's quads change places by at the first k (wgsl/linear_scalar.wgsl). 1 is 1 to 3 % faster but where an input's gradient
/// has nothing behind it: 0.713 ms instead of 0.640 at 8192 x 768 x 2304.
fn first_shuffle(layout: Layout, epilogue: Epilogue) -> u32 {
    u32::from((layout, epilogue) != (Layout::Nn, Epilogue::Plain))
}

/// The kernel of `spec`.
pub(super) fn make(spec: &Spec) -> Kernel {
    let Spec { variant, layout, epilogue, bias, f16, access, ragged, factor, tile } = *spec;
    let elem = |f16: bool| if f16 { "f16" } else { "f32" };
    // Bindings: A, B, out, then the bias, the extra matrix and the clock where there are any, then the parameters.
    let extra = 3 + u32::from(bias);
    let clock = extra + u32::from(epilogue.has_extra());
    let params = clock + u32::from(matches!(epilogue, Epilogue::Residual { .. }));
    let (kind, detail) = match epilogue {
        Epilogue::Plain => ("plain", String::new()),
        Epilogue::Added => ("added", String::new()),
        Epilogue::Gelu { tanh } => ("gelu", format!("const GELU_TANH: bool = {tanh};\n")),
        Epilogue::GeluSlope { tanh } => ("gelu slope", format!("const GELU_TANH: bool = {tanh};\n")),
        Epilogue::Residual { dropout } => {
            ("residual", format!("const DROPOUT: bool = {dropout};\nconst CLOCK: u32 = {clock}u;\n"))
        }
    };
    let multiplies_f16 = matches!(variant, Variant::Coop { f16: true, .. });
    // The comment tells a reader of the header what the constants do not.
    let name = match access {
        Access::Singles => "singles",
        Access::Quads => "quads",
        Access::Octs => "octs",
    };
    let mut header = String::new();
    if multiplies_f16 || f16.contains(&true) {
        header += "enable f16;\n";
    }
    if let Variant::Coop { edge, f16 } = variant {
        let matrix = elem(f16);
        header += &format!(
            "enable wgpu_cooperative_matrix;\nalias mat_elem = {matrix};\n\
             alias mat_a = coop_mat{edge}x{edge}<{matrix}, A>;\nalias mat_b = coop_mat{edge}x{edge}<{matrix}, B>;\n\
             alias mat_c = coop_mat{edge}x{edge}<f32, C>;\nconst EDGE: u32 = {edge}u;\n\
             const SUBGROUP_SIZE: u32 = {SUBGROUP_SIZE}u;\n\
             const SUBGROUP_ROWS: u32 = {}u;\nconst SUBGROUP_COLS: u32 = {}u;\nconst SCRATCH_PAD: u32 = {}u;\n\
             const EXTRA_ROWS: u32 = {}u;\nconst A_SCALED: bool = {};\n",
            tile.grid.0,
            tile.grid.1,
            tile.pad,
            extra_rows(tile, spec.f16[3]),
            factor == Factor::Applied
        );
    } else {
        header += &format!(
            "const THREAD_ROWS: u32 = {}u;\nconst THREAD_COLS: u32 = {}u;\nconst FIRST_SHUFFLE: u32 = {}u;\n\
             const EXTRA_ROWS: u32 = {}u;\n",
            tile.grid.0,
            tile.grid.1,
            first_shuffle(layout, epilogue),
            if epilogue.is_fed() { 2 } else { 0 }
        );
    }
    header += &format!(
        "alias a_elem = {};\nalias b_elem = {};\nalias out_elem = {};\nalias extra_elem = {};\n\
         const BLOCK_M: u32 = {}u;\nconst BLOCK_N: u32 = {}u;\nconst BLOCK_K: u32 = {}u;\n\
         const A_BY_K: bool = {};\nconst B_BY_N: bool = {};\n\
         const RAGGED: bool = {};\nconst K_RAGGED: bool = {};\nconst IS_ONE: bool = {};\n\
         const BIAS_BINDING: u32 = 3u;\nconst EXTRA: u32 = {extra}u;\nconst PARAMS: u32 = {params}u;\n\
         // {kind}, {name}, bias: {bias}\n{detail}",
        elem(f16[0]),
        elem(f16[1]),
        elem(f16[2]),
        elem(f16[3]),
        tile.m,
        tile.n,
        tile.k,
        layout == Layout::Tn,
        layout == Layout::Nt,
        ragged != Ragged::Nothing,
        ragged == Ragged::Sums,
        factor == Factor::One && variant != Variant::Scalar,
    );
    let mut files = match epilogue {
        Epilogue::Gelu { .. } | Epilogue::GeluSlope { .. } => vec![include_str!("../../../wgsl/gelu.wgsl")],
        Epilogue::Residual { .. } => vec![PHILOX],
        Epilogue::Plain | Epilogue::Added => vec![],
    };
    files.push(include_str!("../../../wgsl/linear_params.wgsl"));
    if access != Access::Octs {
        files.push(include_str!("../../../wgsl/linear_pack4.wgsl"));
    }
    files.push(match access {
        Access::Singles => include_str!("../../../wgsl/linear_singles.wgsl"),
        Access::Quads => include_str!("../../../wgsl/linear_quads.wgsl"),
        Access::Octs => include_str!("../../../wgsl/linear_octs.wgsl"),
    });
    files.push(if bias {
        include_str!("../../../wgsl/linear_bias.wgsl")
    } else {
        include_str!("../../../wgsl/linear_no_bias.wgsl")
    });
    if epilogue.has_extra() {
        files.push(if access == Access::Singles {
            include_str!("../../../wgsl/linear_extra_singles.wgsl")
        } else {
            include_str!("../../../wgsl/linear_extra_quads.wgsl")
        });
    }
    if epilogue.is_fed() && epilogue.has_extra() {
        files.push(include_str!("../../../wgsl/linear_fetch.wgsl"));
    }
    files.push(match epilogue {
        Epilogue::Plain => include_str!("../../../wgsl/linear_plain.wgsl"),
        Epilogue::Gelu { .. } => include_str!("../../../wgsl/linear_gelu.wgsl"),
        Epilogue::Residual { .. } => include_str!("../../../wgsl/linear_residual.wgsl"),
        Epilogue::GeluSlope { .. } => include_str!("../../../wgsl/linear_gelu_slope.wgsl"),
        Epilogue::Added => include_str!("../../../wgsl/linear_added.wgsl"),
    });
    match variant {
        Variant::Scalar => {
            files.push(include_str!("../../../wgsl/linear_scalar.wgsl"));
            Kernel::new("linear_scalar", header, files, (tile.grid.0 * tile.grid.1, 1, 1))
        }
        Variant::Coop { edge, .. } => {
            // Metal's matrices want single elements behind them, and it alone has edge 8.
            files.push(if edge == 8 {
                include_str!("../../../wgsl/linear_coop_memory_singles.wgsl")
            } else {
                include_str!("../../../wgsl/linear_coop_memory_quads.wgsl")
            });
            files.push(include_str!("../../../wgsl/linear_coop.wgsl"));
            Kernel::new("linear_coop", header, files, (tile.grid.0 * tile.grid.1 * SUBGROUP_SIZE, 1, 1))
        }
    }
}
