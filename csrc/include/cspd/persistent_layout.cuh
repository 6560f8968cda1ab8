// Where the persistent kernel keeps what: in a block's shared memory, and between the blocks.
#pragma once

#include "cspd/row_group.cuh"
#include "cspd/weights.cuh"

namespace cspd {

// Byte offsets into a block's shared memory, each a multiple of 16.
struct SharedLayout {
  std::size_t weights, operand, sums, own_h, biases, input_weight, input_bias, x, log_stds, path, scratch, partial,
      blocks, layers, bytes;
};

constexpr int kNarrowWidth = 4 * kRowThreads, kMostWidth = 2048;

// Widths as the kernel is compiled for.
template <typename T>
CSPD_HD constexpr int compiled_width(int width) {
  return sizeof(T) == 2 && width <= kNarrowWidth ? kNarrowWidth : kMostWidth;
}

// Whether every block computes all of a step's first h for itself. That takes 64 fused products a row and thread, so
// 128 cycles a row, and a wide row's weights are too many for the registers; a hand-over takes about 1,400 cycles for
// any few rows.
CSPD_HD constexpr bool has_own_start(int rows, int width) { return rows <= 4 && width <= kNarrowWidth; }

// From one token's x to the next: 0 beyond the channels, as far as their weights stay in registers (step_start.cuh).
CSPD_HD int x_stride(int channels) { return channels <= 16 ? 16 : (channels + 3) / 4 * 4; }

// Values from one row of a layer's operand to the next. A warp may read more spans than its own, as many as the widest
// layer has. An odd number of spans, each 64 bytes: of two rows that are read together each has half of the banks.
template <typename T>
CSPD_HD int operand_stride(int width) {
  const int spans = Pieces<T>::spans(width), most = Pieces<T>::spans(compiled_width<T>(width));
  return (((kChainWarps - 1) * spans + (sizeof(T) == 2 ? most : spans)) | 1) * Pieces<T>::kSpan;
}

// Pieces of a thread in shared memory, where weights stay.
CSPD_HD int resident_slots(int rows, int depth, int columns, int layer_pieces) {
  return (2 * depth - (keeps_layer(rows, columns) ? 1 : 0)) * layer_pieces;
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
  const int projected = has_own_start(rows, compiled_width<T>(width)) ? 0 : columns;
  layout.input_weight = take(projected * channels * sizeof(float));
  layout.input_bias = take(projected * sizeof(float));
  layout.x = take(tokens * x_stride(channels) * sizeof(float));
  layout.log_stds = take(tokens * channels * sizeof(float));
  layout.path = take(tokens * channels * sizeof(float));
  layout.scratch = take(rows * kRowWarps * sizeof(Moments));
  layout.partial = take(rows * kRowWarps * sizeof(float));
  layout.blocks = take(depth * sizeof(BlockWeights));
  layout.layers = take(2 * depth * sizeof(void*));
  layout.bytes = next;
  return layout;
}

// How many copies of the exchange buffer there are. A writer writes all of them, a reader reads one: of few rows, all
// blocks ask for the same few lines of memory, which then take turns.
CSPD_HD constexpr int exchange_copies(int rows) { return rows <= 2 ? 2 : 1; }

// Places of one copy of the exchange buffer, and its words. What the last network block leaves in h, ``final_h``, has a
// place of its own: only who computes outputs reads it, and readers of a place read every writing.
//
// Why a block W may write a place again, and no block R still waits for what was there (exchange.cuh):
// - activations, within a step: W has read the h that follows them from every R, and R passes its columns of h on after
//   it has read them. From a step to the next: W has read the outputs. Whoever made those had read final_h from every
//   R, which R passed on after it had read the step's last activations.
// - h: W has read the activations that follow it from every R, and R passes those on after it has read h. The first h
//   of a step, where it is exchanged, follows the last one of the step before, so this holds for it, too.
// - final_h: W has read the first activations of its own step from every R, which has by then ended the step before.
// - outputs: W has read final_h of its own step from every R, which has by then ended the step before.
// A block ends reading before it passes on: between the two all of its threads meet. A launch begins with zeros, and a
// copy is a place like another: its readers are some of the blocks.
struct ExchangeLayout {
  std::int64_t h, activations, final_h, outputs, words;
};

CSPD_HD ExchangeLayout exchange_layout(int rows, int channels, int width) {
  const std::int64_t row_words = static_cast<std::int64_t>(rows) * width;
  return {0, row_words, 2 * row_words, 3 * row_words, (3 * row_words + 2 * rows * channels + 31) / 32 * 32};
}

}  // namespace cspd
