// What csrc/*.cu offer: one function a launch, on raw pointers to device memory and a stream. Each returns the error
// of its launch and changes nothing where that is not cudaSuccess.
#pragma once

#ifdef CSPD_EMULATED
#include "emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "cspd/parameters.h"

namespace cspd {

enum class Operand { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// Channels 0..256, any number of tokens.
cudaError_t log_density_ratio(const Judged& judged, float* out, cudaStream_t stream);
// ``tokens_per_warp`` is chosen here.
cudaError_t accept_reject(const Judged& judged, const Redraw& redraw, const Candidates& candidates, bool closed_form,
                          int multiprocessors, cudaStream_t stream);

// [calls, numel] of a type. The first call's normals are rounded to the type ``first`` before.
cudaError_t randn(Operand type, Operand first, const Randn& draw, void* out, cudaStream_t stream);

// Widths are multiples of 16 up to 4096, ``hidden`` any multiple of 16. ``live``: see ``idle``.
cudaError_t condition(Operand type, const void* y, const float* time_embedding, void* out, int steps, int rows,
                      int width, bool own, cudaStream_t stream);
// ``value`` is [rows, hidden], or of a swiglu layer [rows, 2 hidden], of which the first half becomes the activations.
cudaError_t bias_silu(Operand type, void* value, const void* bias, const Ahead& ahead, std::int64_t rows, int hidden,
                      bool swiglu, cudaStream_t stream, const std::int32_t* live = nullptr);
// ``early``: where the kernel before it is the ``update`` of the step before. It is not for the first step of a chain,
// so that what was launched before the chain has ended when others of its kernels start early. Token t has the row
// t / period * groups * period + t % period, and in every further group that ``period`` rows further.
cudaError_t input(Operand type, const float* x, const float* weight, const float* bias, float* h,
                  const AnyModulation& modulation, void* operand, std::int64_t tokens, int groups, int channels,
                  int width, std::int64_t period, bool early, cudaStream_t stream, const std::int32_t* live = nullptr);
// Without a product, h is left as it is.
cudaError_t residual(Operand type, const void* product, const void* bias, const void* mods, float* h,
                     const AnyModulation& next, void* operand, std::int64_t rows, int width, cudaStream_t stream,
                     const std::int32_t* live = nullptr);
cudaError_t update(const Update& update, cudaStream_t stream);
cudaError_t output(const NetworkOutput& output, cudaStream_t stream);
cudaError_t sweep(const Sweep& sweep, cudaStream_t stream);
cudaError_t settle(const Settle& settle, cudaStream_t stream);
// By tiles of [16, 16], [32, 32], [64, 64] or, not swiglu, [64, 32]; of a half-precision type. Sizes are multiples of
// 16.
cudaError_t product(Operand type, const Product& product, int tile_rows, int tile_columns, cudaStream_t stream);

// For ``rows`` = M <= 16, widths up to 2048, and shared memory of ``shared_limit`` bytes a block. A network block of
// LayerNorm and silu, as wide as the network.
PersistentPlan persistent_plan(Operand type, int rows, int tokens, int channels, int width, int depth,
                               int multiprocessors, std::size_t shared_limit);
cudaError_t persistent(Operand type, const Persistent& chain, const PersistentPlan& plan, cudaStream_t stream);

// Whether this build adds conditional nodes to CUDA graphs; what follows is an error where it does not.
bool has_conditional_nodes();
// Before the first one on the current device: a stream for the bodies alone.
cudaError_t prepare_conditional(cudaStream_t* body);
// While ``stream`` is captured: what is launched on ``body`` until the end happens, at that point of ``stream``, if
// ``flag`` is not 0; of a ``loop``, as long as it is not. The end takes the ``handle``, also where a body failed.
cudaError_t begin_conditional(bool loop, const int* flag, cudaStream_t stream, cudaStream_t body,
                              std::uint64_t* handle);
cudaError_t end_conditional(bool loop, const int* flag, std::uint64_t handle, cudaStream_t body);
// Adds 1 to ``count``; ``flag`` is whether it is less than ``until``. To prove such nodes with.
cudaError_t count(int* count, int until, int* flag, cudaStream_t stream);

}  // namespace cspd
