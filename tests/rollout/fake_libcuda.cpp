// A driver without a GPU, compiled against CUDA's own header: what Python passes must fit these
// prototypes, or the test that reads it back fails.

#include <cuda.h>

#include <cstdio>
#include <cstring>
#include <string>

static std::string calls;

template <typename... Args>
static CUresult note(const char* format, Args... args) {
  char line[256];
  std::snprintf(line, sizeof(line), format, args...);
  calls += line;
  return CUDA_SUCCESS;
}

extern "C" {

const char* fake_calls() { return calls.c_str(); }
void fake_forget() { calls.clear(); }

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : nullptr;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemAlloc(CUdeviceptr* address, size_t size) {
  if (size > (size_t(1) << 40)) return CUDA_ERROR_OUT_OF_MEMORY;
  *address = 0x7f1234567000;
  return note("alloc %zu\n", size);
}
CUresult cuMemFree(CUdeviceptr address) { return note("free %llx\n", address); }
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr address) {
  *static_cast<unsigned*>(data) = address != 0x7f0000000000;
  if (attribute != CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE) return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
}
CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* size, CUdeviceptr address) {
  *base = address & ~0xfffULL;
  *size = 0x1000;
  return CUDA_SUCCESS;
}
CUresult cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr address) {
  std::memset(handle->reserved, 'm', sizeof(handle->reserved));
  std::memcpy(handle->reserved, &address, sizeof(address));
  return CUDA_SUCCESS;
}
CUresult cuIpcOpenMemHandle(CUdeviceptr* address, CUipcMemHandle handle, unsigned flags) {
  if (handle.reserved[63] != 'm') return CUDA_ERROR_INVALID_HANDLE;
  std::memcpy(address, handle.reserved, sizeof(*address));
  return note("open memory %llx %u\n", *address, flags);
}
CUresult cuIpcCloseMemHandle(CUdeviceptr address) { return note("close memory %llx\n", address); }
CUresult cuEventCreate(CUevent* event, unsigned flags) {
  *event = reinterpret_cast<CUevent>(0x5500000000e0);
  return note("event %u\n", flags);
}
CUresult cuIpcGetEventHandle(CUipcEventHandle* handle, CUevent event) {
  std::memset(handle->reserved, 'e', sizeof(handle->reserved));
  std::memcpy(handle->reserved, &event, sizeof(event));
  return CUDA_SUCCESS;
}
CUresult cuIpcOpenEventHandle(CUevent* event, CUipcEventHandle handle) {
  if (handle.reserved[63] != 'e') return CUDA_ERROR_INVALID_HANDLE;
  std::memcpy(event, handle.reserved, sizeof(*event));
  return CUDA_SUCCESS;
}
CUresult cuEventDestroy(CUevent event) { return note("destroy %p\n", static_cast<void*>(event)); }
CUresult cuEventRecord(CUevent event, CUstream stream) {
  return note("record %p on %p\n", static_cast<void*>(event), static_cast<void*>(stream));
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  return note("%p waits for %p %u\n", static_cast<void*>(stream), static_cast<void*>(event), flags);
}

}  // extern "C"
