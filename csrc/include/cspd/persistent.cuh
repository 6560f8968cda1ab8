// The whole denoising chain of a few tokens in one launch.
//
// A block makes ``columns`` columns of every layer, for all rows, with weights that stay in its shared memory or stream
// through it (weights.cuh). Between two layers every block needs every other's columns: they pass through global memory
// as values that are their own ready flags (exchange.cuh). LayerNorm and modulation of whole rows are done by every
// block for itself, as are the update of x and what else is cheap.
//
// Per reverse step: for each network block h -> activations -> h; h -> outputs of the final layer, spread over the
// blocks by channel; outputs -> x, in every block -> h. The h of a step's start is computed by every block for itself
// where that takes less time than an exchange (step_start.cuh), else by columns, too: 2 D + 1 or 2 D + 2 exchanges.
#pragma once

#include "cspd/exchange.cuh"
#include "cspd/items.cuh"
#include "cspd/persistent_layout.cuh"
#include "cspd/step.cuh"
#include "cspd/step_start.cuh"

namespace cspd {

static_assert(kChainThreads == kRowThreads && kChainWarps == kRowWarps);

// ``Rows`` is the number of rows, rounded up to 2, 4, 8 or 16, and ``MaxWidth`` the width, rounded up to 1024 or 2048.
template <typename T, int Rows, int MaxWidth, bool Resident>
class ChainBlock {
  static constexpr int kChunks = MaxWidth / kNarrowWidth;
  static constexpr int kMostTogether = (sizeof(T) == 2 ? 8 : 4) / kChunks;  // what the registers of a thread hold
  static constexpr int kTogether = Rows < kMostTogether ? Rows : kMostTogether;
  static constexpr bool kOwnStart = has_own_start(Rows, MaxWidth);
  static constexpr int kCopies = exchange_copies(Rows);
  using Group = RowGroup<kTogether, kChunks>;
  using Supply = WeightSupply<T, Rows, MaxWidth, Resident>;

 public:
  __device__ __forceinline__ ChainBlock(const Persistent& chain, const PersistentPlan& plan)
      : chain_(chain),
        columns_(plan.columns),
        first_column_(static_cast<int>(blockIdx.x) * plan.columns),
        rows_(chain.tokens * chain.groups),
        outputs_(chain.learned ? 2 * chain.channels : chain.channels),
        stride_(operand_stride<T>(chain.width)),
        x_stride_(x_stride(chain.channels)),
        items_(rows_, columns_, first_column_, chain.width),
        places_(exchange_layout(rows_, chain.channels, chain.width)),
        read_(chain.exchange + blockIdx.x % kCopies * places_.words),
        shape_(chain.width),
        watchdog_(chain.error, chain.timeout_ns) {
    const int layer_pieces = Pieces<T>::of_layer(chain.width, columns_);
    const int slots =
        Resident ? resident_slots(Rows, chain.depth, columns_, layer_pieces) : kStages * plan.stage_pieces;
    const auto layout = shared_layout<T>(Rows, chain.tokens, chain.channels, chain.width, chain.depth, columns_, slots);
    auto* memory = shared_memory<unsigned char>();
    ring_ = memory + layout.weights;
    operand_ = reinterpret_cast<T*>(memory + layout.operand);
    sums_ = reinterpret_cast<float*>(memory + layout.sums);
    own_h_ = reinterpret_cast<float*>(memory + layout.own_h);
    biases_ = reinterpret_cast<float*>(memory + layout.biases);
    input_weight_ = reinterpret_cast<float*>(memory + layout.input_weight);
    input_bias_ = reinterpret_cast<float*>(memory + layout.input_bias);
    x_ = reinterpret_cast<float*>(memory + layout.x);
    log_stds_ = reinterpret_cast<float*>(memory + layout.log_stds);
    path_ = reinterpret_cast<float*>(memory + layout.path);
    scratch_ = reinterpret_cast<Moments*>(memory + layout.scratch);
    partial_ = reinterpret_cast<float*>(memory + layout.partial);
    blocks_ = reinterpret_cast<BlockWeights*>(memory + layout.blocks);
    layers_ = reinterpret_cast<const void**>(memory + layout.layers);
  }

  __device__ __forceinline__ void run(int stage_pieces) {
    load_addresses();
    sync_block();
    Supply weights(ring_, layers_, 2 * chain_.depth, chain_.stop - chain_.start, chain_.width, first_column_, columns_,
                   stage_pieces);
    load_constants();
    sync_block();
    if constexpr (!kOwnStart) project();
    for (int step = chain_.stop - 1; step >= chain_.start; --step) {
      const std::int64_t row = static_cast<std::int64_t>(step - chain_.first) * rows_;
      for (int block = 0; block < chain_.depth; ++block) {
        const T* mods = static_cast<const T*>(chain_.mods) + block * chain_.mods_block + row * 3 * chain_.width;
        const auto first_tile = weights.begin(2 * block);
        normalise(block, mods);
        multiply(weights, first_tile);
        pass_on_activations(block);
        weights.end();
        if constexpr (!Resident) prefetch_for_next(block, step, mods);
        const float gate = gate_at(mods, items_.first());
        const auto second_tile = weights.begin(2 * block + 1);
        await_activations();
        multiply(weights, second_tile);
        add_residual(block, mods, gate);
        weights.end();
      }
      final_layer(static_cast<const T*>(chain_.final_mods) + row * 2 * chain_.width);
      update(step);
      sync_block();
      if constexpr (!kOwnStart) {
        if (step > chain_.start) project();
      }
    }
    store_results();
  }

 private:
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }

  __device__ __forceinline__ bool speaks() const { return static_cast<int>(blockIdx.x) != chain_.silent; }

  __device__ __forceinline__ void load_addresses() {
    for (int block = thread(); block < chain_.depth; block += kChainThreads) {
      blocks_[block] = chain_.blocks[block];
      layers_[2 * block] = blocks_[block].weight0;
      layers_[2 * block + 1] = blocks_[block].weight1;
    }
  }

  __device__ __forceinline__ void load_constants() {
    for (int i = thread(); i < Rows * stride_; i += kChainThreads) operand_[i] = from_float<T>(0.0f);
    const int width = chain_.width, channels = chain_.channels;
    for (int i = thread(); i < 2 * chain_.depth * columns_; i += kChainThreads) {
      const int layer = i / columns_, column = first_column_ + i % columns_;
      const auto& block = blocks_[layer / 2];
      const T* bias = static_cast<const T*>(layer % 2 ? block.bias1 : block.bias0);
      biases_[i] = column < width ? to_float(bias[column]) : 0.0f;
    }
    if constexpr (kOwnStart) {
      start_.load(chain_.ends, channels, width);
    } else {
      for (int i = thread(); i < channels * columns_; i += kChainThreads) {  // [C, columns]: no two lanes on one bank
        const int column = first_column_ + i % columns_;
        input_weight_[i] = column < width ? chain_.ends.input_weight[column * channels + i / columns_] : 0.0f;
      }
      for (int i = thread(); i < columns_; i += kChainThreads) {
        input_bias_[i] = first_column_ + i < width ? chain_.ends.input_bias[first_column_ + i] : 0.0f;
      }
    }
    for (int i = thread(); i < chain_.tokens * x_stride_; i += kChainThreads) {
      const int token = i / x_stride_, channel = i % x_stride_;
      x_[i] = channel < channels ? chain_.x[token * channels + channel] : 0.0f;
    }
    for (int i = thread(); i < chain_.tokens * channels; i += kChainThreads) path_[i] = 0.0f;
  }

  // h of the block's columns, from x: the same for both groups.
  __device__ __forceinline__ void project() {
    ++h_written_;
    items_.for_each([&](const Item& i) {
      const float* x = x_ + token_of(i.row) * x_stride_;
      float h = input_bias_[i.c];
      for (int channel = 0; channel < chain_.channels; ++channel) {
        h = fmaf(x[channel], input_weight_[channel * columns_ + i.c], h);
      }
      write_h(places_.h, i, h, h_written_);
    });
  }

  __device__ __forceinline__ void write_h(std::int64_t place, const Item& i, float value, unsigned times) {
    own_h_[i.index] = value;
    pass_on_at(place + i.row * chain_.width + i.column, value, times);
  }

  __device__ __forceinline__ void pass_on_at(std::int64_t place, float value, unsigned times) {
    if (!speaks()) return;
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      pass_on(chain_.exchange + copy * places_.words + place, value, times & 1);
    }
  }

  __device__ __forceinline__ int token_of(int row) const { return row < chain_.tokens ? row : row - chain_.tokens; }

  // Rows from ``first`` on, as they come in; modulations and the like are asked for before.
  __device__ __forceinline__ Group await_rows_at(std::int64_t place, int first, unsigned times) {
    const auto* words = read_ + place + static_cast<std::int64_t>(first) * chain_.width;
    return await_rows<kTogether, kChunks>(words, rows_ - first, chain_.width, times & 1, watchdog_);
  }

  // Every block's h of a step's start, from x, of which it keeps its own columns.
  __device__ __forceinline__ Group start_of_step() {
    Group h;
    start_.project(h, chain_.ends, x_, x_stride_, chain_.tokens, rows_, chain_.width);
    const int column = Group::column(0), c = column - first_column_;
    if (c >= 0 && c < columns_ && column < chain_.width) {
#pragma unroll
      for (int row = 0; row < kTogether; ++row) {
        if (row < rows_) store_four(own_h_ + row * columns_ + c, h.v[row][0]);
      }
    }
    return h;
  }

  __device__ __forceinline__ Group await_h(int block, int first) {
    if constexpr (kOwnStart) {
      if (block == 0) return start_of_step();
    }
    return await_rows_at(places_.h, first, h_written_);
  }

  // The first layer's operand.
  __device__ __forceinline__ void normalise(int block, const T* mods) {
    const Modulation<T> modulation = {blocks_[block].norm_weight, blocks_[block].norm_bias, mods, 3 * chain_.width,
                                      chain_.epsilon};
#pragma unroll 1
    for (int first = 0; first < rows_; first += kTogether) {
      const GroupModulation<kTogether, kChunks, T> early(modulation, first, rows_, chain_.width);
      const Group h = await_h(block, first);
      Statistics statistics[kTogether];
      group_statistics(h, shape_, chain_.width, chain_.epsilon, scratch_ + first * kRowWarps, statistics);
      store_operand(first,
                    [&](int row, int chunk) { return early.apply(row, chunk, h.v[row][chunk], statistics[row]); });
    }
    sync_block();
  }

  // ``value`` of the rows from ``first`` on that there are, into the operand.
  template <typename Value>
  __device__ __forceinline__ void store_operand(int first, const Value& value) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int column = Group::column(chunk);
      if (column >= chain_.width) continue;
#pragma unroll
      for (int row = 0; row < kTogether; ++row) {
        if (first + row < rows_) store_four(operand_ + (first + row) * stride_ + column, value(row, chunk));
      }
    }
  }

  __device__ __forceinline__ void await_activations() {
#pragma unroll 1
    for (int first = 0; first < rows_; first += kTogether) {
      const Group values = await_rows_at(places_.activations, first, activations_written_);
      store_operand(first, [&](int row, int chunk) { return values.v[row][chunk]; });
    }
    sync_block();
  }

  // Every warp's share of operand @ weights^T, into ``sums_`` [warps, Rows, columns].
  __device__ __forceinline__ void multiply(Supply& weights, typename Supply::Tile pieces) {
    constexpr int kSpan = Pieces<T>::kSpan;
    const int spans = Pieces<T>::spans(chain_.width), tiles = columns_ / kTileColumns;
    const bool whole = weights.whole_tiles();
    const T* start = operand_ + warp() * spans * kSpan + lane() % 4 * Pieces<T>::kPiece;
    for (int tile = 0; tile < tiles; ++tile) {
      TileSum<T, Rows> sum;
      if (whole) {
        if (!Supply::kAhead || tile > 0) pieces = weights.next_tile();
        // Beyond the warp's spans the weights are zeros, and the operand another warp's or zeros.
#pragma unroll
        for (int span = 0; span < Supply::kSpans; ++span) {
          if (span >= 4 && span % 2 == 0 && span >= spans) break;
          sum.add(span % 2, pieces.v[span], start + span * kSpan, stride_);
        }
      } else {
        const T* a = start;
        // Not unrolled: a ring takes much code.
#pragma unroll 1
        for (int span = 0; span < spans; ++span, a += kSpan) sum.add(0, weights.next(), a, stride_);
      }
      sum.store(sums_ + warp() * Rows * columns_ + tile * kTileColumns, columns_);
    }
    sync_block();
  }

  __device__ __forceinline__ float layer_value(int layer, const Item& i) const {
    return sum_of_warps(sums_ + i.index, Rows * columns_, biases_[layer * columns_ + i.c]);
  }

  __device__ __forceinline__ void pass_on_activations(int block) {
    ++activations_written_;
    items_.for_each([&](const Item& i) {
      pass_on_at(places_.activations + i.row * chain_.width + i.column, silu(layer_value(2 * block, i)),
                 activations_written_);
    });
  }

  // Weights that stream by have driven out of the L2 cache what is read once a step: ask for that of the next block of
  // the network, or of the end of the step and the start of the next, each block of the grid for some of it.
  __device__ __forceinline__ void prefetch_for_next(int block, int step, const T* mods) const {
    const std::int64_t row_bytes = chain_.width * static_cast<std::int64_t>(sizeof(T)), norm_bytes = 4 * chain_.width;
    const bool last = block == chain_.depth - 1;
    if (last) {
      const std::int64_t row = static_cast<std::int64_t>(step - chain_.first) * rows_;
      prefetch_together(static_cast<const T*>(chain_.final_mods) + row * 2 * chain_.width, rows_ * 2 * row_bytes);
      if (step == chain_.start) return;
      mods = static_cast<const T*>(chain_.mods) + (row - rows_) * 3 * chain_.width;
    } else {
      mods += chain_.mods_block;
    }
    const auto& next = blocks_[last ? 0 : block + 1];
    prefetch_together(mods, rows_ * 3 * row_bytes);
    prefetch_together(next.norm_weight, norm_bytes);
    prefetch_together(next.norm_bias, norm_bytes);
  }

  // 0 beyond the last value.
  __device__ __forceinline__ float gate_at(const T* mods, const Item& i) const {
    if (!items_.exists(i)) return 0.0f;
    return to_float(mods[(3 * i.row + 2) * chain_.width + i.column]);
  }

  // ``gate`` is that of the thread's first value, asked for early.
  __device__ __forceinline__ void add_residual(int block, const T* mods, float gate) {
    const bool last = block == chain_.depth - 1;
    const std::int64_t place = last ? places_.final_h : places_.h;
    const unsigned times = last ? ++final_h_written_ : ++h_written_;
    items_.for_each([&](const Item& i) {
      const float strength = i.index == items_.first().index ? gate : gate_at(mods, i);
      write_h(place, i, fmaf(strength, layer_value(2 * block + 1, i), own_h_[i.index]), times);
    });
  }

  // The channels of the final layer that are this block's, if any are.
  __device__ __forceinline__ void final_layer(const T* mods) {
    ++outputs_written_;
    if (static_cast<int>(blockIdx.x) >= outputs_) return;
    const Modulation<T> modulation = {nullptr, nullptr, mods, 2 * chain_.width, chain_.epsilon};
#pragma unroll 1
    for (int first = 0; first < rows_; first += kTogether) {
      const GroupModulation<kTogether, kChunks, T> early(modulation, first, rows_, chain_.width);
      int output = static_cast<int>(blockIdx.x);
      auto weights = final_weights(output);
      float bias = chain_.ends.final_bias[output];
      Group a = await_rows_at(places_.final_h, first, final_h_written_);
      Statistics statistics[kTogether];
      group_statistics(a, shape_, chain_.width, chain_.epsilon, scratch_ + first * kRowWarps, statistics);
#pragma unroll
      for (int row = 0; row < kTogether; ++row) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          if (first + row >= rows_ || Group::column(chunk) >= chain_.width) continue;
          a.v[row][chunk] = early.apply(row, chunk, a.v[row][chunk], statistics[row]);
        }
      }
      while (output < outputs_) {
        group_products(a, weights, partial_);
        sync_block();
        const int row = first + thread();
        if (thread() < kTogether && row < rows_) {
          pass_on_at(places_.outputs + static_cast<std::int64_t>(row) * 2 * chain_.channels + output,
                     sum_of_warps(partial_ + thread() * kRowWarps, 1, bias), outputs_written_);
        }
        output += static_cast<int>(gridDim.x);
        if (output < outputs_) {
          weights = final_weights(output);
          bias = chain_.ends.final_bias[output];
        }
        sync_block();  // the partial sums are used again
      }
    }
  }

  // A thread's part of one row of the final layer.
  __device__ __forceinline__ RowGroup<1, kChunks> final_weights(int output) const {
    RowGroup<1, kChunks> weights = {};
    const float* weight = chain_.ends.final_weight + static_cast<std::int64_t>(output) * chain_.width;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int column = Group::column(chunk);
      if (column < chain_.width) weights.v[0][chunk] = load_four(weight + column);
    }
    return weights;
  }

  __device__ __forceinline__ const std::uint32_t* output_word(int row, int output) const {
    return read_ + places_.outputs + row * 2 * chain_.channels + output;
  }

  // x after the step, in every block.
  __device__ __forceinline__ void update(int step) {
    const int channels = chain_.channels;
    const bool guided = chain_.groups == 2;
    for (int i = thread(); i < chain_.tokens * channels; i += kChainThreads) {
      const int token = i / channels, channel = i % channels;
      const float noise = step > 0 ? noise_at(chain_.noise, step, token, channel, channels) : 0.0f;
      const StepTable table = chain_.tables[step];
      const float scales[kMostGroups - 1] = {guided ? chain_.scale[token] : 1.0f}, temperature = *chain_.temperature;
      const Limits limits(chain_.clip, channel, channels);
      // What there is none of is the first word once more.
      const auto* word = output_word(token, channel);
      const std::uint32_t* const words[] = {word, chain_.learned ? output_word(token, channels + channel) : word,
                                            guided ? output_word(chain_.tokens + token, channel) : word};
      float values[3];
      await(words, values, outputs_written_ & 1, watchdog_);
      const float out = guided_output<2>({{values[0], values[2], 0.0f}, 0.0f}, chain_.groups, scales);
      float& x = x_[token * x_stride_ + channel];
      const Step after = reverse_step(x, out, values[1], table, chain_.learned, limits, temperature, noise, step == 0);
      x = after.x;
      log_stds_[i] = after.log_std;
      if (step > 0) path_[i] += after.log_std;
    }
  }

  __device__ __forceinline__ void store_results() {
    if (blockIdx.x != 0) return;
    fence();  // what came from who gave up came after the flag
    const bool broken = load_relaxed(reinterpret_cast<const std::uint32_t*>(chain_.error)) != 0;
    const int channels = chain_.channels;
    for (int i = thread(); i < chain_.tokens * channels; i += kChainThreads) {
      chain_.x[i] = broken ? NAN : x_[i / channels * x_stride_ + i % channels];
      if (chain_.start == 0) chain_.log_std[i] = log_stds_[i];
      chain_.path[i] += path_[i];
    }
  }

  const Persistent& chain_;
  int columns_, first_column_, rows_, outputs_, stride_, x_stride_;
  Items items_;
  ExchangeLayout places_;
  const std::uint32_t* read_;  // the copy of the exchange that this block reads
  GroupShape<kChunks> shape_;
  StepStart start_;
  Watchdog watchdog_;
  unsigned h_written_ = 0, activations_written_ = 0, final_h_written_ = 0, outputs_written_ = 0;
  unsigned char* ring_;
  T* operand_;
  float *sums_, *own_h_, *biases_, *input_weight_, *input_bias_, *x_, *log_stds_, *path_, *partial_;
  Moments* scratch_;
  BlockWeights* blocks_;
  const void** layers_;
};

template <typename T, int Rows, int MaxWidth, bool Resident>
__global__ void __launch_bounds__(kChainThreads, 1) persistent_kernel(Persistent chain, PersistentPlan plan) {
  ChainBlock<T, Rows, MaxWidth, Resident>(chain, plan).run(plan.stage_pieces);
}

}  // namespace cspd
