// Copies every weight of a model from the learner's layout to the engine's in one launch.
//
// A segment is a matrix (rows, cols) with unit stride inside a row. It is cut into chunks of at most
// kChunk elements: whole rows where a row fits, pieces of one row where it does not. Blocks stay
// resident and take chunks in turn; a chunk's segment is found by binary search on the running sum
// of chunks. Memory traffic: each source element read once, each destination element written once.
//
// Plain C interface: pointers and a stream in, an error code out. No torch, no C++ ABI.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

constexpr int kThreads = 384;
constexpr int kBlocksPerSM = 2;
constexpr int kVector = 8;     // elements of one 16-byte access at 16 bits each
constexpr int kInFlight = 64;  // bytes a thread has asked for before it stores any
constexpr int64_t kChunk = 16 * kVector * kThreads;

enum Dtype { kFloat32, kBFloat16, kFloat16, kDtypes };

struct Segment {
  const void* src;
  void* dst;
  int64_t rows, cols;
  int64_t src_ld, dst_ld;  // elements from one row to the next
  int64_t first_chunk;     // chunks of all segments before this one
};

struct Chunk {
  int64_t row, col;  // of its first element
  int rows, cols;
};

// kVector elements as they lie in memory; taken apart only while they are converted, since a
// register holds two of 16 bits.
template <typename T>
struct Vector {
  uint4 part[kVector * sizeof(T) / 16];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < sizeof(part) / 16; ++i)
      part[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < sizeof(part) / 16; ++i)
      __stcs(reinterpret_cast<uint4*>(to) + i, part[i]);
  }
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }

template <typename S, typename D>
__device__ __forceinline__ void convert(S from, D& to) {
  if constexpr (std::is_same_v<S, D>) {
    to = from;  // the bits as they are: a NaN keeps its payload
  } else {
    narrow(widen(from), to);
  }
}

template <typename S, typename D>
__device__ __forceinline__ void convert(const Vector<S>& from, Vector<D>& to) {
  if constexpr (std::is_same_v<S, D>) {
    to = from;
  } else {
    S in[kVector];
    D out[kVector];
    memcpy(in, &from, sizeof(in));
#pragma unroll
    for (int i = 0; i < kVector; ++i) convert(in[i], out[i]);
    memcpy(&to, out, sizeof(out));
  }
}

__device__ __forceinline__ bool aligned(const void* a, const void* b) {
  return ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) & 15) == 0;
}

// Elements before the narrower of the two pointers reaches a multiple of 16 bytes.
template <typename S, typename D>
__device__ __forceinline__ int elements_before_alignment(const S* src, const D* dst) {
  const auto address =
      sizeof(D) <= sizeof(S) ? reinterpret_cast<uintptr_t>(dst) : reinterpret_cast<uintptr_t>(src);
  constexpr int kSize = sizeof(D) <= sizeof(S) ? sizeof(D) : sizeof(S);
  return static_cast<int>((16 - (address & 15)) & 15) / kSize;
}

template <typename S, typename D>
__device__ __forceinline__ void copy_vectors(const S* src, D* dst, const Segment& s, int per_row,
                                             int rows) {
  constexpr int kUnroll = kInFlight / static_cast<int>(sizeof(Vector<S>));
  const int count = per_row * rows;
  for (int first = threadIdx.x; first < count; first += kThreads * kUnroll) {
    Vector<S> held[kUnroll];
    int64_t place[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = first + u * kThreads;
      if (v >= count) continue;
      const int row = rows == 1 ? 0 : v / per_row;
      const int col = (v - row * per_row) * kVector;
      held[u].load(src + row * s.src_ld + col);
      place[u] = row * s.dst_ld + col;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kThreads >= count) continue;
      Vector<D> out;
      convert(held[u], out);
      out.store(dst + place[u]);
    }
  }
}

__device__ __forceinline__ Chunk chunk_of(const Segment& s, int64_t index) {
  if (s.cols <= kChunk) {
    const int64_t height = kChunk / s.cols, row = index * height;
    return {row, 0, static_cast<int>(min(height, s.rows - row)), static_cast<int>(s.cols)};
  }
  const int64_t pieces = (s.cols + kChunk - 1) / kChunk, row = index / pieces;
  const int64_t col = (index - row * pieces) * kChunk;
  return {row, col, 1, static_cast<int>(min(kChunk, s.cols - col))};
}

template <typename S, typename D>
__device__ __forceinline__ void copy(const Segment& s, const Chunk& c) {
  const S* src = static_cast<const S*>(s.src) + c.row * s.src_ld + c.col;
  D* dst = static_cast<D*>(s.dst) + c.row * s.dst_ld + c.col;
  const bool one = c.rows == 1;
  const int head = one ? min(elements_before_alignment(src, dst), c.cols) : 0;
  const bool even = one || (c.cols % kVector == 0 && s.src_ld * sizeof(S) % 16 == 0 &&
                            s.dst_ld * sizeof(D) % 16 == 0);
  const int per_row = even && aligned(src + head, dst + head) ? (c.cols - head) / kVector : 0;
  copy_vectors(src + head, dst + head, s, per_row, c.rows);
  const int wide = per_row * kVector, rest = c.cols - wide;
  for (int i = threadIdx.x; i < rest * c.rows; i += kThreads) {
    const int row = i / rest, k = i - row * rest, col = k < head ? k : k + wide;
    convert(src[row * s.src_ld + col], dst[row * s.dst_ld + col]);
  }
}

// The last segment whose first chunk is not above `index`; segments are never empty.
__device__ __forceinline__ int segment_of(const Segment* table, int segments, int64_t index) {
  int low = 0, high = segments - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table[middle].first_chunk <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <typename S, typename D>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    weight_sync_kernel(const Segment* __restrict__ table, int segments, int64_t chunks) {
  for (int64_t index = blockIdx.x; index < chunks; index += gridDim.x) {
    const Segment s = table[segment_of(table, segments, index)];
    copy<S, D>(s, chunk_of(s, index - s.first_chunk));
  }
}

using Kernel = void (*)(const Segment*, int, int64_t);

template <typename S>
constexpr Kernel kFrom[kDtypes] = {weight_sync_kernel<S, float>,
                                   weight_sync_kernel<S, __nv_bfloat16>,
                                   weight_sync_kernel<S, __half>};
constexpr const Kernel* kKernels[kDtypes] = {kFrom<float>, kFrom<__nv_bfloat16>, kFrom<__half>};

}  // namespace

extern "C" {

// Copies `segments` segments of `table` (device memory), `chunks` chunks in all, on `stream` of the
// current device; dtypes are those of Dtype. Returns 0, or an error code of the CUDA runtime.
int polymath_weight_sync(const void* table, int segments, int64_t chunks, int src_dtype,
                         int dst_dtype, void* stream) {
  if (segments <= 0 || chunks <= 0) return cudaSuccess;
  if (src_dtype < 0 || src_dtype >= kDtypes || dst_dtype < 0 || dst_dtype >= kDtypes)
    return cudaErrorInvalidValue;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t resident = static_cast<int64_t>(multiprocessors) * kBlocksPerSM;
  const int blocks = static_cast<int>(chunks < resident ? chunks : resident);
  kKernels[src_dtype][dst_dtype]<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const Segment*>(table), segments, chunks);
  return cudaGetLastError();
}

const char* polymath_error_string(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// What Python and this file must agree on: the chunk, the size of a segment, and where its fields
// start. Writes at most `count` numbers; returns how many there are.
int polymath_weight_sync_layout(int64_t* out, int count) {
  const int64_t layout[] = {kChunk,
                            sizeof(Segment),
                            offsetof(Segment, src),
                            offsetof(Segment, dst),
                            offsetof(Segment, rows),
                            offsetof(Segment, cols),
                            offsetof(Segment, src_ld),
                            offsetof(Segment, dst_ld),
                            offsetof(Segment, first_chunk)};
  const int size = sizeof(layout) / sizeof(layout[0]);
  for (int i = 0; i < size && i < count; ++i) out[i] = layout[i];
  return size;
}

}  // extern "C"
