// Products of a few rows with weights packed in panels of 64 outputs, and the packing itself.
//
// A panel is cut into stripes, as wide as the registers allow for six rows of sums. A stripe holds its inputs one after
// the other (bf16 in pairs), its outputs each: a product is an outer product per input, and every output element is one
// chain of additions over the inputs, whatever the number of rows.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "common.h"

namespace {

constexpr int64_t PANEL = 64;                 // outputs that are computed together
constexpr int64_t VECTORS = PANEL / LANES;    // registers that hold them
#if defined(__AVX512F__)
constexpr int64_t STRIPE = 4;                 // vectors of a stripe; 6 rows of it are 24 sums, what 32 registers hold
#else
constexpr int64_t STRIPE = 2;                 // 6 rows of it are 12 sums, what 16 registers hold
#endif
constexpr int64_t STRIPES = VECTORS / STRIPE;
constexpr int TILE_ROWS = 6;

inline int64_t panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }
inline int64_t padded(int64_t outputs) { return panels(outputs) * PANEL; }
inline int64_t gated_panels(int64_t width) { return (width + PANEL / 2 - 1) / (PANEL / 2); }
inline int64_t gated_padded(int64_t width) { return gated_panels(width) * PANEL / 2; }

template <class T>
inline int64_t panel_size(int64_t inputs) {  // elements; bf16 inputs go in pairs
    return PANEL * (sizeof(T) == 2 ? (inputs + 1) / 2 * 2 : inputs);
}

// Rows times some stripes of a panel. Sums are kept in locals: through a reference they would be written to memory at
// every step.
template <int ROWS, int COUNT>
inline void multiply(const float* const* rows, const float* stripes, int64_t inputs, floats (*out)[VECTORS]) {
    const float* x[ROWS];
    floats sums[ROWS][COUNT][STRIPE];
    for (int r = 0; r < ROWS; ++r) {
        x[r] = rows[r];
        for (int s = 0; s < COUNT; ++s)
            for (int v = 0; v < STRIPE; ++v) sums[r][s][v] = floats{};
    }
    for (int64_t i = 0; i < inputs; ++i)
        for (int s = 0; s < COUNT; ++s) {
            floats w[STRIPE];
            for (int v = 0; v < STRIPE; ++v)
                w[v] = in_register(load(stripes + ((s * inputs + i) * STRIPE + v) * LANES));
            for (int r = 0; r < ROWS; ++r) {
                floats value = broadcast(x[r][i]);
                for (int v = 0; v < STRIPE; ++v) sums[r][s][v] += value * w[v];
            }
        }
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < COUNT; ++s)
            for (int v = 0; v < STRIPE; ++v) out[r][s * STRIPE + v] = sums[r][s][v];
}

#if defined(__AVX512BF16__)
template <int ROWS, int COUNT>
inline void multiply(const bfloat16* const* rows, const bfloat16* panel, int64_t inputs, floats (*out)[VECTORS]) {
    static_assert(COUNT == STRIPES);
    const int32_t* x[ROWS];
    __m512 sums[ROWS][VECTORS] = {};
    for (int r = 0; r < ROWS; ++r) x[r] = reinterpret_cast<const int32_t*>(rows[r]);
    for (int64_t i = 0; i < (inputs + 1) / 2; ++i, panel += 2 * PANEL) {
        __m512bh w[VECTORS];
        for (int v = 0; v < VECTORS; ++v) w[v] = (__m512bh)_mm512_loadu_si512(panel + 2 * v * LANES);
        for (int r = 0; r < ROWS; ++r) {
            __m512bh value = (__m512bh)_mm512_set1_epi32(x[r][i]);
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], value, w[v]);
        }
    }
    for (int r = 0; r < ROWS; ++r) std::memcpy(out[r], sums[r], sizeof sums[r]);
}
#endif

// Calls use(row, sums) for each of `count` rows times one panel. Few rows take several stripes at once: as many
// chains of additions as the processor can have under way.
template <int ROWS, class T, class Use>
inline void tile(const T* const* rows, int64_t first, const T* panel, int64_t inputs, const Use& use) {
    constexpr int COUNT = std::min<int>(STRIPES, ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1);
    floats sums[ROWS][VECTORS];
    for (int s = 0; s < STRIPES; s += COUNT)
        multiply<ROWS, COUNT>(rows + first, panel + s * inputs * STRIPE * LANES, inputs,
                              reinterpret_cast<floats(*)[VECTORS]>(&sums[0][s * STRIPE]));
    for (int r = 0; r < ROWS; ++r) use(first + r, sums[r]);
}

template <class T, class Use>
inline void product(const T* const* rows, int64_t count, const T* panel, int64_t inputs, const Use& use) {
    int64_t first = 0;
    for (; first + TILE_ROWS <= count; first += TILE_ROWS) tile<TILE_ROWS>(rows, first, panel, inputs, use);
    switch (count - first) {
        case 5: tile<5>(rows, first, panel, inputs, use); break;
        case 4: tile<4>(rows, first, panel, inputs, use); break;
        case 3: tile<3>(rows, first, panel, inputs, use); break;
        case 2: tile<2>(rows, first, panel, inputs, use); break;
        case 1: tile<1>(rows, first, panel, inputs, use); break;
        default: break;
    }
}

template <class Out>
inline void store_panel(Out* out, const floats (&sums)[VECTORS]) {
    for (int v = 0; v < VECTORS; ++v) store(out + v * LANES, sums[v]);
}

template <class Out>
inline void store_gated(Out* out, const floats (&sums)[VECTORS]) {  // the panel's first half gates its second
    for (int v = 0; v < VECTORS / 2; ++v) store(out + v * LANES, sums[v] * sigmoid(sums[v]) * sums[v + VECTORS / 2]);
}

template <class T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) {
    return value;
}
template <>
inline bfloat16 narrow<bfloat16>(float value) {
    bfloat16 out[LANES];
    store(out, broadcast(value));
    return out[0];
}

// weight [outputs, inputs] -> panels of 64 outputs, each in stripes, inputs outermost in a stripe (in pairs for bf16);
// `row_of` says which row of the weight is output o of a panel, or -1 for padding.
template <class T, class RowOf>
void pack(const float* weight, int64_t inputs, int64_t num_panels, T* packed, const RowOf& row_of) {
    constexpr int64_t PAIR = sizeof(T) == 2 ? 2 : 1, WIDTH = STRIPE * LANES;
    const int64_t rows = panel_size<T>(inputs) / PANEL;  // inputs, filled up to whole pairs
    for (int64_t panel = 0; panel < num_panels; ++panel, packed += panel_size<T>(inputs))
        for (int64_t o = 0; o < PANEL; ++o) {
            const int64_t row = row_of(panel, o);
            T* stripe = packed + o / WIDTH * WIDTH * rows;
            for (int64_t i = 0; i < rows; ++i)
                stripe[(i / PAIR * WIDTH + o % WIDTH) * PAIR + i % PAIR] =
                    narrow<T>(row < 0 || i >= inputs ? 0.0f : weight[row * inputs + i]);
        }
}

template <class T>
void pack_weight(const float* weight, int64_t outputs, int64_t inputs, int64_t gated, T* packed) {
    if (!gated) {
        pack(weight, inputs, panels(outputs), packed,
             [&](int64_t panel, int64_t o) { return panel * PANEL + o < outputs ? panel * PANEL + o : -1; });
        return;
    }
    const int64_t width = outputs / 2, half = PANEL / 2;  // gate rows first, then up rows
    pack(weight, inputs, gated_panels(width), packed, [&](int64_t panel, int64_t o) {
        const int64_t i = panel * half + o % half;
        return i < width ? i + o / half * width : -1;
    });
}

}  // namespace
