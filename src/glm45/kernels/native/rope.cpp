// From the fused projection to q, k and v: per-head RMSNorm (optional), rotation, and their backward pass.
// N tokens, K key/value heads, G query heads a group, D head size (multiple of 16, at most 1024), R half of the
// rotated dimensions. A token's projection is [K, G + 2, D]; q is [K * G, D], k and v are [K, D].
#include "common.h"

namespace {

constexpr int64_t MAX_HEAD = 1024;

template <class T>
void read(const T* from, float* to, int64_t D) {
    for (int64_t d = 0; d < D; d += LANES) store(to + d, load(from + d));
}

template <class T>
void write(const float* from, T* to, int64_t D) {
    for (int64_t d = 0; d < D; d += LANES) store(to + d, load(from + d));
}

inline float inverse_rms(const float* x, int64_t D, float eps) {
    floats squares = {};
    for (int64_t d = 0; d < D; d += LANES) squares += load(x + d) * load(x + d);
    return 1.0f / std::sqrt(sum(squares) / D + eps);
}

// Rotates by the angle, or back by it where direction is -1.
inline void rotate(float* x, const float* cosine, const float* sine, float direction, int64_t R) {
#pragma omp simd
    for (int64_t r = 0; r < R; ++r) {
        float first = x[r], second = x[r + R], s = sine[r] * direction;
        x[r] = first * cosine[r] - second * s;
        x[r + R] = second * cosine[r] + first * s;
    }
}

template <class T>
void head_forward(const T* in, const float* weight, float eps, const float* cosine, const float* sine, T* out,
                  int64_t D, int64_t R) {
    alignas(64) float x[MAX_HEAD];
    read(in, x, D);
    if (weight) {
        float scale = inverse_rms(x, D, eps);
        for (int64_t d = 0; d < D; d += LANES) store(x + d, load(x + d) * scale * load(weight + d));
    }
    rotate(x, cosine, sine, 1.0f, R);
    write(x, out, D);
}

template <class T>
void head_backward(const T* grad_out, const T* in, const float* weight, float eps, const float* cosine,
                   const float* sine, T* grad_in, float* grad_weight, int64_t D, int64_t R) {
    alignas(64) float g[MAX_HEAD], x[MAX_HEAD];
    read(grad_out, g, D);
    rotate(g, cosine, sine, -1.0f, R);
    if (weight) {
        read(in, x, D);
        float scale = inverse_rms(x, D, eps);
        floats products = {};
        for (int64_t d = 0; d < D; d += LANES) {
            floats normed = load(x + d) * scale, gradient = load(g + d);
            store(grad_weight + d, load(grad_weight + d) + gradient * normed);
            gradient *= load(weight + d);
            products += gradient * normed;
            store(x + d, normed);
            store(g + d, gradient);
        }
        float mean = sum(products) / D;
        for (int64_t d = 0; d < D; d += LANES) store(g + d, (load(g + d) - load(x + d) * mean) * scale);
    }
    write(g, grad_in, D);
}

template <class T>
void forward(const T* qkv, const float* cosine, const float* sine, int64_t table_rows, const float* q_weight,
             const float* k_weight, float eps, T* q, T* k, T* v, int64_t N, int64_t K, int64_t G, int64_t D,
             int64_t R, int64_t threads) {
    parallel(N, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t n = begin; n < end; ++n) {
            const float *c = cosine + n % table_rows * R, *s = sine + n % table_rows * R;
            for (int64_t h = 0; h < K; ++h) {
                const T* group = qkv + (n * K + h) * (G + 2) * D;
                for (int64_t g = 0; g < G; ++g)
                    head_forward(group + g * D, q_weight, eps, c, s, q + ((n * K + h) * G + g) * D, D, R);
                head_forward(group + G * D, k_weight, eps, c, s, k + (n * K + h) * D, D, R);
                std::memcpy(v + (n * K + h) * D, group + (G + 1) * D, D * sizeof(T));
            }
        }
    });
}

// Norm weights' gradients are one row a thread: first D for q, then D for k.
template <class T>
void backward(const T* grad_q, const T* grad_k, const T* grad_v, const T* qkv, const float* cosine,
              const float* sine, int64_t table_rows, const float* q_weight, const float* k_weight, float eps,
              T* grad_qkv, float* grad_weights, int64_t N, int64_t K, int64_t G, int64_t D, int64_t R,
              int64_t threads) {
    parallel(N, threads, [&](int64_t begin, int64_t end, int64_t thread) {
        float* mine = grad_weights + thread * 2 * D;
        std::fill(mine, mine + 2 * D, 0.0f);
        for (int64_t n = begin; n < end; ++n) {
            const float *c = cosine + n % table_rows * R, *s = sine + n % table_rows * R;
            for (int64_t h = 0; h < K; ++h) {
                int64_t at = (n * K + h) * (G + 2) * D;
                for (int64_t g = 0; g < G; ++g)
                    head_backward(grad_q + ((n * K + h) * G + g) * D, qkv + at + g * D, q_weight, eps, c, s,
                                  grad_qkv + at + g * D, mine, D, R);
                head_backward(grad_k + (n * K + h) * D, qkv + at + G * D, k_weight, eps, c, s,
                              grad_qkv + at + G * D, mine + D, D, R);
                std::memcpy(grad_qkv + at + (G + 1) * D, grad_v + (n * K + h) * D, D * sizeof(T));
            }
        }
    });
}

}  // namespace

#define DEFINE(suffix, T)                                                                                            \
    EXPORT void split_qkv_forward_##suffix(const T* qkv, const float* cosine, const float* sine, int64_t table_rows, \
                                           const float* q_weight, const float* k_weight, float eps, T* q, T* k,      \
                                           T* v, int64_t N, int64_t K, int64_t G, int64_t D, int64_t R,              \
                                           int64_t threads) {                                                        \
        forward<T>(qkv, cosine, sine, table_rows, q_weight, k_weight, eps, q, k, v, N, K, G, D, R, threads);         \
    }                                                                                                                \
    EXPORT void split_qkv_backward_##suffix(                                                                         \
        const T* grad_q, const T* grad_k, const T* grad_v, const T* qkv, const float* cosine, const float* sine,     \
        int64_t table_rows, const float* q_weight, const float* k_weight, float eps, T* grad_qkv,                    \
        float* grad_weights, int64_t N, int64_t K, int64_t G, int64_t D, int64_t R, int64_t threads) {               \
        backward<T>(grad_q, grad_k, grad_v, qkv, cosine, sine, table_rows, q_weight, k_weight, eps, grad_qkv,        \
                    grad_weights, N, K, G, D, R, threads);                                                           \
    }

DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
