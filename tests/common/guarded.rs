//! Outputs that notice a kernel writing outside them.

use burn::backend::DispatchTensorKind;
use burn::tensor::{DType, Device, Shape, Tensor};
use burn_cubecl::tensor::CubeTensor;

use super::{tensor_of, values};

/// Elements before and after every output that no kernel may touch; 256 bytes, 128 of f16, is the largest binding alignment.
const GUARD: usize = 128;

/// What stands there. Not NaN: an update in place would turn that into NaN again. Large, so that reading it shows too.
fn untouched(f16: bool) -> f64 {
    if f16 { (1u64 << 15) as f64 } else { (1u64 << 60) as f64 }
}

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
    f16: bool,
}

impl Guarded {
    /// An output that is all NaN until a kernel writes it.
    pub fn new<const D: usize>(dims: [usize; D], device: &Device) -> Self {
        Self::of(false, dims, device)
    }

    /// The same in f16 (or f32).
    pub fn of<const D: usize>(f16: bool, dims: [usize; D], device: &Device) -> Self {
        Self::around(f16, &vec![f64::NAN; dims.iter().product()], dims, device)
    }

    /// An output that a kernel reads and rewrites.
    pub fn holding<const D: usize>(content: &[f64], dims: [usize; D], device: &Device) -> Self {
        Self::around(false, content, dims, device)
    }

    fn around<const D: usize>(f16: bool, content: &[f64], dims: [usize; D], device: &Device) -> Self {
        let count = content.len();
        let after = GUARD + count.next_multiple_of(GUARD) - count;
        let mut all = vec![untouched(f16); GUARD + count + after];
        all[GUARD..GUARD + count].copy_from_slice(content);
        let whole = tensor_of(f16, &all, [all.len()], device);
        let t = primitive(whole.clone());
        let dtype = if f16 { DType::F16 } else { DType::F32 };
        assert_eq!(t.dtype, dtype);
        // The guard behind is part of what is bound: a driver that drops writes outside a binding would hide them.
        let handle = t.handle.clone().offset_start((dtype.size() * GUARD) as u64);
        let shape = Shape::new(dims);
        let inside = CubeTensor::new_contiguous(t.client.clone(), t.device.clone(), shape, handle, dtype);
        Self { whole, inside, count, f16 }
    }

    /// The output's values, after a check that nothing around them was written.
    #[track_caller]
    pub fn values(self, what: &str) -> Vec<f64> {
        drop(self.inside);
        let (all, untouched) = (values(self.whole), untouched(self.f16));
        let (inside, after) = all[GUARD..].split_at(self.count);
        assert!(all[..GUARD].iter().all(|v| *v == untouched), "{what}: wrote before its output");
        assert!(after.iter().all(|v| *v == untouched), "{what}: wrote behind its output");
        inside.to_vec()
    }
}
