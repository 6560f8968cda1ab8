#include "cspd/persistent_launch.cuh"

namespace cspd {
CSPD_LAUNCH(float, kMostWidth, false);
}  // namespace cspd
