// Sampling where temperature alone shapes the distribution, drafts and their verification included: the same draws as
// `engine.sampling`.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "panels.h"

namespace {

enum Stream : uint64_t { TOKEN = 0, ACCEPT = 1, DRAFT = 2 };  // as in `engine.sampling`

inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// The same number as `engine.sampling.uniforms`.
inline double uniform(uint64_t seed, uint64_t position, Stream stream) {
    constexpr uint64_t golden = 0x9E3779B97F4A7C15ull;
    uint64_t state = mix(mix(seed ^ golden * (stream + 1)) + position * golden);
    return static_cast<double>(state >> 11) * 0x1p-53;
}

// Filled by kernels/decode.py: how each of `count` sequences draws, and its next position.
struct Draws {
    int64_t count;
    const float* temperatures;
    const uint64_t *seeds, *positions;
};

// softmax(logits / temperature) of one row, not normalised; temperature 0 leaves the logits as they are.
class Distribution {
  public:
    void set(const float* logits, int64_t vocab, float temperature) {
        logits_ = logits, vocab_ = vocab, temperature_ = temperature;
        inverse_ = temperature == 0 ? 1.0f : 1.0f / temperature;
        weights_.resize(padded(vocab));
        floats best = broadcast(-std::numeric_limits<float>::infinity());
        for (int64_t i = 0; i < vocab; i += LANES) best = maximum(at(i), best);
        highest_ = maximum(best);
        fill([&](int64_t i) {
            floats x = (at(i) - highest_) * inverse_;
            return x < -87.0f ? floats{} : exponential(x);
        });
        log_total_ = static_cast<float>(std::log(total_));
    }

    // Leaves what is in excess of other probabilities [padded(vocab)]; everything, if rounding leaves nothing.
    void subtract(const float* other) {
        const float scale = static_cast<float>(1 / total_);
        fill([&](int64_t i) { return maximum(load(&weights_[i]) * scale - load(other + i), floats{}); });
        if (total_ == 0) set(logits_, vocab_, temperature_);
    }

    int64_t best() const {
        for (int64_t i = 0; i < vocab_; ++i)
            if (logits_[i] == highest_) return i;
        return 0;  // nothing is finite: the log-probability says so
    }

    // Inverts the cumulative distribution.
    int64_t draw(double point) const {
        double left = point * total_;
        size_t block = 0;
        while (block + 1 < block_sums_.size() && left >= block_sums_[block]) left -= block_sums_[block++];
        int64_t drawn = best();
        for (int64_t i = block * PANEL; i < vocab_ && i < static_cast<int64_t>(block + 1) * PANEL; ++i) {
            if (weights_[i] > 0) drawn = i;
            if (left < weights_[i]) break;
            left -= weights_[i];
        }
        return drawn;
    }

    double probability(int64_t token) const { return weights_[token] / total_; }
    float logprob(int64_t token) const { return (logits_[token] - highest_) * inverse_ - log_total_; }

    void probabilities(float* out) const {  // [padded(vocab)]
        const float scale = static_cast<float>(1 / total_);
        for (int64_t i = 0; i < padded(vocab_); i += LANES) store(out + i, load(&weights_[i]) * scale);
    }

  private:
    floats at(int64_t i) const {  // logits i, i + 1, ..., as good as none past the last
        floats x = load(logits_ + i);
        for (int64_t lane = vocab_ - i; lane < LANES; ++lane) x[lane] = -std::numeric_limits<float>::infinity();
        return x;
    }

    template <class Weight>
    void fill(const Weight& weight) {
        block_sums_.clear();
        total_ = 0;
        for (int64_t start = 0; start < padded(vocab_); start += PANEL) {
            floats block{};
            for (int64_t i = start; i < start + PANEL; i += LANES) {
                floats w = i < vocab_ ? weight(i) : floats{};
                store(&weights_[i], w);
                block += w;
            }
            block_sums_.push_back(sum(block));
            total_ += block_sums_.back();
        }
    }

    const float* logits_;
    int64_t vocab_;
    float temperature_, inverse_, highest_, log_total_;
    double total_;
    std::vector<float> weights_;
    std::vector<double> block_sums_;
};

// A draft after one row: its token, and the probabilities [padded(vocab)] that it was drawn from.
inline int32_t propose(Distribution& d, const float* logits, int64_t vocab, const Draws& draws, int64_t i,
                       int64_t ahead, float* probs) {
    d.set(logits, vocab, draws.temperatures[i]);
    if (draws.temperatures[i] != 0) {
        d.probabilities(probs);
        return static_cast<int32_t>(d.draw(uniform(draws.seeds[i], draws.positions[i] + ahead, DRAFT)));
    }
    const int64_t best = d.best();
    std::fill(probs, probs + padded(vocab), 0.0f);
    probs[best] = 1.0f;
    return static_cast<int32_t>(best);
}

// Rejection sampling over a sequence's rows, one after its last token and one after each of its drafts: accepted
// drafts and one token more (see `engine.sampling.verify`). Returns how many tokens there are.
inline int64_t verify(Distribution& d, const float* logits, int64_t vocab, int64_t stride, const Draws& draws,
                      int64_t i, const int32_t* drafts, int64_t num_drafts, const float* draft_probs, int32_t* tokens,
                      float* logprobs) {
    const uint64_t seed = draws.seeds[i];
    for (int64_t row = 0;; ++row) {
        const uint64_t position = draws.positions[i] + row;
        const float* proposed = draft_probs + row * padded(vocab);
        d.set(logits + row * stride, vocab, draws.temperatures[i]);
        int64_t token;
        bool accepted = false;
        if (draws.temperatures[i] == 0) {
            token = d.best();
            accepted = row < num_drafts && token == drafts[row];
        } else if (row < num_drafts) {
            token = drafts[row];
            accepted = uniform(seed, position, ACCEPT) * proposed[token] < d.probability(token);
            if (!accepted) d.subtract(proposed);
        }
        if (!accepted && draws.temperatures[i] != 0) token = d.draw(uniform(seed, position, TOKEN));
        tokens[row] = static_cast<int32_t>(token);
        logprobs[row] = d.logprob(token);
        if (!accepted) return row + 1;
    }
}

}  // namespace
