//! Row-wise kernels are written once and run with four columns a thread where rows allow vector loads, else with one.

use std::sync::Once;

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::{Kernel, Kernels, Made, choice};

/// What a thread handles at a time, a lane: four neighbouring columns or one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lanes {
    width: usize,
    /// Lanes in a row.
    pub count: usize,
}

impl Lanes {
    /// For rows of `columns` elements.
    pub fn of(columns: usize) -> Self {
        let width = if columns.is_multiple_of(4) { 4 } else { 1 };
        Self { width, count: columns / width }
    }

    /// Whether a lane is four elements.
    pub fn is_quads(self) -> bool {
        self.width == 4
    }

    /// A kernel made of `files` for lanes of this width: `f16` says whether activations that are given, and those that are made, are
    /// stored in f16, else f32; `constants` are declared in its header, and what the lanes are is put in front of the files. Files and
    /// threads have to follow from `name` and `constants`: a kernel is made once for those.
    pub fn kernel(
        self,
        name: &'static str,
        f16: [bool; 2],
        constants: &str,
        files: &[&'static str],
        threads: u32,
    ) -> Kernel {
        /// For a width, a name, f16 or f32, and constants.
        static MADE: Made<(usize, &'static str, [bool; 2], String)> = Made::new();
        let is = |key: &(usize, &'static str, [bool; 2], String)| {
            (key.0, key.1, key.2, key.3.as_str()) == (self.width, name, f16, constants)
        };
        MADE.find(is, || {
            let header = format!("{}const WIDTH: u32 = {}u;\n{constants}", types(f16), self.width);
            let lanes = if self.is_quads() {
                include_str!("../../wgsl/lanes4.wgsl")
            } else {
                include_str!("../../wgsl/lanes1.wgsl")
            };
            let files = std::iter::once(lanes).chain(files.iter().copied()).collect();
            ((self.width, name, f16, constants.into()), Kernel::new(name, header, files, (threads, 1, 1)))
        })
    }
}

/// How a header begins whose kernel is given elem and makes out_elem, each f16 or f32.
pub fn types(f16: [bool; 2]) -> String {
    let enable = if f16.contains(&true) { "enable f16;\n" } else { "" };
    let [elem, out_elem] = f16.map(|f16| if f16 { "f16" } else { "f32" });
    format!("{enable}alias elem = {elem};\nalias out_elem = {out_elem};\n")
}

/// Whether our kernels serve an operation on `tensor`: the user wants them, and they exist for its type and for `case`, what
/// else the operation asks for. A refusal that is not the user's choice is told once.
pub fn serves(tensor: &CubeTensor, case: Result<(), &str>) -> bool {
    static ONCE: Once = Once::new();
    if choice() == Kernels::Composed {
        return false;
    }
    let refusal = match case {
        Err(refusal) => refusal,
        Ok(()) if matches!(tensor.dtype, DType::F32 | DType::F16) => return true,
        Ok(()) => "tensors that are neither f32 nor f16",
    };
    ONCE.call_once(|| tracing::warn!("no kernel of ours for {refusal}: composed instead"));
    false
}
