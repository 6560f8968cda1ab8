// From an operand type's name to the type.
#pragma once

#include "cspd/device.cuh"
#include "cspd/launch.h"

namespace cspd {

// ``use`` with a value of the type.
template <typename Use>
cudaError_t with_type(Operand operand, const Use& use) {
  switch (operand) {
    case Operand::kFloat32: return use(float{});
    case Operand::kFloat16: return use(float16{});
    case Operand::kBfloat16: return use(bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace cspd
