// A whole rollout of a Gaussian-mixture policy, and its gradient, for one tile of pixels at a time.
//
// Pixels do not interact along a rollout, so the state of a tile (its means, weights and offset) is read once, taken
// through all substeps in the first-level cache, and written once. The backward pass runs the forward pass of the tile
// again, keeping offsets and weights of its substeps in scratch memory, and so needs nothing from the forward call.
// The formula of a substep is in mixture_rollout/__init__.py.
//
// Layout: means (batch, components, channels, pixels), logweights (batch, components, pixels), source and offset
// (batch, channels, pixels), coefficients (batch, substeps, 6), lengths (batch), all contiguous.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kTileBytes = 64;  // a tile is as wide as a cache line
constexpr int kVectors = kTileBytes / kVectorBytes;

template <typename T>
struct Traits;

template <>
struct Traits<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr int kMantissaBits = 23;
  static constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  static constexpr float kSmallest = -87.0f;
  static constexpr int kDegree = 7;
};

template <>
struct Traits<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissaBits = 52;
  static constexpr double kLog2High = 6.93147180369123816490e-01, kLog2Low = 1.90821492927058770002e-10;
  static constexpr double kSmallest = -708.0;
  static constexpr int kDegree = 13;
};

// One number for each pixel of a tile.
template <typename T>
struct Pack {
  using Vector = typename Traits<T>::Vector;
  using Integers = typename Traits<T>::Integers;
  static constexpr int kLanes = kTileBytes / sizeof(T);
  Vector v[kVectors];

  static Pack fill(T value) {
    Pack result;
    for (int i = 0; i < kVectors; ++i) result.v[i] = value - Vector{};
    return result;
  }
  static Pack load(const T* from, int64_t count) {
    if (count >= kLanes) {
      Pack result;
      std::memcpy(&result, from, sizeof(Pack));
      return result;
    }
    Pack result = fill(0);
    std::memcpy(&result, from, count * sizeof(T));
    return result;
  }
  void store(T* to, int64_t count) const { std::memcpy(to, this, (count < kLanes ? count : kLanes) * sizeof(T)); }

  T sum() const {
    T total = 0;
    for (int i = 0; i < kVectors; ++i)
      for (int lane = 0; lane < int(kVectorBytes / sizeof(T)); ++lane) total += v[i][lane];
    return total;
  }
  friend Pack operator+(Pack a, const Pack& b) {
    for (int i = 0; i < kVectors; ++i) a.v[i] += b.v[i];
    return a;
  }
  friend Pack operator-(Pack a, const Pack& b) {
    for (int i = 0; i < kVectors; ++i) a.v[i] -= b.v[i];
    return a;
  }
  friend Pack operator*(Pack a, const Pack& b) {
    for (int i = 0; i < kVectors; ++i) a.v[i] *= b.v[i];
    return a;
  }
  friend Pack operator*(Pack a, T b) {
    for (int i = 0; i < kVectors; ++i) a.v[i] *= b;
    return a;
  }
  friend Pack operator/(Pack a, const Pack& b) {
    for (int i = 0; i < kVectors; ++i) a.v[i] /= b.v[i];
    return a;
  }
  Pack& operator+=(const Pack& b) { return *this = *this + b; }
  friend Pack max(Pack a, const Pack& b) {
    for (int i = 0; i < kVectors; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
  }

  // exp(x) for x <= 0, and 0 where the result would be subnormal: x = n log 2 + r with |r| <= log(2) / 2, then the
  // Taylor polynomial of exp(r), whose remainder is below the rounding error.
  friend Pack exp_of_negative(const Pack& x) {
    using C = Traits<T>;
    Pack result;
    for (int i = 0; i < kVectors; ++i) {
      const Vector smallest = C::kSmallest - Vector{};
      const Integers is_zero = x.v[i] < smallest;
      const Vector clamped = is_zero ? smallest : x.v[i];
      const Vector rounded = clamped * T(1.4426950408889634074) + C::kRound;
      const Vector n = rounded - C::kRound;
      const Vector r = (clamped - n * C::kLog2High) - n * C::kLog2Low;
      Vector y = T(1.0) / factorial(C::kDegree) - Vector{};
#pragma GCC unroll 16
      for (int k = C::kDegree - 1; k >= 0; --k) y = y * r + T(1.0) / factorial(k);
      Integers bits, exponent;
      std::memcpy(&bits, &y, sizeof(bits));
      std::memcpy(&exponent, &rounded, sizeof(exponent));
      bits += exponent << C::kMantissaBits;
      bits &= ~is_zero;
      std::memcpy(&result.v[i], &bits, sizeof(bits));
    }
    return result;
  }

 private:
  static constexpr T factorial(int n) { return n <= 1 ? T(1) : T(n) * factorial(n - 1); }
};

enum Coefficient { kState, kSource, kMean, kLogitOffset, kLogitSource, kLogitNorm, kCount };

template <typename T>
struct Problem {
  const T *means, *logweights, *source, *offset, *coefficients;
  const int64_t* lengths;
  int64_t batch, components, channels, pixels, substeps;
};

// The inputs of one tile, and what a substep computes from them.
template <typename T>
class Tile {
 public:
  using P = Pack<T>;

  Tile(int64_t components, int64_t channels)
      : components_(components),
        channels_(channels),
        means(components * channels),
        logweights(components),
        squared_norms(components),
        source(channels),
        offset(channels),
        direction(channels) {}

  void load(const Problem<T>& problem, int64_t row, int64_t first, int64_t count) {
    const int64_t pixels = problem.pixels;
    for (int64_t c = 0; c < channels_; ++c) {
      source[c] = P::load(problem.source + (row * channels_ + c) * pixels + first, count);
      offset[c] = P::load(problem.offset + (row * channels_ + c) * pixels + first, count);
    }
    for (int64_t k = 0; k < components_; ++k) {
      const int64_t component = row * components_ + k;
      logweights[k] = P::load(problem.logweights + component * pixels + first, count);
      P norm = P::fill(0);
      for (int64_t c = 0; c < channels_; ++c) {
        const P mean = P::load(problem.means + (component * channels_ + c) * pixels + first, count);
        means[k * channels_ + c] = mean;
        norm += mean * mean;
      }
      squared_norms[k] = norm;
    }
  }

  // Takes the offset through one substep; leaves the posterior weights in `weights`.
  void substep(const T* coefficient, P* weights) {
    for (int64_t c = 0; c < channels_; ++c)
      direction[c] = offset[c] * coefficient[kLogitOffset] + source[c] * coefficient[kLogitSource];
    P largest = P::fill(-std::numeric_limits<T>::infinity());
    for (int64_t k = 0; k < components_; ++k) {
      P logit = logweights[k] + squared_norms[k] * coefficient[kLogitNorm];
      for (int64_t c = 0; c < channels_; ++c) logit += means[k * channels_ + c] * direction[c];
      weights[k] = logit;
      largest = max(largest, logit);
    }
    P total = P::fill(0);
    for (int64_t k = 0; k < components_; ++k) {
      weights[k] = exp_of_negative(weights[k] - largest);
      total += weights[k];
    }
    const P scale = P::fill(1) / total;
    for (int64_t k = 0; k < components_; ++k) weights[k] = weights[k] * scale;
    constexpr int kBlock = 4;  // channels whose sums stay in registers
    for (int64_t c = 0; c < channels_; c += kBlock) {
      const int width = int(channels_ - c < kBlock ? channels_ - c : kBlock);
      P mean[kBlock];
      for (int i = 0; i < kBlock; ++i) mean[i] = P::fill(0);
      if (width == kBlock) {
        for (int64_t k = 0; k < components_; ++k)
          for (int i = 0; i < kBlock; ++i) mean[i] += weights[k] * means[k * channels_ + c + i];
      } else {
        for (int64_t k = 0; k < components_; ++k)
          for (int i = 0; i < width; ++i) mean[i] += weights[k] * means[k * channels_ + c + i];
      }
      for (int i = 0; i < width; ++i)
        offset[c + i] += offset[c + i] * coefficient[kState] + source[c + i] * coefficient[kSource] +
                         mean[i] * coefficient[kMean];
    }
  }

 private:
  int64_t components_, channels_;

 public:
  std::vector<P> means, logweights, squared_norms, source, offset, direction;
};

// Pixels of one sample are cut into at most this many chunks, whatever the number of threads, so that sums over pixels
// are taken in the same order on any machine.
constexpr int64_t kChunks = 16;

template <typename T>
void forward(const Problem<T>& p, T* result, int threads) {
  using P = Pack<T>;
  const int64_t tiles = (p.pixels + P::kLanes - 1) / P::kLanes;
#pragma omp parallel num_threads(threads)
  {
    Tile<T> tile(p.components, p.channels);
    std::vector<P> weights(p.components);
#pragma omp for schedule(dynamic, 8)
    for (int64_t job = 0; job < p.batch * tiles; ++job) {
      const int64_t row = job / tiles, first = job % tiles * P::kLanes, count = p.pixels - first;
      tile.load(p, row, first, count);
      for (int64_t i = 0; i < p.lengths[row]; ++i)
        tile.substep(p.coefficients + (row * p.substeps + i) * kCount, weights.data());
      for (int64_t c = 0; c < p.channels; ++c)
        tile.offset[c].store(result + (row * p.channels + c) * p.pixels + first, count);
    }
  }
}

template <typename T>
void backward(const Problem<T>& p, const T* grad, T* grad_means, T* grad_logweights, T* grad_source, T* grad_offset,
              double* grad_coefficients, int threads) {
  using P = Pack<T>;
  const int64_t K = p.components, C = p.channels;
  const int64_t tiles = (p.pixels + P::kLanes - 1) / P::kLanes;
  const int64_t chunks = tiles < kChunks ? tiles : kChunks;
#pragma omp parallel num_threads(threads)
  {
    Tile<T> tile(K, C);
    std::vector<P> weights(p.substeps * K), states(p.substeps * C), sums(p.substeps * kCount);
    std::vector<P> d_means(K * C), d_logits(K), d_norms(K), d_state(C), d_source(C), d_mean(C), d_direction(C);
    std::vector<P> slope(K);
#pragma omp for schedule(dynamic, 1)
    for (int64_t job = 0; job < p.batch * chunks; ++job) {
      const int64_t row = job / chunks, chunk = job % chunks, length = p.lengths[row];
      std::fill(sums.begin(), sums.end(), P::fill(0));
      for (int64_t t = tiles * chunk / chunks; t < tiles * (chunk + 1) / chunks; ++t) {
        const int64_t first = t * P::kLanes, count = p.pixels - first;
        tile.load(p, row, first, count);
        for (int64_t i = 0; i < length; ++i) {
          std::memcpy(states.data() + i * C, tile.offset.data(), C * sizeof(P));
          tile.substep(p.coefficients + (row * p.substeps + i) * kCount, weights.data() + i * K);
        }
        std::fill(d_means.begin(), d_means.end(), P::fill(0));
        std::fill(d_logits.begin(), d_logits.end(), P::fill(0));
        std::fill(d_norms.begin(), d_norms.end(), P::fill(0));
        std::fill(d_source.begin(), d_source.end(), P::fill(0));
        for (int64_t c = 0; c < C; ++c)
          d_state[c] = P::load(grad + (row * C + c) * p.pixels + first, count);

        for (int64_t i = length - 1; i >= 0; --i) {
          const T* coefficient = p.coefficients + (row * p.substeps + i) * kCount;
          const P *state = states.data() + i * C, *weight = weights.data() + i * K;
          P* sum = sums.data() + i * kCount;
          for (int64_t c = 0; c < C; ++c) {
            d_mean[c] = d_state[c] * coefficient[kMean];
            tile.direction[c] = state[c] * coefficient[kLogitOffset] + tile.source[c] * coefficient[kLogitSource];
            sum[kState] += d_state[c] * state[c];
            sum[kSource] += d_state[c] * tile.source[c];
            d_direction[c] = P::fill(0);
          }
          P average = P::fill(0);
          for (int64_t k = 0; k < K; ++k) {
            P dot = P::fill(0);
            for (int64_t c = 0; c < C; ++c) dot += tile.means[k * C + c] * d_mean[c];
            slope[k] = dot;
            average += weight[k] * dot;
          }
          if (coefficient[kMean] != 0) sum[kMean] += average * (T(1) / coefficient[kMean]);
          P norm_sum = P::fill(0);
          for (int64_t k = 0; k < K; ++k) {
            const P d_logit = weight[k] * (slope[k] - average);
            d_logits[k] += d_logit;
            d_norms[k] += d_logit * coefficient[kLogitNorm];
            norm_sum += d_logit * tile.squared_norms[k];
            for (int64_t c = 0; c < C; ++c) {
              d_direction[c] += d_logit * tile.means[k * C + c];
              d_means[k * C + c] += weight[k] * d_mean[c] + d_logit * tile.direction[c];
            }
          }
          sum[kLogitNorm] += norm_sum;
          for (int64_t c = 0; c < C; ++c) {
            sum[kLogitOffset] += d_direction[c] * state[c];
            sum[kLogitSource] += d_direction[c] * tile.source[c];
            d_source[c] += d_state[c] * coefficient[kSource] + d_direction[c] * coefficient[kLogitSource];
            d_state[c] += d_state[c] * coefficient[kState] + d_direction[c] * coefficient[kLogitOffset];
          }
        }
        for (int64_t c = 0; c < C; ++c) {
          d_source[c].store(grad_source + (row * C + c) * p.pixels + first, count);
          d_state[c].store(grad_offset + (row * C + c) * p.pixels + first, count);
        }
        for (int64_t k = 0; k < K; ++k) {
          d_logits[k].store(grad_logweights + (row * K + k) * p.pixels + first, count);
          for (int64_t c = 0; c < C; ++c) {
            const P total = d_means[k * C + c] + tile.means[k * C + c] * d_norms[k] * T(2);
            total.store(grad_means + ((row * K + k) * C + c) * p.pixels + first, count);
          }
        }
      }
      double* target = grad_coefficients + (row * chunks + chunk) * p.substeps * kCount;
      for (int64_t i = 0; i < p.substeps * kCount; ++i) target[i] = double(sums[i].sum());
    }
  }
}

}  // namespace

#define LAKONLAB_EXPORT(T, SUFFIX)                                                                                    \
  extern "C" void mixture_rollout_forward_##SUFFIX(                                                                   \
      const T* means, const T* logweights, const T* source, const T* offset, const T* coefficients,                   \
      const int64_t* lengths, int64_t batch, int64_t components, int64_t channels, int64_t pixels, int64_t substeps,  \
      T* result, int threads) {                                                                                       \
    forward<T>({means, logweights, source, offset, coefficients, lengths, batch, components, channels, pixels,        \
                substeps},                                                                                            \
               result, threads);                                                                                      \
  }                                                                                                                   \
  extern "C" void mixture_rollout_backward_##SUFFIX(                                                                  \
      const T* means, const T* logweights, const T* source, const T* offset, const T* coefficients,                   \
      const int64_t* lengths, int64_t batch, int64_t components, int64_t channels, int64_t pixels, int64_t substeps,  \
      const T* grad, T* grad_means, T* grad_logweights, T* grad_source, T* grad_offset, double* grad_coefficients,    \
      int threads) {                                                                                                  \
    backward<T>({means, logweights, source, offset, coefficients, lengths, batch, components, channels, pixels,       \
                 substeps},                                                                                           \
                grad, grad_means, grad_logweights, grad_source, grad_offset, grad_coefficients, threads);             \
  }

LAKONLAB_EXPORT(float, f32)
LAKONLAB_EXPORT(double, f64)

// The number of chunks a sample is cut into, by which the caller sizes grad_coefficients (batch, chunks, substeps, 6).
extern "C" int64_t mixture_rollout_chunks(int64_t pixels, int64_t element_size) {
  const int64_t lanes = kTileBytes / element_size, tiles = (pixels + lanes - 1) / lanes;
  return tiles < kChunks ? tiles : kChunks;
}
