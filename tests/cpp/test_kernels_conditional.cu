// The kernel that proves conditional nodes, and such nodes in a graph.
#include "cspd/launch.h"
#include "device.h"

using device::Array;

namespace {

void counts() {
  const Array<int> count{4};
  const Array<int> flag(1);
  for (const int until : {5, 6, 8, -1}) {
    const int before = count.host()[0];
    RUN(cspd::count(count.get(), until, flag.get(), nullptr));
    CHECK_EQUAL(count.host()[0], before + 1);
    CHECK_EQUAL(flag.host()[0], before + 1 < until ? 1 : 0);
  }
  device::run_early([&] { count.set({9}); }, [&] { return cspd::count(count.get(), 11, flag.get(), nullptr); });
  CHECK_EQUAL(count.host()[0], 10);
  CHECK_EQUAL(flag.host()[0], 1);
}

#ifdef CSPD_EMULATED

void nodes() {
  std::uint64_t handle = 0;
  cudaStream_t body = nullptr;
  CHECK(!cspd::has_conditional_nodes());
  CHECK(cspd::prepare_conditional(&body) != cudaSuccess);
  CHECK(cspd::begin_conditional(true, nullptr, nullptr, body, &handle) != cudaSuccess);
  CHECK(cspd::end_conditional(true, nullptr, handle, body) != cudaSuccess);
}

#else

// Of a loop, or a branch, whose body has two launches, with one behind it: what was counted at each launch of the
// graph, with these flags, up to a number.
std::vector<int> replayed(bool loop, const std::vector<int>& flags, int until) {
  const Array<int> count{0};
  const Array<int> flag{0};
  cudaStream_t stream = nullptr, body = nullptr;
  SUCCEED(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  SUCCEED(cspd::prepare_conditional(&body));
  std::uint64_t handle = 0;
  CHECK(cspd::begin_conditional(loop, flag.get(), stream, body, &handle) != cudaSuccess);  // nothing is captured
  CHECK(cudaGetLastError() == cudaSuccess);
  SUCCEED(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  SUCCEED(cspd::begin_conditional(loop, flag.get(), stream, body, &handle));
  for (int i = 0; i < 2; ++i) SUCCEED(cspd::count(count.get(), until, flag.get(), body));
  SUCCEED(cspd::end_conditional(loop, flag.get(), handle, body));
  SUCCEED(cspd::count(count.get(), until, flag.get(), stream));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t ready = nullptr;
  SUCCEED(cudaStreamEndCapture(stream, &graph));
  SUCCEED(cudaGraphInstantiate(&ready, graph, 0));
  std::vector<int> found;
  for (const int value : flags) {
    count.set({0});
    flag.set({value});
    SUCCEED(cudaGraphLaunch(ready, stream));
    SUCCEED(cudaStreamSynchronize(stream));
    found.push_back(count.host()[0]);
  }
  SUCCEED(cudaGraphExecDestroy(ready));
  SUCCEED(cudaGraphDestroy(graph));
  SUCCEED(cudaStreamDestroy(stream));
  SUCCEED(cudaStreamDestroy(body));
  return found;
}

void nodes() {
  int driver = 0;
  if (!cspd::has_conditional_nodes() || cudaDriverGetVersion(&driver) != cudaSuccess || driver < 12040) return;
  RUN(cspd::count(Array<int>{0}.get(), 0, Array<int>(1).get(), nullptr));  // loaded before a capture
  CHECK_SAME_BITS(replayed(true, {1, 0, -5, 1}, 6), (std::vector<int>{7, 1, 7, 7}));
  CHECK_SAME_BITS(replayed(true, {1, 1}, 0), (std::vector<int>{3, 3}));
  CHECK_SAME_BITS(replayed(false, {1, 0, 7, 0}, 100), (std::vector<int>{3, 1, 3, 1}));
}

#endif

}  // namespace

int main(int argc, char** argv) {
  return device::program("conditional", argc, argv, [] {
    counts();
    nodes();
  });
}
