#include "cspd/persistent_launch.cuh"

template cudaError_t cspd::launch_chain<cspd::bfloat16>(const cspd::Persistent&, const cspd::PersistentPlan&,
                                                        cudaStream_t);
