// What the files that talk to the CUDA runtime share.
#pragma once

#include <cuda_runtime.h>

namespace deep_ep {
namespace cuda {

// Throws what a call reported.
void must(cudaError_t result, const char* call);

}  // namespace cuda
}  // namespace deep_ep
