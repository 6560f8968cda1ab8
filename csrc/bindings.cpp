// The Python module: csrc's launches, with pointers and the stream as integers. Nothing here is checked but what a
// kernel could not survive; cspd_kernels/ops/*/cuda*.py checks the rest.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cspd/launch.h"

namespace py = pybind11;

namespace {

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void check(cudaError_t error, const char* launch) {
  if (error == cudaSuccess) return;
  throw CudaError(std::string(launch) + " failed: " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

// An address in Python: an int, 0 for null.
struct Address {
  std::uintptr_t value;

  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

using cspd::Operand;

Operand operand(int type) {
  if (type < 0 || type > 2) {
    throw std::invalid_argument("expected an operand type of 0 (float32), 1 (float16) or 2 (bfloat16), got " +
                                std::to_string(type));
  }
  return static_cast<Operand>(type);
}

void log_density_ratio(Address x, Address mean_q, Address log_q, Address path_q, Address mean_p, Address log_p,
                       Address path_p, Address relaxations, float relaxation, Address out, std::int64_t n, int channels,
                       bool released, Address stream) {
  const cspd::Judged judged = {
      x, {mean_q, log_q, path_q}, {mean_p, log_p, path_p}, relaxations, relaxation, n, channels, released};
  check(cspd::log_density_ratio(judged, out, stream), "log_density_ratio");
}

// Bit i of ``own``: whether each candidate has a row of its own, or one is for all. Of the sample, the draft's mean,
// log standard deviation and path, the target's, the relaxation.
cspd::Candidates candidates_of(int count, Address accepted, unsigned own) {
  const auto rows = [&](int i) { return own >> i & 1 ? count : 1; };
  return {count, accepted, {rows(1), rows(2), rows(3)}, {rows(4), rows(5), rows(6)}, rows(7), rows(0)};
}

void accept_reject(Address x, Address mean_q, Address log_q, Address path_q, Address mean_p, Address log_p,
                   Address path_p, Address relaxations, float relaxation, Address sample, Address rows, Address token,
                   Address accepted, Address tries, Address log_ratio, Address candidate, std::int64_t n,
                   int candidates, unsigned own, int channels, std::uint64_t seed, Address seeds, int max_tries,
                   bool released, bool closed_form, int multiprocessors, Address stream) {
  const cspd::Judged judged = {
      x, {mean_q, log_q, path_q}, {mean_p, log_p, path_p}, relaxations, relaxation, n, channels, released};
  const cspd::Redraw redraw = {sample, rows, seed, max_tries, token, accepted, tries, log_ratio, seeds};
  const auto tried = candidates_of(candidates, candidate, own);
  check(cspd::accept_reject(judged, redraw, tried, closed_form, multiprocessors, stream), "accept_reject");
}

void randn(int type, int first, std::uint64_t seed, std::uint64_t counter, std::int64_t numel, int calls, int grid,
           int rounds, bool reversed, Address out, Address stream) {
  const cspd::Randn draw = {seed, counter, numel, calls, grid, rounds, reversed};
  check(cspd::randn(operand(type), operand(first), draw, out, stream), "randn");
}

void condition(int type, Address y, Address time_embedding, Address out, int steps, int rows, int width, bool own,
               Address stream) {
  check(cspd::condition(operand(type), y, time_embedding, out, steps, rows, width, own, stream), "condition");
}

// The modulations of the block at hand and of the next layer, whose shift and scale are followed by a gate or not.
cspd::Ahead ahead(Address mods, Address next_mods, bool gated, int width) {
  return {mods, next_mods, gated ? 3 * width : 2 * width, width};
}

void bias_silu(int type, Address value, Address bias, Address mods, Address next_mods, bool next_gated,
               std::int64_t rows, int width, int hidden, bool swiglu, Address live, Address stream) {
  const auto modulations = ahead(mods, next_mods, next_gated, width);
  check(cspd::bias_silu(operand(type), value, bias, modulations, rows, hidden, swiglu, stream, live), "bias_silu");
}

void input(int type, Address x, Address weight, Address bias, Address h, Address norm_weight, Address norm_bias,
           Address mods, Address out, std::int64_t n, int groups, int channels, int width, float epsilon, bool rms,
           std::int64_t period, Address live, bool early, Address stream) {
  const cspd::AnyModulation modulation = {norm_weight, norm_bias, mods, epsilon, rms};
  check(cspd::input(operand(type), x, weight, bias, h, modulation, out, n, groups, channels, width, period, early,
                    stream, live),
        "input");
}

void residual(int type, Address product, Address bias, Address mods, Address h, Address norm_weight, Address norm_bias,
              Address next_mods, Address out, std::int64_t rows, int width, float epsilon, bool rms, Address live,
              Address stream) {
  const cspd::AnyModulation next = {norm_weight, norm_bias, next_mods, epsilon, rms};
  check(cspd::residual(operand(type), product, bias, mods, h, next, out, rows, width, stream, live), "residual");
}

// A network block by the extension's own products, in tiles of [tile_rows, tile_columns]: h and the operand before it
// become h and the operand after it.
void block(int type, int tile_rows, int tile_columns, Address operand_before, Address activations, Address h,
           Address weight0, Address bias0, Address weight1, Address bias1, Address mods, Address norm_weight,
           Address norm_bias, Address next_mods, Address out, std::int64_t rows, int width, int hidden, bool swiglu,
           float epsilon, bool rms, Address live, Address stream) {
  const auto of = operand(type);
  const bool gated = static_cast<const void*>(norm_weight) != nullptr;
  const auto modulations = ahead(mods, next_mods, gated, width);
  const cspd::Product first = {operand_before, weight0, bias0, activations, nullptr, nullptr,
                               modulations,    rows,    width, hidden,      swiglu,  live};
  const cspd::Product second = {activations, weight1, bias1, nullptr, mods, h, {}, rows, hidden, width, false, live};
  const cspd::AnyModulation next = {norm_weight, norm_bias, next_mods, epsilon, rms};
  check(cspd::product(of, first, tile_rows, tile_columns, stream), "product");
  check(cspd::product(of, second, tile_rows, tile_columns, stream), "product");
  check(cspd::residual(of, nullptr, nullptr, nullptr, h, next, out, rows, width, stream, live), "residual");
}

void update(Address final_operand, Address final_weight, Address final_bias, Address coefficients, Address temperature,
            Address scale, Address clip, Address x, Address noise, Address seed, Address addresses, int step,
            Address log_std, Address path, std::int64_t n, int groups, int channels, bool learned, int width,
            Address live, Address stream) {
  const cspd::Update arguments = {final_operand,
                                  {nullptr, nullptr, final_weight, final_bias},
                                  coefficients,
                                  temperature,
                                  scale,
                                  clip,
                                  x,
                                  {noise, 0, seed, addresses},
                                  log_std,
                                  path,
                                  n,
                                  step,
                                  groups,
                                  channels,
                                  width,
                                  learned,
                                  live};
  check(cspd::update(arguments, stream), "update");
}

void output(Address operand, Address final_weight, Address final_bias, Address out, Address v, std::int64_t tokens,
            std::int64_t period, int groups, int channels, int width, Address live, Address stream) {
  const cspd::NetworkOutput arguments = {operand, final_weight, final_bias, out,   v,   tokens,
                                         period,  groups,       channels,   width, live};
  check(cspd::output(arguments, stream), "output");
}

void sweep(Address out, Address v, Address start, Address scale, Address temperature, Address clip, Address noise,
           std::int64_t noise_step, Address seed, Address addresses, Address tables, Address x, Address before,
           Address x0, Address mean, Address log_std, Address path, Address change, Address size, Address settled,
           Address done, Address live, std::int64_t tokens, int steps, int groups, int channels, bool begin,
           bool guessed, Address stream) {
  const cspd::Sweep arguments = {
      out,    v,        start,   scale,  temperature, clip,    {noise, noise_step, seed, addresses},
      tables, x,        before,  x0,     mean,        log_std, path,
      change, size,     settled, done,   live,        tokens,  steps,
      groups, channels, begin,   guessed};
  check(cspd::sweep(arguments, stream), "sweep");
}

void settle(Address change, Address size, Address tolerance, Address count, Address settled, Address sweeps,
            Address done, Address live, Address left, std::int64_t tokens, int steps, int channels, int limit,
            bool begin, Address stream) {
  const cspd::Settle arguments = {change, size, tolerance, count, settled,  sweeps, done,
                                  live,   left, tokens,    steps, channels, limit,  begin};
  check(cspd::settle(arguments, stream), "settle");
}

cspd::PersistentPlan persistent_plan(int type, int rows, int tokens, int channels, int width, int depth,
                                     int multiprocessors, std::size_t shared_limit) {
  return cspd::persistent_plan(operand(type), rows, tokens, channels, width, depth, multiprocessors, shared_limit);
}

void persistent(int type, const cspd::PersistentPlan& plan, Address blocks, Address mods, std::int64_t mods_block,
                Address final_mods, Address final_weight, Address final_bias, Address input_weight, Address input_bias,
                Address coefficients, Address temperature, Address scale, Address clip, Address x, Address noise,
                std::int64_t noise_step, Address seed, Address addresses, Address log_std, Address path,
                Address exchange, Address error, int n, int groups, int channels, bool learned, int depth, int width,
                float epsilon, int first, int start, int stop, std::uint64_t timeout_ns, int silent, Address stream) {
  const cspd::Persistent chain = {blocks,
                                  mods,
                                  mods_block,
                                  final_mods,
                                  {input_weight, input_bias, final_weight, final_bias},
                                  coefficients,
                                  temperature,
                                  scale,
                                  clip,
                                  x,
                                  {noise, noise_step, seed, addresses},
                                  log_std,
                                  path,
                                  exchange,
                                  error,
                                  n,
                                  groups,
                                  channels,
                                  depth,
                                  width,
                                  learned,
                                  epsilon,
                                  first,
                                  start,
                                  stop,
                                  timeout_ns,
                                  silent};
  check(cspd::persistent(operand(type), chain, plan, stream), "persistent");
}

std::uintptr_t prepare_conditional() {
  cudaStream_t body = nullptr;
  check(cspd::prepare_conditional(&body), "prepare_conditional");
  return reinterpret_cast<std::uintptr_t>(body);
}

std::uint64_t begin_conditional(bool loop, Address flag, Address stream, Address body) {
  std::uint64_t handle = 0;
  check(cspd::begin_conditional(loop, flag, stream, body, &handle), "begin_conditional");
  return handle;
}

void end_conditional(bool loop, Address flag, std::uint64_t handle, Address body) {
  check(cspd::end_conditional(loop, flag, handle, body), "end_conditional");
}

void count(Address count, int until, Address flag, Address stream) {
  check(cspd::count(count, until, flag, stream), "count");
}

// Versions such as 12040 for 12.4; a driver's is 0 where there is none.
int version(cudaError_t (*of)(int*)) {
  int value = 0;
  return of(&value) == cudaSuccess ? value : 0;
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("int"));

  bool load(handle source, bool) {
    if (!PyLong_Check(source.ptr())) return false;
    value.value = PyLong_AsUnsignedLongLong(source.ptr());
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
  }
};

}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels on raw pointers; see cspd_kernels/ops/*/cuda*.py";
#ifdef CSPD_EMULATED
  m.attr("EMULATED") = true;
#else
  m.attr("EMULATED") = false;
#endif
  m.attr("CONDITIONAL_NODES") = cspd::has_conditional_nodes();
  py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  py::class_<cspd::PersistentPlan>(m, "PersistentPlan")
      .def_readonly("blocks", &cspd::PersistentPlan::blocks)
      .def_readonly("columns", &cspd::PersistentPlan::columns)
      .def_readonly("resident", &cspd::PersistentPlan::resident)
      .def_readonly("shared_bytes", &cspd::PersistentPlan::shared_bytes)
      .def_readonly("exchange_words", &cspd::PersistentPlan::exchange_words);
  // A launch may take a while, or load the module: other threads go on.
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("log_density_ratio", &log_density_ratio, unlocked);
  m.def("accept_reject", &accept_reject, unlocked);
  m.def("randn", &randn, unlocked);
  m.def("condition", &condition, unlocked);
  m.def("bias_silu", &bias_silu, unlocked);
  m.def("input", &input, unlocked);
  m.def("residual", &residual, unlocked);
  m.def("block", &block, unlocked);
  m.def("update", &update, unlocked);
  m.def("output", &output, unlocked);
  m.def("sweep", &sweep, unlocked);
  m.def("settle", &settle, unlocked);
  m.def("driver_version", [] { return version(cudaDriverGetVersion); });
  m.def("runtime_version", [] { return version(cudaRuntimeGetVersion); });
  m.def("persistent_plan", &persistent_plan);
  m.def("persistent", &persistent, unlocked);
  m.def("prepare_conditional", &prepare_conditional, unlocked);
  m.def("begin_conditional", &begin_conditional, unlocked);
  m.def("end_conditional", &end_conditional, unlocked);
  m.def("count", &count, unlocked);
}
