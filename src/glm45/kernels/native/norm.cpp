// Residual addition and RMSNorm, forward and backward, one pass over each row. N rows, D columns (multiple of 16).
#include "common.h"

namespace {

template <class T>
void forward(const float* residual, const T* delta, const float* weight, float eps, float* new_residual, T* out,
             float* inverse_rms, int64_t N, int64_t D, int64_t threads) {
    parallel(N, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t n = begin; n < end; ++n) {
            const float* row = residual + n * D;
            floats squares = {};
            if (delta) {
                float* written = new_residual + n * D;
                for (int64_t d = 0; d < D; d += LANES) {
                    floats x = load(row + d) + load(delta + n * D + d);
                    store(written + d, x);
                    squares += x * x;
                }
                row = written;
            } else {
                for (int64_t d = 0; d < D; d += LANES) squares += load(row + d) * load(row + d);
            }
            float scale = 1.0f / std::sqrt(sum(squares) / D + eps);
            inverse_rms[n] = scale;
            for (int64_t d = 0; d < D; d += LANES) store(out + n * D + d, load(row + d) * scale * load(weight + d));
        }
    });
}

// grad_residual (may be null) is what reaches the new residual from above; weight gradients are one row a thread.
template <class T>
void backward(const T* grad_out, const float* grad_residual, const float* residual, const float* weight,
              const float* inverse_rms, float* grad_in, T* grad_delta, float* grad_weight, int64_t N, int64_t D,
              int64_t threads) {
    parallel(N, threads, [&](int64_t begin, int64_t end, int64_t thread) {
        float* mine = grad_weight + thread * D;
        std::fill(mine, mine + D, 0.0f);
        for (int64_t n = begin; n < end; ++n) {
            const float* x = residual + n * D;
            const T* g = grad_out + n * D;
            float scale = inverse_rms[n];
            floats products = {};
            for (int64_t d = 0; d < D; d += LANES) {
                floats gradient = load(g + d), normed = load(x + d) * scale;
                store(mine + d, load(mine + d) + gradient * normed);
                products += gradient * load(weight + d) * normed;
            }
            float mean = sum(products) / D;
            for (int64_t d = 0; d < D; d += LANES) {
                floats normed = load(x + d) * scale;
                floats result = (load(g + d) * load(weight + d) - normed * mean) * scale;
                if (grad_residual) result += load(grad_residual + n * D + d);
                store(grad_in + n * D + d, result);
                if (grad_delta) store(grad_delta + n * D + d, result);
            }
        }
    });
}

}  // namespace

#define DEFINE(suffix, T)                                                                                            \
    EXPORT void add_rms_norm_forward_##suffix(const float* residual, const T* delta, const float* weight, float eps, \
                                              float* new_residual, T* out, float* inverse_rms, int64_t N, int64_t D, \
                                              int64_t threads) {                                                     \
        forward<T>(residual, delta, weight, eps, new_residual, out, inverse_rms, N, D, threads);                     \
    }                                                                                                                \
    EXPORT void add_rms_norm_backward_##suffix(const T* grad_out, const float* grad_residual, const float* residual, \
                                               const float* weight, const float* inverse_rms, float* grad_in,        \
                                               T* grad_delta, float* grad_weight, int64_t N, int64_t D,              \
                                               int64_t threads) {                                                    \
        backward<T>(grad_out, grad_residual, residual, weight, inverse_rms, grad_in, grad_delta, grad_weight, N, D,  \
                    threads);                                                                                        \
    }

DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
