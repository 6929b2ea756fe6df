#include "model/divergence_kernels.h"

#include <algorithm>
#include <vector>

#include "model/fused_lanes.h"

namespace pare {
namespace {

// With q the student's and p the teacher's probabilities, every divergence D = sum of `value` has a gradient with
// respect to the student's logits over tau of  q_j f_j - q_j sum_i q_i f_i,  f = dD/dq up to a constant. `pull` is q f.
struct Term {
  F16 value, pull;
};

struct Mixture {    // of a p + b q, a + b = 1: every quotient is finite whatever underflows
  F16 log_q, q, p;  // log(q / m), q / m, p / m
};
INLINE Mixture mixture(const F16& log_p, const F16& log_q, float a, float b) {
  const F16 d = log_q - log_p, zero = set(0), one = set(1);
  const F16 e = exp16(d > zero ? -d : d);
  const F16 inverse = 1.0f / (d > zero ? e * a + b : e * b + a);
  return {(d > zero ? zero : d) + log16(inverse), (d > zero ? one : e) * inverse, (d > zero ? e : one) * inverse};
}

// weights: of forward and reverse KL in kAdaptiveKl.
template <Divergence kind>
INLINE Term term(const F16& log_p, const F16& log_q, float parameter, float forward, float reverse) {
  const F16 p = exp16(log_p), q = exp16(log_q), ratio = log_q - log_p;
  if constexpr (kind == Divergence::kReverseKl) {
    const F16 x = q * ratio;
    return {x, x};
  } else if constexpr (kind == Divergence::kJsd) {
    const Mixture m = mixture(log_p, log_q, parameter, 1.0f - parameter);
    const F16 own = q * m.log_q * (1.0f - parameter);
    return {p * (m.log_q - ratio) * parameter + own, own};
  } else if constexpr (kind == Divergence::kSkewKl) {
    const Mixture m = mixture(log_p, log_q, parameter, 1.0f - parameter);
    return {p * (m.log_q - ratio), q * m.p * (parameter - 1.0f)};
  } else if constexpr (kind == Divergence::kSkewReverseKl) {
    const Mixture m = mixture(log_p, log_q, 1.0f - parameter, parameter);
    const F16 x = q * m.log_q;
    return {x, x - q * m.q * parameter};
  } else {
    static_assert(kind == Divergence::kAdaptiveKl);
    const F16 x = q * ratio * reverse;
    return {x - p * ratio * forward, x - p * forward};
  }
}

// What one row needs besides its logits.
struct RowScale {
  float inverse_tau = 1, lse_p = 0, lse_q = 0, forward = 0, reverse = 0;
};

// Shares of head and tail in |p - q|, the head being the teacher's largest probabilities up to kAdaptiveHead together,
// and always the largest. Equal distributions: half and half.
template <class T>
void adaptive_weights(const T* student, const T* teacher, std::int64_t vocab, RowScale& row, std::vector<float>& p,
                      std::vector<float>& gap, std::vector<std::int64_t>& order) {
  const auto n = static_cast<std::size_t>(vocab);
  p.resize(n);
  gap.resize(n);
  for (std::size_t i = 0; i < n; ++i) {
    p[i] = std::exp(load1(teacher + i) * row.inverse_tau - row.lse_p);
    gap[i] = std::fabs(p[i] - std::exp(load1(student + i) * row.inverse_tau - row.lse_q));
  }
  const auto later = [&](std::int64_t a, std::int64_t b) {
    const float x = p[static_cast<std::size_t>(a)], y = p[static_cast<std::size_t>(b)];
    return x != y ? x < y : a > b;
  };
  // Mostly a few ids are the head: look among the likely ones first.
  float found = 0;
  for (const float least : {1e-3f, -1.0f}) {
    order.clear();
    found = 0;
    for (std::int64_t i = 0; i < vocab; ++i)
      if (p[static_cast<std::size_t>(i)] > least) {
        order.push_back(i);
        found += p[static_cast<std::size_t>(i)];
      }
    if (found > kAdaptiveHead) break;
  }
  std::make_heap(order.begin(), order.end(), later);
  float mass = 0, head = 0, tail = 0;
  for (auto end = order.end(); end != order.begin(); --end) {
    const auto i = static_cast<std::size_t>(order.front());
    mass += p[i];
    if (mass > kAdaptiveHead && end != order.end()) break;
    head += gap[i];
    gap[i] = 0;
    std::pop_heap(order.begin(), end, later);
  }
  for (const float g : gap) tail += g;
  const float all = head + tail;
  row.forward = all > 0 ? head / all : 0.5f;
  row.reverse = all > 0 ? tail / all : 0.5f;
}

template <Divergence kind, class T>
INLINE void rows_of(const DivergenceStep& step, T* student, const T* teacher, const std::int64_t* targets,
                    std::int64_t rows, std::int64_t vocab, float* value, float* ce) {
  std::vector<float> p, gap;
  std::vector<std::int64_t> order;
  const float soft = step.scale * step.weight * step.tau, hard = step.scale * step.ce_weight;
  for (std::int64_t r = 0; r < rows; ++r, student += vocab, teacher += vocab) {
    const std::int64_t target = targets[r];
    value[r] = ce[r] = 0;
    if (target < 0) {
      clear_row(student, vocab);
      continue;
    }
    const float s_peak = row_max(student, vocab), t_peak = row_max(teacher, vocab);
    RowScale row;
    row.inverse_tau = 1.0f / step.tau;
    row.lse_q = s_peak * row.inverse_tau + std::log(row_exp_sum(student, vocab, s_peak, row.inverse_tau));
    row.lse_p = t_peak * row.inverse_tau + std::log(row_exp_sum(teacher, vocab, t_peak, row.inverse_tau));
    const float hard_lse = s_peak + std::log(row_exp_sum(student, vocab, s_peak, 1.0f));
    ce[r] = hard_lse - load1(student + target);
    if constexpr (kind == Divergence::kAdaptiveKl) adaptive_weights(student, teacher, vocab, row, p, gap, order);

    F16 value_sum = set(0), pull_sum = set(0);
    float value_tail = 0, pull_tail = 0;
    std::int64_t i = 0;
    for (; i + 16 <= vocab; i += 16) {
      const Term t =
          term<kind>(load(teacher + i) * row.inverse_tau - row.lse_p, load(student + i) * row.inverse_tau - row.lse_q,
                     step.parameter, row.forward, row.reverse);
      value_sum += t.value;
      pull_sum += t.pull;
    }
    for (; i < vocab; ++i) {
      const Term t =
          term<kind>(set(load1(teacher + i) * row.inverse_tau - row.lse_p),
                     set(load1(student + i) * row.inverse_tau - row.lse_q), step.parameter, row.forward, row.reverse);
      value_tail += t.value[0];
      pull_tail += t.pull[0];
    }
    value[r] = sum_lanes(value_sum) + value_tail;
    const float mean = sum_lanes(pull_sum) + pull_tail;

    const float at_target = load1(student + target);
    float target_soft = 0;
    const auto gradient = [&](const F16& z, const F16& y) __attribute__((always_inline)) {
      const F16 log_q = z * row.inverse_tau - row.lse_q;
      const Term t = term<kind>(y * row.inverse_tau - row.lse_p, log_q, step.parameter, row.forward, row.reverse);
      return (t.pull - exp16(log_q) * mean) * soft;
    };
    if (hard != 0) target_soft = gradient(set(at_target), set(load1(teacher + target)))[0];
    for (i = 0; i + 16 <= vocab; i += 16) {
      const F16 z = load(student + i);
      F16 g = gradient(z, load(teacher + i));
      if (hard != 0) g += exp16(z - hard_lse) * hard;
      store(student + i, g);
    }
    for (; i < vocab; ++i) {
      const float z = load1(student + i);
      const float g = gradient(set(z), set(load1(teacher + i)))[0];
      store1(student + i, g + (hard != 0 ? exp1(z - hard_lse) * hard : 0.0f));
    }
    if (hard != 0) store1(student + target, target_soft + (exp1(at_target - hard_lse) - 1.0f) * hard);
  }
}

template <class T>
INLINE void divergence(const DivergenceStep& step, T* student, const T* teacher, const std::int64_t* targets,
                       std::int64_t rows, std::int64_t vocab, float* value, float* ce) {
  switch (step.kind) {
    case Divergence::kForwardKl:
      break;
    case Divergence::kReverseKl:
      return rows_of<Divergence::kReverseKl>(step, student, teacher, targets, rows, vocab, value, ce);
    case Divergence::kJsd:
      return rows_of<Divergence::kJsd>(step, student, teacher, targets, rows, vocab, value, ce);
    case Divergence::kSkewKl:
      return rows_of<Divergence::kSkewKl>(step, student, teacher, targets, rows, vocab, value, ce);
    case Divergence::kSkewReverseKl:
      return rows_of<Divergence::kSkewReverseKl>(step, student, teacher, targets, rows, vocab, value, ce);
    case Divergence::kAdaptiveKl:
      return rows_of<Divergence::kAdaptiveKl>(step, student, teacher, targets, rows, vocab, value, ce);
  }
}

#define PARE_DIVERGENCE(isa, attribute)                                                                             \
  template <class T>                                                                                                \
  attribute void divergence_##isa(const DivergenceStep& step, T* student, const T* teacher,                         \
                                  const std::int64_t* targets, std::int64_t rows, std::int64_t vocab, float* value, \
                                  float* ce) {                                                                      \
    divergence<T>(step, student, teacher, targets, rows, vocab, value, ce);                                         \
  }

PARE_DIVERGENCE(plain, )
#if defined(__x86_64__)
PARE_DIVERGENCE(avx2, __attribute__((target("avx2,fma"))))
PARE_DIVERGENCE(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))))
#endif

}  // namespace

template <class T>
DivergenceKernel<T> divergence_kernel() {
#if defined(__x86_64__)
  static const int set = instruction_set();
  if (set == 2) return divergence_avx512<T>;
  if (set == 1) return divergence_avx2<T>;
#endif
  return divergence_plain<T>;
}
template DivergenceKernel<float> divergence_kernel<float>();
template DivergenceKernel<Bf16> divergence_kernel<Bf16>();

}  // namespace pare
