// Runs the device code of csrc/weight_sync.cu on a CPU, one thread of one block after the other.
// SOURCE is that file up to its C interface, with chunks of EMULATED_CHUNK elements.

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include <cuda_runtime.h>

#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, gridDim;
static int64_t wide_accesses;
using std::min;

template <typename T>
static void expect_alignment(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) std::abort();
  ++wide_accesses;
}
template <typename T>
static T __ldcs(const T* from) {
  expect_alignment(from);
  return *from;
}
template <typename T>
static void __stcs(T* to, T value) {
  expect_alignment(to);
  *to = value;
}

#include SOURCE

extern "C" int64_t emulate(const void* table, int segments, int64_t chunks, int src_dtype,
                           int dst_dtype, int blocks) {
  wide_accesses = 0;
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x)
      kKernels[src_dtype][dst_dtype](static_cast<const Segment*>(table), segments, chunks);
  return wide_accesses;
}
