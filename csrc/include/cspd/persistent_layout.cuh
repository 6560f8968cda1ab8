// Where the persistent kernel keeps what: in a block's shared memory, and between the blocks.
#pragma once

#include "cspd/rows.cuh"
#include "cspd/weights.cuh"

namespace cspd {

// Byte offsets into a block's shared memory, each a multiple of 16.
struct SharedLayout {
  std::size_t weights, operand, sums, own_h, biases, input_weight, input_bias, x, log_stds, path, scratch, blocks,
      layers, bytes;
};

// Values from one row of a layer's operand to the next. The last warps' spans may lie beyond W, and rows start on
// different banks.
template <typename T>
CSPD_HD int operand_stride(int width) {
  return kChainWarps * Pieces<T>::spans(width) * Pieces<T>::kSpan + 64 / static_cast<int>(sizeof(T));
}

template <typename T>
CSPD_HD SharedLayout shared_layout(int rows, int tokens, int channels, int width, int depth, int columns,
                                   int weight_slots) {
  std::size_t next = 0;
  const auto take = [&next](std::size_t bytes) {
    const std::size_t at = next;
    next += (bytes + 15) / 16 * 16;
    return at;
  };
  SharedLayout layout;
  layout.weights = take(static_cast<std::size_t>(weight_slots) * kChainThreads * kPieceBytes);
  layout.operand = take(rows * operand_stride<T>(width) * sizeof(T));
  layout.sums = take(kChainWarps * rows * columns * sizeof(float));
  layout.own_h = take(rows * columns * sizeof(float));
  layout.biases = take(2 * depth * columns * sizeof(float));
  layout.input_weight = take(columns * channels * sizeof(float));
  layout.input_bias = take(columns * sizeof(float));
  layout.x = take(tokens * channels * sizeof(float));
  layout.log_stds = take(tokens * channels * sizeof(float));
  layout.path = take(tokens * sizeof(float));
  layout.scratch = take(3 * kRowWarps * sizeof(float));
  layout.blocks = take(depth * sizeof(BlockWeights));
  layout.layers = take(2 * depth * sizeof(void*));
  layout.bytes = next;
  return layout;
}

// Places of the exchange buffer. What the last network block leaves in h, ``final_h``, has one of its own: not every
// block shows that it has read it (exchange.cuh) before the next step's h is written, but all do within that step.
struct ExchangeLayout {
  std::int64_t h, activations, final_h, outputs, words;
};

CSPD_HD ExchangeLayout exchange_layout(int rows, int channels, int width) {
  const std::int64_t row_words = static_cast<std::int64_t>(rows) * width;
  return {0, row_words, 2 * row_words, 3 * row_words, (3 * row_words + 2 * rows * channels + 3) / 4 * 4};
}

}  // namespace cspd
