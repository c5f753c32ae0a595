// Log-probability of each row's target and, in place of the logits, the loss gradient. N rows, V columns (multiple
// of 16).
#include "common.h"

#include <vector>

namespace {

// With s = logits * inverse_temperature: logprobs[n] = log softmax(s)[target], entropy[n] that of
// softmax(s). Where weights are given, logits[n] becomes weights[n] * inverse_temperature * (softmax(s) - onehot).
template <class T>
void cross_entropy(T* logits, const int64_t* targets, const float* weights, float inverse_temperature,
                   float* logprobs, float* entropy, int64_t N, int64_t V, int64_t threads) {
    parallel(N, threads, [&](int64_t begin, int64_t end, int64_t) {
        std::vector<float> row(V);
        for (int64_t n = begin; n < end; ++n) {
            T* x = logits + n * V;
            floats best = load(x);
            for (int64_t v = LANES; v < V; v += LANES) best = maximum(best, load(x + v));
            float top = maximum(best);
            floats total = {}, weighted = {};
            for (int64_t v = 0; v < V; v += LANES) {
                floats shifted = (load(x + v) - top) * inverse_temperature;
                floats e = exponential(shifted);
                store(row.data() + v, e);
                total += e;
                weighted += e * shifted;
            }
            float partition = sum(total), target_logit;
            float log_partition = std::log(partition);
            float chosen[LANES];
            int64_t aligned = targets[n] / LANES * LANES;
            store(chosen, load(x + aligned));
            target_logit = (chosen[targets[n] - aligned] - top) * inverse_temperature;
            logprobs[n] = target_logit - log_partition;
            entropy[n] = log_partition - sum(weighted) / partition;
            if (!weights) continue;
            float factor = weights[n] * inverse_temperature / partition;
            row[targets[n]] -= partition;
            for (int64_t v = 0; v < V; v += LANES) store(x + v, load(row.data() + v) * factor);
        }
    });
}

}  // namespace

#define DEFINE(suffix, T)                                                                                          \
    EXPORT void cross_entropy_##suffix(T* logits, const int64_t* targets, const float* weights,                    \
                                       float inverse_temperature, float* logprobs, float* entropy, int64_t N,      \
                                       int64_t V, int64_t threads) {                                               \
        cross_entropy<T>(logits, targets, weights, inverse_temperature, logprobs, entropy, N, V, threads);         \
    }

DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
