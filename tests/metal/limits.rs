//! What a kernel must keep to run on an Apple GPU, and the kernels' own rules of docs/design.md, as a table over naga's IR.
//!
//! Apple's numbers: Metal feature set tables, families Apple 7 (M1) and later.

use naga::valid::{FunctionInfo, GlobalUse};
use naga::{
    AddressSpace, BinaryOperator, CooperativeRole, CooperativeSize, Expression, Function, Handle, Scalar, ScalarKind,
    Statement, StorageAccess, TypeInner,
};

use crate::lower::Shader;

const WORKGROUP_MEMORY: u32 = 32 << 10;
const WORKGROUP_VARIABLES: usize = 31;
const THREADS: u32 = 1024;
const SIMDGROUP: u32 = 32;
/// 31 buffers, less the uniform and the buffer of the buffers' sizes.
const STORAGE_BINDINGS: usize = 29;

/// One thing that a kernel must keep.
pub struct Rule {
    /// What is asked.
    pub name: &'static str,
    check: fn(&Shader) -> Option<String>,
    /// The smallest kernel that breaks this rule.
    breaker: &'static str,
}

/// The rules that `shader` breaks, each with how.
pub fn broken(shader: &Shader) -> Vec<(&'static str, String)> {
    RULES.iter().filter_map(|rule| (rule.check)(shader).map(|how| (rule.name, how))).collect()
}

/// Every rule.
pub const RULES: &[Rule] = &[
    Rule {
        name: "at most 32 KiB of workgroup memory, each variable rounded up to 16 bytes",
        check: |shader| {
            let bytes: u32 = workgroup_variables(shader).iter().map(|size| size.next_multiple_of(16)).sum();
            (bytes > WORKGROUP_MEMORY).then(|| format!("{bytes} bytes"))
        },
        // 32768 bytes as they stand, 16 more as Metal counts them
        breaker: "var<workgroup> a: array<f32, 8189>; var<workgroup> b: array<f32, 3>;
            @compute @workgroup_size(32) fn main() { a[0] = b[0]; }",
    },
    Rule {
        name: "at most 31 workgroup variables",
        check: |shader| {
            let count = workgroup_variables(shader).len();
            (count > WORKGROUP_VARIABLES).then(|| format!("{count} of them"))
        },
        breaker: "var<workgroup> a0: vec4<f32>; var<workgroup> a1: vec4<f32>; var<workgroup> a2: vec4<f32>;
            var<workgroup> a3: vec4<f32>; var<workgroup> a4: vec4<f32>; var<workgroup> a5: vec4<f32>;
            var<workgroup> a6: vec4<f32>; var<workgroup> a7: vec4<f32>; var<workgroup> a8: vec4<f32>;
            var<workgroup> a9: vec4<f32>; var<workgroup> b0: vec4<f32>; var<workgroup> b1: vec4<f32>;
            var<workgroup> b2: vec4<f32>; var<workgroup> b3: vec4<f32>; var<workgroup> b4: vec4<f32>;
            var<workgroup> b5: vec4<f32>; var<workgroup> b6: vec4<f32>; var<workgroup> b7: vec4<f32>;
            var<workgroup> b8: vec4<f32>; var<workgroup> b9: vec4<f32>; var<workgroup> c0: vec4<f32>;
            var<workgroup> c1: vec4<f32>; var<workgroup> c2: vec4<f32>; var<workgroup> c3: vec4<f32>;
            var<workgroup> c4: vec4<f32>; var<workgroup> c5: vec4<f32>; var<workgroup> c6: vec4<f32>;
            var<workgroup> c7: vec4<f32>; var<workgroup> c8: vec4<f32>; var<workgroup> c9: vec4<f32>;
            var<workgroup> d0: vec4<f32>; var<workgroup> d1: vec4<f32>;
            @compute @workgroup_size(32) fn main() {
                a0 = a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9 + b0 + b1 + b2 + b3 + b4 + b5 + b6 + b7 + b8 + b9 + c0 + c1
                    + c2 + c3 + c4 + c5 + c6 + c7 + c8 + c9 + d0 + d1;
            }",
    },
    Rule {
        name: "at most 1024 threads",
        check: |shader| (threads(shader) > THREADS).then(|| format!("{} threads", threads(shader))),
        breaker: "@compute @workgroup_size(1056) fn main() {}",
    },
    Rule {
        name: "whole simdgroups of 32 threads",
        check: |shader| {
            let threads = threads(shader);
            (threads == 0 || !threads.is_multiple_of(SIMDGROUP)).then(|| format!("{threads} threads"))
        },
        breaker: "@compute @workgroup_size(48) fn main() {}",
    },
    Rule {
        name: "two simdgroups or more with cooperative matrices",
        check: |shader| {
            let few = threads(shader) < 2 * SIMDGROUP && !matrices(shader).is_empty();
            few.then(|| format!("{} threads", threads(shader)))
        },
        breaker: "enable wgpu_cooperative_matrix;
            @group(0) @binding(0) var<storage, read_write> a: array<f32>;
            @compute @workgroup_size(32) fn main() { let m = coopLoadT<coop_mat8x8<f32, C>>(&a[0], 8u); coopStoreT(m, &a[0], 8u); }",
    },
    Rule {
        name: "at most 29 storage bindings",
        check: |shader| {
            let count = storage(shader).count();
            (count > STORAGE_BINDINGS).then(|| format!("{count} of them"))
        },
        breaker: "@group(0) @binding(0) var<storage, read_write> a0: u32; @group(0) @binding(1) var<storage, read_write> a1: u32;
            @group(0) @binding(2) var<storage, read_write> a2: u32; @group(0) @binding(3) var<storage, read_write> a3: u32;
            @group(0) @binding(4) var<storage, read_write> a4: u32; @group(0) @binding(5) var<storage, read_write> a5: u32;
            @group(0) @binding(6) var<storage, read_write> a6: u32; @group(0) @binding(7) var<storage, read_write> a7: u32;
            @group(0) @binding(8) var<storage, read_write> a8: u32; @group(0) @binding(9) var<storage, read_write> a9: u32;
            @group(0) @binding(10) var<storage, read_write> b0: u32; @group(0) @binding(11) var<storage, read_write> b1: u32;
            @group(0) @binding(12) var<storage, read_write> b2: u32; @group(0) @binding(13) var<storage, read_write> b3: u32;
            @group(0) @binding(14) var<storage, read_write> b4: u32; @group(0) @binding(15) var<storage, read_write> b5: u32;
            @group(0) @binding(16) var<storage, read_write> b6: u32; @group(0) @binding(17) var<storage, read_write> b7: u32;
            @group(0) @binding(18) var<storage, read_write> b8: u32; @group(0) @binding(19) var<storage, read_write> b9: u32;
            @group(0) @binding(20) var<storage, read_write> c0: u32; @group(0) @binding(21) var<storage, read_write> c1: u32;
            @group(0) @binding(22) var<storage, read_write> c2: u32; @group(0) @binding(23) var<storage, read_write> c3: u32;
            @group(0) @binding(24) var<storage, read_write> c4: u32; @group(0) @binding(25) var<storage, read_write> c5: u32;
            @group(0) @binding(26) var<storage, read_write> c6: u32; @group(0) @binding(27) var<storage, read_write> c7: u32;
            @group(0) @binding(28) var<storage, read_write> c8: u32; @group(0) @binding(29) var<storage, read_write> c9: u32;
            @compute @workgroup_size(32) fn main() {
                a0 = a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9 + b0 + b1 + b2 + b3 + b4 + b5 + b6 + b7 + b8 + b9 + c0 + c1
                    + c2 + c3 + c4 + c5 + c6 + c7 + c8 + c9;
            }",
    },
    Rule {
        name: "every binding is used, or wgpu leaves it out and counts on",
        check: |shader| {
            let uses = shader.info.get_entry_point(0);
            let mut variables = shader.module.global_variables.iter();
            let unused = variables.find(|(handle, v)| v.binding.is_some() && uses[*handle].is_empty());
            unused.map(|(_, v)| v.name.clone().unwrap_or_default())
        },
        breaker: "@group(0) @binding(0) var<storage, read_write> a: u32; @group(0) @binding(1) var<storage, read_write> b: u32;
            @compute @workgroup_size(32) fn main() { b = 1u; }",
    },
    Rule {
        name: "no f64",
        check: |shader| scalar_type(shader, |s| s == Scalar::F64),
        breaker: "@group(0) @binding(0) var<storage, read_write> a: f64;
            @compute @workgroup_size(32) fn main() { a = a * a; }",
    },
    Rule {
        name: "no atomic but of 32-bit integers: Metal has no others in threadgroup memory, and float sums have no fixed order",
        check: |shader| {
            shader.module.types.iter().find_map(|(_, t)| match t.inner {
                TypeInner::Atomic(Scalar::U32 | Scalar::I32) => None,
                TypeInner::Atomic(scalar) => Some(format!("atomic<{}>", name(scalar))),
                _ => None,
            })
        },
        breaker: "@group(0) @binding(0) var<storage, read_write> a: atomic<u64>;
            @compute @workgroup_size(32) fn main() { atomicMax(&a, 1lu); }",
    },
    Rule {
        name: "cooperative matrices are 8x8, of f16 or f32",
        check: |shader| {
            matrices(shader).into_iter().find_map(|(columns, rows, scalar, _)| {
                let listed = columns == CooperativeSize::Eight && rows == CooperativeSize::Eight;
                let listed = listed && [Scalar::F16, Scalar::F32].contains(&scalar);
                (!listed).then(|| format!("{}x{} of {}", columns as u32, rows as u32, name(scalar)))
            })
        },
        breaker: "enable wgpu_cooperative_matrix;
            @group(0) @binding(0) var<storage, read_write> a: array<f32>;
            @compute @workgroup_size(64) fn main() { let m = coopLoadT<coop_mat16x16<f32, C>>(&a[0], 8u); coopStoreT(m, &a[0], 8u); }",
    },
    Rule {
        name: "cooperative sums are f32",
        check: |shader| {
            let sums = matrices(shader).into_iter().filter(|(.., role)| *role == CooperativeRole::C);
            sums.map(|(_, _, scalar, _)| scalar).find(|s| *s != Scalar::F32).map(name)
        },
        breaker: "enable f16; enable wgpu_cooperative_matrix;
            @group(0) @binding(0) var<storage, read_write> a: array<f16>;
            @compute @workgroup_size(64) fn main() { let m = coopLoadT<coop_mat8x8<f16, C>>(&a[0], 8u); coopStoreT(m, &a[0], 8u); }",
    },
    Rule {
        name: "a matrix lies in an array of its own element type",
        check: |shader| functions(shader).find_map(|(function, info)| wrong_place(shader, function, info)),
        breaker: "enable wgpu_cooperative_matrix;
            @group(0) @binding(0) var<storage, read_write> a: array<vec4<f32>>;
            @compute @workgroup_size(64) fn main() { let m = coopLoadT<coop_mat8x8<f32, C>>(&a[0], 8u); coopStoreT(m, &a[0], 8u); }",
    },
    Rule {
        name: "beside cooperative matrices, workgroup variables fill multiples of 16 bytes, where the next one starts",
        check: |shader| {
            let uneven = workgroup_variables(shader).into_iter().find(|size| !size.is_multiple_of(16));
            uneven.filter(|_| !matrices(shader).is_empty()).map(|size| format!("one of {size} bytes"))
        },
        breaker: "enable wgpu_cooperative_matrix;
            var<workgroup> n: u32;
            @group(0) @binding(0) var<storage, read_write> a: array<f32>;
            @compute @workgroup_size(64) fn main() { n = 0u; let m = coopLoadT<coop_mat8x8<f32, C>>(&a[0], 8u); coopStoreT(m, &a[n], 8u); }",
    },
    Rule {
        name: "storage buffers are read_write: CubeCL's tensors share memory",
        check: |shader| {
            let both = StorageAccess::LOAD | StorageAccess::STORE;
            storage(shader).find(|(_, access)| *access != both).map(|(name, _)| name)
        },
        breaker: "@group(0) @binding(0) var<storage> a: array<u32>; @group(0) @binding(1) var<storage, read_write> b: array<u32>;
            @compute @workgroup_size(32) fn main() { b[0] = a[0]; }",
    },
    Rule {
        name: "bindings are 0, 1, 2, ... of group 0, the uniform last",
        check: |shader| {
            let bindings = shader.bindings();
            let apart = bindings.iter().enumerate().find(|(i, b)| b.group != 0 || b.binding != *i as u32);
            let uniform = |v: &naga::GlobalVariable| v.space == AddressSpace::Uniform && v.binding.as_ref() != bindings.last();
            let early = shader.module.global_variables.iter().any(|(_, v)| uniform(v));
            apart.map(|(_, b)| format!("{b:?}")).or(early.then(|| "a buffer behind the uniform".into()))
        },
        breaker: "@group(0) @binding(0) var<uniform> n: u32; @group(0) @binding(1) var<storage, read_write> a: u32;
            @compute @workgroup_size(32) fn main() { a = n; }",
    },
    Rule {
        name: "f16 is stored and given to matrices; arithmetic is f32",
        check: |shader| functions(shader).find_map(|(function, info)| f16_arithmetic(shader, function, info)),
        breaker: "enable f16;
            @group(0) @binding(0) var<storage, read_write> a: array<f16>;
            @compute @workgroup_size(32) fn main() { a[0] = a[1] * a[2]; }",
    },
    Rule {
        name: "no bool in workgroup memory: MSL's has another size than WGSL's",
        check: |shader| {
            let mut variables = shader.module.global_variables.iter().filter(|(_, v)| v.space == AddressSpace::WorkGroup);
            let bool = |inner: &TypeInner| inner.scalar().is_some_and(|s| s.kind == ScalarKind::Bool);
            let types = &shader.module.types;
            let found = variables.find(|(_, v)| match types[v.ty].inner {
                TypeInner::Array { base, .. } => bool(&types[base].inner),
                ref inner => bool(inner),
            });
            found.map(|(_, v)| v.name.clone().unwrap_or_default())
        },
        breaker: "var<workgroup> a: array<bool, 32>;
            @compute @workgroup_size(32) fn main() { a[0] = a[1]; }",
    },
    Rule {
        name: "vectors that threads share are written whole: MSL may write the other components back",
        check: |shader| functions(shader).find_map(|(function, info)| written_in_part(shader, function, info)),
        breaker: "var<workgroup> a: array<vec4<f32>, 8>;
            @compute @workgroup_size(32) fn main(@builtin(local_invocation_index) i: u32) { a[i / 4u][i % 4u] = 1.0; }",
    },
];

fn threads(shader: &Shader) -> u32 {
    shader.module.entry_points[0].workgroup_size.iter().product()
}

/// Bytes of every workgroup variable that the entry point uses, its callees included.
fn workgroup_variables(shader: &Shader) -> Vec<u32> {
    let module = &shader.module;
    let uses = shader.info.get_entry_point(0);
    let used = |handle| uses[handle] != GlobalUse::empty();
    let mine = module.global_variables.iter().filter(|(handle, v)| v.space == AddressSpace::WorkGroup && used(*handle));
    mine.map(|(_, v)| module.types[v.ty].inner.size(module.to_ctx())).collect()
}

fn storage(shader: &Shader) -> impl Iterator<Item = (String, StorageAccess)> {
    shader.module.global_variables.iter().filter_map(|(_, v)| match v.space {
        AddressSpace::Storage { access } => Some((v.name.clone().unwrap_or_default(), access)),
        _ => None,
    })
}

fn scalar_type(shader: &Shader, wrong: impl Fn(Scalar) -> bool) -> Option<String> {
    shader.module.types.iter().filter_map(|(_, t)| t.inner.scalar()).find(|s| wrong(*s)).map(name)
}

/// Every cooperative matrix that is loaded or named.
fn matrices(shader: &Shader) -> Vec<(CooperativeSize, CooperativeSize, Scalar, CooperativeRole)> {
    let of = |inner: &TypeInner| match *inner {
        TypeInner::CooperativeMatrix { columns, rows, scalar, role } => Some((columns, rows, scalar, role)),
        _ => None,
    };
    let types = &shader.module.types;
    let named = types.iter().filter_map(|(_, t)| of(&t.inner));
    let made = functions(shader).flat_map(|(function, info)| {
        function.expressions.iter().filter_map(move |(handle, _)| of(info[handle].ty.inner_with(types)))
    });
    named.chain(made).collect()
}

/// The entry point and every function.
fn functions(shader: &Shader) -> impl Iterator<Item = (&Function, &FunctionInfo)> {
    let entry = (&shader.module.entry_points[0].function, shader.info.get_entry_point(0));
    let others = shader.module.functions.iter().map(|(handle, function)| (function, &shader.info[handle]));
    std::iter::once(entry).chain(others)
}

/// A load or store of a matrix through a pointer to anything but the matrix's element.
fn wrong_place(shader: &Shader, function: &Function, info: &FunctionInfo) -> Option<String> {
    let types = &shader.module.types;
    let inner = |handle: Handle<Expression>| info[handle].ty.inner_with(types);
    let differs = |pointer: Handle<Expression>, matrix: Handle<Expression>| {
        let TypeInner::CooperativeMatrix { scalar, .. } = *inner(matrix) else { return None };
        let right = match *inner(pointer) {
            TypeInner::Pointer { base, .. } => types[base].inner == TypeInner::Scalar(scalar),
            TypeInner::ValuePointer { size, scalar: at, .. } => size.is_none() && at == scalar,
            _ => false,
        };
        (!right).then(|| format!("a matrix of {} in {:?}", name(scalar), inner(pointer)))
    };
    let loaded = function.expressions.iter().find_map(|(handle, expression)| match expression {
        Expression::CooperativeLoad { data, .. } => differs(data.pointer, handle),
        _ => None,
    });
    loaded.or_else(|| {
        let mut found = None;
        visit(&function.body, &mut |statement| {
            if let Statement::CooperativeStore { target, data } = statement {
                found = found.take().or(differs(data.pointer, *target));
            }
        });
        found
    })
}

fn visit(block: &naga::Block, see: &mut impl FnMut(&Statement)) {
    for statement in block {
        see(statement);
        match statement {
            Statement::Block(inner) => visit(inner, see),
            Statement::If { accept, reject, .. } => {
                visit(accept, see);
                visit(reject, see);
            }
            Statement::Switch { cases, .. } => cases.iter().for_each(|case| visit(&case.body, see)),
            Statement::Loop { body, continuing, .. } => {
                visit(body, see);
                visit(continuing, see);
            }
            _ => {}
        }
    }
}

fn f16_arithmetic(shader: &Shader, function: &Function, info: &FunctionInfo) -> Option<String> {
    use BinaryOperator::{Add, Divide, Multiply, Subtract};
    let f16 = |handle: Handle<Expression>| {
        let inner = info[handle].ty.inner_with(&shader.module.types);
        !matches!(inner, TypeInner::CooperativeMatrix { .. }) && inner.scalar() == Some(Scalar::F16)
    };
    function.expressions.iter().find_map(|(handle, expression)| match expression {
        Expression::Binary { op: Add | Subtract | Multiply | Divide, .. } | Expression::Math { .. } if f16(handle) => {
            Some(format!("in {}", function.name.as_deref().unwrap_or("main")))
        }
        _ => None,
    })
}

/// A store to one component of a vector in workgroup memory or a buffer.
fn written_in_part(shader: &Shader, function: &Function, info: &FunctionInfo) -> Option<String> {
    let mut found = false;
    visit(&function.body, &mut |statement| {
        if let Statement::Store { pointer, .. } = statement {
            let shared = |space: AddressSpace| matches!(space, AddressSpace::WorkGroup | AddressSpace::Storage { .. });
            // To a component; a pointer to a scalar that stands alone is a `Pointer`.
            found |= match *info[*pointer].ty.inner_with(&shader.module.types) {
                TypeInner::ValuePointer { size: None, space, .. } => shared(space),
                _ => false,
            };
        }
    });
    found.then(|| format!("in {}", function.name.as_deref().unwrap_or("main")))
}

fn name(scalar: Scalar) -> String {
    format!("{:?} of {} bits", scalar.kind, 8 * scalar.width)
}

/// Every rule's breaker breaks that rule and no other: no rule is asleep, and none cries for another's fault.
#[test]
fn every_limit_has_a_kernel_that_breaks_it() {
    for rule in RULES {
        let kernel = gpt_wgpu::kernel::Kernel::new("breaker", String::new(), Vec::new(), (1, 1, 1));
        let shader = Shader::new(&kernel, rule.breaker.into()).unwrap_or_else(|e| panic!("{}: {e}", rule.name));
        let names: Vec<_> = broken(&shader).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, [rule.name]);
    }
}

#[test]
fn every_kernel_keeps_apples_limits_and_the_rules_of_the_house() {
    let shaders = crate::shaders();
    let broken: Vec<_> = shaders
        .values()
        .flat_map(|shader| broken(shader).into_iter().map(|(rule, how)| format!("{}: {rule}: {how}", shader.label)))
        .collect();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    eprintln!("{} kernels keep {} rules", shaders.len(), RULES.len());
}
