// The one assumption that attend makes of a GPU and no emulator can confirm: that tensor cores keep fp16 subnormals.
//
//   nvcc -std=c++20 -arch=native csrc/tests/subnormals.cu -o subnormals && ./subnormals
//
// Should it fail, build logquant with LOGQUANT_NORMAL_CODES (csrc/cuda/tensor/fragments.cuh). It also says how sums are
// rounded, which the emulator's model of truncation (ptx.cuh) is to be compared with.
#include <cmath>
#include <cstdio>

#include "../cuda/ptx.cuh"

namespace ptx = logquant::cuda::ptx;

// d = a * b for constant a and b: every result is first + 16 * x * y.
__global__ void multiply(float x, float y, float first, float* out) {
  const uint32_t a = ptx::pack_f16(x, x), b = ptx::pack_f16(y, y);
  float d[4] = {first, first, first, first};
  ptx::mma<__half>(d, {a, a, a, a}, {b, b});
  out[threadIdx.x] = d[0];
}

#if defined(__CUDACC__)
bool run(float x, float y, float first, float* host) {
  float* device = nullptr;
  const bool ok = cudaMalloc(&device, 32 * sizeof(float)) == cudaSuccess &&
                  ptx::launch(multiply, 1, 32, 0, nullptr, x, y, first, device) == cudaSuccess &&
                  cudaMemcpy(host, device, 32 * sizeof(float), cudaMemcpyDeviceToHost) == cudaSuccess;
  cudaFree(device);
  return ok;
}
#else
bool run(float x, float y, float first, float* host) {
  return ptx::launch(multiply, 1, 32, 0, nullptr, x, y, first, host) == cudaSuccess;
}
#endif

int main() {
  bool good = true;
  for (int shift = 0; shift < 8; ++shift) {
    for (int code = 1; code < 4; ++code) {
      const float x = std::ldexp(static_cast<float>(code), shift - 24);
      float out[32];
      if (!run(x, 1.5f, 0.0f, out)) {
        std::puts("the kernel did not run");
        return 2;
      }
      for (const float value : out) good = good && value == 16.0f * x * 1.5f;
    }
  }
  std::printf("fp16 subnormals as operands of mma: %s\n", good ? "kept" : "LOST");
  // 1 + 16 * 2^-25: exact is 1 + 2^-21; a sum whose products are cut off at 2^-24 below the largest loses them.
  float out[32];
  if (run(std::ldexp(1.0f, -12), std::ldexp(1.0f, -13), 1.0f, out)) {
    std::printf("1 + 16 * 2^-25 = 1 + %g * 2^-21\n", std::ldexp(out[0] - 1.0f, 21));
  }
  return good ? 0 : 1;
}
