//! WGSL to MSL with the options that wgpu-hal 30 gives naga on Metal, and what the text's entry point asks for.

use std::collections::BTreeSet;

use gpt_wgpu::kernel::Kernel;
use naga::back::msl;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, ShaderStage, TypeInner};

/// A kernel as naga understood it.
pub struct Shader {
    /// File name without its ending, the same in every run.
    pub id: String,
    /// Name and header's constants, for people.
    pub label: String,
    /// What wgpu would be given.
    pub wgsl: String,
    pub module: Module,
    pub info: ModuleInfo,
}

impl Shader {
    /// `wgsl` is the kernel's text, or a changed one.
    ///
    /// # Errors
    /// What naga finds wrong with the text.
    pub fn new(kernel: &Kernel, wgsl: String) -> Result<Self, String> {
        let module = naga::front::wgsl::parse_str(&wgsl).map_err(|e| e.emit_to_string(&wgsl))?;
        let mut validator = Validator::new(ValidationFlags::all(), Capabilities::all());
        let info = validator.validate(&module).map_err(|e| e.emit_to_string(&wgsl))?;
        Ok(Self { id: id(kernel), label: label(kernel), wgsl, module, info })
    }

    /// The text that Apple's compiler would get.
    ///
    /// # Errors
    /// Where naga cannot write it.
    pub fn msl(&self) -> Result<String, String> {
        // wgpu-hal numbers the buffers in the order of the layout, which is the order of the bindings, and puts the buffer
        // of the buffers' sizes behind them.
        let mut resources = msl::EntryPointResources::default();
        for (slot, binding) in self.bindings().iter().enumerate() {
            let target = msl::BindTarget { buffer: Some(slot as u8), mutable: true, ..Default::default() };
            resources.resources.insert(*binding, target);
        }
        resources.sizes_buffer = Some(self.bindings().len() as u8);
        // CubeCL turns every check off (src/kernel.rs: Unchecked), and asks for no zeros in workgroup memory.
        let unchecked = BoundsCheckPolicy::Unchecked;
        let options = msl::Options {
            lang_version: (3, 1), // macOS 14; later ones change the first line alone
            per_entry_point_map: msl::EntryPointResourceMap::from([("main".into(), resources)]),
            inline_samplers: Vec::new(),
            spirv_cross_compatibility: false,
            fake_missing_bindings: false,
            bounds_check_policies: BoundsCheckPolicies {
                index: unchecked,
                buffer: unchecked,
                image_load: unchecked,
                binding_array: unchecked,
            },
            zero_initialize_workgroup_memory: false,
            force_loop_bounding: false,
            task_dispatch_limits: None,
            mesh_shader_primitive_indices_clamp: false,
            emit_int_div_checks: false,
            ray_query_initialization_tracking: false,
        };
        let pipeline = msl::PipelineOptions {
            entry_point: Some((ShaderStage::Compute, "main".into())),
            vertex_pulling_transform: true,
            ..Default::default()
        };
        let (text, _) =
            msl::write_string(&self.module, &self.info, &options, &pipeline).map_err(|error| error.to_string())?;
        Ok(text)
    }

    /// The bindings of the text, in order.
    pub fn bindings(&self) -> Vec<naga::ResourceBinding> {
        let mut bindings: Vec<_> = self.module.global_variables.iter().filter_map(|(_, v)| v.binding).collect();
        bindings.sort();
        bindings
    }

    /// The sizes buffer for buffers of these lengths (by binding): the lengths of those that end in an array without size.
    pub fn sizes(&self, bytes: &[usize]) -> Vec<u32> {
        let types = &self.module.types;
        let bindings = self.bindings();
        self.module
            .global_variables
            .iter()
            .filter(|(_, v)| types[v.ty].inner.needs_host_buffer_byte_size(types))
            .filter_map(|(_, v)| bindings.iter().position(|b| Some(*b) == v.binding))
            .map(|slot| bytes[slot] as u32)
            .collect()
    }

    /// C++ around the MSL: a function that calls the entry point for one thread, and what memory that wants.
    ///
    /// # Errors
    /// Where the entry point is not of the form that is known here.
    pub fn program(&self, msl: &str) -> Result<String, String> {
        let threads: u32 = self.module.entry_points[0].workgroup_size.iter().product();
        let arguments = msl
            .split_once(" kernel void main_(\n")
            .and_then(|(_, rest)| rest.split_once("\n) {"))
            .map(|(arguments, _)| arguments.lines().map(|line| line.trim_start_matches([' ', ','])))
            .ok_or("the MSL has no `kernel void main_(`")?;
        let mut elements = self.elements().into_iter();
        let (mut passed, mut memories) = (Vec::new(), Vec::new());
        for argument in arguments {
            let (declaration, attribute) = match argument.split_once(" [[") {
                Some((declaration, attribute)) => (declaration, attribute.trim_end_matches("]]")),
                None => (argument, ""),
            };
            let (kind, name) = declaration.rsplit_once(' ').ok_or_else(|| format!("unknown argument {argument}"))?;
            if let Some(value) = built_in(attribute) {
                passed.push(value.to_string());
                continue;
            }
            let kind = kind.split(' ').find(|word| !["device", "constant", "threadgroup", "const&"].contains(word));
            let kind = kind.unwrap_or_default().trim_end_matches('&');
            passed.push(format!("*({kind}*)at[{}]", memories.len()));
            let (buffer, bytes) = match attribute.strip_prefix("buffer(").and_then(|n| n.strip_suffix(')')) {
                Some(n) => (n, "0".to_string()),
                None if argument.starts_with("threadgroup ") => ("-1", format!("sizeof({kind})")),
                None => return Err(format!("unknown argument {argument}")),
            };
            let known =
                if name == "_buffer_sizes" { (4, 4) } else { elements.next().ok_or("more memory than WGSL has")? };
            memories.push(format!("{{\"{name}\", {buffer}, {bytes}, {}, {}}}", known.0, known.1));
        }
        let msl = once_for_all_spaces(msl);
        // In a namespace without name, so that many kernels fit in one program. The headers must stand outside.
        Ok(format!(
            "#include <metal_stdlib>\n#include <simd/simd.h>\n{}namespace {{\n#line 1\n{msl}\n\
             void run_thread(void* const* at, const msl::Place& place) {{\n    (void)at, (void)place;\n    main_({});\n}}\n\
             const msl::Memory MEMORIES[] = {{{}}};\n\
             const msl::Kernel KERNEL = {{\"{}\", {threads}, MEMORIES, {}, run_thread}};\n\
             const int ADDED = msl::add_kernel(&KERNEL);\n}}\n",
            constructors(&msl),
            passed.join(", "),
            memories.join(", "),
            self.id,
            memories.len(),
        ))
    }

    /// Bytes of an element, and of a scalar, of every buffer and workgroup variable that the entry point uses, in naga's
    /// order.
    fn elements(&self) -> Vec<(u32, u32)> {
        let used = self.info.get_entry_point(0);
        let variables = self.module.global_variables.iter();
        variables
            .filter(|(handle, v)| !used[*handle].is_empty() && v.space != AddressSpace::Private)
            .map(|(_, v)| {
                let mut inner = &self.module.types[v.ty].inner;
                let element = if let TypeInner::Array { stride, .. } = inner { *stride } else { 4 };
                while let TypeInner::Array { base, .. } = inner {
                    inner = &self.module.types[*base].inner;
                }
                let scalar = inner.scalar().map_or(4, |s| u32::from(s.width));
                (element, scalar)
            })
            .collect()
    }
}

/// The text with one of the functions that naga writes for each address space, which C++ cannot tell apart. Lines keep their numbers.
fn once_for_all_spaces(msl: &str) -> String {
    let mut seen = BTreeSet::new();
    let (mut text, mut drops) = (String::new(), false);
    for line in msl.lines() {
        let is_function = !line.starts_with(' ') && line.contains('(') && line.ends_with('{');
        drops |= is_function && !seen.insert(line.replace("device ", "").replace("threadgroup ", ""));
        if !drops {
            text += line;
        }
        text.push('\n');
        drops &= line != "}";
    }
    text
}

/// What lets a C++ compiler take `quad(a, b, c, d)` where MSL names a vector `quad`, as the stand-in headers do for `float4`.
pub fn constructors(msl: &str) -> String {
    let vectors =
        ["half", "float", "int", "uint"].map(|scalar| [2, 3, 4].map(|count| format!("metal::{scalar}{count}")));
    let alias = |line: &str| {
        let (vector, name) = line.strip_prefix("typedef ")?.strip_suffix(';')?.split_once(' ')?;
        let is_array = name.ends_with(']');
        let is_vector = !is_array && vectors.as_flattened().iter().any(|known| known == vector);
        is_vector.then(|| format!("#define {name}(...) metal::make<{name}>(__VA_ARGS__)\n"))
    };
    msl.lines().filter_map(alias).collect()
}

/// What the launcher passes for a built-in value.
fn built_in(attribute: &str) -> Option<&'static str> {
    Some(match attribute {
        "threadgroup_position_in_grid" => "metal::uint3(place.group.x, place.group.y, place.group.z)",
        "threadgroups_per_grid" => "metal::uint3(place.groups.x, place.groups.y, place.groups.z)",
        "thread_position_in_threadgroup" => "metal::uint3(place.local.x, place.local.y, place.local.z)",
        "thread_position_in_grid" => {
            "metal::uint3(place.group.x * place.size.x + place.local.x, place.group.y * place.size.y + place.local.y, \
             place.group.z * place.size.z + place.local.z)"
        }
        "thread_index_in_threadgroup" => "place.index",
        "thread_index_in_simdgroup" => "place.index % msl::LANES",
        "simdgroup_index_in_threadgroup" => "place.index / msl::LANES",
        "threads_per_simdgroup" => "msl::LANES",
        "simdgroups_per_threadgroup" => "(place.size.x * place.size.y * place.size.z + msl::LANES - 1) / msl::LANES",
        _ => return None,
    })
}

fn id(kernel: &Kernel) -> String {
    // FNV-1a: the same in every version of Rust
    let hash = kernel
        .header()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{}_{:08x}{}", kernel.name(), hash >> 32, if has_int64(kernel) { "_int64" } else { "" })
}

/// Whether this is the form of a kernel's text with 64-bit integers. Most kernels have one form only.
pub fn has_int64(kernel: &Kernel) -> bool {
    kernel.text() != kernel.clone().with_int64(false).text()
}

/// `attention_delta{elem=f16 HEAD_DIM=64}`; a comment of the header stands as it is.
pub fn label(kernel: &Kernel) -> String {
    let int64 = has_int64(kernel).then(|| "int64".to_string());
    let constants = kernel.header().lines().filter_map(|line| {
        if let Some(comment) = line.strip_prefix("// ") {
            return Some(comment.to_string());
        }
        let (left, right) = line.trim_end_matches(';').split_once(" = ")?;
        let name = left.trim_start_matches("const ").trim_start_matches("alias ");
        let name = name.split(':').next()?;
        let said = !right.starts_with("coop_mat"); // the types of matrices follow from EDGE and mat_elem
        said.then(|| format!("{name}={}", right.trim_end_matches('u')))
    });
    format!("{}{{{}}}", kernel.name(), constants.chain(int64).collect::<Vec<_>>().join(" "))
}
