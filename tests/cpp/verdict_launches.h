// The launches that judge a window, on arrays with walls.
#pragma once

#include "cspd/launch.h"
#include "verdicts.h"

enum Matrix { kX, kMeanQ, kLogQ, kMeanP, kLogP, kSample, kToken, kMatrices };

// Bit m of ``offsets`` sets matrix m off by one float from where it could be read 16 bytes at a time. Where there are
// ``candidates``, matrices of the window have as many rows a token as those say.
class OnDevice {
 public:
  explicit OnDevice(const Window& window, unsigned offsets = 0, const cspd::Candidates* candidates = nullptr)
      : window_(window),
        candidates_(candidates ? *candidates : cspd::Candidates{}),
        x_(window.x, offsets >> kX & 1),
        mean_q_(window.mean_q, offsets >> kMeanQ & 1),
        log_q_(window.log_q, offsets >> kLogQ & 1),
        mean_p_(window.mean_p, offsets >> kMeanP & 1),
        log_p_(window.log_p, offsets >> kLogP & 1),
        sample_(window.sample, offsets >> kSample & 1),
        path_q_(window.path_q),
        path_p_(window.path_p),
        relaxations_(window.relaxations),
        rows_(window.rows),
        token_(window.x.size() / candidates_.count, offsets >> kToken & 1),
        log_ratio_(window.tokens * candidates_.count),
        accepted_(window.tokens),
        tries_(window.tokens),
        candidate_(candidates ? window.tokens : 0) {
    if (candidates) candidates_.accepted = candidate_.get();
  }

  cspd::Judged judged() const {
    return {x_.get(),
            {mean_q_.get(), log_q_.get(), path_q_.get()},
            {mean_p_.get(), log_p_.get(), path_p_.get()},
            window_.relaxations.empty() ? nullptr : relaxations_.get(),
            window_.relaxation,
            window_.tokens,
            window_.channels,
            window_.released};
  }

  cspd::Redraw redraw() const {
    return {sample_.get(),     rows_.get(),     window_.seed,
            window_.max_tries, token_.get(),    reinterpret_cast<bool*>(accepted_.get()),
            tries_.get(),      log_ratio_.get()};
  }

  std::vector<float> log_density_ratio() const {
    RUN(cspd::log_density_ratio(judged(), log_ratio_.get(), nullptr));
    return log_ratio_.host();
  }

  Verdicts accept_reject(bool closed_form, int multiprocessors) const {
    RUN(cspd::accept_reject(judged(), redraw(), candidates_, closed_form, multiprocessors, nullptr));
    return {log_ratio_.host(), token_.host(), accepted_.host(), tries_.host(), candidate_.host()};
  }

  bool untouched() const {
    return log_ratio_.untouched() && token_.untouched() && accepted_.untouched() && tries_.untouched() &&
           candidate_.untouched();
  }

 private:
  const Window& window_;
  cspd::Candidates candidates_;
  device::Array<float> x_, mean_q_, log_q_, mean_p_, log_p_, sample_, path_q_, path_p_, relaxations_;
  device::Array<std::int64_t> rows_;
  device::Array<float> token_, log_ratio_;
  device::Array<std::uint8_t> accepted_;
  device::Array<std::int32_t> tries_, candidate_;
};
