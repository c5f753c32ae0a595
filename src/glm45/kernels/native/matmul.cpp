// C (+)= A B for operands of mixed types and any strides, with a choice of arithmetic unit.
//
// M x K times K x N. Operands are packed, as fp32, into strips of LANES rows of A or columns of B, [K][LANES]; a tile
// of PRODUCT_ROWS rows and two strips of B then runs over the whole of K in registers. Two units:
//   fp32   multiply-add in fp32: exact for bf16 operands. For processors whose bf16 products are slower than that.
//   fp16   AVX512-FP16, twice as fast again: each row of A and column of B is scaled by a power of two into fp16's
//          range, products are summed in fp16 over 32 terms at most and from there in fp32. Eleven bits of mantissa
//          against bf16's eight.
#include "common.h"

#include <vector>

namespace {

constexpr int64_t BLOCK_BYTES = 1 << 20; // of packed B, to stay in a core's second-level cache
constexpr int64_t K_BLOCK = 512;        // terms of a sum taken together where C is fp32
constexpr int64_t CHUNK = 32;           // products summed in fp16
constexpr int LARGEST_EXPONENT = 4;     // after scaling below 32: 32 * 32 * CHUNK is half of fp16's range

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Element (row, k) of an operand is at data[row * row_stride + k * k_stride]; for B, rows are its columns.
template <class T>
struct Operand {
    const T* data;
    int64_t row_stride, k_stride, rows;
    Operand(const T* data, int64_t row_stride, int64_t k_stride, int64_t rows)
        : data(data), row_stride(row_stride), k_stride(k_stride), rows(rows) {}
};

// Packs rows [row, row + LANES) as [K][LANES], zeros past the last one, and returns each row's largest magnitude.
template <class T>
floats pack(const Operand<T>& x, int64_t row, int64_t K, float* strip) {
    floats largest = {};
    auto put = [&](int64_t k, floats v) {
        store(strip + k * LANES, v);
        largest = maximum(magnitude(v), largest);
    };
    int64_t count = std::min(LANES, x.rows - row), whole = count == LANES ? K / LANES * LANES : 0;
    const T* from = x.data + row * x.row_stride;
    int64_t k = 0;
    if (x.row_stride == 1 && count == LANES) {
        for (; k < K; ++k) put(k, load(from + k * x.k_stride));
    } else if (x.k_stride == 1) {
        for (; k < whole; k += LANES) {
            floats tile[LANES];
            for (int64_t r = 0; r < LANES; ++r) tile[r] = load(from + r * x.row_stride + k);
            transpose_tile(tile);
            for (int64_t r = 0; r < LANES; ++r) put(k + r, tile[r]);
        }
    }
    for (; k < K; ++k) {
        float values[LANES] = {};
        for (int64_t r = 0; r < count; ++r) values[r] = widen(from[r * x.row_stride + k * x.k_stride]);
        put(k, load(values));
    }
    return largest;
}

// Where a product goes, and what is added to it.
template <class T>
struct Target {
    T* data;
    int64_t row_stride;
    bool add;           // to what is there
    const float* bias;  // one a column, or null
    Target(T* data, int64_t row_stride, bool add, const float* bias)
        : data(data), row_stride(row_stride), add(add), bias(bias) {}
};

// Puts a tile [rows][columns] at (row, column), times a scale for each row and column where given.
template <class T>
void finish(const float* tile, int64_t tile_stride, const Target<T>& C, int64_t row, int64_t column, int64_t rows,
            int64_t columns, const float* row_scales, const float* column_scales) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; c += LANES) {
            floats value = load(tile + r * tile_stride + c);
            if (row_scales) value *= row_scales[r] * load(column_scales + c);
            T* to = C.data + (row + r) * C.row_stride + column + c;
            int64_t width = std::min(LANES, columns - c);
            if (C.bias) {
                float bias[LANES] = {};
                std::copy(C.bias + column + c, C.bias + column + c + width, bias);
                value += load(bias);
            }
            if (width == LANES) {
                store(to, C.add ? value + load(to) : value);
                continue;
            }
            T edge[LANES] = {};
            std::copy(to, to + width, edge);
            store(edge, C.add ? value + load(edge) : value);
            std::copy(edge, edge + width, to);
        }
    }
}

// --- fp32 -----------------------------------------------------------------------------------------------------------

// tile[PRODUCT_ROWS][VECTORS * LANES] = the first rows of A's strip times VECTORS strips of B.
template <int VECTORS>
void multiply_fp32(const float* A, const float* B, int64_t K, float* tile) {
    floats sums[PRODUCT_ROWS][VECTORS] = {};
    for (int64_t k = 0; k < K; ++k) {
        floats b[VECTORS];
        for (int v = 0; v < VECTORS; ++v) b[v] = in_register(load(B + (v * K + k) * LANES));
        for (int r = 0; r < PRODUCT_ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) sums[r][v] += broadcast(A[k * LANES + r]) * b[v];
    }
    for (int r = 0; r < PRODUCT_ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(tile + (r * VECTORS + v) * LANES, sums[r][v]);
}

template <class TA, class TB, class TC>
void matmul_fp32(const Operand<TA>& A, const Operand<TB>& B, const Target<TC>& C, int64_t K) {
    int64_t block = std::max(2 * LANES, BLOCK_BYTES / 4 / K / (2 * LANES) * (2 * LANES));
    std::vector<float> a(K * LANES), b(K * std::min(block, round_up(B.rows, LANES)));
    float tile[PRODUCT_ROWS * 2 * LANES];
    for (int64_t start = 0; start < B.rows; start += block) {
        int64_t stop = std::min(start + block, B.rows);
        for (int64_t n = start; n < stop; n += LANES) pack(B, n, K, &b[(n - start) * K]);
        for (int64_t m = 0; m < A.rows; m += LANES) {
            pack(A, m, K, a.data());
            for (int64_t n = start; n < stop; n += 2 * LANES) {
                bool both = stop - n > LANES;
                for (int64_t half = 0; half < LANES && m + half < A.rows; half += PRODUCT_ROWS) {
                    auto multiply = both ? multiply_fp32<2> : multiply_fp32<1>;
                    multiply(&a[half], &b[(n - start) * K], K, tile);
                    int64_t row = m + half;
                    finish(tile, both ? 2 * LANES : LANES, C, row, n, std::min(PRODUCT_ROWS, A.rows - row),
                           std::min(2 * LANES, stop - n), nullptr, nullptr);
                }
            }
        }
    }
}

// --- fp16 -----------------------------------------------------------------------------------------------------------

#ifdef __AVX512FP16__

constexpr int64_t WIDE = 32;  // lanes of fp16

typedef _Float16 wide __attribute__((vector_size(64)));
typedef _Float16 narrow __attribute__((vector_size(32)));
typedef _Float16 loose_narrow __attribute__((vector_size(32), aligned(2), may_alias));

// The power of two that brings each lane's largest magnitude into [16, 32), and its inverse.
inline floats choose_scales(floats largest, float* inverses) {
    floats scales;
    for (int64_t lane = 0; lane < LANES; ++lane) {
        int32_t bits, exponent = 0;
        std::memcpy(&bits, reinterpret_cast<const char*>(&largest) + lane * sizeof bits, sizeof bits);
        if (bits > 0 && bits < 0x7f800000) exponent = (bits >> 23) - 127 - LARGEST_EXPONENT;
        exponent = std::max(-120, std::min(120, exponent));
        int32_t up = (127 - exponent) << 23, down = (127 + exponent) << 23;
        std::memcpy(reinterpret_cast<char*>(&scales) + lane * sizeof up, &up, sizeof up);
        std::memcpy(inverses + lane, &down, sizeof down);
    }
    return scales;
}

// A strip as [K][16] pairs of equal halves: one 32-bit broadcast fills a register with a value.
inline void halve_rows(const float* strip, floats scales, int64_t K, uint32_t* out) {
    for (int64_t k = 0; k < K; ++k) {
        narrow half = __builtin_convertvector(load(strip + k * LANES) * scales, narrow);
        words pairs = __builtin_convertvector((halves)half, words);
        pairs |= pairs << 16;
        std::memcpy(out + k * LANES, &pairs, sizeof pairs);
    }
}

// Two strips side by side as [K][32]; `second` says which half this strip is.
inline void halve_columns(const float* strip, floats scales, int64_t K, _Float16* out, int64_t second) {
    for (int64_t k = 0; k < K; ++k) {
        narrow half = __builtin_convertvector(load(strip + k * LANES) * scales, narrow);
        *reinterpret_cast<loose_narrow*>(out + k * WIDE + second * LANES) = half;
    }
}

inline floats first_half(wide x) { return (floats)_mm512_cvtxph_ps(_mm512_castph512_ph256((__m512h)x)); }

inline floats second_half(wide x) {
    return (floats)_mm512_cvtxph_ps((__m256h)_mm512_extractf64x4_pd((__m512d)x, 1));
}

// tile[PRODUCT_ROWS][VECTORS * 32] = the first rows of A's strip times VECTORS double strips of B.
template <int VECTORS>
void multiply_fp16(const uint32_t* A, const _Float16* B, int64_t K, float* tile) {
    for (int64_t chunk = 0; chunk < K; chunk += CHUNK) {
        wide sums[PRODUCT_ROWS][VECTORS] = {};
        int64_t stop = std::min(chunk + CHUNK, K);
        for (int64_t k = chunk; k < stop; ++k) {
            wide b[VECTORS];
            for (int v = 0; v < VECTORS; ++v) std::memcpy(&b[v], B + (v * K + k) * WIDE, sizeof b[v]);
            for (int r = 0; r < PRODUCT_ROWS; ++r) {
                wide a = (wide)(words{} + A[k * LANES + r]);
                for (int v = 0; v < VECTORS; ++v) sums[r][v] += a * b[v];
            }
        }
        for (int r = 0; r < PRODUCT_ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) {
                float* to = tile + (r * VECTORS + v) * WIDE;
                floats low = first_half(sums[r][v]), high = second_half(sums[r][v]);
                store(to, chunk ? load(to) + low : low);
                store(to + LANES, chunk ? load(to + LANES) + high : high);
            }
    }
}

template <class TA, class TB, class TC>
void matmul_fp16(const Operand<TA>& A, const Operand<TB>& B, const Target<TC>& C, int64_t K) {
    int64_t pair = 2 * WIDE, block = std::max(pair, BLOCK_BYTES / 2 / K / pair * pair);
    int64_t held = std::min(block, round_up(B.rows, pair));
    std::vector<float> strip(K * LANES), column_scales(held);
    std::vector<uint32_t> a(K * LANES);
    std::vector<_Float16> b(K * held);
    float tile[PRODUCT_ROWS * 2 * WIDE], row_scales[LANES];
    for (int64_t start = 0; start < B.rows; start += block) {
        int64_t stop = std::min(start + block, B.rows);
        for (int64_t n = start; n < round_up(stop, WIDE); n += LANES) {
            floats largest = {};
            if (n < stop) largest = pack(B, n, K, strip.data());
            else std::fill(strip.begin(), strip.end(), 0.0f);
            int64_t at = n - start;
            floats scales = choose_scales(largest, &column_scales[at]);
            halve_columns(strip.data(), scales, K, &b[at / WIDE * WIDE * K], at / LANES % 2);
        }
        for (int64_t m = 0; m < A.rows; m += LANES) {
            floats scales = choose_scales(pack(A, m, K, strip.data()), row_scales);
            halve_rows(strip.data(), scales, K, a.data());
            for (int64_t n = start; n < stop; n += pair) {
                bool both = stop - n > WIDE;
                for (int64_t half = 0; half < LANES && m + half < A.rows; half += PRODUCT_ROWS) {
                    auto multiply = both ? multiply_fp16<2> : multiply_fp16<1>;
                    multiply(&a[half], &b[(n - start) * K], K, tile);
                    int64_t row = m + half;
                    finish(tile, both ? pair : WIDE, C, row, n, std::min(PRODUCT_ROWS, A.rows - row),
                           std::min(pair, stop - n), row_scales + half, &column_scales[n - start]);
                }
            }
        }
    }
}

#else

template <class TA, class TB, class TC>
void matmul_fp16(const Operand<TA>&, const Operand<TB>&, const Target<TC>&, int64_t) {
    __builtin_trap();  // never called: has_fp16() is false
}

#endif

// One thread's part is a range of C's rows, or of its columns where there are more of those. Into fp32, a long sum is
// taken in blocks that keep a panel of B in the first-level cache.
template <class TA, class TB, class TC>
void multiply(Operand<TA> A, Operand<TB> B, Target<TC> C, int64_t K, bool fp16, int64_t threads) {
    auto run = fp16 ? matmul_fp16<TA, TB, TC> : matmul_fp32<TA, TB, TC>;
    int64_t along = std::max(A.rows, B.rows), k_block = sizeof(TC) == sizeof(float) ? K_BLOCK : K;
    parallel((along + 63) / 64, threads, [&](int64_t begin, int64_t end, int64_t) {
        int64_t first = begin * 64, count = std::min(end * 64, along) - first;
        Operand<TA> a = A;
        Operand<TB> b = B;
        Target<TC> c = C;
        if (A.rows >= B.rows) {
            a.data += first * a.row_stride, a.rows = count, c.data += first * c.row_stride;
        } else {
            b.data += first * b.row_stride, b.rows = count, c.data += first;
            if (c.bias) c.bias += first;
        }
        for (int64_t k = 0; k < K; k += k_block) {
            run(a, b, c, std::min(k_block, K - k));
            a.data += k_block * a.k_stride, b.data += k_block * b.k_stride;
            c.add = true, c.bias = nullptr;
        }
    });
}

}  // namespace

EXPORT int64_t has_fp16() {
#ifdef __AVX512FP16__
    return 1;
#else
    return 0;
#endif
}

namespace {

// Calls run(a, b, c) with pointers of the types that the numbers name: 0 for fp32, 1 for bf16.
template <class Run>
void with_types(const void* A, int64_t a_type, const void* B, int64_t b_type, void* C, int64_t c_type, const Run& run) {
    auto with_b = [&](auto* a, auto* b) { c_type ? run(a, b, (bfloat16*)C) : run(a, b, (float*)C); };
    auto with_a = [&](auto* a) { b_type ? with_b(a, (const bfloat16*)B) : with_b(a, (const float*)B); };
    a_type ? with_a((const bfloat16*)A) : with_a((const float*)A);
}

}  // namespace

// Strides are in elements; C's rows are contiguous; bias (may be null) is one fp32 a column. Types: 0 fp32, 1 bf16.
EXPORT void matmul(const void* A, int64_t a_type, int64_t a_row, int64_t a_k, const void* B, int64_t b_type,
                   int64_t b_k, int64_t b_column, void* C, int64_t c_type, int64_t c_row, const float* bias, int64_t M,
                   int64_t N, int64_t K, int64_t add, int64_t fp16, int64_t threads) {
    with_types(A, a_type, B, b_type, C, c_type, [&](auto* a, auto* b, auto* c) {
        multiply(Operand(a, a_row, a_k, M), Operand(b, b_column, b_k, N), Target(c, c_row, add != 0, bias), K, fp16,
                 threads);
    });
}

// One product for each group g of rows [offsets[g], offsets[g + 1]) of A and C, with the matrix of B at g * b_group.
EXPORT void matmul_groups(const void* A, int64_t a_type, int64_t a_row, int64_t a_k, const void* B, int64_t b_type,
                          int64_t b_group, int64_t b_k, int64_t b_column, void* C, int64_t c_type, int64_t c_row,
                          const int64_t* offsets, int64_t groups, int64_t N, int64_t K, int64_t fp16,
                          int64_t threads) {
    with_types(A, a_type, B, b_type, C, c_type, [&](auto* a, auto* b, auto* c) {
        for (int64_t g = 0; g < groups; ++g) {
            int64_t first = offsets[g], rows = offsets[g + 1] - first;
            if (rows)
                multiply(Operand(a + first * a_row, a_row, a_k, rows), Operand(b + g * b_group, b_column, b_k, N),
                         Target(c + first * c_row, c_row, false, nullptr), K, fp16, threads);
        }
    });
}

// One product for each group g of terms [offsets[g], offsets[g + 1]), into the matrix of C at g * c_group; a group
// without terms is left as it is.
EXPORT void matmul_term_groups(const void* A, int64_t a_type, int64_t a_row, int64_t a_k, const void* B,
                               int64_t b_type, int64_t b_k, int64_t b_column, void* C, int64_t c_type,
                               int64_t c_group, int64_t c_row, const int64_t* offsets, int64_t groups, int64_t M,
                               int64_t N, int64_t fp16, int64_t threads) {
    with_types(A, a_type, B, b_type, C, c_type, [&](auto* a, auto* b, auto* c) {
        for (int64_t g = 0; g < groups; ++g) {
            int64_t first = offsets[g], terms = offsets[g + 1] - first;
            if (terms)
                multiply(Operand(a + first * a_k, a_row, a_k, M), Operand(b + first * b_k, b_column, b_k, N),
                         Target(c + g * c_group, c_row, false, nullptr), terms, fp16, threads);
        }
    });
}
