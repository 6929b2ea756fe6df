#include "model/sparsity.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>

#include "core/error.h"

namespace pare {

Sparsity Sparsity::pattern(std::string_view text, const std::string& place) {
  Sparsity out;
  const std::size_t colon = text.find(':');
  const auto number = [](std::string_view digits, int& value) {
    const auto [end, problem] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    return problem == std::errc() && end == digits.data() + digits.size() && !digits.empty();
  };
  if (colon == std::string_view::npos || !number(text.substr(0, colon), out.keep) ||
      !number(text.substr(colon + 1), out.of) || out.keep < 1 || out.keep >= out.of || out.of > 64)
    throw usage_error(place, "N:M with 0 < N < M <= 64, N weights kept of every M", "\"" + std::string(text) + "\"",
                      "for example 2:4 or 4:8");
  out.fraction = 1.0 - static_cast<double>(out.keep) / out.of;
  return out;
}

std::string Sparsity::name() const {
  if (n_of_m()) return std::to_string(keep) + ":" + std::to_string(of);
  std::string percent = std::to_string(std::lround(fraction * 1000));  // tenths of a percent
  if (percent.size() < 2) percent.insert(0, "0");
  const char tenth = percent.back();
  percent.pop_back();
  return percent + (tenth == '0' ? "" : std::string(".") + tenth) + " %";
}

std::int64_t Sparsity::removed(std::int64_t count) const {
  if (n_of_m()) return count / of * (of - keep);
  // The small term undoes products such as 100 * 0.29 = 28.999999999999996.
  return static_cast<std::int64_t>(std::floor(static_cast<double>(count) * fraction + 1e-9));
}

std::int64_t Sparsity::removed_before(std::int64_t part, std::int64_t whole) const {
  const std::int64_t all = weights >= 0 ? weights : removed(whole);
  return part * all / whole;  // products fit for matrices of up to 2^31 weights
}

template <class T>
void drop_lowest(const T* scores, std::int64_t count, std::int64_t remove, std::vector<T>& work, std::uint8_t* keep) {
  std::fill(keep, keep + count, std::uint8_t{1});
  if (remove <= 0) return;
  work.assign(scores, scores + count);
  std::nth_element(work.begin(), work.begin() + (remove - 1), work.end());
  const T threshold = work[static_cast<std::size_t>(remove - 1)];
  std::int64_t left = remove;
  for (std::int64_t i = 0; i < count; ++i) {
    if (scores[i] < threshold) {
      keep[i] = 0;
      --left;
    }
  }
  for (std::int64_t i = count - 1; i >= 0 && left > 0; --i) {
    if (scores[i] == threshold) {
      keep[i] = 0;
      --left;
    }
  }
}
template void drop_lowest(const float*, std::int64_t, std::int64_t, std::vector<float>&, std::uint8_t*);
template void drop_lowest(const double*, std::int64_t, std::int64_t, std::vector<double>&, std::uint8_t*);

SweepMask::SweepMask(const SweepFactor& factor, std::int64_t rows, const Sparsity& sparsity)
    : factor_(factor),
      sparsity_(sparsity),
      rows_(rows),
      cost_(static_cast<std::size_t>(factor.columns)),
      keep_(static_cast<std::size_t>(rows * factor.columns), 1) {
  for (std::size_t i = 0; i < cost_.size(); ++i) {
    const double diagonal = factor.u[i * cost_.size() + i];
    const bool dead = factor.dead[static_cast<std::size_t>(factor.order[i])] != 0;
    cost_[i] = dead ? 0.0 : 1.0 / (diagonal * diagonal);
  }
}

void SweepMask::choose(RowTile tile, std::int64_t first, std::int64_t count, const double* current) {
  std::vector<std::int64_t> positions(static_cast<std::size_t>(count));  // by input as stored
  std::iota(positions.begin(), positions.end(), first);
  const auto column = [&](std::int64_t position) { return factor_.order[static_cast<std::size_t>(position)]; };
  std::sort(positions.begin(), positions.end(),
            [&](std::int64_t a, std::int64_t b) { return column(a) < column(b); });
  std::vector<double> scores(static_cast<std::size_t>(tile.count * count)), work;
  for (std::int64_t r = 0; r < tile.count; ++r) {
    for (std::int64_t j = 0; j < count; ++j) {
      const std::int64_t position = positions[static_cast<std::size_t>(j)];
      const double w = current[(position - first) * kSweepRows + r];
      scores[static_cast<std::size_t>(r * count + j)] = w * w * cost_[static_cast<std::size_t>(position)];
    }
  }
  std::vector<std::uint8_t> keep(scores.size());
  if (sparsity_.n_of_m()) {
    const auto size = static_cast<std::size_t>(sparsity_.of);
    for (std::size_t at = 0; at < scores.size(); at += size)
      drop_lowest(scores.data() + at, sparsity_.of, sparsity_.of - sparsity_.keep, work, keep.data() + at);
  } else {
    const std::int64_t whole = rows_ * factor_.columns;
    const std::int64_t begin = tile.first * factor_.columns + tile.count * first;
    const std::int64_t remove = sparsity_.removed_before(begin + tile.count * count, whole) -
                                sparsity_.removed_before(begin, whole);
    drop_lowest(scores.data(), tile.count * count, remove, work, keep.data());
  }
  for (std::int64_t r = 0; r < tile.count; ++r)
    for (std::int64_t j = 0; j < count; ++j)
      keep_[static_cast<std::size_t>((tile.first + r) * factor_.columns +
                                     column(positions[static_cast<std::size_t>(j)]))] =
          keep[static_cast<std::size_t>(r * count + j)];
}

}  // namespace pare
