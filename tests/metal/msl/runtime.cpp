// Runs a kernel's threadgroups one after another on one CPU thread. Each thread of a group is a fibre; a barrier, or a
// function of the simdgroup, switches to the next thread that can run. In which order is the schedule.
//
//     program KERNEL CASE RESULTS
//
// CASE (32-bit words): grid x y z; threads x y z; how many buffers; their sizes in bytes; their contents, each padded to
// whole words. Buffer i is [[buffer(i)]]. RESULTS: the buffers' contents after each of the schedules, one after another,
// padded likewise. Exit status 77: a fault, told on stderr.
#include "runtime.h"
#include "checker.h"

#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <random>
#include <vector>

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#if !defined(__x86_64__)
#error "switch_stack is written for x86-64"
#endif

// Saves the registers that a call preserves and the stack pointer to *from, and goes on with the stack `to`.
extern "C" void switch_stack(void** from, void* to);
asm(R"(
.text
.globl switch_stack
switch_stack:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

namespace msl {

namespace {

constexpr size_t STACK_BYTES = 256 << 10;
const char* const SCHEDULES[] = {"ascending", "descending", "random 1", "random 2"};

enum class State { ready, at_barrier, at_simdgroup, done };

struct Fibre {
    void* stack_pointer;
    char* stack;
    State state;
    const void* site;    // of the call that it waits in
    const void* request; // of that call
    unsigned exchanges;
};

enum class Function { barrier, exchange, load, store, multiply_add };

// What a lane asks for while it waits for the others.
struct Request {
    Function function;
    Matrix matrices[4] = {};
    const void* memory = nullptr;
    long stride = 0;
    bool transposed = false;
};

std::vector<const Kernel*>& kernels() {
    static std::vector<const Kernel*> all;
    return all;
}

const Kernel* kernel;
std::vector<void*> memories;
std::vector<Fibre> fibres;
std::vector<unsigned> order;      // threads, as the schedule takes them
std::vector<unsigned> place_of;   // of a thread in `order`
std::mt19937 generator;
bool shuffled;
unsigned current, waiting, done;
unsigned arrived[32]; // lanes of each simdgroup that wait for the others
void* main_stack;
Place place;
int schedule;
// Values that lanes exchange, in two sets in turn: nobody starts on a set before all have read its last content.
alignas(16) char exchanged[32][2][LANES][16];

unsigned simdgroup_of(unsigned thread) { return thread / LANES; }
unsigned first_lane(unsigned simdgroup) { return simdgroup * LANES; }
unsigned lanes_of(unsigned simdgroup) { return std::min<unsigned>(LANES, fibres.size() - first_lane(simdgroup)); }

// Gives the processor to the next thread that can run, from place `from` of the order on.
void switch_from(unsigned from) {
    unsigned count = order.size(), next = count;
    for (unsigned i = 0; i < count && next == count; i++) {
        unsigned thread = order[(from + i) % count];
        if (fibres[thread].state == State::ready) next = thread;
    }
    if (next == count) {
        if (done != count) {
            unsigned lanes = 0;
            for (const Fibre& f : fibres) lanes += f.state == State::at_simdgroup;
            fault("threads part: of %u, %u wait at a threadgroup barrier, %u in a simdgroup function, %u have returned", count,
                  waiting, lanes, done);
        }
        void* unused;
        switch_stack(&unused, main_stack);
    }
    if (next == current) return;
    void** save = &fibres[current].stack_pointer;
    current = next;
    switch_stack(save, fibres[next].stack_pointer);
}

// The first thing on every fibre's stack.
void start() {
    Place p = place;
    p.index = current;
    p.local = {current % p.size.x, current / p.size.x % p.size.y, current / (p.size.x * p.size.y)};
    kernel->run(memories.data(), p);
    fibres[current].state = State::done;
    done++;
    switch_from(place_of[current] + 1);
}

float element(const Matrix& of, unsigned index) {
    return of.element == Element::f16 ? (float)((const _Float16*)of.held)[index] : ((const float*)of.held)[index];
}

void set(const Matrix& of, unsigned index, float value) {
    if (of.element == Element::f16) {
        ((_Float16*)of.held)[index] = (_Float16)value;
    } else {
        ((float*)of.held)[index] = value;
    }
}

const Request& request_of(unsigned thread) { return *(const Request*)fibres[thread].request; }

// All lanes have come: moves 8x8 elements between their matrices and memory.
void move(unsigned simdgroup, bool store) {
    unsigned first = first_lane(simdgroup);
    const Request& asked = request_of(first);
    size_t bytes = asked.matrices[0].element == Element::f16 ? 2 : 4;
    begin_together(simdgroup);
    for (unsigned i = 0; i < 64; i++) {
        long row = i / 8, column = i % 8;
        long index = asked.transposed ? column * asked.stride + row : row * asked.stride + column;
        char* at = (char*)asked.memory + index * (long)bytes;
        access_together(at, bytes, store);
        char* held = (char*)request_of(first + i / 2).matrices[0].held + i % 2 * bytes;
        memcpy(store ? at : held, store ? held : at, bytes);
    }
}

void multiply_add(unsigned simdgroup) {
    unsigned first = first_lane(simdgroup);
    float operands[3][64];
    for (unsigned which = 0; which < 3; which++) {
        for (unsigned i = 0; i < 64; i++) operands[which][i] = element(request_of(first + i / 2).matrices[1 + which], i % 2);
    }
    auto& [a, b, sum] = operands;
    for (unsigned row = 0; row < 8; row++) {
        for (unsigned k = 0; k < 8; k++) {
            for (unsigned column = 0; column < 8; column++) sum[8 * row + column] += a[8 * row + k] * b[8 * k + column];
        }
    }
    for (unsigned i = 0; i < 64; i++) set(request_of(first + i / 2).matrices[0], i % 2, sum[i]);
}

// Waits until every lane of the simdgroup has asked for the same; the last to come does it for all.
void together(const Request& request, const void* site) {
    unsigned me = current, group = simdgroup_of(me), first = first_lane(group), count = lanes_of(group);
    fibres[me].site = site;
    fibres[me].request = &request;
    fibres[me].state = State::at_simdgroup;
    if (++arrived[group] < count) return switch_from(place_of[me] + 1);
    arrived[group] = 0;
    const Request& asked = request_of(first);
    for (unsigned i = first; i < first + count; i++) {
        const Request& other = request_of(i);
        if (fibres[i].site != fibres[first].site || other.function != asked.function) {
            fault("lanes part: threads %u and %u are in different simdgroup functions", first, i);
        }
        if (other.memory != asked.memory || other.stride != asked.stride || other.transposed != asked.transposed) {
            fault("lanes part: threads %u and %u ask for a matrix at different places", first, i);
        }
    }
    bool matrix = asked.function == Function::load || asked.function == Function::store;
    if ((matrix || asked.function == Function::multiply_add) && count != LANES) fault("a matrix in a simdgroup of %u lanes", count);
    if (matrix) move(group, asked.function == Function::store);
    if (asked.function == Function::multiply_add) multiply_add(group);
    if (asked.function == Function::barrier) pass_simdgroup_barrier(group);
    for (unsigned i = first; i < first + count; i++) fibres[i].state = State::ready;
    switch_from(place_of[order[0]]);
}

void run_group() {
    unsigned count = kernel->threads;
    begin_group();
    waiting = done = 0;
    std::fill(std::begin(arrived), std::end(arrived), 0);
    for (unsigned i = 0; i < kernel->memory_count; i++) {
        if (kernel->memories[i].buffer < 0) memset(memories[i], 0xff, kernel->memories[i].bytes); // NaN
    }
    for (Fibre& f : fibres) {
        f.state = State::ready;
        f.exchanges = 0;
        void** top = (void**)(f.stack + STACK_BYTES - 64);
        *--top = nullptr;
        *--top = (void*)start;
        for (int registers = 0; registers < 6; registers++) *--top = nullptr;
        f.stack_pointer = top;
    }
    if (shuffled) std::shuffle(order.begin(), order.end(), generator);
    for (unsigned i = 0; i < count; i++) place_of[order[i]] = i;
    current = order[0];
    switch_stack(&main_stack, fibres[current].stack_pointer);
}

void crash(int signal, siginfo_t* info, void*) {
    if (signal == SIGXCPU) fault("does not come to an end");
    if (signal == SIGFPE) fault("an integer division by zero, thread %u", current);
    char where[128];
    describe(info->si_addr, where, sizeof where);
    fault("thread %u reaches for %s", current, where);
}

std::vector<uint32_t> read(const char* path) {
    FILE* file = fopen(path, "rb");
    if (!file) fault("cannot read %s", path);
    std::vector<uint32_t> words;
    uint32_t buffer[4096];
    while (size_t count = fread(buffer, 4, 4096, file)) words.insert(words.end(), buffer, buffer + count);
    fclose(file);
    return words;
}

} // namespace

int add_kernel(const Kernel* one) {
    kernels().push_back(one);
    return 0;
}

unsigned current_thread() { return current; }

void fault(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    Place p = place;
    fprintf(stderr, "%s order, group (%u, %u, %u): ", SCHEDULES[schedule], p.group.x, p.group.y, p.group.z);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    _exit(77);
}

unsigned lane() { return current % LANES; }
unsigned lane_count() { return lanes_of(simdgroup_of(current)); }

void threadgroup_barrier(int memory) {
    unsigned me = current, count = fibres.size();
    fibres[me].site = __builtin_return_address(0);
    fibres[me].state = State::at_barrier;
    if (++waiting < count) return switch_from(place_of[me] + 1);
    for (const Fibre& f : fibres) {
        if (f.site != fibres[0].site) fault("threads part: they wait at different threadgroup barriers");
    }
    pass_threadgroup_barrier(memory);
    waiting = 0;
    for (Fibre& f : fibres) f.state = State::ready;
    if (shuffled) {
        std::shuffle(order.begin(), order.end(), generator);
        for (unsigned i = 0; i < count; i++) place_of[order[i]] = i;
    }
    switch_from(0);
}

void simdgroup_barrier(int) {
    together({.function = Function::barrier}, __builtin_return_address(0));
}

const void* exchange(const void* value, unsigned bytes) {
    unsigned me = current;
    auto& set = exchanged[simdgroup_of(me)][fibres[me].exchanges++ % 2];
    memcpy(set[me % LANES], value, bytes);
    together({.function = Function::exchange}, __builtin_return_address(0));
    return set;
}

void matrix_load(Matrix to, const void* from, long stride, bool transposed) {
    together({.function = Function::load, .matrices = {to}, .memory = from, .stride = stride, .transposed = transposed},
             __builtin_return_address(0));
}

void matrix_store(Matrix from, void* to, long stride, bool transposed) {
    together({.function = Function::store, .matrices = {from}, .memory = to, .stride = stride, .transposed = transposed},
             __builtin_return_address(0));
}

void matrix_multiply_add(Matrix d, Matrix a, Matrix b, Matrix c) {
    together({.function = Function::multiply_add, .matrices = {d, a, b, c}}, __builtin_return_address(0));
}

} // namespace msl

using namespace msl;

int main(int count, char** arguments) {
    if (count != 4) fault("wants KERNEL CASE RESULTS");
    for (const Kernel* one : kernels()) {
        if (!strcmp(one->name, arguments[1])) kernel = one;
    }
    if (!kernel) fault("no kernel %s", arguments[1]);
#ifdef FLUSH_DENORMALS // as Apple's GPUs do under fast math
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);
#endif
    static char signal_stack[64 << 10];
    stack_t alternative = {};
    alternative.ss_sp = signal_stack;
    alternative.ss_size = sizeof signal_stack;
    sigaltstack(&alternative, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = crash;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGXCPU}) sigaction(signal, &action, nullptr);
    rlimit limit = {60, 70}; // seconds of this process alone, hundreds of times what a case takes
    setrlimit(RLIMIT_CPU, &limit);

    std::vector<uint32_t> words = read(arguments[2]);
    const uint32_t* next = words.data();
    Vec3 groups = {next[0], next[1], next[2]}, size = {next[3], next[4], next[5]};
    unsigned buffer_count = next[6];
    const uint32_t* sizes = next + 7;
    next = sizes + buffer_count;
    if (size.x * size.y * size.z != kernel->threads) fault("a launch of other threads than the kernel states");

    std::vector<void*> buffers(buffer_count);
    for (unsigned m = 0; m < kernel->memory_count; m++) {
        const Memory& memory = kernel->memories[m];
        bool own = memory.buffer < 0;
        if (!own && memory.buffer >= (int)buffer_count) fault("no buffer %d", memory.buffer);
        unsigned bytes = own ? memory.bytes : sizes[memory.buffer];
        void* at = add_memory(memory.name, bytes, memory.element, memory.scalar, own ? THREADGROUP : DEVICE);
        memories.push_back(at);
        if (!own) buffers[memory.buffer] = at;
    }
    for (void* at : buffers) {
        if (!at) fault("a buffer that the kernel does not use");
    }
    fibres.resize(kernel->threads);
    for (Fibre& f : fibres) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        f.stack = (char*)mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (f.stack == MAP_FAILED || mprotect(f.stack, 4096, PROT_NONE)) fault("no memory for a stack");
    }
    order.resize(kernel->threads);
    place_of.resize(kernel->threads);

    FILE* results = fopen(arguments[3], "wb");
    if (!results) fault("cannot write %s", arguments[3]);
    for (schedule = 0; schedule < 4; schedule++) {
        begin_launch();
        const uint32_t* content = next;
        for (unsigned i = 0; i < buffer_count; i++) {
            memcpy(buffers[i], content, sizes[i]);
            content += (sizes[i] + 3) / 4;
        }
        shuffled = schedule >= 2;
        generator.seed(schedule);
        for (unsigned i = 0; i < order.size(); i++) order[i] = schedule == 1 ? order.size() - 1 - i : i;
        for (unsigned z = 0; z < groups.z; z++) {
            for (unsigned y = 0; y < groups.y; y++) {
                for (unsigned x = 0; x < groups.x; x++) {
                    place = {{x, y, z}, groups, {}, size, 0};
                    run_group();
                }
            }
        }
        for (unsigned i = 0; i < buffer_count; i++) {
            fwrite(buffers[i], 1, sizes[i], results);
            fwrite("\0\0\0", 1, (4 - sizes[i] % 4) % 4, results);
        }
    }
    return fclose(results) ? 1 : 0;
}
