//! The kernels beside the products: a bias's gradient, GELU's gradient, sums of parts; and the list of all.

use super::Gelu;
use super::product::sum_parts_kernel;
use super::tiles;
use crate::kernel::lanes::types;
use crate::kernel::{Capabilities, Kernel, Made};

/// The type of a kernel's elements, as its header begins.
pub(in crate::ops) fn elem(f16: bool) -> &'static str {
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
    Kernel::new("column_sum", header, vec![include_str!("../../../wgsl/column_sum.wgsl")], (64, 1, 1))
}

/// The kernel of GELU's gradient, given and made in f16 (or f32), four elements an invocation.
pub fn gelu_gradient_kernel(gelu: Gelu, f16: [bool; 2]) -> Kernel {
    static MADE: Made<(Gelu, [bool; 2])> = Made::new();
    MADE.get((gelu, f16), |&(gelu, f16)| make_gelu_gradient(gelu, f16))
}

fn make_gelu_gradient(gelu: Gelu, f16: [bool; 2]) -> Kernel {
    let header = format!("{}const GELU_TANH: bool = {};\n", types(f16), gelu == Gelu::Tanh);
    let files = vec![include_str!("../../../wgsl/gelu.wgsl"), include_str!("../../../wgsl/gelu_gradient.wgsl")];
    Kernel::new("gelu_gradient", header, files, (256, 1, 1))
}

/// Every kernel of linear layers that a device with these capabilities can be given.
pub fn kernels(capabilities: &Capabilities) -> Vec<Kernel> {
    let mut kernels = tiles::kernels(capabilities);
    for f16 in [false, true] {
        kernels.push(column_sum_kernel(f16));
    }
    for gelu in [Gelu::Erf, Gelu::Tanh] {
        kernels.extend([[false; 2], [true; 2], [false, true]].map(|f16| gelu_gradient_kernel(gelu, f16)));
    }
    for elements in [1, 4] {
        kernels.extend([false, true].map(|accumulate| sum_parts_kernel(elements, accumulate, false).0));
        kernels.push(sum_parts_kernel(elements, false, true).0);
    }
    kernels
}
