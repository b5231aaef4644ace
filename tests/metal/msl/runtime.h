// What the stand-in metal_stdlib asks of the runtime (runtime.cpp), and how a kernel makes itself known to it.
//
// No standard headers: this file and metal_stdlib are compiled once for every kernel and build.
#pragma once

namespace msl {

constexpr unsigned LANES = 32; // of a simdgroup, on every Apple GPU

struct Vec3 {
    unsigned x, y, z;
};

// Where one thread of a dispatch is.
struct Place {
    Vec3 group;  // threadgroup_position_in_grid
    Vec3 groups; // threadgroups_per_grid
    Vec3 local;  // thread_position_in_threadgroup
    Vec3 size;   // threads_per_threadgroup
    unsigned index; // thread_index_in_threadgroup
};

// One buffer or threadgroup variable of a kernel.
struct Memory {
    const char* name;
    int buffer;     // the index in [[buffer(n)]]; -1: threadgroup memory
    unsigned bytes; // of threadgroup memory
    unsigned element, scalar; // bytes of the array's element, and of the smallest thing in it
};

// A kernel: `run` calls it for one thread; memories[i] lies at at[i].
struct Kernel {
    const char* name;
    unsigned threads;
    const Memory* memories;
    unsigned memory_count;
    void (*run)(void* const* at, const Place& place);
};

int add_kernel(const Kernel* kernel);

// All of these switch to other threads before they return. `convergent`: a compiler may not move a call under a branch,
// so that the place of the call stands for the place in the text.
#define MSL_CONVERGENT __attribute__((convergent))

constexpr int DEVICE = 1, THREADGROUP = 2; // bits of the memory that a barrier orders

MSL_CONVERGENT void threadgroup_barrier(int memory);
MSL_CONVERGENT void simdgroup_barrier(int memory);

// Gives `value` (at most 16 bytes) to the lanes of the simdgroup; returns all lanes' values, 16 bytes apart.
MSL_CONVERGENT const void* exchange(const void* value, unsigned bytes);
unsigned lane();
unsigned lane_count();

enum class Element { f16, f32 };

// What the lanes hold of a simdgroup_matrix, two elements each: lane l has elements 2l and 2l+1 of the rows one after the
// other. Which they are on a GPU is not documented, so no kernel may depend on it.
struct Matrix {
    void* held;
    Element element;
};

MSL_CONVERGENT void matrix_load(Matrix to, const void* from, long stride, bool transposed);
MSL_CONVERGENT void matrix_store(Matrix from, void* to, long stride, bool transposed);
MSL_CONVERGENT void matrix_multiply_add(Matrix d, Matrix a, Matrix b, Matrix c);

// Atomics are looked at for bounds alone: WGSL lets no plain access touch them.
void atomic_access(const void* at, unsigned bytes);

} // namespace msl
