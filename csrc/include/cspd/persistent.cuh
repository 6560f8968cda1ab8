// The whole denoising chain of a few tokens in one launch.
//
// A block makes ``columns`` columns of every layer, for all rows, with weights that stay in its shared memory or stream
// through it (weights.cuh). Between two layers every block needs every other's columns: they pass through global memory
// as values that are their own ready flags (exchange.cuh). LayerNorm and modulation of whole rows are done by every
// block for itself, as are the update of x and what else is cheap.
//
// Per reverse step: for each network block h -> activations -> h; h -> outputs of the final layer, spread over the
// blocks by channel; outputs -> x, in every block -> h. So 2 D + 2 exchanges.
#pragma once

#include "cspd/exchange.cuh"
#include "cspd/persistent_layout.cuh"
#include "cspd/posterior.cuh"

namespace cspd {

static_assert(kChainThreads == kRowThreads && kChainWarps == kRowWarps);

// ``Rows`` is the number of rows, rounded up to 2, 4, 8 or 16.
template <typename T, int Rows, bool Resident>
class ChainBlock {
  static constexpr int kThreadsPerRow = Rows >= 8 ? kWarp : kRowThreads / Rows;  // at most 128
  static constexpr int kRowsAtOnce = kRowThreads / kThreadsPerRow;
  static constexpr int kPasses = (Rows + kRowsAtOnce - 1) / kRowsAtOnce;
  using Row = RowPart<kThreadsPerRow>;

 public:
  __device__ __forceinline__ ChainBlock(const Persistent& chain, const PersistentPlan& plan)
      : chain_(chain),
        columns_(plan.columns),
        first_column_(static_cast<int>(blockIdx.x) * plan.columns),
        rows_(chain.tokens * chain.halves),
        outputs_(chain.learned ? 2 * chain.channels : chain.channels),
        stride_(operand_stride<T>(chain.width)),
        places_(exchange_layout(rows_, chain.channels, chain.width)),
        shape_(chain.width),
        watchdog_(chain.error, chain.timeout_ns) {
    const int layer_pieces = Pieces<T>::of_layer(chain.width, columns_);
    const int slots = Resident ? 2 * chain.depth * layer_pieces : kStages * plan.stage_pieces;
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
    scratch_ = reinterpret_cast<float*>(memory + layout.scratch);
    blocks_ = reinterpret_cast<BlockWeights*>(memory + layout.blocks);
    layers_ = reinterpret_cast<const void**>(memory + layout.layers);
    first_ = item(thread());
  }

  __device__ __forceinline__ void run(int stage_pieces) {
    load_addresses();
    sync_block();
    WeightSupply<T, Resident> weights(ring_, layers_, 2 * chain_.depth, chain_.stop - chain_.start, chain_.width,
                                      first_column_, columns_, stage_pieces);
    load_constants();
    sync_block();
    project();
    for (int step = chain_.stop - 1; step >= chain_.start; --step) {
      const std::int64_t row = static_cast<std::int64_t>(step - chain_.first) * rows_;
      for (int block = 0; block < chain_.depth; ++block) {
        const T* mods = static_cast<const T*>(chain_.mods) + block * chain_.mods_block + row * 3 * chain_.width;
        normalise(block, mods);
        multiply(weights, 2 * block);
        pass_on_activations(block);
        weights.end();
        const float gate = gate_at(mods, first_);
        await_activations();
        multiply(weights, 2 * block + 1);
        add_residual(block, mods, gate);
        weights.end();
      }
      final_layer(static_cast<const T*>(chain_.final_mods) + row * 2 * chain_.width);
      update(step);
      sync_block();
      if (step > chain_.start) project();
      if (step > 0) add_path();
    }
    store_results();
  }

 private:
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }

  // One of the block's values of a layer, in the order in which threads take them.
  struct Item {
    int index, row, c, column;  // column is that of the layer, c the block's
  };

  // Divides, which takes long: a thread's first item is found out once.
  __device__ __forceinline__ Item item(int index) const {
    return {index, index / columns_, index % columns_, first_column_ + index % columns_};
  }

  // ``use`` with every item of this thread that there is.
  template <typename Use>
  __device__ __forceinline__ void for_items(const Use& use) const {
    for (Item i = first_; i.index < rows_ * columns_; i = item(i.index + kChainThreads)) {
      if (i.column < chain_.width) use(i);
    }
  }

  __device__ __forceinline__ bool speaks() const { return static_cast<int>(blockIdx.x) != chain_.silent; }

  __device__ __forceinline__ int row_of(int pass) const { return thread() / kThreadsPerRow + pass * kRowsAtOnce; }

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
    for (int i = thread(); i < channels * columns_; i += kChainThreads) {  // [C, columns]: no two lanes on one bank
      const int column = first_column_ + i % columns_;
      input_weight_[i] = column < width ? chain_.ends.input_weight[column * channels + i / columns_] : 0.0f;
    }
    for (int i = thread(); i < columns_; i += kChainThreads) {
      input_bias_[i] = first_column_ + i < width ? chain_.ends.input_bias[first_column_ + i] : 0.0f;
    }
    for (int i = thread(); i < chain_.tokens * channels; i += kChainThreads) x_[i] = chain_.x[i];
    for (int i = thread(); i < chain_.tokens; i += kChainThreads) path_[i] = 0.0f;
  }

  // h of the block's columns, from x: the same for both halves.
  __device__ __forceinline__ void project() {
    ++h_written_;
    for_items([&](const Item& i) {
      const float* x = x_ + (i.row < chain_.tokens ? i.row : i.row - chain_.tokens) * chain_.channels;
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
    if (speaks()) pass_on(chain_.exchange + place, value, times & 1);
  }

  // A row that every block has columns of, as it comes in; modulations and the like are asked for before.
  __device__ __forceinline__ Row await_h(std::int64_t place, int row, unsigned times) {
    const auto* words = chain_.exchange + place + static_cast<std::int64_t>(row) * chain_.width;
    return await_row<kThreadsPerRow>(words, chain_.width, times & 1, watchdog_);
  }

  // The first layer's operand.
  __device__ __forceinline__ void normalise(int block, const T* mods) {
    const Modulation<T> modulation = {blocks_[block].norm_weight, blocks_[block].norm_bias, mods, 3 * chain_.width,
                                      chain_.epsilon};
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = row_of(pass);
      const bool mine = row < rows_;
      const ModulationPart<kThreadsPerRow, T> early(modulation, mine ? row : 0, chain_.width);
      Row h = {};
      if (mine) h = await_h(places_.h, row, h_written_);
      const auto statistics = row_statistics(h, shape_, chain_.width, chain_.epsilon, scratch_);
#pragma unroll
      for (int chunk = 0; chunk < Row::kChunks; ++chunk) {
        const int column = Row::column(chunk);
        if (!mine || column >= chain_.width) continue;
        store_four(operand_ + row * stride_ + column, early.apply(chunk, h.v[chunk], statistics));
      }
    }
    sync_block();
  }

  __device__ __forceinline__ void await_activations() {
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = row_of(pass);
      if (row >= rows_) continue;
      const auto* words = chain_.exchange + places_.activations + static_cast<std::int64_t>(row) * chain_.width;
      const auto values = await_row<kThreadsPerRow>(words, chain_.width, activations_written_ & 1, watchdog_);
#pragma unroll
      for (int chunk = 0; chunk < Row::kChunks; ++chunk) {
        const int column = Row::column(chunk);
        if (column < chain_.width) store_four(operand_ + row * stride_ + column, values.v[chunk]);
      }
    }
    sync_block();
  }

  // Every warp's share of operand @ weights^T, into ``sums_`` [warps, Rows, columns].
  __device__ __forceinline__ void multiply(WeightSupply<T, Resident>& weights, int layer) {
    weights.begin(layer);
    constexpr int kSpan = Pieces<T>::kSpan;
    const int spans = Pieces<T>::spans(chain_.width);
    const T* start = operand_ + warp() * spans * kSpan + lane() % 4 * Pieces<T>::kPiece;
    for (int tile = 0; tile < columns_ / kTileColumns; ++tile) {
      TileSum<T, Rows> sum;
      const T* a = start;
      if constexpr (Resident) {
        int span = 0;
#pragma unroll 2
        for (; span + 1 < spans; span += 2, a += 2 * kSpan) {
          sum.template add<0>(weights.next(), a, stride_);
          sum.template add<1>(weights.next(), a + kSpan, stride_);
        }
        if (span < spans) sum.template add<0>(weights.next(), a, stride_);
      } else {
        // Not unrolled: a ring takes much code.
#pragma unroll 1
        for (int span = 0; span < spans; ++span, a += kSpan) sum.template add<0>(weights.next(), a, stride_);
      }
      sum.store(sums_ + warp() * Rows * columns_ + tile * kTileColumns, columns_);
    }
    sync_block();
  }

  __device__ __forceinline__ float layer_value(int layer, const Item& i) const {
    float value = biases_[layer * columns_ + i.c];
#pragma unroll
    for (int w = 0; w < kChainWarps; ++w) value += sums_[w * Rows * columns_ + i.index];
    return value;
  }

  __device__ __forceinline__ void pass_on_activations(int block) {
    ++activations_written_;
    for_items([&](const Item& i) {
      pass_on_at(places_.activations + i.row * chain_.width + i.column, silu(layer_value(2 * block, i)),
                 activations_written_);
    });
  }

  // 0 beyond the last value.
  __device__ __forceinline__ float gate_at(const T* mods, const Item& i) const {
    if (i.row >= rows_ || i.column >= chain_.width) return 0.0f;
    return to_float(mods[(3 * i.row + 2) * chain_.width + i.column]);
  }

  // ``gate`` is that of the thread's first value, asked for early.
  __device__ __forceinline__ void add_residual(int block, const T* mods, float gate) {
    const bool last = block == chain_.depth - 1;
    const std::int64_t place = last ? places_.final_h : places_.h;
    const unsigned times = last ? ++final_h_written_ : ++h_written_;
    for_items([&](const Item& i) {
      const float strength = i.index == first_.index ? gate : gate_at(mods, i);
      write_h(place, i, fmaf(strength, layer_value(2 * block + 1, i), own_h_[i.index]), times);
    });
  }

  // The channels of the final layer that are this block's, if any are.
  __device__ __forceinline__ void final_layer(const T* mods) {
    ++outputs_written_;
    if (static_cast<int>(blockIdx.x) >= outputs_) return;
    const Modulation<T> modulation = {nullptr, nullptr, mods, 2 * chain_.width, chain_.epsilon};
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = row_of(pass);
      const bool mine = row < rows_;
      const ModulationPart<kThreadsPerRow, T> early(modulation, mine ? row : 0, chain_.width);
      int output = static_cast<int>(blockIdx.x);
      Row weights = final_weights(output), a = {};
      float bias = chain_.ends.final_bias[output];
      if (mine) a = await_h(places_.final_h, row, final_h_written_);
      const auto statistics = row_statistics(a, shape_, chain_.width, chain_.epsilon, scratch_);
#pragma unroll
      for (int chunk = 0; chunk < Row::kChunks; ++chunk) {
        if (mine && Row::column(chunk) < chain_.width) {
          a.v[chunk] = early.apply(chunk, a.v[chunk], statistics);
        }
      }
      while (output < outputs_) {
        float sum = 0.0f;
#pragma unroll
        for (int chunk = 0; chunk < Row::kChunks; ++chunk) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum = fmaf(a.v[chunk].v[i], weights.v[chunk].v[i], sum);
        }
        sum = sum_over_row<kThreadsPerRow>(sum, scratch_ + 2 * kRowWarps) + bias;
        if (mine && thread() % kThreadsPerRow == 0) {
          pass_on_at(places_.outputs + static_cast<std::int64_t>(row) * 2 * chain_.channels + output, sum,
                     outputs_written_);
        }
        output += static_cast<int>(gridDim.x);
        if (output < outputs_) {
          weights = final_weights(output);
          bias = chain_.ends.final_bias[output];
        }
        sync_block();  // the scratch is used again
      }
    }
  }

  // A thread's part of one row of the final layer, 0 where there is none.
  __device__ __forceinline__ Row final_weights(int output) const {
    Row weights = {};
    if (output >= outputs_) return weights;
    const float* weight = chain_.ends.final_weight + static_cast<std::int64_t>(output) * chain_.width;
#pragma unroll
    for (int chunk = 0; chunk < Row::kChunks; ++chunk) {
      const int column = Row::column(chunk);
      if (column < chain_.width) weights.v[chunk] = load_four(weight + column);
    }
    return weights;
  }

  __device__ __forceinline__ const std::uint32_t* output_word(int row, int output) const {
    return chain_.exchange + places_.outputs + row * 2 * chain_.channels + output;
  }

  // x after the step, in every block.
  __device__ __forceinline__ void update(int step) {
    const int channels = chain_.channels;
    const bool guided = chain_.halves == 2;
    for (int i = thread(); i < chain_.tokens * channels; i += kChainThreads) {
      const int token = i / channels, channel = i % channels;
      const float noise = step > 0 ? noise_at(chain_.noise, step, token, channel, channels) : 0.0f;
      const StepTable table = chain_.tables[step];
      const float scale = guided ? chain_.scale[token] : 1.0f, temperature = *chain_.temperature;
      // What there is none of is the word of eps once more.
      const auto* eps = output_word(token, channel);
      const std::uint32_t* const words[] = {eps, chain_.learned ? output_word(token, channels + channel) : eps,
                                            guided ? output_word(chain_.tokens + token, channel) : eps};
      float values[3];
      await(words, values, outputs_written_ & 1, watchdog_);
      const Output out = {values[0], chain_.learned ? values[1] : 0.0f, values[2]};
      const Step after = reverse_step(x_[i], out, table, guided, scale, temperature, noise, step == 0);
      x_[i] = after.x;
      log_stds_[i] = after.log_std;
    }
  }

  // After the update's wait; nobody waits for this.
  __device__ __forceinline__ void add_path() {
    for (int token = thread(); token < chain_.tokens; token += kChainThreads) {
      float sum = 0.0f;
      for (int channel = 0; channel < chain_.channels; ++channel) sum += log_stds_[token * chain_.channels + channel];
      path_[token] += sum;
    }
  }

  __device__ __forceinline__ void store_results() {
    if (blockIdx.x != 0) return;
    fence();  // what came from who gave up came after the flag
    const bool broken = load_relaxed(reinterpret_cast<const std::uint32_t*>(chain_.error)) != 0;
    for (int i = thread(); i < chain_.tokens * chain_.channels; i += kChainThreads) {
      chain_.x[i] = broken ? NAN : x_[i];
      if (chain_.start == 0) chain_.log_std[i] = log_stds_[i];
    }
    for (int token = thread(); token < chain_.tokens; token += kChainThreads) chain_.path[token] += path_[token];
  }

  const Persistent& chain_;
  int columns_, first_column_, rows_, outputs_, stride_;
  Item first_;
  ExchangeLayout places_;
  RowShape<kThreadsPerRow> shape_;
  Watchdog watchdog_;
  unsigned h_written_ = 0, activations_written_ = 0, final_h_written_ = 0, outputs_written_ = 0;
  unsigned char* ring_;
  T* operand_;
  float *sums_, *own_h_, *biases_, *input_weight_, *input_bias_, *x_, *log_stds_, *path_, *scratch_;
  BlockWeights* blocks_;
  const void** layers_;
};

template <typename T, int Rows, bool Resident>
__global__ void __launch_bounds__(kChainThreads, 1) persistent_kernel(Persistent chain, PersistentPlan plan) {
  ChainBlock<T, Rows, Resident>(chain, plan).run(plan.stage_pieces);
}

}  // namespace cspd
