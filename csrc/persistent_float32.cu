#include "cspd/persistent_launch.cuh"

namespace cspd {
CSPD_LAUNCH(float, kMaxWidth, false);
}  // namespace cspd
