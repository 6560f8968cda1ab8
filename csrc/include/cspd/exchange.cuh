// Values that the blocks of one launch pass to each other, each its own ready flag.
//
// A value is a float32 word whose lowest bit says how often, modulo 2, the place has been written: the reader knows
// the bit that it waits for and reads the word until it is there. So no barrier, no fence and no second trip to
// memory stand between writing and reading, and the value is changed by one unit in the last place at most.
//
// It takes memory that is zero at the start, where the first writing has bit 1, and two things of its users. A thread
// reads every writing of its words: reads of one place by one thread are in order (PTX: coherence), so what it finds is
// the latest writing or the one before, which has the other bit. And a place is written again only by a block that has
// since read something that depends, directly or by way of other blocks, on what every block that reads the place has
// passed on after all of its threads had: to read the new writing there, a thread would have to read what depends on
// its own reading (PTX: no thin air).
//
// Who waits too long sets an error flag; then nobody waits any more, and values mean nothing.
#pragma once

#include "cspd/row_group.cuh"

namespace cspd {

class Watchdog {
 public:
  __device__ __forceinline__ Watchdog(std::int32_t* error, std::uint64_t timeout_ns)
      : error_(reinterpret_cast<std::uint32_t*>(error)), timeout_ns_(timeout_ns) {}

  // A wait begins.
  __device__ __forceinline__ void start() { tries_ = 0; }

  // Whether to look again.
  __device__ __forceinline__ bool patient() {
    if (gave_up_) return false;
    pause();
    if (++tries_ % kTriesPerLook != 0) return true;
    const std::uint64_t now = nanoseconds();
    if (tries_ == kTriesPerLook) started_ = now;
    if (now - started_ > timeout_ns_) {
      store_relaxed(error_, 1);
      fence();  // before anything that is computed from what has not come
      gave_up_ = true;
    } else if (load_relaxed(error_) != 0) {
      fence();  // likewise
      gave_up_ = true;
    }
    return !gave_up_;
  }

 private:
  static constexpr unsigned kTriesPerLook = 64;
  std::uint32_t* error_;
  std::uint64_t timeout_ns_, started_ = 0;
  unsigned tries_ = 0;
  bool gave_up_ = false;
};

__device__ __forceinline__ void pass_on(std::uint32_t* word, float value, unsigned bit) {
  store_relaxed(word, (bit_cast<std::uint32_t>(value) & ~1u) | bit);
}

// Single words, asked for together.
template <int Count>
__device__ __forceinline__ void await(const std::uint32_t* const (&words)[Count], float (&values)[Count], unsigned bit,
                                      Watchdog& watchdog) {
  std::uint32_t got[Count], ones;
  watchdog.start();
  do {
#pragma unroll
    for (int i = 0; i < Count; ++i) got[i] = load_relaxed(words[i]);
    ones = 0;
#pragma unroll
    for (int i = 0; i < Count; ++i) ones += got[i] & 1;
  } while (ones != Count * bit && watchdog.patient());
#pragma unroll
  for (int i = 0; i < Count; ++i) values[i] = bit_cast<float>(got[i]);
}

// A thread's part of rows of which there are ``rows``; all of it is asked for at once.
template <int Rows, int Chunks>
__device__ __forceinline__ RowGroup<Rows, Chunks> await_rows(const std::uint32_t* words, int rows, int width,
                                                             unsigned bit, Watchdog& watchdog) {
  using Group = RowGroup<Rows, Chunks>;
  Vector<std::uint32_t, 4> got[Rows][Chunks];
  std::uint32_t ones;  // counted, as ptxas puts the tests of single words between the loads
  watchdog.start();
  do {
#pragma unroll
    for (int row = 0; row < Rows; ++row) {
#pragma unroll
      for (int chunk = 0; chunk < Chunks; ++chunk) {
        const auto* at = reinterpret_cast<const Vector<std::uint32_t, 4>*>(words + row * width + Group::column(chunk));
        got[row][chunk] = load_relaxed_if(row < rows && Group::column(chunk) < width, at, bit);
      }
    }
    ones = 0;
#pragma unroll
    for (int row = 0; row < Rows; ++row) {
#pragma unroll
      for (int chunk = 0; chunk < Chunks; ++chunk) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ones += got[row][chunk].v[i] & 1;
      }
    }
  } while (ones != 4 * Rows * Chunks * bit && watchdog.patient());
  Group group;
#pragma unroll
  for (int row = 0; row < Rows; ++row) {
#pragma unroll
    for (int chunk = 0; chunk < Chunks; ++chunk) {
      const bool there = row < rows && Group::column(chunk) < width;
#pragma unroll
      for (int i = 0; i < 4; ++i) group.v[row][chunk].v[i] = there ? bit_cast<float>(got[row][chunk].v[i]) : 0.0f;
    }
  }
  return group;
}

}  // namespace cspd
