// SwiGLU, forward and backward, with an optional weight a row. N rows of [gate | up], I columns each (multiple of 16).
#include "common.h"

namespace {

template <class T>
void forward(const T* gate_up, const float* row_weights, T* out, int64_t N, int64_t I, int64_t threads) {
    parallel(N, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t n = begin; n < end; ++n) {
            const T *gate = gate_up + n * 2 * I, *up = gate + I;
            float weight = row_weights ? row_weights[n] : 1.0f;
            for (int64_t i = 0; i < I; i += LANES) {
                floats g = load(gate + i);
                store(out + n * I + i, g * sigmoid(g) * load(up + i) * weight);
            }
        }
    });
}

// Also writes the forward output again (`out`, may be null) and the gradient of each row's weight (may be null), so
// that neither has to be kept from the forward pass.
template <class T>
void backward(const T* grad_out, const T* gate_up, const float* row_weights, T* grad_gate_up, T* out,
              float* grad_weights, int64_t N, int64_t I, int64_t threads) {
    parallel(N, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t n = begin; n < end; ++n) {
            const T *gate = gate_up + n * 2 * I, *up = gate + I;
            T *grad_gate = grad_gate_up + n * 2 * I, *grad_up = grad_gate + I;
            float weight = row_weights ? row_weights[n] : 1.0f;
            floats weight_gradient = {};
            for (int64_t i = 0; i < I; i += LANES) {
                floats g = load(gate + i), u = load(up + i), gradient = load(grad_out + n * I + i);
                floats s = sigmoid(g), silu = g * s, product = silu * u;
                weight_gradient += gradient * product;
                if (out) store(out + n * I + i, product * weight);
                gradient *= weight;
                store(grad_gate + i, gradient * u * (s + silu * (1.0f - s)));
                store(grad_up + i, gradient * silu);
            }
            if (grad_weights) grad_weights[n] = sum(weight_gradient);
        }
    });
}

}  // namespace

#define DEFINE(suffix, T)                                                                                           \
    EXPORT void swiglu_forward_##suffix(const T* gate_up, const float* row_weights, T* out, int64_t N, int64_t I,   \
                                        int64_t threads) {                                                          \
        forward<T>(gate_up, row_weights, out, N, I, threads);                                                       \
    }                                                                                                               \
    EXPORT void swiglu_backward_##suffix(const T* grad_out, const T* gate_up, const float* row_weights,             \
                                         T* grad_gate_up, T* out, float* grad_weights, int64_t N, int64_t I,        \
                                         int64_t threads) {                                                         \
        backward<T>(grad_out, gate_up, row_weights, grad_gate_up, out, grad_weights, N, I, threads);                \
    }

DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
