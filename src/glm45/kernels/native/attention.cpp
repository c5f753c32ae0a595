// Causal grouped-query attention within documents that keeps only q, k, v and the log-sum of each row.
// B batch, T tokens, K key/value heads, G query heads a group (H = K * G), D head size (multiple of 16).
//
// One task is one (batch row, key/value head). Tokens fall into runs, each a document, a document's trunk or one of the
// branches that grow from it. A query sees its run up to itself and, in a branch, the whole trunk. Whole rows of scores
// are held, a few queries at a time, the trunk's columns first and the run's after them, so softmax needs no rescaling.
// Columns that fill up the last vectors, and keys after a query in its tile, get a weight of 0.
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

// Tokens [begin, end) of one document and branch, which also see the trunk [trunk, trunk + trunk_size).
struct Run {
    int64_t begin, end, trunk, trunk_size;
    int64_t own() const { return round_up(trunk_size, COLUMNS); }  // column of scores where the run's own tokens begin
};

// The runs of batch row b. Branches are numbered from 1 within a document; 0 is its trunk.
inline void find_runs(const int64_t* document_ids, const int64_t* branch_ids, int64_t b, int64_t T,
                      std::vector<Run>& runs) {
    runs.clear();
    for (int64_t t = 0, trunk = 0, trunk_size = 0, end; t < T; t = end) {
        auto document = [&](int64_t i) { return document_ids ? document_ids[b * T + i] : 0; };
        auto branch = [&](int64_t i) { return branch_ids ? branch_ids[b * T + i] : 0; };
        for (end = t + 1; end < T && document(end) == document(t) && branch(end) == branch(t);) ++end;
        if (t == 0 || document(t) != document(t - 1)) trunk = t, trunk_size = branch(t) == 0 ? end - t : 0;
        runs.push_back({t, end, trunk, branch(t) == 0 ? 0 : trunk_size});
    }
}

// Lanes of the columns j, j + 1, ... that lie before `stop`.
inline ints before(int64_t j, int64_t stop) { return lane_numbers() + (int32_t)j < (int32_t)stop; }

// Turns `width` scores of one row into exp(score - shift), zero from `stop` on, and returns their sums by lane.
inline floats exponentiate(float* scores, int64_t width, int64_t stop, float shift) {
    floats total = {};
    for (int64_t j = 0; j < width; j += LANES) {
        floats e = exponential(load(scores + j) - shift);
        e = before(j, stop) ? e : floats{};
        store(scores + j, e);
        total += e;
    }
    return total;
}

// The largest of `best` and the scores before `stop`, by lane.
inline floats row_maximum(const float* scores, int64_t width, int64_t stop, floats best) {
    for (int64_t j = 0; j < width; j += LANES) {
        floats x = load(scores + j);
        best = maximum(best, before(j, stop) ? x : best);
    }
    return best;
}

struct Shape {
    int64_t B, T, K, G, D;
    // Rows of a head: a run's last rows are multiplied together with what follows them.
    int64_t padded() const { return round_up(T + ROWS, LANES); }
    // Of a row of scores or of a transposed head, with room for the trunk's last columns and the run's. Rows a power of
    // two apart would share a few lines of the cache.
    int64_t stride() const { return padded() + 2 * COLUMNS + 16; }
    int64_t q_stride() const { return K * G * D; }
    int64_t k_stride() const { return K * D; }
    int64_t q_at(int64_t b, int64_t k, int64_t g) const { return b * T * q_stride() + (k * G + g) * D; }
    int64_t k_at(int64_t b, int64_t k) const { return b * T * k_stride() + k * D; }
};

// Scores of ROWS queries: with the trunk's keys, and with the run's own up to `width` columns of them.
inline void score(const float* queries, const Head& key, const Run& run, int64_t stride, int64_t width, int64_t D,
                  float* scores) {
    if (run.trunk_size)
        multiply<false>(queries, D, 1, &key.columns[run.trunk], stride, scores, stride, 0, D, run.own());
    multiply<false>(queries, D, 1, &key.columns[run.begin], stride, scores + run.own(), stride, 0, D, width);
}

// ROWS rows of weights times the rows of a head that they belong to, `count` of the run's own: out [ROWS, D].
inline void weigh(const float* weights, const Head& head, const Run& run, int64_t stride, int64_t count, int64_t D,
                  float* out) {
    const float *own = weights + run.own(), *rows = &head.rows[run.begin * D];
    if (run.trunk_size) {
        multiply<false>(weights, stride, 1, &head.rows[run.trunk * D], D, out, D, 0, run.trunk_size, D);
        multiply<true>(own, stride, 1, rows, D, out, D, 0, count, D);
    } else {
        multiply<false>(own, stride, 1, rows, D, out, D, 0, count, D);
    }
}

template <class T>
void forward(const T* q, const T* k, const T* v, const int64_t* document_ids, const int64_t* branch_ids, float scale,
             T* out, float* log_sums, Shape s, int64_t threads) {
    int64_t padded = s.padded(), stride = s.stride(), D = s.D;
    parallel(s.B * s.K, threads, [&](int64_t begin, int64_t end, int64_t) {
        Head key, value, query;
        std::vector<float> scores(ROWS * stride), result(ROWS * D);
        std::vector<Run> runs;
        for (int64_t task = begin; task < end; ++task) {
            int64_t b = task / s.K, head = task % s.K;
            find_runs(document_ids, branch_ids, b, s.T, runs);
            key.read_rows(k + s.k_at(b, head), s.k_stride(), s.T, padded, D, 1.0f);
            key.transpose(padded, stride, D);
            value.read_rows(v + s.k_at(b, head), s.k_stride(), s.T, padded, D, 1.0f);
            for (int64_t g = 0; g < s.G; ++g) {
                query.read_rows(q + s.q_at(b, head, g), s.q_stride(), s.T, padded, D, scale);
                for (const Run& run : runs)
                    for (int64_t i = run.begin; i < run.end; i += ROWS) {
                        int64_t rows = std::min(ROWS, run.end - i), count = i + rows - run.begin;
                        int64_t width = round_up(count, COLUMNS);
                        score(&query.rows[i * D], key, run, stride, width, D, scores.data());
                        float inverse[ROWS] = {};
                        for (int64_t r = 0; r < rows; ++r) {
                            float *trunk = &scores[r * stride], *own = trunk + run.own();
                            int64_t stop = i + r + 1 - run.begin;
                            floats best = row_maximum(trunk, run.own(), run.trunk_size, broadcast(-INFINITY));
                            float top = maximum(row_maximum(own, width, stop, best));
                            float total = sum(exponentiate(trunk, run.own(), run.trunk_size, top) +
                                              exponentiate(own, width, stop, top));
                            inverse[r] = 1.0f / total;
                            log_sums[((b * s.K + head) * s.G + g) * s.T + i + r] = top + std::log(total);
                        }
                        weigh(scores.data(), value, run, stride, count, D, result.data());
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
    std::vector<Run> runs;
};

// Calls body(column, which of its lanes are seen) over the trunk's columns and the run's own.
template <class Body>
inline void for_columns(const Run& run, int64_t width, int64_t stop, const Body& body) {
    for (int64_t j = 0; j < run.own(); j += LANES) body(j, before(j, run.trunk_size));
    for (int64_t j = 0; j < width; j += LANES) body(run.own() + j, before(j, stop));
}

// Softmax weights (from scores) and score gradients (from gradients of the weights) of one row, in place; the run's own
// columns count up to `stop`.
inline void backward_row(float* weights, float* grads, const Run& run, int64_t width, int64_t stop, float log_sum) {
    exponentiate(weights, run.own(), run.trunk_size, log_sum);
    exponentiate(weights + run.own(), width, stop, log_sum);
    floats products = {};
    for_columns(run, width, stop, [&](int64_t j, ints seen) {
        products += seen ? load(weights + j) * load(grads + j) : floats{};
    });
    const float mean = sum(products);
    for_columns(run, width, stop, [&](int64_t j, ints seen) {
        store(grads + j, seen ? load(weights + j) * (load(grads + j) - mean) : floats{});
    });
}

// Fills rows [i, i + 8) of the panels with softmax weights and score gradients, and grad_query with dq.
inline void backward_rows(Workspace& w, const float* log_sums, const Shape& s, float scale, const Run& run,
                          int64_t panel, int64_t i) {
    int64_t stride = s.stride(), D = s.D, rows = std::min(ROWS, run.end - i), count = i + rows - run.begin;
    int64_t width = round_up(count, COLUMNS);
    float *weights = &w.weights[(i - panel) * stride], *grads = &w.grad_scores[(i - panel) * stride];
    score(&w.query.rows[i * D], w.key, run, stride, width, D, weights);
    score(&w.grad.rows[i * D], w.value, run, stride, width, D, grads);
    for (int64_t r = 0; r < rows; ++r)
        backward_row(weights + r * stride, grads + r * stride, run, width, i + r + 1 - run.begin, log_sums[i + r]);
    weigh(grads, w.key, run, stride, count, D, w.grad_query.data());
    for (int64_t n = 0; n < ROWS * D; n += LANES) store(&w.grad_query[n], load(&w.grad_query[n]) * scale);
}

// Adds what the queries [from, to) of a panel give to the keys and values of ROWS tokens; `column` is the first one's.
inline void backward_keys(Workspace& w, const Shape& s, int64_t panel, int64_t token, int64_t column, int64_t from,
                          int64_t to) {
    const int64_t stride = s.stride(), D = s.D;
    // Queries are already scaled, so grad_scores needs no scale for the keys' gradient.
    multiply<true>(&w.grad_scores[column] - panel * stride, 1, stride, w.query.rows.data(), D, &w.grad_key[token * D],
                   D, from, to, D);
    multiply<true>(&w.weights[column] - panel * stride, 1, stride, w.grad.rows.data(), D, &w.grad_value[token * D], D,
                   from, to, D);
}

template <class T>
void backward(const T* grad_out, const T* q, const T* k, const T* v, const int64_t* document_ids,
              const int64_t* branch_ids, float scale, const float* log_sums, T* grad_q, T* grad_k, T* grad_v, Shape s,
              int64_t threads) {
    int64_t padded = s.padded(), stride = s.stride(), D = s.D;
    parallel(s.B * s.K, threads, [&](int64_t begin, int64_t end, int64_t) {
        Workspace w;
        w.weights.resize(PANEL * stride);
        w.grad_scores.resize(PANEL * stride);
        w.grad_query.resize(ROWS * D);
        for (int64_t task = begin; task < end; ++task) {
            int64_t b = task / s.K, head = task % s.K;
            find_runs(document_ids, branch_ids, b, s.T, w.runs);
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
                for (const Run& run : w.runs)
                    for (int64_t panel = run.begin; panel < run.end; panel += PANEL) {
                        int64_t stop = std::min(panel + PANEL, run.end);
                        for (int64_t i = panel; i < stop; i += ROWS) {
                            backward_rows(w, logs, s, scale, run, panel, i);
                            T* written = grad_q + s.q_at(b, head, g) + i * s.q_stride();
                            for (int64_t r = 0; r < std::min(ROWS, stop - i); ++r)
                                for (int64_t d = 0; d < D; d += LANES)
                                    store(written + r * s.q_stride() + d, load(&w.grad_query[r * D + d]));
                        }
                        for (int64_t j = 0; j < run.trunk_size; j += ROWS)
                            backward_keys(w, s, panel, run.trunk + j, j, panel, stop);
                        for (int64_t j = run.begin; j < stop; j += ROWS)
                            backward_keys(w, s, panel, j, run.own() + j - run.begin, std::max(panel, j), stop);
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
                                           const int64_t* branch_ids, float scale, Type* out, float* log_sums,       \
                                           int64_t B, int64_t T, int64_t K, int64_t G, int64_t D, int64_t threads) { \
        forward<Type>(q, k, v, document_ids, branch_ids, scale, out, log_sums, {B, T, K, G, D}, threads);            \
    }                                                                                                                \
    EXPORT void attention_backward_##suffix(const Type* grad_out, const Type* q, const Type* k, const Type* v,       \
                                            const int64_t* document_ids, const int64_t* branch_ids, float scale,     \
                                            const float* log_sums, Type* grad_q, Type* grad_k, Type* grad_v,         \
                                            int64_t B, int64_t T, int64_t K, int64_t G, int64_t D,                   \
                                            int64_t threads) {                                                       \
        backward<Type>(grad_out, q, k, v, document_ids, branch_ids, scale, log_sums, grad_q, grad_k, grad_v,         \
                       {B, T, K, G, D}, threads);                                                                    \
    }

DEFINE(float32, float)
DEFINE(bfloat16, bfloat16)
