//! Outputs that notice a kernel writing outside them.

use burn::backend::DispatchTensorKind;
use burn::tensor::{DType, Device, Shape, Tensor};
use burn_cubecl::tensor::CubeTensor;

use super::{tensor, values};

/// Floats before and after every output that no kernel may touch; 256 bytes is the largest binding alignment.
const GUARD: usize = 64;

/// What stands there. Not NaN: an update in place would turn that into NaN again. Large, so that reading it shows too.
const UNTOUCHED: f64 = (1u64 << 60) as f64;

/// What a kernel is launched on.
pub fn primitive<const D: usize>(tensor: Tensor<D>) -> CubeTensor {
    match tensor.into_dispatch().kind {
        DispatchTensorKind::Cube(tensor) => tensor.float(),
        _ => panic!("not a GPU tensor"),
    }
}

/// An output inside a larger buffer.
pub struct Guarded {
    whole: Tensor<1>,
    pub inside: CubeTensor,
    count: usize,
}

impl Guarded {
    /// An output that is all NaN until a kernel writes it.
    pub fn new<const D: usize>(dims: [usize; D], device: &Device) -> Self {
        Self::holding(&vec![f64::NAN; dims.iter().product()], dims, device)
    }

    /// An output that a kernel reads and rewrites.
    pub fn holding<const D: usize>(content: &[f64], dims: [usize; D], device: &Device) -> Self {
        let count = content.len();
        let after = GUARD + count.next_multiple_of(GUARD) - count;
        let mut all = vec![UNTOUCHED; GUARD + count + after];
        all[GUARD..GUARD + count].copy_from_slice(content);
        let whole = tensor(&all, [all.len()], device);
        let t = primitive(whole.clone());
        // The guard behind is part of what is bound: a driver that drops writes outside a binding would hide them.
        let handle = t.handle.clone().offset_start(4 * GUARD as u64);
        let shape = Shape::new(dims);
        let inside = CubeTensor::new_contiguous(t.client.clone(), t.device.clone(), shape, handle, DType::F32);
        Self { whole, inside, count }
    }

    /// The output's values, after a check that nothing around them was written.
    #[track_caller]
    pub fn values(self, what: &str) -> Vec<f64> {
        drop(self.inside);
        let all = values(self.whole);
        let (inside, after) = all[GUARD..].split_at(self.count);
        assert!(all[..GUARD].iter().all(|v| *v == UNTOUCHED), "{what}: wrote before its output");
        assert!(after.iter().all(|v| *v == UNTOUCHED), "{what}: wrote behind its output");
        inside.to_vec()
    }
}
