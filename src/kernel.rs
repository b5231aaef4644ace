//! One WGSL kernel: a header of constants, the text of its files, and how it is launched.
//!
//! A kernel is specialised by text that is put in front of the file as it stands (`const HEAD_DIM: u32 = 64u;`), so that
//! every file under `wgsl/` stays plain WGSL. Sizes that change from call to call travel in one uniform, bound last: only a
//! uniform is uniform enough for cooperative matrices, and CubeCL caches it by value.

pub mod clock;
pub mod lanes;
mod made;
pub mod slots;
mod submit;
mod tensors;
mod variants;

use std::cell::{Cell, RefCell};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use burn_cubecl::tensor::CubeTensor;
use cubecl::{
    CubeKernel,
    ir::{attributes::BufferIOAttr, metadata::Info},
    prelude::*,
    server::{KernelArguments, MetadataBindingInfo},
};

use self::variants::with_device;
use crate::{profile, startup};

pub use made::Made;
pub use submit::{begin_step, heaviest, limit as submit_limit, weighed};
pub use tensors::{empty, empty_like, empty_of, matrix, own};
pub use variants::{
    Capabilities, Kernels, SUBGROUP_SIZE, Variant, capabilities, choice, choose, chosen, describe, few_registers,
    largest_buffer, register, supported, variant, work_limit,
};

/// The text of a kernel and the size of its workgroup. The entry point is `main`. A clone costs next to nothing.
#[derive(Clone, Debug)]
pub struct Kernel {
    source: Arc<Source>,
    /// Whether the device's shaders have 64-bit integers; known at the launch.
    int64: bool,
    /// What the launch computes, for profiles.
    work: Work,
}

/// What a kernel is made of. Equal sources are one kernel, whoever made them; a launch compares them by their address and by
/// a hash made once, not letter by letter.
#[derive(Debug, PartialEq, Eq)]
struct Source {
    name: &'static str,
    header: String,
    files: Vec<&'static str>,
    workgroup: (u32, u32, u32),
    /// Whether the clock is bound behind the tensors: where a file declares it.
    clocked: bool,
    /// Of name and header, which seldom leave anything else to tell apart.
    hash: u64,
}

impl Hash for Source {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

/// What a launch computes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Floating-point operations of its products, 0 where memory is what counts.
    pub flops: f64,
    /// Rows, columns and depth of a product.
    pub sizes: Option<[usize; 3]>,
    /// What follows its sums; empty where nothing does.
    pub epilogue: &'static str,
}

/// How a kernel declares the [`clock`].
const CLOCK: &str = "var<storage, read_write> clock: array<u32>";

/// The random generator, which is written over a multiplication that devices have or have not.
pub const PHILOX: &str = include_str!("../wgsl/philox.wgsl");

impl Kernel {
    /// `header` is prepended to `files`.
    pub fn new(name: &'static str, header: String, files: Vec<&'static str>, workgroup: (u32, u32, u32)) -> Self {
        let mut hasher = DefaultHasher::new();
        (name, &header).hash(&mut hasher);
        let clocked = files.iter().any(|file| file.contains(CLOCK));
        let source = Arc::new(Source { name, header, files, workgroup, clocked, hash: hasher.finish() });
        Self { source, int64: false, work: Work::default() }
    }

    /// The same kernel for a device whose shaders have, or have not, 64-bit integers.
    pub fn with_int64(self, int64: bool) -> Self {
        Self { int64, ..self }
    }

    /// The same kernel with what its launch computes.
    pub fn with_work(self, work: Work) -> Self {
        Self { work, ..self }
    }

    /// What the kernel does, in profiles.
    pub fn name(&self) -> &'static str {
        self.source.name
    }

    /// The constants in front of the files.
    pub fn header(&self) -> &str {
        &self.source.header
    }

    /// Threads of a workgroup.
    pub fn workgroup(&self) -> (u32, u32, u32) {
        self.source.workgroup
    }

    /// Whether the kernel reads the [`clock`], which a launch binds behind the tensors.
    pub fn is_clocked(&self) -> bool {
        self.source.clocked
    }

    /// The whole WGSL text that is compiled.
    pub fn text(&self) -> String {
        let mut text = self.source.header.clone();
        for &file in &self.source.files {
            text.push('\n');
            if file == PHILOX {
                text.push_str(if self.int64 {
                    include_str!("../wgsl/multiply_wide_u64.wgsl")
                } else {
                    include_str!("../wgsl/multiply_wide_u32.wgsl")
                });
                text.push('\n');
            }
            text.push_str(file);
        }
        text
    }

    /// The text as naga reads and checks it; an error where it refuses.
    pub(crate) fn module(&self) -> Result<naga::Module, String> {
        let text = self.text();
        let module = naga::front::wgsl::parse_str(&text).map_err(|e| e.emit_to_string(&text))?;
        let everything = naga::valid::Capabilities::all();
        let mut validator = naga::valid::Validator::new(naga::valid::ValidationFlags::all(), everything);
        validator.validate(&module).map_err(|e| e.emit_to_string(&text))?;
        Ok(module)
    }

    /// Bytes of workgroup memory, each variable rounded up to 16 as Metal does; an error where naga refuses the text.
    pub fn workgroup_memory(&self) -> Result<u32, String> {
        let module = self.module()?;
        let sizes = module
            .global_variables
            .iter()
            .filter(|(_, variable)| variable.space == naga::AddressSpace::WorkGroup)
            .map(|(_, variable)| module.types[variable.ty].inner.size(module.to_ctx()).next_multiple_of(16));
        Ok(sizes.sum())
    }

    /// Queues one launch over `grid` workgroups: `tensors` are bound at 0, 1, 2, ..., behind them the [`clock`] where the kernel
    /// has one, and `params` (32-bit words) last.
    ///
    /// The caller guarantees what the kernel's file states of its bindings: CubeCL's WGSL path checks no bounds.
    pub fn launch(self, grid: (u32, u32, u32), tensors: &[&CubeTensor], params: &[u32]) {
        let client = &tensors[0].client;
        let (int64, submit_limit) = with_device(tensors[0], |device| match device {
            Some(device) => (device.capabilities.int64, device.submit_limit),
            None => (false, f64::INFINITY),
        });
        let kernel = Self { int64, ..self };
        if NOTED.with_borrow_mut(|noted| noted.as_mut().map(|noted| noted.push(kernel.clone()))).is_some() {
            return;
        }
        let clock = kernel.is_clocked().then(|| clock::buffer(client, &tensors[0].device).binding());
        let buffers = tensors.iter().map(|t| t.handle.clone().binding()).chain(clock);
        let info = MetadataBindingInfo::custom(pack(params));
        let count = CubeCount::Static(grid.0, grid.1, grid.2);
        if RECORDING.get() {
            let arguments = buffers.fold(KernelArguments::new(), |arguments, buffer| {
                arguments.with_buffer_io(buffer, BufferIOAttr::ReadOnly)
            });
            client.launch(Box::new(kernel), count, arguments.with_info(info));
            return;
        }
        let arguments = KernelArguments::new().with_buffers(buffers.collect()).with_info(info);
        let bytes = tensors.iter().map(|t| t.meta.shape().num_elements() * t.dtype.size()).sum();
        if submit::is_full(kernel.work.flops, bytes, submit_limit) {
            // What fails here fails at the next read or wait too.
            let _ = client.flush();
        }
        let launch = |kernel| client.launch(Box::new(kernel), count, arguments);
        if startup::is_first(&kernel) {
            startup::compile(client, &kernel.clone(), || launch(kernel));
        } else if profile::is_on() {
            profile::record(client, kernel.name(), kernel.work, bytes, || launch(kernel));
        } else {
            launch(kernel);
        }
    }
}

thread_local! {
    /// The kernels that this thread was asked to launch, while they are only noted.
    static NOTED: RefCell<Option<Vec<Kernel>>> = const { RefCell::new(None) };
    /// Whether CubeCL records what this thread launches.
    static RECORDING: Cell<bool> = const { Cell::new(false) };
}

/// What `work` gives, whose launches CubeCL records and does not run. So nothing is submitted meanwhile, and all buffers are
/// declared as read only: should the recording come to nothing, CubeCL is not to take those for spoiled that it never wrote, the
/// parameters among them.
pub fn recorded<T>(work: impl FnOnce() -> T) -> T {
    /// Ends it, also where the work panics.
    struct Recording;
    impl Drop for Recording {
        fn drop(&mut self) {
            RECORDING.set(false);
        }
    }
    RECORDING.set(true);
    let _recording = Recording;
    work()
}

/// What `work` gives, and the kernels that it launches on this thread, in their order. None of them runs, so the tensors that they
/// would write hold anything.
pub fn noted<T>(work: impl FnOnce() -> T) -> (T, Vec<Kernel>) {
    /// Lets launches run again, also where the work panics.
    struct Noting;
    impl Drop for Noting {
        fn drop(&mut self) {
            NOTED.set(None);
        }
    }
    NOTED.set(Some(Vec::new()));
    let _noting = Noting;
    let done = work();
    (done, NOTED.take().unwrap_or_default())
}

/// A grid of `groups` workgroups, folded into two dimensions where one is too short.
pub fn fold(groups: u32) -> (u32, u32, u32) {
    const LONGEST: u32 = 65_535;
    if groups <= LONGEST {
        return (groups.max(1), 1, 1);
    }
    let y = groups.div_ceil(LONGEST);
    (groups.div_ceil(y), y, 1)
}

/// Two 32-bit words in one u64, low word first, filled with zeros up to the 16 bytes that a uniform's size is a multiple of.
fn pack(params: &[u32]) -> Vec<u64> {
    let word = |i: usize| u64::from(params.get(i).copied().unwrap_or(0));
    (0..params.len().div_ceil(4) * 2).map(|i| word(2 * i) | word(2 * i + 1) << 32).collect()
}

impl KernelMetadata for Kernel {
    /// All that the text is made of: CubeCL's cache of pipelines never sees the text itself.
    fn id(&self) -> KernelId {
        // The mode that counts is the identity's, and it defaults to Checked: bounded loops, which no compiler unrolls. The
        // cooperative attention kernels are three times slower that way.
        let id = KernelId::new::<Self>().cube_dim(self.workgroup().into()).mode(ExecutionMode::Unchecked);
        id.info((self.source.clone(), self.int64))
    }

    fn address_type(&self) -> cubecl::ir::ElemType {
        cubecl::ir::UIntKind::U32.into()
    }
}

impl CubeKernel for Kernel {
    fn define(&self) -> KernelDefinition {
        // Unchecked: the kernels guard their own edges, and loop bounding costs a fifth of a matrix product's speed.
        let settings = KernelSettings::new(self.workgroup().into(), ExecutionMode::Unchecked, AddressType::U32);
        KernelDefinition { body: Scope::root(settings.clone()), settings, info: Info::default() }
    }

    fn source(&self) -> Option<cubecl::PrecompiledSource> {
        Some(cubecl::PrecompiledSource { source: self.text(), entrypoint_name: "main".into(), lang: "wgsl" })
    }
}

#[cfg(test)]
mod tests {
    use cubecl::prelude::KernelMetadata;

    use super::Kernel;

    #[test]
    fn a_kernels_identity_is_all_that_its_text_and_its_launch_depend_on() {
        let kernel = |name, header: &str, file, threads| Kernel::new(name, header.into(), vec![file], (threads, 1, 1));
        let one = kernel("name", "header", "file", 64);
        assert_eq!(one.id(), kernel("name", "header", "file", 64).id());
        let others = [
            kernel("another", "header", "file", 64),
            kernel("name", "another", "file", 64),
            kernel("name", "header", "another", 64),
            kernel("name", "header", "file", 32),
            one.clone().with_int64(true),
        ];
        for other in others {
            assert!(one.id() != other.id(), "{other:?}");
        }
    }

    #[test]
    fn work_that_panics_leaves_the_thread_launching() {
        let panicked = std::panic::catch_unwind(|| super::noted(|| panic!("in the work")));
        assert!(panicked.is_err());
        assert!(super::NOTED.take().is_none(), "launches are still only noted");
    }

    #[test]
    fn grids_are_folded_without_losing_a_group() {
        for groups in [1, 65_535, 65_536, 1_000_000] {
            let (x, y, _) = super::fold(groups);
            assert!(x <= 65_535 && y <= 65_535 && x * y >= groups && x * y < groups + x, "{groups}: {x} {y}");
        }
    }

    #[test]
    fn params_are_packed_low_word_first_and_padded_to_16_bytes() {
        assert_eq!(super::pack(&[1, 2, 3]), [1 | 2 << 32, 3]);
        assert_eq!(super::pack(&[1, 2, 3, 4, 5]).len(), 4);
    }
}
