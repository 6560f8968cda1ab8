#include "cspd/persistent_launch.cuh"

template cudaError_t cspd::launch_chain<float>(const cspd::Persistent&, const cspd::PersistentPlan&, cudaStream_t);
