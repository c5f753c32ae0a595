// Newton-Schulz iteration on the Gram matrices of many small matrices, for Muon.
//
// S matrices of M rows and N >= M columns. Every step multiplies by Q = a + b G + c G^2, a symmetric matrix, and the
// Gram matrix becomes Q G Q: all products are of symmetric matrices that commute, so their results are symmetric, too,
// and half of each is computed. One matrix stays in the second-level cache from the first product to the last. Small
// eigenvalues lose digits in it at every step, so matrices that may have them (N < 4 M) are multiplied out in between.
//
// A symmetric matrix is kept as panels of WIDTH columns, [M / WIDTH][M][WIDTH], filled up with zeros: a panel is read
// from front to back, as columns of the right operand and, by symmetry, as rows of the left one.
#include "common.h"

#include <utility>
#include <vector>

namespace {

constexpr int64_t WIDTH = 2 * LANES;
constexpr int64_t RESTART = 3;    // steps after which a matrix that is not wide is multiplied out
constexpr int64_t K_BLOCK = 256;  // terms of X X^T taken together, so that their panels stay in cache

// block[WIDTH][WIDTH] (+)= left^T right, for panels of K rows.
void multiply(const float* left, const float* right, int64_t K, bool add, float* block) {
    for (int64_t row = 0; row < WIDTH; row += PRODUCT_ROWS) {
        floats sums[PRODUCT_ROWS][2] = {};
        for (int64_t k = 0; k < K; ++k) {
            floats first = in_register(load(right + k * WIDTH)), second = in_register(load(right + k * WIDTH + LANES));
            for (int64_t r = 0; r < PRODUCT_ROWS; ++r) {
                floats factor = broadcast(left[k * WIDTH + row + r]);
                sums[r][0] += factor * first;
                sums[r][1] += factor * second;
            }
        }
        for (int64_t r = 0; r < PRODUCT_ROWS; ++r)
            for (int64_t v = 0; v < 2; ++v) {
                float* to = block + (row + r) * WIDTH + v * LANES;
                store(to, add ? load(to) + sums[r][v] : sums[r][v]);
            }
    }
}

// Writes the transpose of block[WIDTH][WIDTH].
void transpose(const float* block, float* to) {
    for (int64_t row = 0; row < WIDTH; row += LANES)
        for (int64_t column = 0; column < WIDTH; column += LANES) {
            floats tile[LANES];
            for (int64_t r = 0; r < LANES; ++r) tile[r] = load(block + (row + r) * WIDTH + column);
            transpose_tile(tile);
            for (int64_t r = 0; r < LANES; ++r) store(to + (column + r) * WIDTH + row, tile[r]);
        }
}

// The iteration's buffers for matrices of one size; P is M rounded up to whole panels.
struct Iteration {
    int64_t M, N, P;
    std::vector<float> gram, step, factor, spare, rows;

    Iteration(int64_t M, int64_t N)
        : M(M), N(N), P((M + WIDTH - 1) / WIDTH * WIDTH), gram(P * P), step(P * P), factor(P * P), spare(P * P),
          rows(P * K_BLOCK) {}

    // Calls each(row, column, block) for the blocks of a symmetric matrix on and above the diagonal.
    template <class Each>
    void upper_blocks(float* matrix, const Each& each) {
        for (int64_t column = 0; column < P; column += WIDTH)
            for (int64_t row = 0; row <= column; row += WIDTH) each(row, column, matrix + column * P + row * WIDTH);
    }

    void mirror(float* matrix) {
        upper_blocks(matrix, [&](int64_t row, int64_t column, float* block) {
            if (row < column) transpose(block, matrix + row * P + column * WIDTH);
        });
    }

    // C = A B, for symmetric matrices that commute.
    void product(const float* A, const float* B, float* C) {
        upper_blocks(C, [&](int64_t row, int64_t column, float* block) {
            multiply(A + row * P, B + column * P, P, false, block);
        });
        mirror(C);
    }

    // gram = X X^T
    void multiply_out(const float* X) {
        for (int64_t first = 0; first < N; first += K_BLOCK) {
            int64_t count = std::min(K_BLOCK, N - first);
            for (int64_t row = 0; row < P; ++row)
                for (int64_t k = 0; k < count; ++k)
                    rows[row / WIDTH * WIDTH * K_BLOCK + k * WIDTH + row % WIDTH] = row < M ? X[row * N + first + k] : 0;
            upper_blocks(gram.data(), [&](int64_t row, int64_t column, float* block) {
                multiply(&rows[row * K_BLOCK], &rows[column * K_BLOCK], count, first > 0, block);
            });
        }
        mirror(gram.data());
    }

    // Divides gram by its matrix's squared norm; returns 1 / norm, of the norm or `least` if that is more.
    float normalize(float least) {
        double square = 0;
        for (int64_t i = 0; i < M; ++i) square += gram[i / WIDTH * WIDTH * P + i * WIDTH + i % WIDTH];
        float inverse = 1 / std::max(float(std::sqrt(square)), least);
        for (float& value : gram) value *= inverse * inverse;
        return inverse;
    }

    // step = a + b gram + c gram^2
    void quintic(float a, float b, float c) {
        product(gram.data(), gram.data(), step.data());
        for (int64_t i = 0; i < P * P; ++i) step[i] = c * step[i] + b * gram[i];
        for (int64_t i = 0; i < P; ++i) step[i / WIDTH * WIDTH * P + i * WIDTH + i % WIDTH] += a;
    }

    // Y = scale * factor X; Y may be X.
    void finish(const float* X, float scale, float* Y) {
        std::vector<float> panel(M * WIDTH);
        float block[WIDTH * WIDTH];
        for (int64_t column = 0; column < N; column += WIDTH) {
            int64_t width = std::min(WIDTH, N - column);
            for (int64_t k = 0; k < M; ++k) {
                std::copy(X + k * N + column, X + k * N + column + width, &panel[k * WIDTH]);
                std::fill(&panel[k * WIDTH] + width, &panel[k * WIDTH] + WIDTH, 0.0f);
            }
            for (int64_t row = 0; row < M; row += WIDTH) {
                multiply(&factor[row * P], panel.data(), M, false, block);
                for (int64_t r = 0; r < std::min(WIDTH, M - row); ++r)
                    for (int64_t i = 0; i < width; ++i) Y[(row + r) * N + column + i] = scale * block[r * WIDTH + i];
            }
        }
    }

    void run(const float* X, float* Y, int64_t steps, float a, float b, float c, float least) {
        multiply_out(X);
        float scale = normalize(least);
        int64_t restart = N < 4 * M && steps > RESTART ? RESTART : steps;
        for (int64_t turn = 0; turn < steps; ++turn) {
            if (turn == restart) {
                finish(X, scale, Y);
                multiply_out(Y);
                X = Y, scale = 1;
            }
            quintic(a, b, c);
            if (turn == 0 || turn == restart) {
                factor = step;
            } else {
                product(step.data(), factor.data(), spare.data());
                std::swap(factor, spare);
            }
            if (turn == steps - 1 || turn == restart - 1) continue;
            product(step.data(), gram.data(), spare.data());
            product(step.data(), spare.data(), gram.data());
        }
        finish(X, scale, Y);
    }
};

}  // namespace

// Y = the matrices of X after the iteration; both [S][M][N] in fp32, M <= N. `least` is the smallest norm divided by.
EXPORT void orthogonalize(const float* X, float* Y, int64_t S, int64_t M, int64_t N, int64_t steps, float a, float b,
                          float c, float least, int64_t threads) {
    parallel(S, threads, [&](int64_t begin, int64_t end, int64_t) {
        Iteration iteration(M, N);
        for (int64_t s = begin; s < end; ++s) iteration.run(X + s * M * N, Y + s * M * N, steps, a, b, c, least);
    });
}
