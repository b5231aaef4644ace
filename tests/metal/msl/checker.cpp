// Bounds and races, exactly. A kernel compiled with -fsanitize=thread,array-bounds calls the functions at the end before
// every access; they stand here in place of the sanitizers' own libraries, which know neither fibres nor simdgroups and
// may forget an access. Every scalar of device and threadgroup memory has a record of its last writer and readers. Two
// accesses of one scalar, of which one writes, are ordered only by a barrier that names that memory, and never between
// threadgroups.
#include "checker.h"
#include "runtime.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include <sys/mman.h>

namespace msl {

namespace {

// Every piece of memory has a window of its own; behind them is nothing for as far as a 32-bit index can reach.
constexpr size_t WINDOW = 64 << 20, WINDOWS = 64, START = 4096 + 16; // 16: no more alignment than Metal promises
constexpr size_t REACH = size_t(16) << 32;
constexpr uint32_t SIMDGROUPS = 32; // of a threadgroup, at most

// When something touched memory, and who.
struct Moment {
    uint32_t epoch = 0;  // barriers and groups begun so far; 0: never
    uint32_t actor = 0;
    uint32_t simd = 0;   // barriers of the simdgroup so far, and which simdgroup
};

uint32_t simdgroup_of(const Moment& moment) { return moment.simd % SIMDGROUPS; }

struct Record {
    Moment write, read; // the last ones
    // Whether `read` stands for several, since the last barrier or ever
    bool actors = false, simdgroups = false, groups = false;
};

struct Region {
    const char* name;
    char* start;
    unsigned bytes, element, scalar;
    int kind;
    std::vector<Record> records; // of every scalar
};

char* arena;
std::vector<Region> regions;
uint32_t epochs[3], group_began[3], simd_epochs[SIMDGROUPS];
// Actors: threads by their number, matrix functions by a number each.
constexpr uint32_t FIRST_TOGETHER = 1 << 16;
uint32_t together_actor = FIRST_TOGETHER, together_simdgroup;

Region* region_of(const void* at) {
    size_t offset = (const char*)at - arena;
    return offset / WINDOW < regions.size() ? &regions[offset / WINDOW] : nullptr;
}

bool in_arena(const void* at) { return at >= arena && (const char*)at < arena + WINDOW * WINDOWS + REACH; }

// Whether `then` was in the group that runs now.
bool in_this_group(const Moment& then, const Region& region) { return then.epoch >= group_began[region.kind]; }

// Whether `then` still matters: threadgroup memory is another's in every group.
bool exists(const Moment& then, const Region& region) {
    return region.kind == DEVICE ? then.epoch != 0 : in_this_group(then, region);
}

// Whether a barrier lies between, or both are of one thread.
bool ordered(const Moment& then, const Moment& now, const Region& region) {
    if (then.epoch != now.epoch) return in_this_group(then, region);
    if (simdgroup_of(then) != simdgroup_of(now)) return false;
    return then.simd != now.simd || then.actor == now.actor;
}

void name_actor(const Moment& moment, char* text, size_t size) {
    if (moment.actor < FIRST_TOGETHER) {
        snprintf(text, size, "thread %u", moment.actor);
    } else {
        snprintf(text, size, "a matrix of simdgroup %u", simdgroup_of(moment));
    }
}

// `several`: `then` is only the last of them.
[[noreturn]] void race(const Region& region, size_t scalar, const Moment& now, bool writes, const Moment& then, bool wrote,
                       bool several = false) {
    char one[64], other[64] = "several threads";
    name_actor(now, one, sizeof one);
    if (!several) name_actor(then, other, sizeof other);
    fault("race: %s %s %s[%zu], which %s %s%s with no barrier between", one, writes ? "writes" : "reads", region.name,
          scalar * region.scalar / region.element, other, wrote ? "wrote" : "read",
          in_this_group(then, region) ? "" : " in another group");
}

void note_read(Record& record, const Moment& now, const Region& region) {
    const Moment& then = record.read;
    if (!exists(then, region)) {
        record.actors = record.simdgroups = record.groups = false;
    } else if (then.epoch != now.epoch) {
        record.groups |= !in_this_group(then, region);
        record.actors = record.simdgroups = false;
    } else if (simdgroup_of(then) != simdgroup_of(now)) {
        record.simdgroups = true;
    } else if (then.simd != now.simd) {
        record.actors = false;
    } else {
        record.actors |= then.actor != now.actor;
    }
    record.read = now;
}

void touch(Region& region, size_t scalar, const Moment& now, bool writes) {
    Record& record = region.records[scalar];
    const Moment &write = record.write, &read = record.read;
    if (exists(write, region) && !ordered(write, now, region)) race(region, scalar, now, writes, write, true);
    if (!writes) return note_read(record, now, region);
    bool several = record.groups ||
                   (read.epoch == now.epoch && (record.simdgroups || (record.actors && read.simd == now.simd)));
    if (exists(read, region) && (several || !ordered(read, now, region))) race(region, scalar, now, true, read, false, several);
    record.write = now;
}

void access(const void* at, size_t bytes, bool writes, uint32_t actor, uint32_t simdgroup) {
    Region* region = region_of(at);
    size_t offset = region ? (const char*)at - region->start : 0; // wraps around before the start
    if (!region || offset >= region->bytes || region->bytes - offset < bytes) {
        char where[128];
        describe(at, where, sizeof where);
        fault("out of bounds: thread %u %s %s", current_thread(), writes ? "writes" : "reads", where);
    }
    Moment now = {epochs[region->kind], actor, simd_epochs[simdgroup] * SIMDGROUPS + simdgroup};
    size_t end = (offset + bytes - 1) / region->scalar;
    for (size_t scalar = offset / region->scalar; scalar <= end; scalar++) touch(*region, scalar, now, writes);
}

void hook(const void* at, size_t bytes, bool writes) {
    if (in_arena(at)) access(at, bytes, writes, current_thread(), current_thread() / LANES);
}

} // namespace

void* add_memory(const char* name, unsigned bytes, unsigned element, unsigned scalar, int kind) {
    if (!arena) {
        size_t size = WINDOW * WINDOWS + REACH;
        arena = (char*)mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (arena == MAP_FAILED) fault("no address space");
    }
    if (bytes > WINDOW - 2 * START || regions.size() == WINDOWS) fault("%s is too large", name);
    char* window = arena + WINDOW * regions.size();
    size_t pages = (START + bytes + 4095) / 4096 * 4096 - 4096;
    if (pages && mprotect(window + 4096, pages, PROT_READ | PROT_WRITE)) fault("no memory for %s", name);
    size_t scalars = (bytes + scalar - 1) / scalar;
    regions.push_back({name, window + START, bytes, element, scalar, kind, std::vector<Record>(scalars)});
    return window + START;
}

void begin_launch() {
    for (Region& region : regions) std::fill(region.records.begin(), region.records.end(), Record());
}

void begin_group() {
    for (int kind : {DEVICE, THREADGROUP}) group_began[kind] = ++epochs[kind];
}

void pass_threadgroup_barrier(int memory) {
    for (int kind : {DEVICE, THREADGROUP}) epochs[kind] += (memory & kind) != 0;
}

void pass_simdgroup_barrier(unsigned simdgroup) { simd_epochs[simdgroup]++; }

void begin_together(unsigned simdgroup) {
    together_actor++;
    together_simdgroup = simdgroup;
}

void access_together(const void* at, size_t bytes, bool write) { access(at, bytes, write, together_actor, together_simdgroup); }

void atomic_access(const void* at, unsigned bytes) {
    Region* region = region_of(at);
    if (!region || size_t((const char*)at - region->start) + bytes > region->bytes) hook(at, bytes, true);
}

void describe(const void* at, char* text, size_t size) {
    Region* region = region_of(at);
    if (!region) {
        snprintf(text, size, in_arena(at) ? "far behind its memory" : "memory that is not the kernel's");
        return;
    }
    long byte = (const char*)at - region->start;
    snprintf(text, size, "%s[%ld], which has %u elements", region->name, byte / (long)region->element,
             region->bytes / region->element);
}

} // namespace msl

// What -fsanitize=thread calls. Accesses to a thread's own stack come here too and are none of ours.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define MSL_HOOKS(BYTES)                                                                        \
    void __tsan_read##BYTES(void* at) { msl::hook(at, BYTES, false); }                          \
    void __tsan_write##BYTES(void* at) { msl::hook(at, BYTES, true); }                          \
    void __tsan_unaligned_read##BYTES(void* at) { msl::hook(at, BYTES, false); }                \
    void __tsan_unaligned_write##BYTES(void* at) { msl::hook(at, BYTES, true); }
MSL_HOOKS(1)
MSL_HOOKS(2)
MSL_HOOKS(4)
MSL_HOOKS(8)
MSL_HOOKS(16)
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
    msl::hook(from, bytes, false);
    msl::hook(to, bytes, true);
    return __builtin_memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
    msl::hook(from, bytes, false);
    msl::hook(to, bytes, true);
    return __builtin_memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
    msl::hook(to, bytes, true);
    return __builtin_memset(to, value, bytes);
}

// What -fsanitize=array-bounds calls: an index into an array of known size, such as a thread's own. naga calls a buffer of
// unknown length an array of one by a name of its own, `type_7`; those pass the hooks above.
struct TypeName {
    uint16_t kind, info;
    char name[1];
};
struct OutOfBounds {
    const char* file;
    uint32_t line, column;
    const TypeName* array;
    const TypeName* index;
};
void __ubsan_handle_out_of_bounds(OutOfBounds* what, uintptr_t index) {
    const char* end = strchr(what->array->name + 1, '\'');
    if (end && end[-1] != ']') return;
    msl::fault("out of bounds: thread %u takes element %zu of %s, line %u of the MSL", msl::current_thread(), size_t(index),
               what->array->name, what->line);
}
}
