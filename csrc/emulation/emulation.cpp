// Some compilers check a longjmp by default, and take one from a fiber's stack to another's for a damaged one.
#undef _FORTIFY_SOURCE
#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <mutex>
#include <random>

namespace cspd::emulation {
namespace {

constexpr std::size_t kStackBytes = 64 << 10;
constexpr int kWarp = 32;
constexpr int kSleep = 40;  // rounds: longer than the others take from one word of this block's to the next

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

// Threads that wait for each other, and what they show: two sets in turn, as some still read one while others write
// the next.
struct Meeting {
  int size = 0, arrived = 0;
  unsigned turn = 0;
  Payload shown[2][kWarp];
};

struct Block {
  std::vector<unsigned char> shared;
  Meeting whole;
  std::vector<Meeting> warps;
};

struct Fiber {
  Index thread, block;
  Block* home;
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf place;
  bool started = false, ended = false, waited = false;
  const Meeting* waits_for = nullptr;
  unsigned waits_turn = 0;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;

  bool ready() const { return !ended && (waits_for == nullptr || waits_for->turn != waits_turn); }
};

std::mutex one_at_a_time;
const std::function<void()>* body_of_all = nullptr;
Fiber* current = nullptr;
jmp_buf scheduler;

void enter() {
  (*body_of_all)();
  current->ended = true;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) void leave() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

// Not inlined, like all that calls setjmp or getcontext: its caller could lose variables.
__attribute__((noinline)) void prepare(Fiber& fiber, char* stack) {
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stack;
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void meet(Meeting& meeting) {
  const unsigned turn = meeting.turn;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.turn;
    return;
  }
  current->waits_for = &meeting;
  current->waits_turn = turn;
  leave();
  current->waits_for = nullptr;
}

std::uint64_t seed() {
  const char* text = std::getenv("CSPD_EMULATION_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 0;
}

// Run blocks [first, last) to their end, all at the same time.
bool run_blocks(std::int64_t first, std::int64_t last, int threads, std::size_t shared_bytes, bool early,
                std::vector<std::unique_ptr<char[]>>& stacks, std::mt19937_64& random) {
  std::vector<Block> blocks(last - first);
  std::vector<Fiber> fibers(blocks.size() * threads);
  const int warps = (threads + kWarp - 1) / kWarp;
  while (stacks.size() < fibers.size()) stacks.emplace_back(new char[kStackBytes]);
  for (std::size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    Block& block = blocks[i / threads];
    const auto thread = static_cast<unsigned>(i % threads);
    if (thread == 0) {
      block.shared.assign(shared_bytes + 16, 0xff);
      block.whole.size = threads;
      block.warps.resize(warps);
      for (int w = 0; w < warps; ++w) block.warps[w].size = std::min(kWarp, threads - w * kWarp);
    }
    fiber.thread = {thread};
    fiber.block = {static_cast<unsigned>(first + static_cast<std::int64_t>(i / threads))};
    fiber.home = &block;
    prepare(fiber, stacks[i].get());
  }
  // Warps in a new order every round, threads of a warp from either end. Now and then a warp sits some rounds out, so
  // that others get ahead of it by more than what lies between two waits; a round after one without any progress is for
  // all. And one block of several, or one warp of it, sleeps for longer, then another: the others get as far as they
  // can without it.
  std::size_t asleep = blocks.size(), one_asleep = ~std::size_t{0};
  int round = 0;
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < fibers.size(); i += kWarp) order.push_back(i);
  std::size_t left = fibers.size();
  std::vector<unsigned> sits_out(order.size());
  bool for_all = false;
  while (left > 0) {
    std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    if (blocks.size() > 1 && round++ % kSleep == 0) {
      asleep = random() % (blocks.size() + 1);  // the last one: nobody
      one_asleep = asleep < blocks.size() && random() % 2 ? asleep * warps + random() % warps : order.size();
    }
    for (const std::size_t start : order) {
      if (one_asleep < order.size() ? start / kWarp == one_asleep : start / threads == asleep) {
        moved = true;
        continue;
      }
      const std::size_t count = std::min<std::size_t>(kWarp, fibers.size() - start);
      const auto drawn = random();
      unsigned& rounds = sits_out[start / kWarp];
      if (rounds == 0 && drawn % 16 < 2) rounds = drawn >> 8 & 15;
      if (!for_all && rounds > 0) {
        --rounds;
        continue;
      }
      const bool backwards = drawn >> 16 & 1;
      for (std::size_t k = 0; k < count; ++k) {
        Fiber& fiber = fibers[start + (backwards ? count - 1 - k : k)];
        if (!fiber.ready()) continue;
        moved = true;
        resume(fiber);
        left -= fiber.ended;
      }
    }
    if (!moved && for_all) return false;
    for_all = !moved;
  }
  return !early || std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.waited; });
}

}  // namespace

std::function<void()> unfinished;

bool run(std::int64_t blocks, int threads, std::size_t shared_bytes, bool together, bool early,
         const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  std::mt19937_64 random(seed());
  std::vector<std::unique_ptr<char[]>> stacks;
  body_of_all = &body;
  gridDim = {static_cast<unsigned>(blocks)};
  blockDim = {static_cast<unsigned>(threads)};
  if (together) return run_blocks(0, blocks, threads, shared_bytes, early, stacks, random);
  for (std::int64_t block = 0; block < blocks; ++block) {
    if (!run_blocks(block, block + 1, threads, shared_bytes, early, stacks, random)) return false;
  }
  return true;
}

const Payload* exchange(const Payload& mine) {
  Meeting& warp = current->home->warps[threadIdx.x / kWarp];
  Payload* shown = warp.shown[warp.turn & 1];
  shown[threadIdx.x % kWarp] = mine;
  meet(warp);
  return shown;
}

void* shared_memory() {
  const auto at = reinterpret_cast<std::uintptr_t>(current->home->shared.data());
  return reinterpret_cast<void*>((at + 15) & ~std::uintptr_t{15});
}

void sync_block() { meet(current->home->whole); }

void wait_for_earlier() {
  current->waited = true;
  if (!unfinished) return;
  meet(current->home->whole);
  if (!unfinished) return;  // somebody has done it
  unfinished();
  unfinished = nullptr;
}

void yield() { leave(); }

void copy_later(void* to, const void* from, bool valid) { current->open.push_back({to, from, valid}); }

void commit_copies() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void wait_for_copies(int pending) {
  auto& groups = current->groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

std::uint64_t nanoseconds() {
  timespec now = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1000000000 + static_cast<std::uint64_t>(now.tv_nsec);
}

}  // namespace cspd::emulation
