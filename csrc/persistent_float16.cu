#include "cspd/persistent_launch.cuh"

template cudaError_t cspd::launch_chain<cspd::float16>(const cspd::Persistent&, const cspd::PersistentPlan&,
                                                       cudaStream_t);
