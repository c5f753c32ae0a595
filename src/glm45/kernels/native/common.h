// What every native kernel shares: vectors, bfloat16, exponentials, a parallel loop.
//
// Vectors are GCC's generic ones, as wide as a register: what is wider is kept in memory, several times as slow. Sums
// are in fp32 whatever the storage type. Nothing here depends on torch: the interface is plain C over raw pointers.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Lanes of a register, and rows of a tile of a product: two vectors a row, as many sums as registers hold.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, PRODUCT_ROWS = 8;
#elif defined(__AVX__)
constexpr int64_t LANES = 8, PRODUCT_ROWS = 4;
#else
constexpr int64_t LANES = 4, PRODUCT_ROWS = 4;
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef float loose_floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t loose_halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

struct bfloat16 {
    uint16_t bits;
};

inline ints lane_numbers() {
    ints numbers;
    for (int32_t lane = 0; lane < LANES; ++lane) numbers[lane] = lane;
    return numbers;
}

inline floats broadcast(float value) { return value - floats{}; }  // x - 0 is exactly x, and folds away

inline floats load(const float* p) { return *reinterpret_cast<const loose_floats*>(p); }
inline void store(float* p, floats v) { *reinterpret_cast<loose_floats*>(p) = v; }

// A vector that several products share: without this, GCC reads it from memory again for each of them.
inline floats in_register(floats v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__SSE__)
    asm("" : "+x"(v));
#endif
    return v;
}

inline floats load(const bfloat16* p) {
    halves bits = *reinterpret_cast<const loose_halves*>(p);
    return (floats)(__builtin_convertvector(bits, words) << 16);
}

inline void store(bfloat16* p, floats v) {
#ifdef __AVX512BF16__
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &rounded, sizeof rounded);
#else
    words bits = (words)v;
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    words quiet = (bits >> 16) | 0x40;                           // a NaN must not round to infinity
    words chosen = (bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
    *reinterpret_cast<loose_halves*>(p) = __builtin_convertvector(chosen, halves);
#endif
}

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) {
    uint32_t bits = uint32_t{x.bits} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float sum(floats v) {
    float total[LANES];
    std::memcpy(total, &v, sizeof v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) total[lane] += total[lane + width];
    return total[0];
}

// a > b ? a : b and its mirror, lane by lane: b where either is not a number.
#ifdef __AVX512F__
inline floats maximum(floats a, floats b) { return (floats)_mm512_max_ps((__m512)a, (__m512)b); }
inline floats minimum(floats a, floats b) { return (floats)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline floats maximum(floats a, floats b) { return a > b ? a : b; }
inline floats minimum(floats a, floats b) { return a < b ? a : b; }
#endif

inline floats magnitude(floats x) { return (floats)((ints)x & 0x7fffffff); }

inline float maximum(floats v) {
    float best = v[0];
    for (int lane = 1; lane < LANES; ++lane) best = std::max(best, v[lane]);
    return best;
}

// exp to about one unit in the last place; arguments are held within the range of normal results.
inline floats exponential(floats x) {
    floats held = minimum(broadcast(88.0f), maximum(broadcast(-87.0f), x));  // this order keeps a NaN
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    floats shifted = held * 1.44269504f + magic;
    floats n = shifted - magic;
    floats r = held - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    floats p = broadcast(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (floats)((ints)p + ((ints)shifted << 23));
}

inline floats sigmoid(floats x) { return 1.0f / (1.0f + exponential(-x)); }

// One step of transposing LANES x LANES: swaps the off-diagonal blocks of size STEP of every 2 STEP x 2 STEP block.
template <int STEP>
inline void exchange(floats* tile) {
    ints upper, lower;
    for (int lane = 0; lane < LANES; ++lane) {
        upper[lane] = lane & STEP ? LANES + lane - STEP : lane;
        lower[lane] = lane & STEP ? LANES + lane : lane + STEP;
    }
    for (int r = 0; r < LANES; ++r) {
        if (r & STEP) continue;
        floats a = tile[r], b = tile[r + STEP];
        tile[r] = __builtin_shuffle(a, b, upper);
        tile[r + STEP] = __builtin_shuffle(a, b, lower);
    }
}

inline void transpose_tile(floats* tile) {
    if constexpr (LANES > 8) exchange<8>(tile);
    if constexpr (LANES > 4) exchange<4>(tile);
    exchange<2>(tile);
    exchange<1>(tile);
}

// Calls body(begin, end, thread) over [0, count), split evenly over threads; plain call for one thread.
template <class Body>
inline void parallel(int64_t count, int64_t threads, const Body& body) {
    threads = std::max<int64_t>(1, std::min(threads, count));
    if (threads == 1) {
        body(int64_t{0}, count, int64_t{0});
        return;
    }
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t thread = 0; thread < threads; ++thread)
        body(count * thread / threads, count * (thread + 1) / threads, thread);
}
