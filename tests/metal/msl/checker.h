// Who touched which scalar, and whether a barrier lies between two that do not bear each other (checker.cpp).
#pragma once
#include <cstddef>

namespace msl {

// Tells where and what on stderr, and ends the program.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fault(const char* format, ...);

unsigned current_thread();

// A piece of memory of exactly `bytes`, with unknown content. `element` and `scalar` are the bytes of its array's element,
// for messages, and of the smallest thing in it; `kind` is DEVICE or THREADGROUP.
void* add_memory(const char* name, unsigned bytes, unsigned element, unsigned scalar, int kind);

void begin_launch();
void begin_group();
void pass_threadgroup_barrier(int memory);
void pass_simdgroup_barrier(unsigned simdgroup);

// One load or store of a matrix: which lane touches which element is not known, so the accesses between are the
// simdgroup's as a whole, and no lane's own.
void begin_together(unsigned simdgroup);
void access_together(const void* at, size_t bytes, bool write);

// Where `at` is, for people.
void describe(const void* at, char* text, size_t size);

} // namespace msl
