//! One WGSL kernel: a header of constants, the text of its files, and how it is launched.
//!
//! A kernel is specialised by text that is put in front of the file as it stands (`const HEAD_DIM: u32 = 64u;`), so that
//! every file under `wgsl/` stays plain WGSL. Sizes that change from call to call travel in one uniform, bound last: only a
//! uniform is uniform enough for cooperative matrices, and CubeCL caches it by value.

use burn_cubecl::tensor::CubeTensor;
use cubecl::{
    CubeKernel,
    ir::metadata::Info,
    prelude::*,
    server::{KernelArguments, MetadataBindingInfo},
};

/// The text of a kernel and the size of its workgroup. The entry point is `main`.
#[derive(Clone, Debug)]
pub struct Kernel {
    name: &'static str,
    header: String,
    files: &'static [&'static str],
    workgroup: (u32, u32, u32),
}

impl Kernel {
    /// `name` must be unique for `files`; `header` is prepended to them.
    pub fn new(name: &'static str, header: String, files: &'static [&'static str], workgroup: (u32, u32, u32)) -> Self {
        Self { name, header, files, workgroup }
    }

    /// The whole WGSL text that is compiled.
    pub fn text(&self) -> String {
        let mut text = self.header.clone();
        for file in self.files {
            text.push('\n');
            text.push_str(file);
        }
        text
    }

    /// Queues one launch over `grid` workgroups: `tensors` are bound at 0, 1, 2, ... and `params` (32-bit words) last.
    ///
    /// The caller guarantees what the kernel's file states of its bindings: CubeCL's WGSL path checks no bounds.
    pub fn launch(self, grid: (u32, u32, u32), tensors: &[&CubeTensor], params: &[u32]) {
        let buffers = tensors.iter().map(|t| t.handle.clone().binding()).collect();
        let mut arguments = KernelArguments::new().with_buffers(buffers);
        arguments.info = MetadataBindingInfo::custom(pack(params));
        tensors[0].client.launch(Box::new(self), CubeCount::Static(grid.0, grid.1, grid.2), arguments);
    }
}

/// Two 32-bit words in one u64, low word first, filled with zeros up to the 16 bytes that a uniform's size is a multiple of.
fn pack(params: &[u32]) -> Vec<u64> {
    let word = |i: usize| u64::from(params.get(i).copied().unwrap_or(0));
    (0..params.len().div_ceil(4) * 2).map(|i| word(2 * i) | word(2 * i + 1) << 32).collect()
}

impl KernelMetadata for Kernel {
    /// Name and header stand for the full text: CubeCL's cache of pipelines never sees the text itself.
    fn id(&self) -> KernelId {
        KernelId::new::<Self>().cube_dim(self.workgroup.into()).info((self.name, self.header.clone()))
    }

    fn address_type(&self) -> cubecl::ir::ElemType {
        cubecl::ir::UIntKind::U32.into()
    }
}

impl CubeKernel for Kernel {
    fn define(&self) -> KernelDefinition {
        // Unchecked: the kernels guard their own edges, and loop bounding costs a fifth of a matrix product's speed.
        let settings = KernelSettings::new(self.workgroup.into(), ExecutionMode::Unchecked, AddressType::U32);
        KernelDefinition { body: Scope::root(settings.clone()), settings, info: Info::default() }
    }

    fn source(&self) -> Option<cubecl::PrecompiledSource> {
        Some(cubecl::PrecompiledSource { source: self.text(), entrypoint_name: "main".into(), lang: "wgsl" })
    }
}

/// A contiguous tensor of `tensor`'s type and device with undefined content.
pub fn empty_like(tensor: &CubeTensor) -> CubeTensor {
    empty(tensor, tensor.meta.shape().clone())
}

/// A contiguous tensor of `shape` with undefined content, of `tensor`'s element type and on its device.
pub fn empty(tensor: &CubeTensor, shape: burn::tensor::Shape) -> CubeTensor {
    let buffer = tensor.client.empty(shape.num_elements() * tensor.dtype.size());
    CubeTensor::new_contiguous(tensor.client.clone(), tensor.device.clone(), shape, buffer, tensor.dtype)
}

#[cfg(test)]
mod tests {
    #[test]
    fn params_are_packed_low_word_first_and_padded_to_16_bytes() {
        assert_eq!(super::pack(&[1, 2, 3]), [1 | 2 << 32, 3]);
        assert_eq!(super::pack(&[1, 2, 3, 4, 5]).len(), 4);
    }
}
