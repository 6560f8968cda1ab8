// Conditional nodes of CUDA graphs: launches that happen once, or again and again, if a number in device memory says
// so. They take CUDA 12.4. Their bodies are captured on a stream that nothing else uses.
#include "cspd/device.cuh"
#include "cspd/launch.h"

#if !defined(CSPD_EMULATED) && CUDART_VERSION >= 12040
#define CSPD_CONDITIONAL_NODES
#endif

namespace cspd {
namespace {

#ifndef CSPD_EMULATED

__global__ void set_condition_kernel(std::uint64_t handle, const int* flag) {
#ifdef CSPD_CONDITIONAL_NODES
  cudaGraphSetConditional(handle, *flag != 0);
#endif
}

#endif

// Early, as the kernels of a chain: also as the first one of a body, and right behind a node.
__global__ void count_kernel(int* count, int until, int* flag) {
  wait_for_earlier();
  if (threadIdx.x == 0) {
    *count += 1;
    *flag = *count < until;
  }
}

#ifdef CSPD_CONDITIONAL_NODES

// What is being captured from a stream, and after what its next launch comes.
struct Capture {
  cudaGraph_t graph = nullptr;
  const cudaGraphNode_t* nodes = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  std::size_t count = 0;
};

// Its own errors are not to be found by whoever asks next.
cudaError_t reported(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

cudaError_t capture_of(cudaStream_t stream, Capture& capture) {
#if CUDART_VERSION >= 13000
  const auto ask = cudaStreamGetCaptureInfo;
#else
  const auto ask = cudaStreamGetCaptureInfo_v3;
#endif
  auto status = cudaStreamCaptureStatusNone;
  const auto error = ask(stream, &status, nullptr, &capture.graph, &capture.nodes, &capture.edges, &capture.count);
  return error == cudaSuccess && status != cudaStreamCaptureStatusActive ? cudaErrorIllegalState : error;
}

// Add a node to what is being captured from a stream; what the stream launches next comes behind it.
cudaError_t add_node(cudaStream_t stream, cudaGraphNodeParams& node) {
#if CUDART_VERSION >= 13000
  const auto add = cudaGraphAddNode;
  const auto go_on_behind = cudaStreamUpdateCaptureDependencies;
#else
  const auto add = cudaGraphAddNode_v2;
  const auto go_on_behind = cudaStreamUpdateCaptureDependencies_v2;
#endif
  Capture capture;
  cudaGraphNode_t added = nullptr;
  auto error = capture_of(stream, capture);
  if (error != cudaSuccess) return error;
  error = add(&added, capture.graph, capture.nodes, capture.edges, capture.count, &node);
  if (error != cudaSuccess) return error;
  return go_on_behind(stream, &added, nullptr, 1, cudaStreamSetCaptureDependencies);
}

// Not early: it reads what the kernel before it leaves. So it has ended, and with it all that came before it, when a
// body begins, when a loop goes round, and when what is behind a loop begins. No kernel starts early across a node's
// borders: only an edge between two kernels lets one.
cudaError_t set_condition(std::uint64_t handle, const int* flag, cudaStream_t stream) {
  return launch(set_condition_kernel, Grid{1, 1}, stream, handle, flag);
}

#endif

}  // namespace

cudaError_t count(int* count, int until, int* flag, cudaStream_t stream) {
  return launch(count_kernel, Grid{1, kWarp, 0, false, true}, stream, count, until, flag);
}

#ifdef CSPD_CONDITIONAL_NODES

bool has_conditional_nodes() { return true; }

cudaError_t prepare_conditional(cudaStream_t* body) {
  cudaFuncAttributes code = {};  // asking loads the kernel, which may not be possible while a stream is captured
  const auto error = cudaFuncGetAttributes(&code, set_condition_kernel);
  return reported(error != cudaSuccess ? error : cudaStreamCreateWithFlags(body, cudaStreamNonBlocking));
}

cudaError_t begin_conditional(bool loop, const int* flag, cudaStream_t stream, cudaStream_t body,
                              std::uint64_t* handle) {
  Capture capture;
  auto error = capture_of(stream, capture);
  if (error != cudaSuccess) return reported(error);
  cudaGraphNodeParams node = {};
  node.type = cudaGraphNodeTypeConditional;
  node.conditional.type = loop ? cudaGraphCondTypeWhile : cudaGraphCondTypeIf;
  node.conditional.size = 1;
  error = cudaGraphConditionalHandleCreate(&node.conditional.handle, capture.graph, 0, cudaGraphCondAssignDefault);
  if (error != cudaSuccess) return reported(error);
  *handle = node.conditional.handle;
  error = set_condition(*handle, flag, stream);
  if (error != cudaSuccess) return error;
  error = add_node(stream, node);
  if (error != cudaSuccess) return reported(error);
  return reported(cudaStreamBeginCaptureToGraph(body, node.conditional.phGraph_out[0], nullptr, nullptr, 0,
                                                cudaStreamCaptureModeThreadLocal));
}

cudaError_t end_conditional(bool loop, const int* flag, std::uint64_t handle, cudaStream_t body) {
  const auto set = loop ? set_condition(handle, flag, body) : cudaSuccess;
  cudaGraph_t graph = nullptr;  // the node's
  const auto ended = reported(cudaStreamEndCapture(body, &graph));
  return set != cudaSuccess ? set : ended;
}

#else

bool has_conditional_nodes() { return false; }

cudaError_t prepare_conditional(cudaStream_t*) { return cudaErrorInvalidValue; }

cudaError_t begin_conditional(bool, const int*, cudaStream_t, cudaStream_t, std::uint64_t*) {
  return cudaErrorInvalidValue;
}

cudaError_t end_conditional(bool, const int*, std::uint64_t, cudaStream_t) { return cudaErrorInvalidValue; }

#endif

}  // namespace cspd
