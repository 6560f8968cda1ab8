// What the launches of csrc/*.cu are given: plain structures of raw pointers to device memory.
//
// N tokens of C channels, with K candidates each where that is said. A denoising chain works on M = G N rows of width
// W: under guidance there are G = 2 or 3 groups of N, the fully conditional one first. A network block goes through H
// values a row. T is the type of GEMM operands.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cspd {

// A chain's last step: [N, C], [N, C], [N].
struct Chain {
  const float *mean, *log_std, *path;
};

struct Judged {
  const float* x;  // [N, C]
  Chain draft, target;
  const float* relaxations;  // [N], or null where ``relaxation`` is every token's
  float relaxation;
  std::int64_t tokens;
  int channels;
  bool released;         // the path term with the released code's sign
  bool aligned = false;  // rows of [N, C] start on 16-byte boundaries; found out at the launch
};

struct Redraw {
  const float* sample;       // [N, C], the target's own draw
  const std::int64_t* rows;  // [N] addresses of the random numbers
  std::uint64_t seed;
  int max_tries;
  float* token;                         // [N, C]
  bool* accepted;                       // [N]
  std::int32_t* tries;                  // [N]
  float* log_ratio;                     // [N]
  const std::int64_t* seeds = nullptr;  // [1], read by the kernel in place of ``seed``; or null
  int tokens_per_warp = 0;              // chosen at the launch
};

// K candidates a token, tried in order: x is then [N, K, C], log_ratio [N, K], and what belongs to a candidate [N, K,
// C] and [N, K], or as above where all candidates share it.
struct Candidates {
  int count = 1;                     // K
  std::int32_t* accepted = nullptr;  // [N], which one was, -1: none; may be null where K = 1
  // How many rows a token has of each matrix: 1 or K.
  struct Rows {
    int mean = 1, log_std = 1, path = 1;
  } draft, target;
  int relaxations = 1, sample = 1;
  bool chains = false;  // whether a chain has K; found out at the launch
};

// Calls of PyTorch's normal_() one after the other, each on ``numel`` values of its own.
struct Randn {
  std::uint64_t seed, counter;  // of the generator; the counter is a quarter of its offset
  std::int64_t numel;
  int calls;
  int grid, rounds;  // blocks that PyTorch would launch a call, and how often each of their threads draws
  bool reversed;     // the first call's values come last
};

constexpr int kMostGroups = 3;

// Coefficients of one reverse step; the log standard deviations are those at v = 1 and at v = -1, the lower one where
// the variance is not learned. -inf: the step adds no noise.
struct alignas(16) StepTable {
  float x0_x, x0_out, mean_x0, mean_x, log_std_upper, log_std_lower, unused[2];
};

// What turns a row of h into a layer's operand: norm(h) (1 + scale) + shift. The norm is LayerNorm, or, with ``rms``,
// the same of values whose mean is taken to be 0.
template <typename T>
struct Modulation {
  const float *gain, *offset;  // [W] of an affine norm, or null
  const T* mods;               // [M, stride]: shift, scale, and further columns
  int stride;
  float epsilon;
  bool rms = false;
};

// The same of any operand type. ``operand`` is of that type where the norm is affine, else float32.
struct AnyModulation {
  const float *gain, *offset;
  const void* mods;
  float epsilon;
  bool rms = false;
};

// Modulations that kernels to come will read, and that the one at hand asks the second-level cache for: they come from
// device memory, which is otherwise idle here. Nothing where the pointers are null.
struct Ahead {
  const void* gates;  // [M, 3 W], the third column block
  const void* next;   // [M, next_stride], the first two column blocks: shift and scale of the next layer
  int next_stride;
  int width;  // W
};

// A layer of K values in and ``columns`` out, whose product and what follows are one kernel, with P = operand weight^T
// + bias: activations = silu(P) or, where ``h`` is not null, h += gate P. A swiglu layer has two rows of weights for
// every column, those that go through silu all before the others: activations = silu(P_0) P_1. Of type T, a
// half-precision one, but for h.
struct Product {
  const void *operand, *weight, *bias;  // [M, K], [columns, K], [columns]; swiglu: [2 columns, K], [2 columns]
  void* activations;                    // [M, columns]
  const void* mods;                     // [M, 3 columns]: the gate is the third column block
  float* h;                             // [M, columns]
  Ahead ahead;
  std::int64_t rows;
  int inner, columns;  // K, and of the output
  bool swiglu = false;
  const std::int32_t* live = nullptr;  // see ``idle``
};

// Where a step's noise comes from: stored, or addressed where ``noise`` is null.
struct Noise {
  const float* noise;  // [N, C] of step 0, and ``stride`` floats further for every step
  std::int64_t stride;
  const std::int64_t *seed, *addresses;  // [1], [N]
};

// The ends of the network, float32 whatever T.
struct Ends {
  const float *input_weight, *input_bias;  // [W, C], [W]
  const float *final_weight, *final_bias;  // [2 C, W] what x0 is made of and v, or [C, W] with a fixed variance
};

struct Update {
  const float* operand;  // [M, W], of the final layer
  Ends ends;
  const StepTable* table;            // of this step
  const float *temperature, *scale;  // [1], [G - 1, N]
  const float* clip;                 // [2, C], the least and the most that x0 may be; or null
  float* x;                          // [N, C], in place
  Noise noise;
  float *log_std, *path;  // [N, C] of step 0, without the temperature; [N, C], added to by the others
  std::int64_t tokens;
  int step, groups, channels, width;
  bool learned;
  const std::int32_t* live = nullptr;  // see ``idle``
};

// The final layer of a chain's network at all of its steps, or of the network alone: then T = G = 1, and C is all that
// it puts out.
struct NetworkOutput {
  const float* operand;  // [T M, W]; of token t = i N + n and group g the row (i G + g) N + n
  const float *final_weight, *final_bias;
  float *out, *v;               // [G, T N, C], [T N, C] of the first group or null
  std::int64_t tokens, period;  // T N, N
  int groups, channels, width;
  const std::int32_t* live;  // nothing is done where it is 0
};

// A sweep over all T steps of N tokens: what the network puts out at the inputs x becomes the next inputs.
struct Sweep {
  const float *out, *v;                      // [G, T, N, C], [T, N, C]; v is null with a fixed variance
  const float *start, *scale, *temperature;  // [N, C], x_T; [G - 1, N]; [1]
  const float* clip;                         // [2, C], or null
  Noise noise;
  const StepTable* tables;                       // [T]
  float *x, *before, *x0;                        // [T, N, C] and, x0, [G, T, N, C], in place
  float *mean, *log_std, *path, *change, *size;  // [N, C]
  const std::int32_t *settled, *done, *live;     // [N], [1], [1]
  std::int64_t tokens;
  int steps, groups, channels;
  bool begin, guessed;  // the inputs of the first sweep, from the noise alone; or all but one are there
};

struct Settle {
  const float *change, *size, *tolerance;  // [N, C], [N, C], [1]
  const std::int32_t* count;               // [1], tokens of the call
  std::int32_t *settled, *sweeps;          // [N]
  std::int32_t *done, *live, *left;        // [1]: sweeps done; whether there is to be another; whether a token is left
  std::int64_t tokens;
  int steps, channels, limit;
  bool begin;
};

// One block of the network, as a table of addresses in device memory holds it.
struct BlockWeights {
  const float *norm_weight, *norm_bias;  // [W]
  const void *weight0, *bias0;           // [W, W], [W], of type T
  const void *weight1, *bias1;
};

// How the persistent kernel is cut for a device.
struct PersistentPlan {
  int blocks;        // of the grid, all at the same time; 0 where it does not fit
  int columns;       // of every layer that a block makes, a multiple of 8
  int stage_pieces;  // pieces of 16 bytes a thread holds in one stage of its weights
  bool resident;     // whether a block's weights of all layers stay in its shared memory
  std::size_t shared_bytes;
  std::int64_t exchange_words;  // of 4 bytes, through which blocks pass values to each other
};

struct Persistent {
  const BlockWeights* blocks;  // [D], in device memory
  const void* mods;  // [D, ..., 3 W] of type T, rows of step i from (i - first) M, blocks ``mods_block`` apart
  std::int64_t mods_block;
  const void* final_mods;  // [..., 2 W]
  Ends ends;
  const StepTable* tables;  // [T]
  const float *temperature, *scale, *clip;
  float* x;  // [N, C], in place
  Noise noise;
  float *log_std, *path;
  std::uint32_t* exchange;                     // [exchange_words]
  std::int32_t* error;                         // [1], set where a block waited too long; x is then NaN
  int tokens, groups, channels, depth, width;  // one or two groups
  bool learned;
  float epsilon;
  int first, start, stop;  // runs the steps stop - 1 .. start
  std::uint64_t timeout_ns;
  int silent;  // a block that passes nothing on, for the watchdog's test; -1: none
};

}  // namespace cspd
