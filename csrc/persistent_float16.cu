#include "cspd/persistent_launch.cuh"

namespace cspd {
CSPD_LAUNCH(float16, kNarrowWidth, true);
CSPD_LAUNCH(float16, kNarrowWidth, false);
}  // namespace cspd
