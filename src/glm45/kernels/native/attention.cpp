// Causal grouped-query attention within documents that keeps only q, k, v and the log-sum of each row.
// B batch, T tokens, K key/value heads, G query heads a group (H = K * G), D head size (multiple of 16).
//
// One task is one (batch row, key/value head). Whole rows of scores are held, a few queries at a time, so softmax
// needs no rescaling and keys outside a document or after the query are never multiplied.
#include "common.h"

#include <vector>

namespace {

constexpr int64_t ROWS = 8;     // queries multiplied together
constexpr int64_t PANEL = 64;   // queries whose scores the backward pass holds at a time
constexpr int64_t COLUMNS = 2 * LANES; // key columns multiplied together

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// C (+)= A[:, begin:end] B[begin:end, :], PRODUCT_ROWS rows of VECTORS * LANES columns; A may be strided either way.
template <int VECTORS, bool ADD>
inline void multiply_tile(const float* A, int64_t a_row, int64_t a_inner, const float* B, int64_t b_row, float* C,
                          int64_t c_row, int64_t begin, int64_t end) {
    floats sums[PRODUCT_ROWS][VECTORS];
    for (int r = 0; r < PRODUCT_ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = ADD ? load(C + r * c_row + v * LANES) : floats{};
    for (int64_t i = begin; i < end; ++i) {
        floats b[VECTORS];
        for (int v = 0; v < VECTORS; ++v) b[v] = in_register(load(B + i * b_row + v * LANES));
        for (int r = 0; r < PRODUCT_ROWS; ++r) {
            floats a = broadcast(A[r * a_row + i * a_inner]);
            for (int v = 0; v < VECTORS; ++v) sums[r][v] += a * b[v];
        }
    }
    for (int r = 0; r < PRODUCT_ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(C + r * c_row + v * LANES, sums[r][v]);
}

// The same over ROWS rows and `width` columns, a multiple of LANES.
template <bool ADD>
void multiply(const float* A, int64_t a_row, int64_t a_inner, const float* B, int64_t b_row, float* C, int64_t c_row,
              int64_t begin, int64_t end, int64_t width) {
    for (int64_t r = 0; r < ROWS; r += PRODUCT_ROWS, A += PRODUCT_ROWS * a_row, C += PRODUCT_ROWS * c_row) {
        int64_t column = 0;
        for (; column + 2 * LANES <= width; column += 2 * LANES)
            multiply_tile<2, ADD>(A, a_row, a_inner, B + column, b_row, C + column, c_row, begin, end);
        if (column < width) multiply_tile<1, ADD>(A, a_row, a_inner, B + column, b_row, C + column, c_row, begin, end);
    }
}

// One head as fp32, [T, D] with rows padded by zeros, and its transpose [D, padded T].
struct Head {
    std::vector<float> rows, columns;

    template <class T>
    void read_rows(const T* from, int64_t stride, int64_t tokens, int64_t padded, int64_t D, float scale) {
        rows.resize(padded * D);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t d = 0; d < D; d += LANES) store(&rows[t * D + d], load(from + t * stride + d) * scale);
        std::fill(rows.begin() + tokens * D, rows.end(), 0.0f);
    }

    void transpose(int64_t padded, int64_t stride, int64_t D) {
        columns.resize(stride * D);
        for (int64_t t = 0; t < padded; t += LANES)
            for (int64_t d = 0; d < D; d += LANES) {
                floats tile[LANES];
                for (int64_t r = 0; r < LANES; ++r) tile[r] = load(&rows[(t + r) * D + d]);
                transpose_tile(tile);
                for (int64_t r = 0; r < LANES; ++r) store(&columns[(d + r) * stride + t], tile[r]);
            }
    }
};

// First position of each token's document.
inline void document_starts(const int64_t* document_ids, int64_t T, std::vector<int64_t>& starts) {
    starts.assign(T, 0);
    if (!document_ids) return;
    for (int64_t t = 1; t < T; ++t) starts[t] = document_ids[t] == document_ids[t - 1] ? starts[t - 1] : t;
}

// Lanes of the columns j, j + 1, ... that lie within [low, high].
inline ints within(int64_t j, int64_t low, int64_t high) {
    ints column = lane_numbers() + (int32_t)j;
    return (column >= (int32_t)low) & (column <= (int32_t)high);
}

// Turns scores[first:last) of one row into exp(score - shift), zero outside [low, high], and returns their sum.
inline float exponentiate(float* scores, int64_t first, int64_t last, int64_t low, int64_t high, float shift) {
    floats total = {};
    for (int64_t j = first; j < last; j += LANES) {
        floats e = exponential(load(scores + j) - shift);
        e = within(j, low, high) ? e : floats{};
        store(scores + j, e);
        total += e;
    }
    return sum(total);
}

inline float row_maximum(const float* scores, int64_t first, int64_t last, int64_t low, int64_t high) {
    floats best = broadcast(-INFINITY);
    for (int64_t j = first; j < last; j += LANES) {
        floats x = load(scores + j);
        best = maximum(best, within(j, low, high) ? x : best);
    }
    return maximum(best);
}

struct Shape {
    int64_t B, T, K, G, D;
    int64_t padded() const { return round_up(T, PANEL); }
    // Of a row of scores or of a transposed head. Rows a power of two apart would share a few lines of the cache.
    int64_t stride() const { return padded() + 16; }
    int64_t q_stride() const { return K * G * D; }
    int64_t k_stride() const { return K * D; }
    int64_t q_at(int64_t b, int64_t k, int64_t g) const { return b * T * q_stride() + (k * G + g) * D; }
    int64_t k_at(int64_t b, int64_t k) const { return b * T * k_stride() + k * D; }
};

template <class T>
void forward(const T* q, const T* k, const T* v, const int64_t* document_ids, float scale, T* out, float* log_sums,
             Shape s, int64_t threads) {
    int64_t padded = s.padded(), stride = s.stride(), D = s.D;
    parallel(s.B * s.K, threads, [&](int64_t begin, int64_t end, int64_t) {
        Head key, value, query;
        std::vector<float> scores(ROWS * stride), result(ROWS * D);
        std::vector<int64_t> starts;
        for (int64_t task = begin; task < end; ++task) {
            int64_t b = task / s.K, head = task % s.K;
            document_starts(document_ids ? document_ids + b * s.T : nullptr, s.T, starts);
            key.read_rows(k + s.k_at(b, head), s.k_stride(), s.T, padded, D, 1.0f);
            key.transpose(padded, stride, D);
            value.read_rows(v + s.k_at(b, head), s.k_stride(), s.T, padded, D, 1.0f);
            for (int64_t g = 0; g < s.G; ++g) {
                query.read_rows(q + s.q_at(b, head, g), s.q_stride(), s.T, padded, D, scale);
                for (int64_t i = 0; i < s.T; i += ROWS) {
                    int64_t rows = std::min(ROWS, s.T - i), low = starts[i], high = i + rows;
                    int64_t first = low / COLUMNS * COLUMNS, last = round_up(high, COLUMNS);
                    multiply<false>(&query.rows[i * D], D, 1, &key.columns[first], stride, &scores[first], stride, 0,
                                    D, last - first);
                    float inverse[ROWS] = {};
                    for (int64_t r = 0; r < rows; ++r) {
                        float* row = &scores[r * stride];
                        float top = row_maximum(row, first, last, starts[i + r], i + r);
                        float total = exponentiate(row, first, last, starts[i + r], i + r, top);
                        inverse[r] = 1.0f / total;
                        log_sums[((b * s.K + head) * s.G + g) * s.T + i + r] = top + std::log(total);
                    }
                    multiply<false>(scores.data(), stride, 1, value.rows.data(), D, result.data(), D, low, high, D);
                    T* written = out + s.q_at(b, head, g) + i * s.q_stride();
                    for (int64_t r = 0; r < rows; ++r)
                        for (int64_t d = 0; d < D; d += LANES)
                            store(written + r * s.q_stride() + d, load(&result[r * D + d]) * inverse[r]);
                }
            }
        }
    });
}

// What the backward pass of one (batch row, key/value head) reads and writes.
struct Workspace {
    Head key, value, query, grad;
    std::vector<float> grad_key, grad_value, weights, grad_scores, grad_query;
    std::vector<int64_t> starts;
};

// Fills rows [i, i + 8) of the panels with softmax weights and score gradients, and grad_query with dq.
inline void backward_rows(Workspace& w, const float* log_sums, const Shape& s, float scale, int64_t panel,
                          int64_t low, int64_t i) {
    int64_t stride = s.stride(), D = s.D, rows = std::min(ROWS, s.T - i);
    int64_t first = low / COLUMNS * COLUMNS, last = round_up(i + rows, COLUMNS);
    float *weights = &w.weights[(i - panel) * stride], *grads = &w.grad_scores[(i - panel) * stride];
    multiply<false>(&w.query.rows[i * D], D, 1, &w.key.columns[first], stride, weights + first, stride, 0, D,
                    last - first);
    multiply<false>(&w.grad.rows[i * D], D, 1, &w.value.columns[first], stride, grads + first, stride, 0, D,
                    last - first);
    for (int64_t r = 0; r < rows; ++r) {
        float *p = weights + r * stride, *g = grads + r * stride;
        exponentiate(p, first, last, w.starts[i + r], i + r, log_sums[i + r]);
        floats products = {};
        for (int64_t j = first; j < last; j += LANES) products += load(p + j) * load(g + j);
        float mean = sum(products);
        for (int64_t j = first; j < last; j += LANES) store(g + j, load(p + j) * (load(g + j) - mean));
    }
    for (int64_t r = rows; r < ROWS; ++r)
        for (int64_t j = first; j < last; ++j) weights[r * stride + j] = grads[r * stride + j] = 0.0f;
    multiply<false>(grads, stride, 1, w.key.rows.data(), D, w.grad_query.data(), D, low, i + rows, D);
    for (int64_t n = 0; n < ROWS * D; n += LANES) store(&w.grad_query[n], load(&w.grad_query[n]) * scale);
}

template <class T>
void backward(const T* grad_out, const T* q, const T* k, const T* v, const int64_t* document_ids, float scale,
              const float* log_sums, T* grad_q, T* grad_k, T* grad_v, Shape s, int64_t threads) {
    int64_t padded = s.padded(), stride = s.stride(), D = s.D;
    parallel(s.B * s.K, threads, [&](int64_t begin, int64_t end, int64_t) {
        Workspace w;
        w.weights.resize(PANEL * stride);
        w.grad_scores.resize(PANEL * stride);
        w.grad_query.resize(ROWS * D);
        for (int64_t task = begin; task < end; ++task) {
            int64_t b = task / s.K, head = task % s.K;
            document_starts(document_ids ? document_ids + b * s.T : nullptr, s.T, w.starts);
            w.key.read_rows(k + s.k_at(b, head), s.k_stride(), s.T, padded, D, 1.0f);
            w.key.transpose(padded, stride, D);
            w.value.read_rows(v + s.k_at(b, head), s.k_stride(), s.T, padded, D, 1.0f);
            w.value.transpose(padded, stride, D);
            w.grad_key.assign(padded * D, 0.0f);
            w.grad_value.assign(padded * D, 0.0f);
            for (int64_t g = 0; g < s.G; ++g) {
                w.query.read_rows(q + s.q_at(b, head, g), s.q_stride(), s.T, padded, D, scale);
                w.grad.read_rows(grad_out + s.q_at(b, head, g), s.q_stride(), s.T, padded, D, 1.0f);
                const float* logs = log_sums + ((b * s.K + head) * s.G + g) * s.T;
                for (int64_t panel = 0; panel < s.T; panel += PANEL) {
                    int64_t stop = std::min(panel + PANEL, s.T), low = w.starts[panel] / ROWS * ROWS;
                    for (int64_t i = panel; i < stop; i += ROWS) {
                        backward_rows(w, logs, s, scale, panel, low, i);
                        T* written = grad_q + s.q_at(b, head, g) + i * s.q_stride();
                        for (int64_t r = 0; r < std::min(ROWS, s.T - i); ++r)
                            for (int64_t d = 0; d < D; d += LANES)
                                store(written + r * s.q_stride() + d, load(&w.grad_query[r * D + d]));
                    }
                    // Queries are already scaled, so grad_scores needs no scale for the keys' gradient.
                    int64_t padded_stop = round_up(stop, ROWS);
                    for (int64_t j = low; j < stop; j += ROWS) {
                        int64_t from = std::max(panel, j);
                        multiply<true>(&w.grad_scores[j] - panel * stride, 1, stride, w.query.rows.data(), D,
                                       &w.grad_key[j * D], D, from, padded_stop, D);
                        multiply<true>(&w.weights[j] - panel * stride, 1, stride, w.grad.rows.data(), D,
                                       &w.grad_value[j * D], D, from, padded_stop, D);
                    }
                }
            }
            for (int64_t t = 0; t < s.T; ++t)
                for (int64_t d = 0; d < D; d += LANES) {
                    store(grad_k + s.k_at(b, head) + t * s.k_stride() + d, load(&w.grad_key[t * D + d]));
                    store(grad_v + s.k_at(b, head) + t * s.k_stride() + d, load(&w.grad_value[t * D + d]));
                }
        }
    });
}

}  // namespace

#define DEFINE(suffix, Type)                                                                                         \
    EXPORT void attention_forward_##suffix(const Type* q, const Type* k, const Type* v, const int64_t* document_ids, \
                                           float scale, Type* out, float* log_sums, int64_t B, int64_t T, int64_t K, \
                                           int64_t G, int64_t D, int64_t threads) {                                  \
        forward<Type>(q, k, v, document_ids, scale, out, log_sums, {B, T, K, G, D}, threads);                        \
    }                                                                                                                \
    EXPORT void attention_backward_##suffix(const Type* grad_out, const Type* q, const Type* k, const Type* v,       \
                                            const int64_t* document_ids, float scale, const float* log_sums,         \
                                            Type* grad_q, Type* grad_k, Type* grad_v, int64_t B, int64_t T,          \
                                            int64_t K, int64_t G, int64_t D, int64_t threads) {                      \
        backward<Type>(grad_out, q, k, v, document_ids, scale, log_sums, grad_q, grad_k, grad_v, {B, T, K, G, D},    \
                       threads);                                                                                     \
    }

DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
