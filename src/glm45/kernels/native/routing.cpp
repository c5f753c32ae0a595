// Routing of tokens to experts: counting sort by expert, gather of rows, sum of a token's rows.
// N tokens, K choices a token, E experts; a pair is one (token, choice), row r of the sorted order is one pair.
#include "common.h"

// pair_of_row[r] is the pair at sorted row r (stable), row_of_pair its inverse, offsets[e] the first row of expert e.
// An id outside 0..E-1 is left out, so that offsets[E] < pairs tells the caller.
EXPORT void route_sort(const int64_t* expert_ids, int64_t pairs, int64_t E, int64_t* offsets, int64_t* pair_of_row,
                       int64_t* row_of_pair) {
    std::fill(offsets, offsets + E + 1, 0);
    auto valid = [&](int64_t p) { return expert_ids[p] >= 0 && expert_ids[p] < E; };
    for (int64_t p = 0; p < pairs; ++p)
        if (valid(p)) ++offsets[expert_ids[p] + 1];
    for (int64_t e = 0; e < E; ++e) offsets[e + 1] += offsets[e];
    for (int64_t p = 0; p < pairs; ++p) {
        if (!valid(p)) continue;
        int64_t row = offsets[expert_ids[p]]++;
        pair_of_row[row] = p;
        row_of_pair[p] = row;
    }
    for (int64_t e = E; e > 0; --e) offsets[e] = offsets[e - 1];
    offsets[0] = 0;
}

// out[r] = x[pair_of_row[r] / K], rows of row_bytes.
EXPORT void route_gather(const char* x, const int64_t* pair_of_row, char* out, int64_t rows, int64_t K,
                         int64_t row_bytes, int64_t threads) {
    parallel(rows, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t r = begin; r < end; ++r)
            std::memcpy(out + r * row_bytes, x + pair_of_row[r] / K * row_bytes, row_bytes);
    });
}

namespace {

template <class T>
void combine(const T* rows, const int64_t* row_of_pair, T* out, int64_t N, int64_t K, int64_t D, int64_t threads) {
    parallel(N, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t n = begin; n < end; ++n) {
            for (int64_t d = 0; d < D; d += LANES) {
                floats total = {};
                for (int64_t k = 0; k < K; ++k) total += load(rows + row_of_pair[n * K + k] * D + d);
                store(out + n * D + d, total);
            }
        }
    });
}

}  // namespace

// out[n] = the sum of token n's rows, in fp32, rounded once.
EXPORT void route_combine_float32(const float* rows, const int64_t* row_of_pair, float* out, int64_t N, int64_t K,
                                  int64_t D, int64_t threads) {
    combine<float>(rows, row_of_pair, out, N, K, D, threads);
}
EXPORT void route_combine_bfloat16(const bfloat16* rows, const int64_t* row_of_pair, bfloat16* out, int64_t N,
                                   int64_t K, int64_t D, int64_t threads) {
    combine<bfloat16>(rows, row_of_pair, out, N, K, D, threads);
}
