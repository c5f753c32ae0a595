// A whole decoding step in one call: every decoder layer over a flat row of tokens with a paged cache, on a pool of
// threads of its own; then the head, sampling where temperature alone shapes the distribution, and drafts of the MTP
// layer.
//
// N rows (tokens of many sequences), D hidden size, K key/value groups of G query heads each, H head size.
//
// Every output element is one chain of additions whose order depends on the weights' shape alone: results are bitwise
// equal for any batch, any chunk of a prompt and any number of threads. Weights are packed in panels of 64 outputs
// (see `panels.h`), so that a product is an outer product per input: no horizontal sums, and one row streams
// through the weights at the speed of memory.

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "common.h"
#include "panels.h"
#include "pool.h"
#include "sampling.h"

namespace {

constexpr int64_t SLOTS = 16;                 // tokens of a cache block
constexpr int64_t CHUNK_ROWS = 48;            // rows that one task multiplies with one panel

// Filled by kernels/decode.py: every field is eight bytes.
struct Shape {
    int64_t hidden, groups, group_heads, head_dim, rotary_half, experts, top_k, moe_width, vocab;
    int64_t norm_top_k;
    double eps, scale, routed_scale;
    const float *embeddings, *cosines, *sines;
    const void* head;

    int64_t group_rows() const { return (group_heads + 2) * head_dim; }
    int64_t heads_width() const { return groups * group_heads * head_dim; }
};

struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm, *qkv_bias;
    const void *qkv, *o_proj;
    const float *router, *router_bias;            // null in a dense layer
    const void *expert_gate_up, *expert_down;
    const void *gate_up, *down;                   // the dense layer's, or the shared expert's (null if there is none)
    int64_t width;                                // of gate_up's output
    float *keys, *values;                         // [block, K, H, 16] and [block, K, 16, H]
};

struct Mtp {
    const float *embedding_norm, *hidden_norm;
    const void* combine;
};

struct Rows {  // filled by kernels/decode.py
    int64_t count;
    const int32_t *tokens, *positions, *slots, *sequence, *blocks, *block_starts;
    int64_t first_slot;

    int64_t block_of(int64_t row, int64_t slot) const { return blocks[block_starts[sequence[row]] + slot / SLOTS]; }
};

inline float mean_square(const float* x, int64_t size) {
    floats squares{};
    for (int64_t i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    return sum(squares) / size;
}

template <class Out>
inline void norm(const float* x, const float* weight, int64_t size, double eps, Out* out) {
    float scale = 1.0f / std::sqrt(mean_square(x, size) + static_cast<float>(eps));
    for (int64_t i = 0; i < size; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
}

inline float dot(const float* a, const float* b, int64_t size) {
    floats total{};
    for (int64_t i = 0; i < size; i += LANES) total += load(a + i) * load(b + i);
    return sum(total);
}

// Turns one row of a group's queries, key and value (as they come from the product) into what attention reads.
void finish_group(const Shape& s, const Layer& layer, const Rows& rows, int64_t row, int64_t group, float* qkv,
                  float* queries) {
    const int64_t head_dim = s.head_dim, half = s.rotary_half;
    if (layer.qkv_bias)
        for (int64_t i = 0; i < s.group_rows(); i += LANES)
            store(qkv + i, load(qkv + i) + load(layer.qkv_bias + group * s.group_rows() + i));
    const float* cosines = s.cosines + rows.positions[row] * half;
    const float* sines = s.sines + rows.positions[row] * half;
    for (int64_t head = 0; head <= s.group_heads; ++head) {
        float* x = qkv + head * head_dim;
        const float* weight = head == s.group_heads ? layer.k_norm : layer.q_norm;
        if (weight) norm(x, weight, head_dim, s.eps, x);
        for (int64_t i = 0; i < half; ++i) {
            float a = x[i], b = x[i + half];
            x[i] = a * cosines[i] - b * sines[i];
            x[i + half] = b * cosines[i] + a * sines[i];
        }
    }
    for (int64_t i = 0; i < s.group_heads * head_dim; i += LANES)
        store(queries + i, load(qkv + i) * static_cast<float>(s.scale));
    const int64_t slot = rows.slots[row], place = slot % SLOTS;
    const int64_t block = (rows.block_of(row, slot) * s.groups + group) * head_dim * SLOTS;
    const float* key = qkv + s.group_heads * head_dim;
    for (int64_t i = 0; i < head_dim; ++i) layer.keys[block + i * SLOTS + place] = key[i];
    std::memcpy(layer.values + block + place * head_dim, key + head_dim, head_dim * sizeof(float));
}

// One row, one query head over its whole context; scores is scratch of a context's length.
template <int HEAD, class Out>
void attend(const Shape& s, const Layer& layer, const Rows& rows, int64_t row, int64_t group, const float* query,
            float* scores, Out* out) {
    constexpr int HEAD_VECTORS = HEAD / LANES;
    const int64_t context = rows.slots[row] + 1;
    const floats lowest = broadcast(-std::numeric_limits<float>::infinity());
    floats best = lowest;
    for (int64_t slot = 0; slot < context; slot += LANES) {
        const int64_t block = rows.block_of(row, slot) * s.groups + group;
        const float* keys = layer.keys + block * HEAD * SLOTS + slot % SLOTS;
        floats parts[4] = {};
        for (int64_t i = 0; i < HEAD; i += 4)
            for (int p = 0; p < 4; ++p) parts[p] += load(keys + (i + p) * SLOTS) * query[i + p];
        floats score = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        ints slots = lane_numbers() + static_cast<int32_t>(slot);
        score = slots < static_cast<int32_t>(context) ? score : lowest;
        score = slots >= static_cast<int32_t>(rows.first_slot) ? score : lowest;
        store(scores + slot, score);
        best = maximum(best, score);
    }
    const float highest = maximum(best);
    floats total{};
    for (int64_t slot = 0; slot < context; slot += LANES) {
        floats score = load(scores + slot);
        floats weight = score == lowest ? floats{} : exponential(score - highest);
        store(scores + slot, weight);
        total += weight;
    }
    const float inverse = 1.0f / sum(total);
    floats sums[HEAD_VECTORS] = {};
    for (int64_t slot = 0; slot < context; ++slot) {
        const int64_t block = (rows.block_of(row, slot) * s.groups + group) * HEAD * SLOTS;
        const float* value = layer.values + block + slot % SLOTS * HEAD;
        for (int v = 0; v < HEAD_VECTORS; ++v) sums[v] += load(value + v * LANES) * scores[slot];
    }
    for (int v = 0; v < HEAD_VECTORS; ++v) store(out + v * LANES, sums[v] * inverse);
}

template <class Out>
void attend_group(const Shape& s, const Layer& layer, const Rows& rows, int64_t row, int64_t group,
                  const float* queries, float* scores, Out* out) {
    for (int64_t head = 0; head < s.group_heads; ++head) {
        const float* query = queries + head * s.head_dim;
        Out* result = out + head * s.head_dim;
        switch (s.head_dim) {
            case 16: attend<16>(s, layer, rows, row, group, query, scores, result); break;
            case 32: attend<32>(s, layer, rows, row, group, query, scores, result); break;
            case 64: attend<64>(s, layer, rows, row, group, query, scores, result); break;
            case 128: attend<128>(s, layer, rows, row, group, query, scores, result); break;
            default: __builtin_trap();  // kernels/decode.py refuses other sizes
        }
    }
}

// Chooses the experts of one row by biased score, and weighs them by score.
void route(const Shape& s, const Layer& layer, const float* x, float* scratch, int32_t* experts, float* weights) {
    float* scores = scratch;
    float* choices = scratch + s.experts;
    for (int64_t e = 0; e < s.experts; ++e) {
        scores[e] = sigmoid(broadcast(dot(x, layer.router + e * s.hidden, s.hidden)))[0];
        choices[e] = scores[e] + layer.router_bias[e];
    }
    float total = 0;
    for (int64_t k = 0; k < s.top_k; ++k) {
        int64_t best = 0;
        for (int64_t e = 1; e < s.experts; ++e)
            if (choices[e] > choices[best]) best = e;
        choices[best] = -std::numeric_limits<float>::infinity();
        experts[k] = static_cast<int32_t>(best);
        weights[k] = scores[best];
        total += scores[best];
    }
    const float scale = static_cast<float>(s.routed_scale) / (s.norm_top_k ? total + 1e-20f : 1.0f);
    for (int64_t k = 0; k < s.top_k; ++k) weights[k] *= scale;
}

template <class X>
struct Buffer {  // grows and never shrinks; contents are not kept
    std::unique_ptr<X[]> data;
    size_t size = 0;
    X* need(size_t wanted) {
        if (wanted > size) data.reset(new X[size = wanted]);
        return data.get();
    }
};

struct Task {
    int32_t expert;  // -1 is the shared expert
    int32_t first, count, panel;
};

template <class T>
struct Workspace {
    Buffer<float> residual, qkv, queries, delta, shared, scratch, weights, routed;
    Buffer<T> x, heads, gated, shared_gated;
    Buffer<float> wide_x;  // what the router reads
    Buffer<int32_t> experts, order, places, firsts;
    Buffer<const T*> x_rows, head_rows, expert_rows;
    std::vector<Task> up_tasks, down_tasks;
};

struct Decoder {
    explicit Decoder(int threads) : pool(threads), distributions(threads) {}

    // Calls use(workspace) with the workspace of the type that the weights are in.
    template <class Use>
    void in(int64_t bf16, const Use& use) {
#if defined(__AVX512BF16__)
        if (bf16) return use(half);
#endif
        use(single);
    }

    Pool pool;
    Workspace<float> single;
    Workspace<bfloat16> half;
    std::vector<Distribution> distributions;  // of each thread
    Buffer<float> drafted, draft_states, draft_logits;
};

template <class T>
void point(Buffer<const T*>& pointers, const T* data, int64_t count, int64_t stride) {
    const T** p = pointers.need(count);
    for (int64_t i = 0; i < count; ++i) p[i] = data + i * stride;
}

template <class T>
class Step {
  public:
    Step(Pool& pool, Workspace<T>& w, const Shape& s, const Rows& rows) : pool_(pool), w_(w), s_(s), rows_(rows) {
        const int64_t n = rows.count, d = s.hidden;
        int64_t context = 0;
        for (int64_t i = 0; i < n; ++i) context = std::max<int64_t>(context, rows.slots[i] + 1);
        scratch_size_ = std::max(context + SLOTS, 2 * s.experts + LANES);
        w.scratch.need(pool.size() * scratch_size_);
        w.residual.need(n * padded(d));
        w.wide_x.need(n * d);
        w.qkv.need(n * s.groups * s.group_rows());
        w.queries.need(n * s.heads_width());
        w.delta.need(n * padded(d));
        w.shared.need(n * padded(d));
        w.x.need(n * 2 * d + 2);
        w.heads.need(n * s.heads_width());
        w.experts.need(n * s.top_k);
        w.weights.need(n * s.top_k);
        w.order.need(n * s.top_k);
        w.places.need(n * s.top_k);
        w.firsts.need(s.experts + 1);
        w.expert_rows.need(n * s.top_k);
        w.routed.need(n * s.top_k * padded(d));
        w.gated.need(n * s.top_k * gated_padded(s.moe_width));
        point(w.x_rows, w.x.data.get(), n, d);
        point(w.head_rows, w.heads.data.get(), n, s.heads_width());
    }

    // Layers one after the other; `final_norm` ends in `hidden_out` [N, D].
    void run(const Layer* layers, int64_t num_layers, const Mtp* mtp, const float* hidden_in, const float* final_norm,
             float* hidden_out) {
        int64_t width = 0;
        for (int64_t l = 0; l < num_layers; ++l)
            if (layers[l].gate_up) width = std::max(width, layers[l].width);
        w_.shared_gated.need(rows_.count * gated_padded(width));
        pool_.run([&](int thread) {
            if (mtp)
                combine(*mtp, hidden_in, layers[0].input_norm);
            else
                embed(layers[0].input_norm);
            for (int64_t l = 0; l < num_layers; ++l) {
                const Layer& layer = layers[l];
                attention(layer, thread);
                const bool last = l + 1 == num_layers;
                const float* next_norm = last ? final_norm : layers[l + 1].input_norm;
                if (layer.router)
                    experts(layer, thread, next_norm, last ? hidden_out : nullptr);
                else
                    dense(layer, next_norm, last ? hidden_out : nullptr);
            }
        });
    }

  private:
    float* residual(int64_t row) { return w_.residual.data.get() + row * padded(s_.hidden); }
    T* x(int64_t row) { return w_.x.data.get() + row * s_.hidden; }
    float* scratch(int thread) { return w_.scratch.data.get() + thread * scratch_size_; }

    void embed(const float* weight) {
        pool_.tasks(rows_.count, [&](int64_t row) {
            std::memcpy(residual(row), s_.embeddings + rows_.tokens[row] * s_.hidden, s_.hidden * sizeof(float));
            norm(residual(row), weight, s_.hidden, s_.eps, x(row));
        });
    }

    // The MTP layer's input: the next token's embedding and the hidden state, normed, side by side, projected.
    void combine(const Mtp& mtp, const float* hidden_in, const float* weight) {
        const int64_t d = s_.hidden;
        T* pairs = w_.x.data.get();
        pool_.tasks(rows_.count, [&](int64_t row) {
            norm(s_.embeddings + rows_.tokens[row] * d, mtp.embedding_norm, d, s_.eps, pairs + 2 * row * d);
            norm(hidden_in + row * d, mtp.hidden_norm, d, s_.eps, pairs + (2 * row + 1) * d);
        });
        const T* packed = static_cast<const T*>(mtp.combine);
        const int64_t chunks = num_chunks();
        pool_.tasks(panels(d) * chunks, [&](int64_t task) {
            const int64_t panel = task / chunks, first = task % chunks * CHUNK_ROWS;
            const T* inputs[CHUNK_ROWS];
            const int64_t count = chunk_rows(first);
            for (int64_t i = 0; i < count; ++i) inputs[i] = pairs + 2 * (first + i) * d;
            product(inputs, count, packed + panel * panel_size<T>(2 * d), 2 * d,
                    [&](int64_t i, const floats(&sums)[VECTORS]) {
                        store_panel(residual(first + i) + panel * PANEL, sums);
                    });
        });
        pool_.tasks(rows_.count, [&](int64_t row) { norm(residual(row), weight, d, s_.eps, x(row)); });
    }

    int64_t num_chunks() const { return (rows_.count + CHUNK_ROWS - 1) / CHUNK_ROWS; }
    int64_t chunk_rows(int64_t first) const { return std::min(CHUNK_ROWS, rows_.count - first); }

    // All rows times all panels of a weight: out[row, panel] for every row.
    template <class Use>
    void project(const T* const* inputs, const void* packed, int64_t num_inputs, int64_t num_panels, const Use& use) {
        const int64_t chunks = num_chunks();
        pool_.tasks(num_panels * chunks, [&](int64_t task) {
            const int64_t panel = task / chunks, first = task % chunks * CHUNK_ROWS;
            product(inputs + first, chunk_rows(first), static_cast<const T*>(packed) + panel * panel_size<T>(num_inputs),
                    num_inputs, [&](int64_t i, const floats(&sums)[VECTORS]) { use(first + i, panel, sums); });
        });
    }

    void attention(const Layer& layer, int thread) {
        const int64_t group_rows = s_.group_rows(), group_panels = group_rows / PANEL, chunks = num_chunks();
        const int64_t query_rows = s_.group_heads * s_.head_dim;
        float* qkv = w_.qkv.data.get();
        float* queries = w_.queries.data.get();
        pool_.tasks(s_.groups * chunks, [&](int64_t task) {
            const int64_t group = task / chunks, first = task % chunks * CHUNK_ROWS, count = chunk_rows(first);
            const int64_t size = panel_size<T>(s_.hidden);
            for (int64_t p = 0; p < group_panels; ++p)
                product(w_.x_rows.data.get() + first, count,
                        static_cast<const T*>(layer.qkv) + (group * group_panels + p) * size, s_.hidden,
                        [&](int64_t i, const floats(&sums)[VECTORS]) {
                            store_panel(qkv + ((first + i) * s_.groups + group) * group_rows + p * PANEL, sums);
                        });
            for (int64_t row = first; row < first + count; ++row)
                finish_group(s_, layer, rows_, row, group, qkv + (row * s_.groups + group) * group_rows,
                             queries + (row * s_.groups + group) * query_rows);
        });
        pool_.tasks(rows_.count * s_.groups, [&](int64_t task) {
            attend_group(s_, layer, rows_, task / s_.groups, task % s_.groups, queries + task * query_rows,
                         scratch(thread), w_.heads.data.get() + task * query_rows);
        });
        const int64_t d = padded(s_.hidden);
        float* delta = w_.delta.data.get();
        project(w_.head_rows.data.get(), layer.o_proj, s_.heads_width(), panels(s_.hidden),
                [&](int64_t row, int64_t panel, const floats(&sums)[VECTORS]) {
                    store_panel(delta + row * d + panel * PANEL, sums);
                });
    }

    // Adds up to two terms to the residual and norms it for what comes next.
    void finish_row(int64_t row, const float* delta, const float* more, const float* weight, float* hidden_out) {
        float* r = residual(row);
        for (int64_t i = 0; i < s_.hidden; i += LANES) {
            floats change = load(delta + i);
            if (more) change += load(more + i);
            store(r + i, load(r + i) + change);
        }
        if (hidden_out)
            norm(r, weight, s_.hidden, s_.eps, hidden_out + row * s_.hidden);
        else
            norm(r, weight, s_.hidden, s_.eps, x(row));
    }

    void feed_forward(const Layer& layer, int64_t d, float* out) {  // dense, or the shared expert alone
        T* gated = w_.shared_gated.data.get();
        const int64_t width = gated_padded(layer.width);
        project(w_.x_rows.data.get(), layer.gate_up, s_.hidden, gated_panels(layer.width),
                [&](int64_t row, int64_t panel, const floats(&sums)[VECTORS]) {
                    store_gated(gated + row * width + panel * PANEL / 2, sums);
                });
        const int64_t chunks = num_chunks();
        pool_.tasks(panels(s_.hidden) * chunks, [&](int64_t task) {
            const int64_t panel = task / chunks, first = task % chunks * CHUNK_ROWS;
            down_chunk(gated, width, layer.down, layer.width, first, chunk_rows(first), panel, out, d);
        });
    }

    void down_chunk(const T* gated, int64_t stride, const void* packed, int64_t width, int64_t first, int64_t count,
                    int64_t panel, float* out, int64_t out_stride) {
        const T* inputs[CHUNK_ROWS];
        for (int64_t i = 0; i < count; ++i) inputs[i] = gated + (first + i) * stride;
        product(inputs, count, static_cast<const T*>(packed) + panel * panel_size<T>(width), width,
                [&](int64_t i, const floats(&sums)[VECTORS]) {
                    store_panel(out + (first + i) * out_stride + panel * PANEL, sums);
                });
    }

    void dense(const Layer& layer, const float* next_norm, float* hidden_out) {
        const int64_t d = padded(s_.hidden);
        float* delta = w_.delta.data.get();
        pool_.tasks(rows_.count, [&](int64_t row) {
            finish_row(row, delta + row * d, nullptr, layer.post_norm, nullptr);
        });
        feed_forward(layer, d, delta);
        pool_.tasks(rows_.count, [&](int64_t row) {
            finish_row(row, delta + row * d, nullptr, next_norm, hidden_out);
        });
    }

    void experts(const Layer& layer, int thread, const float* next_norm, float* hidden_out) {
        const int64_t d = padded(s_.hidden), k = s_.top_k;
        float* delta = w_.delta.data.get();
        int32_t* chosen = w_.experts.data.get();
        float* weights = w_.weights.data.get();
        pool_.tasks(rows_.count, [&](int64_t row) {
            finish_row(row, delta + row * d, nullptr, layer.post_norm, nullptr);
            float* wide = w_.wide_x.data.get() + row * s_.hidden;
            for (int64_t i = 0; i < s_.hidden; i += LANES) store(wide + i, load(x(row) + i));
            route(s_, layer, wide, scratch(thread), chosen + row * k, weights + row * k);
        });
        if (thread == 0) sort_by_expert(layer);
        pool_.barrier();
        const int64_t width = gated_padded(s_.moe_width), shared_width = gated_padded(layer.width);
        pool_.tasks(w_.up_tasks.size(), [&](int64_t i) { up(layer, w_.up_tasks[i], width, shared_width); });
        pool_.tasks(w_.down_tasks.size(), [&](int64_t i) { down(layer, w_.down_tasks[i], width, shared_width, d); });
        const int32_t* places = w_.places.data.get();
        pool_.tasks(rows_.count, [&](int64_t row) {
            float* total = delta + row * d;
            for (int64_t i = 0; i < s_.hidden; i += LANES) {
                floats weighted{};
                for (int64_t j = 0; j < k; ++j)
                    weighted += load(w_.routed.data.get() + places[row * k + j] * d + i) * weights[row * k + j];
                store(total + i, weighted);
            }
            const float* shared = layer.gate_up ? w_.shared.data.get() + row * d : nullptr;
            finish_row(row, total, shared, next_norm, hidden_out);
        });
    }

    // Counting sort of (row, choice) pairs by expert, and the products that follow from it.
    void sort_by_expert(const Layer& layer) {
        const int64_t pairs = rows_.count * s_.top_k;
        const int32_t* chosen = w_.experts.data.get();
        int32_t* firsts = w_.firsts.data.get();
        std::fill(firsts, firsts + s_.experts + 1, 0);
        for (int64_t p = 0; p < pairs; ++p) ++firsts[chosen[p] + 1];
        for (int64_t e = 0; e < s_.experts; ++e) firsts[e + 1] += firsts[e];
        std::vector<int32_t> next(firsts, firsts + s_.experts);
        for (int64_t p = 0; p < pairs; ++p) {
            const int32_t place = next[chosen[p]]++;
            w_.places.data[p] = place;
            w_.expert_rows.data[place] = x(p / s_.top_k);
        }
        w_.up_tasks.clear();
        w_.down_tasks.clear();
        for (int32_t e = 0; e < s_.experts; ++e) add_tasks(e, firsts[e], firsts[e + 1], s_.moe_width);
        if (layer.gate_up) add_tasks(-1, 0, static_cast<int32_t>(rows_.count), layer.width);
    }

    void add_tasks(int32_t expert, int32_t begin, int32_t end, int64_t width) {
        for (int32_t panel = 0; panel < gated_panels(width); ++panel)
            for (int32_t first = begin; first < end; first += CHUNK_ROWS)
                w_.up_tasks.push_back({expert, first, std::min<int32_t>(CHUNK_ROWS, end - first), panel});
        for (int32_t panel = 0; panel < panels(s_.hidden); ++panel)
            for (int32_t first = begin; first < end; first += CHUNK_ROWS)
                w_.down_tasks.push_back({expert, first, std::min<int32_t>(CHUNK_ROWS, end - first), panel});
    }

    void up(const Layer& layer, const Task& task, int64_t width, int64_t shared_width) {
        const bool shared = task.expert < 0;
        const int64_t stride = shared ? shared_width : width, size = panel_size<T>(s_.hidden);
        const T* packed = shared ? static_cast<const T*>(layer.gate_up)
                                 : static_cast<const T*>(layer.expert_gate_up) +
                                       task.expert * gated_panels(s_.moe_width) * size;
        const T* const* inputs = (shared ? w_.x_rows : w_.expert_rows).data.get() + task.first;
        T* out = (shared ? w_.shared_gated : w_.gated).data.get() + task.first * stride + task.panel * PANEL / 2;
        product(inputs, task.count, packed + task.panel * size, s_.hidden,
                [&](int64_t i, const floats(&sums)[VECTORS]) { store_gated(out + i * stride, sums); });
    }

    void down(const Layer& layer, const Task& task, int64_t width, int64_t shared_width, int64_t d) {
        if (task.expert < 0) {
            down_chunk(w_.shared_gated.data.get(), shared_width, layer.down, layer.width, task.first, task.count,
                       task.panel, w_.shared.data.get(), d);
        } else {
            const T* packed = static_cast<const T*>(layer.expert_down) +
                              task.expert * panels(s_.hidden) * panel_size<T>(s_.moe_width);
            down_chunk(w_.gated.data.get(), width, packed, s_.moe_width, task.first, task.count, task.panel,
                       w_.routed.data.get(), d);
        }
    }

    Pool& pool_;
    Workspace<T>& w_;
    const Shape& s_;
    const Rows& rows_;
    int64_t scratch_size_;
};

// hidden [*, D] rows `chosen` times the head: logits [count, padded(V)].
template <class T>
void head(Pool& pool, Workspace<T>& w, const Shape& s, const float* hidden, const int32_t* chosen, int64_t count,
          float* logits) {
    T* x = w.x.need(count * s.hidden + 2);
    point(w.x_rows, static_cast<const T*>(x), count, s.hidden);
    const int64_t chunks = (count + CHUNK_ROWS - 1) / CHUNK_ROWS, stride = padded(s.vocab);
    pool.run([&](int) {
        pool.tasks(count, [&](int64_t i) {
            for (int64_t j = 0; j < s.hidden; j += LANES)
                store(x + i * s.hidden + j, load(hidden + chosen[i] * s.hidden + j));
        });
        pool.tasks(panels(s.vocab) * chunks, [&](int64_t task) {
            const int64_t panel = task / chunks, first = task % chunks * CHUNK_ROWS;
            product(w.x_rows.data.get() + first, std::min(CHUNK_ROWS, count - first),
                    static_cast<const T*>(s.head) + panel * panel_size<T>(s.hidden), s.hidden,
                    [&](int64_t i, const floats(&sums)[VECTORS]) {
                        store_panel(logits + (first + i) * stride + panel * PANEL, sums);
                    });
        });
    });
}

// Runs the MTP layer over rows, then drafts tokens for some sequences, each after its last row: tokens [count,
// num_drafts], and the probabilities [count, num_drafts, padded(V)] that they were drawn from.
template <class T>
void draft(Decoder& decoder, Workspace<T>& w, const Shape& s, const Layer* layers, int64_t num_layers, const Mtp& mtp,
           const Rows& rows, const float* hidden, const float* final_norm, const int32_t* last_rows,
           const Draws& draws, int64_t num_drafts, int32_t* tokens, float* probs) {
    const int64_t count = draws.count, stride = padded(s.vocab);
    float* drafted = decoder.drafted.need(std::max(rows.count, count) * s.hidden);
    float* states = decoder.draft_states.need(count * s.hidden);
    float* logits = decoder.draft_logits.need(count * stride);
    Step(decoder.pool, w, s, rows).run(layers, num_layers, &mtp, hidden, final_norm, drafted);
    if (!count) return;
    std::vector<int32_t> last(last_rows, last_rows + count), next(count), positions(count), slots(count),
        sequence(count);
    for (int64_t i = 0; i < count; ++i) sequence[i] = rows.sequence[last[i]];
    for (int64_t step = 0; step < num_drafts; ++step) {
        head(decoder.pool, w, s, drafted, last.data(), count, logits);
        decoder.pool.run([&](int thread) {
            decoder.pool.tasks(count, [&](int64_t i) {
                next[i] = propose(decoder.distributions[thread], logits + i * stride, s.vocab, draws, i, step,
                                  probs + (i * num_drafts + step) * stride);
                tokens[i * num_drafts + step] = next[i];
            });
        });
        if (step + 1 == num_drafts) return;
        for (int64_t i = 0; i < count; ++i) {
            positions[i] = static_cast<int32_t>(rows.positions[last_rows[i]] + step + 1);
            slots[i] = static_cast<int32_t>(rows.slots[last_rows[i]] + step + 1);
            std::memcpy(states + i * s.hidden, drafted + last[i] * s.hidden, s.hidden * sizeof(float));
            last[i] = static_cast<int32_t>(i);
        }
        const Rows ahead{count,       next.data(),       positions.data(), slots.data(), sequence.data(),
                         rows.blocks, rows.block_starts, rows.first_slot};
        Step(decoder.pool, w, s, ahead).run(layers, num_layers, &mtp, states, final_norm, drafted);
    }
}

}  // namespace

EXPORT void* decoder_create(int64_t threads) { return new Decoder(static_cast<int>(threads)); }

EXPORT void decoder_destroy(void* decoder) { delete static_cast<Decoder*>(decoder); }

EXPORT int64_t decoder_packed_size(int64_t outputs, int64_t inputs, int64_t gated, int64_t bf16) {
    const int64_t count = gated ? gated_panels(outputs / 2) : panels(outputs);
    return count * (bf16 ? 2 * panel_size<bfloat16>(inputs) : 4 * panel_size<float>(inputs));
}

EXPORT void decoder_pack(const float* weight, int64_t outputs, int64_t inputs, int64_t gated, int64_t bf16,
                         void* packed) {
    if (bf16)
        pack_weight(weight, outputs, inputs, gated, static_cast<bfloat16*>(packed));
    else
        pack_weight(weight, outputs, inputs, gated, static_cast<float*>(packed));
}

EXPORT int64_t decoder_has_bf16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

EXPORT void decoder_forward(void* handle, const Shape* shape, const Layer* layers, int64_t num_layers,
                            const Rows* rows, const float* final_norm, int64_t bf16, float* hidden_out) {
    auto& decoder = *static_cast<Decoder*>(handle);
    decoder.in(bf16, [&](auto& workspace) {
        Step(decoder.pool, workspace, *shape, *rows)
            .run(layers, num_layers, nullptr, nullptr, final_norm, hidden_out);
    });
}

EXPORT void decoder_head(void* handle, const Shape* shape, const float* hidden, const int32_t* chosen, int64_t count,
                         int64_t bf16, float* logits) {
    auto& decoder = *static_cast<Decoder*>(handle);
    decoder.in(bf16, [&](auto& workspace) {
        head(decoder.pool, workspace, *shape, hidden, chosen, count, logits);
    });
}

EXPORT void decoder_draft(void* handle, const Shape* shape, const Layer* layers, int64_t num_layers, const Mtp* mtp,
                          const Rows* rows, const float* hidden, const float* final_norm, const int32_t* last_rows,
                          const Draws* draws, int64_t num_drafts, int64_t bf16, int32_t* tokens, float* probs) {
    auto& decoder = *static_cast<Decoder*>(handle);
    decoder.in(bf16, [&](auto& workspace) {
        draft(decoder, workspace, *shape, layers, num_layers, *mtp, *rows, hidden, final_norm, last_rows, *draws,
              num_drafts, tokens, probs);
    });
}

// Rows starts[i] to starts[i + 1] of the logits, of `stride` floats each, belong to sequence i: one after its last token
// and one after each of its drafts, which lie one sequence after the other. Tokens and log-probabilities are written
// from starts[i] on, and how many there are to `counts`.
EXPORT void decoder_sample(void* handle, const float* logits, int64_t vocab, int64_t stride, const Draws* draws,
                           const int32_t* starts, const int32_t* drafts, const float* const* draft_probs,
                           int32_t* tokens, float* logprobs, int32_t* counts) {
    auto& decoder = *static_cast<Decoder*>(handle);
    decoder.pool.run([&](int thread) {
        decoder.pool.tasks(draws->count, [&](int64_t i) {
            const int64_t first = starts[i], num_drafts = starts[i + 1] - first - 1;
            counts[i] = static_cast<int32_t>(verify(decoder.distributions[thread], logits + first * stride, vocab,
                                                    stride, *draws, i, drafts + first - i, num_drafts, draft_probs[i],
                                                    tokens + first, logprobs + first));
        });
    });
}
