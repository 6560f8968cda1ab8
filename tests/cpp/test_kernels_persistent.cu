// The chain in one launch, against double loops: sizes, types, plans, chunks of steps, and what happens when a block
// stays silent.
#include "chains.h"
#include "cspd/weights.cuh"

namespace {

using cspd::bfloat16;
using cspd::float16;

constexpr std::size_t kShared = 160 << 10;

template <typename T>
double tolerance() {
  return sizeof(T) == 4 ? 2e-5 : 4 * Type<T>::kRounding;
}

template <typename T>
cspd::PersistentPlan plan_of(const Size& size, int multiprocessors, std::size_t shared_limit = kShared) {
  return cspd::persistent_plan(Type<T>::kOperand, size.rows(), size.tokens, size.channels, size.width, size.depth,
                               multiprocessors, shared_limit);
}

void check_results(const Results& got, const Results& expected, double within) {
  CHECK_ALL_NEAR(got.x, expected.x, within);
  CHECK_ALL_NEAR(got.log_std, expected.log_std, within);
  CHECK_ALL_NEAR(got.path, expected.path, within);
}

template <typename T>
Results run(const Inputs<T>& in, const cspd::PersistentPlan& plan) {
  CHECK(plan.blocks > 0);
  const ChainOnDevice<T> chain(in, plan);
  RUN(chain.launch(chain.arguments(0, 0, in.size.steps)));
  CHECK_EQUAL(chain.error(), 0);
  return chain.results();
}

// Every cut of this size for so many multiprocessors: resident, or in stages of every length that some limit of
// shared memory leads to.
template <typename T>
std::vector<cspd::PersistentPlan> all_plans(const Size& size, int multiprocessors) {
  std::vector<cspd::PersistentPlan> plans;
  for (std::size_t limit = 8 << 10; limit <= kShared; limit += 1 << 10) {
    const auto plan = plan_of<T>(size, multiprocessors, limit);
    if (plan.blocks == 0) continue;
    CHECK(plan.shared_bytes <= limit);
    const bool known =
        !plans.empty() && plans.back().resident == plan.resident && plans.back().stage_pieces == plan.stage_pieces;
    if (!known) plans.push_back(plan);
  }
  return plans;
}

template <typename T>
void check_plans(const Size& size, const std::vector<int>& multiprocessors) {
  const check::In in(std::string(Type<T>::kName) + ", " + size.text());
  const Inputs<T> inputs(size);
  const auto expected = plain_chain(inputs);
  for (const int count : multiprocessors) {
    for (const auto& plan : all_plans<T>(size, count)) {
      const check::In cut(check::text(plan.blocks) + " blocks, " + check::text(plan.columns) + " columns, " +
                          (plan.resident ? "resident" : check::text(plan.stage_pieces) + " pieces a stage"));
      CHECK(plan.blocks <= count);
      check_results(run(inputs, plan), expected, tolerance<T>());
    }
  }
}

template <typename T>
void check_size(const Size& size, int multiprocessors) {
  const check::In in(std::string(Type<T>::kName) + ", " + size.text());
  const Inputs<T> inputs(size);
  check_results(run(inputs, plan_of<T>(size, multiprocessors)), plain_chain(inputs), tolerance<T>());
}

template <typename T>
void every_type() {
  // Rows 1 .. 16, with and without guidance: each number of rows that the kernel is compiled for, full and not.
  for (int tokens = 1; tokens <= 16; ++tokens) {
    if (device::small && tokens % 5 != 1) continue;
    check_size<T>({tokens, 5, 48, 1, 2, false, tokens % 3 != 0, tokens % 2 == 0}, 3);
    if (tokens <= 8) check_size<T>({tokens, 3, 32, 2, 2, true, tokens % 3 != 1, tokens % 2 == 1}, 2);
  }
  // Limits, steps without noise, modulations that all blocks of the network share.
  for (const bool guided : {false, true}) {
    check_size<T>({3, 5, 48, 2, 3, guided, true, true, true}, 3);
    check_size<T>({1, 5, 48, 2, 3, guided, false, false, false, true, true}, 3);
    check_size<T>({5, 5, 48, 3, 2, guided, false, true, true, true, true}, 2);
  }
  // Columns beyond the width in the last block; more outputs of the final layer than blocks, and fewer.
  check_plans<T>({3, 4, 80, 2, 3}, device::small ? std::vector<int>{3} : std::vector<int>{1, 3, 7});
  check_size<T>({2, 64, 16, 1, 2, true}, 2);
  // Stages of less than a tile, and of several.
  check_plans<T>({2, 3, 272, 1, 2}, {7});
  // Many rows and one tile a block: a layer of resident weights stays in registers.
  for (const int depth : {1, 2}) check_plans<T>({16, 3, 48, depth, 3}, {6});
  check_size<T>({1, 1, 112, 3, 2, false, false}, 7);
  if (!device::small) check_size<T>({2, 16, 1040, 1, 1, true}, 7);
}

void uneven_stages() {
  bool seen = false;
  for (const auto& plan : all_plans<float16>({3, 4, 80, 2, 3}, 1)) {
    const int pieces = cspd::Pieces<float16>::of_layer(80, plan.columns);
    seen = seen || (!plan.resident && plan.stage_pieces > 1 && pieces % plan.stage_pieces != 0);
  }
  CHECK(seen);
}

template <typename T>
void chunks_of_steps() {
  const Size size = {3, 4, 48, 2, 5, true, true, false};
  const Inputs<T> in(size);
  const auto expected = plain_chain(in);
  for (const auto& bounds : std::vector<std::vector<int>>{{5, 0}, {5, 3, 0}, {5, 4, 3, 2, 1, 0}}) {
    for (const bool own_mods : {false, true}) {  // of the chunk's steps only, or of all
      const ChainOnDevice<T> chain(in, plan_of<T>(size, 3));
      for (std::size_t i = 0; i + 1 < bounds.size(); ++i) {
        RUN(chain.launch(chain.arguments(own_mods ? bounds[i + 1] : 0, bounds[i + 1], bounds[i])));
        CHECK_EQUAL(chain.has_log_std(), bounds[i + 1] == 0);
      }
      check_results(chain.results(), expected, tolerance<T>());
    }
  }
}

// As many launches on one exchange buffer as a long chain has chunks, and steps enough for every word's bit to turn.
template <typename T>
void any_order() {
  for (const int tokens : {2, 4}) {  // rows of several warps, and of one: those do not wait for each other
    const Size size = {tokens, 3, 64, 2, device::small ? 3 : 6, true};
    const Inputs<T> in(size);
    for (const auto& plan : all_plans<T>(size, 5)) {
      device::in_any_order(
          [&] {
            const auto got = run(in, plan);
            Doubles all = got.x;
            all.insert(all.end(), got.log_std.begin(), got.log_std.end());
            all.insert(all.end(), got.path.begin(), got.path.end());
            return all;
          },
          6);
    }
  }
}

// ``to`` [outer, rows, inner]: these rows of ``from`` [outer, all, inner].
template <typename T>
void take_rows(Tensor<T>& to, const Tensor<T>& from, const std::vector<int>& rows, std::size_t all, std::size_t inner) {
  to.typed.clear();
  for (auto start = from.typed.begin(); start != from.typed.end(); start += all * inner) {
    for (const int row : rows) to.typed.insert(to.typed.end(), start + row * inner, start + (row + 1) * inner);
  }
  to.values = doubles(to.typed);
  to.array.set(to.typed);
}

// Some tokens of a batch, in another order and as another number of rows, come out with the same bits.
template <typename T>
void tokens_among_others(const Size& all, const std::vector<int>& tokens, int multiprocessors) {
  const check::In in(std::string(Type<T>::kName) + ", " + check::text(tokens.size()) + " of " + all.text());
  Size some = all;
  some.tokens = static_cast<int>(tokens.size());
  auto rows = tokens;
  if (all.guided) {
    for (const int token : tokens) rows.push_back(all.tokens + token);
  }
  const Inputs<T> from(all);
  Inputs<T> to(some);
  take_rows(to.mods, from.mods, rows, all.rows(), 3 * all.width);
  take_rows(to.final_mods, from.final_mods, rows, all.rows(), 2 * all.width);
  take_rows(to.x, from.x, tokens, all.tokens, all.channels);
  take_rows(to.scale, from.scale, tokens, all.tokens, 1);
  for (std::size_t i = 0; i < tokens.size(); ++i) to.rows_of_noise[i] = from.rows_of_noise[tokens[i]];
  const auto same = [](auto& to, const auto& from) {
    to.values = from.values;
    to.array.set(from.typed);
  };
  for (const auto tensor :
       {&Inputs<T>::input_weight, &Inputs<T>::input_bias, &Inputs<T>::final_weight, &Inputs<T>::final_bias}) {
    same(to.*tensor, from.*tensor);
  }
  for (int i = 0; i < all.depth; ++i) {
    auto &block = *to.network[i], &wanted = *from.network[i];
    same(block.norm_weight, wanted.norm_weight);
    same(block.norm_bias, wanted.norm_bias);
    same(block.weight0, wanted.weight0);
    same(block.bias0, wanted.bias0);
    same(block.weight1, wanted.weight1);
    same(block.bias1, wanted.bias1);
  }
  const auto whole = run(from, plan_of<T>(all, multiprocessors)), part = run(to, plan_of<T>(some, multiprocessors));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    for (int channel = 0; channel < all.channels; ++channel) {
      const int to_at = static_cast<int>(i) * all.channels + channel, from_at = tokens[i] * all.channels + channel;
      CHECK(part.x[to_at] == whole.x[from_at]);
      CHECK(part.log_std[to_at] == whole.log_std[from_at]);
      CHECK(part.path[to_at] == whole.path[from_at]);
    }
  }
}

template <typename T>
void places_in_a_batch() {
  tokens_among_others<T>({4, 5, 80, 2, 3, false, true, true}, {2}, 7);
  tokens_among_others<T>({4, 5, 48, 2, 3, false, true, true}, {3, 1, 0}, 3);
  tokens_among_others<T>({2, 5, 48, 2, 3, true, true, true}, {1}, 3);
  tokens_among_others<T>({16, 5, 48, 2, 3, false, true, true}, {15, 2, 7, 9, 0, 4}, 6);
}

template <typename T>
void a_silent_block() {
  const Size size = {2, 3, 48, 1, 2};
  const Inputs<T> in(size);
  for (const int multiprocessors : {1, 3}) {
    const auto plan = plan_of<T>(size, multiprocessors);
    for (int silent = 0; silent < plan.blocks; ++silent) {
      const ChainOnDevice<T> chain(in, plan);
      auto arguments = chain.arguments(0, 0, size.steps);
      arguments.silent = silent;
      arguments.timeout_ns = 3'000'000;
      RUN(chain.launch(arguments));
      CHECK_EQUAL(chain.error(), 1);
      for (const double x : chain.results().x) CHECK(std::isnan(x));
    }
  }
}

void sizes_beyond_the_kernel() {
  const Size good = {2, 3, 48, 1, 2};
  CHECK(plan_of<float>(good, 3).blocks == 3);
  std::vector<Size> bad(9, good);
  bad[0].tokens = 0;
  bad[1].tokens = 17;
  bad[2].tokens = 9, bad[2].guided = true;
  bad[3].channels = 0;
  bad[4].channels = 65;
  bad[5].width = 0;
  bad[6].width = 56;
  bad[7].width = 2064;
  bad[8].depth = 0;
  for (const auto& size : bad) {
    CHECK_EQUAL(plan_of<float>(size, 3).blocks, 0);
    CHECK_EQUAL(plan_of<bfloat16>(size, 3).blocks, 0);
  }
  CHECK_EQUAL(plan_of<float>(good, 0).blocks, 0);
  CHECK_EQUAL(plan_of<float>(good, 3, 8 << 10).blocks, 0);

  const Inputs<float> in(good);
  const ChainOnDevice<float> chain(in, plan_of<float>(good, 3));
  auto arguments = chain.arguments(0, 0, 2);
  const auto refused = [&](const cspd::Persistent& wrong, const cspd::PersistentPlan& plan) {
    CHECK(cspd::persistent(cspd::Operand::kFloat32, wrong, plan, nullptr) == cudaErrorInvalidValue);
  };
  refused(arguments, {});
  for (const int tokens : {0, 17}) {
    arguments.tokens = tokens;
    refused(arguments, plan_of<float>(good, 3));
  }
  arguments.tokens = 2;
  for (const int groups : {0, 3}) {
    arguments.groups = groups;
    refused(arguments, plan_of<float>(good, 3));
  }
  device::synchronise();
  CHECK(chain.untouched());
}

}  // namespace

int main(int argc, char** argv) {
  return device::program("persistent", argc, argv, [] {
    every_type<float>();
    every_type<float16>();
    every_type<bfloat16>();
    uneven_stages();
    places_in_a_batch<float>();
    places_in_a_batch<float16>();
    places_in_a_batch<bfloat16>();
    chunks_of_steps<float>();
    chunks_of_steps<bfloat16>();
    any_order<float>();
    any_order<float16>();
    a_silent_block<float>();
    a_silent_block<bfloat16>();
    sizes_beyond_the_kernel();
    if (!device::small) check_size<float16>({1, 2, 2048, 1, 1}, 7);
  });
}
