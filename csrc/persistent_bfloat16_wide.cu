#include "cspd/persistent_launch.cuh"

namespace cspd {
CSPD_LAUNCH(bfloat16, kMostWidth, false);
}  // namespace cspd
