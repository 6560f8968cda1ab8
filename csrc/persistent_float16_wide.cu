#include "cspd/persistent_launch.cuh"

namespace cspd {
CSPD_LAUNCH(float16, kMostWidth, false);
}  // namespace cspd
