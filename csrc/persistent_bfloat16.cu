#include "cspd/persistent_launch.cuh"

namespace cspd {
CSPD_LAUNCH(bfloat16, kNarrowWidth, true);
CSPD_LAUNCH(bfloat16, kNarrowWidth, false);
}  // namespace cspd
