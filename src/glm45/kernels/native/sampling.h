// Sampling where temperature alone shapes the distribution: the same draws as `engine.sampling`.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "panels.h"

namespace {

inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// The same number as `engine.sampling.uniforms`, stream 0.
inline double uniform(uint64_t seed, uint64_t position) {
    uint64_t state = mix(mix(seed ^ 0x9E3779B97F4A7C15ull) + position * 0x9E3779B97F4A7C15ull);
    return static_cast<double>(state >> 11) * 0x1p-53;
}

// Draws from softmax(logits / temperature) by inverting the cumulative distribution; temperature 0 is greedy.
void sample_row(const float* logits, int64_t vocab, float temperature, uint64_t seed, uint64_t position,
                float* weights, int32_t* token, float* logprob) {
    const float inverse = temperature == 0 ? 1.0f : 1.0f / temperature;
    int64_t best = 0;
    for (int64_t i = 1; i < vocab; ++i)
        if (logits[i] > logits[best]) best = i;
    const float highest = logits[best];
    double total = 0;
    std::vector<double> block_sums;
    block_sums.reserve(vocab / PANEL + 1);
    for (int64_t i = 0; i < vocab; i += PANEL) {
        floats block{};
        for (int64_t j = i; j < i + PANEL && j < vocab; j += LANES) {
            floats x = load(logits + j);
            if (j + LANES > vocab)
                for (int64_t lane = vocab - j; lane < LANES; ++lane) x[lane] = -std::numeric_limits<float>::infinity();
            x = (x - highest) * inverse;
            floats weight = x < -87.0f ? floats{} : exponential(x);
            store(weights + j, weight);
            block += weight;
        }
        block_sums.push_back(sum(block));
        total += block_sums.back();
    }
    int64_t drawn = best;
    if (temperature != 0) {
        double left = uniform(seed, position) * total;
        size_t block = 0;
        while (block + 1 < block_sums.size() && left >= block_sums[block]) left -= block_sums[block++];
        for (int64_t i = block * PANEL; i < vocab && i < static_cast<int64_t>(block + 1) * PANEL; ++i) {
            if (weights[i] > 0) drawn = i;
            if (left < weights[i]) break;
            left -= weights[i];
        }
    }
    *token = static_cast<int32_t>(drawn);
    *logprob = (logits[drawn] - highest) * inverse - static_cast<float>(std::log(total));
}

}  // namespace
