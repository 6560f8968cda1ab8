#include "cspd/persistent_launch.cuh"

namespace cspd {
CSPD_LAUNCH(bfloat16, kMaxWidth, false);
}  // namespace cspd
