// Checks for the programs in this folder: they print what fails and go on, and a program's exit code says whether any
// did.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

namespace check {

inline long done = 0, failed = 0;
inline std::string context;  // printed with a failure: which case of a loop it is

template <typename T>
std::string text(const T& value) {
  std::ostringstream out;
  out.precision(17);
  out << value;
  return out.str();
}

inline bool result(bool good, const char* file, int line, const std::string& what) {
  ++done;
  if (good) return true;
  constexpr long kPrinted = 40;
  if (++failed <= kPrinted) {
    std::printf("%s:%d: %s%s%s\n", file, line, what.c_str(), context.empty() ? "" : " in ", context.c_str());
  }
  return false;
}

template <typename A, typename B>
bool equal(const A& got, const B& expected, const char* file, int line, const char* what) {
  const bool good = got == expected;
  return result(good, file, line, good ? "" : std::string(what) + " is " + text(got) + ", not " + text(expected));
}

// |got - expected| <= relative * scale. Equal infinities are near each other, and so are two NaNs.
inline bool near(long double got, long double expected, long double relative, long double scale, const char* file,
                 int line, const char* what) {
  const bool good = got == expected || (std::isnan(got) && std::isnan(expected)) ||
                    std::fabs(got - expected) <= relative * std::fabs(scale);
  return result(good, file, line,
                good ? ""
                     : std::string(what) + " is " + text(got) + ", not " + text(expected) + " within " +
                           text(relative * std::fabs(scale)));
}

// Two vectors, relative to the largest expected value that is finite; the first difference is named.
template <typename A, typename B>
bool all_near(const std::vector<A>& got, const std::vector<B>& expected, double relative, const char* file, int line,
              const char* what) {
  if (!equal(got.size(), expected.size(), file, line, what)) return false;
  long double largest = 0;
  for (const auto& value : expected) {
    const auto size = std::fabs(static_cast<long double>(value));
    if (std::isfinite(size)) largest = std::fmax(largest, size);
  }
  for (std::size_t i = 0; i < got.size(); ++i) {
    const std::string name = std::string(what) + "[" + text(i) + "]";
    if (!near(got[i], expected[i], relative, largest, file, line, name.c_str())) return false;
  }
  return true;
}

template <typename T>
bool same_bits(const std::vector<T>& got, const std::vector<T>& expected, const char* file, int line,
               const char* what) {
  std::size_t i = 0;
  const std::size_t count = std::min(got.size(), expected.size());
  while (i < count && std::memcmp(&got[i], &expected[i], sizeof(T)) == 0) ++i;
  const bool good = i == got.size() && i == expected.size();
  return result(good, file, line, good ? "" : std::string(what) + " has other bits from place " + text(i) + " on");
}

// A program's exit code.
inline int finish(const char* program) {
  std::printf("%s: %ld checks, %ld failed\n", program, done, failed);
  return failed == 0 && done > 0 ? 0 : 1;
}

// Names the case in what a failure prints, for a scope.
struct In {
  std::string before = context;
  explicit In(const std::string& name) { context = before.empty() ? name : before + ", " + name; }
  ~In() { context = before; }
};

}  // namespace check

#define CHECK(condition) check::result((condition), __FILE__, __LINE__, "not so: " #condition)
#define CHECK_EQUAL(got, expected) check::equal((got), (expected), __FILE__, __LINE__, #got)
#define CHECK_NEAR(got, expected, relative) CHECK_NEAR_SCALE(got, expected, relative, expected)
#define CHECK_NEAR_SCALE(got, expected, relative, scale) \
  check::near((got), (expected), (relative), (scale), __FILE__, __LINE__, #got)
#define CHECK_ALL_NEAR(got, expected, relative) check::all_near((got), (expected), (relative), __FILE__, __LINE__, #got)
#define CHECK_SAME_BITS(got, expected) check::same_bits((got), (expected), __FILE__, __LINE__, #got)
