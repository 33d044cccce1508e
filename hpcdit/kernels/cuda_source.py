"""The CUDA kernels that `kernels.cuda` compiles and launches.

They include no header, so that a machine needs no CUDA toolkit, and have their own half types for that reason. N is
the numbers a thread handles at once; where WIDE, their first lies at a multiple of 16 bytes in all tensors.
"""

MAX_BLOCKS = 16  # destinations of one launch of `embed`: kernel arguments have room for 4 KB

SOURCE = r"""
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };

__device__ float up(f16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
__device__ float up(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ float up(float x) { return x; }
__device__ double up(double x) { return x; }

__device__ void down(f16 &y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ void down(bf16 &y, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ void down(float &y, float x) { y = x; }
__device__ void down(double &y, double x) { y = x; }
__device__ void down(f16 &y, double x) { down(y, (float)x); }  // in two steps, as torch
__device__ void down(bf16 &y, double x) { down(y, (float)x); }
__device__ void down(float &y, double x) { y = (float)x; }

constexpr int alignment(int size, int count) { return size * count < 16 ? size * count : 16; }
template <class T, int N, bool WIDE> struct alignas(alignment(sizeof(T), WIDE ? N : 1)) Vector { T at[N]; };

template <int N, bool WIDE, class T> __device__ Vector<T, N, WIDE> load(const T *x) {
    return *reinterpret_cast<const Vector<T, N, WIDE> *>(x);
}
template <int N, bool WIDE, class T> __device__ void store(T *x, const Vector<T, N, WIDE> &values) {
    *reinterpret_cast<Vector<T, N, WIDE> *>(x) = values;
}

template <class T> struct Rows {  // [token, batch, head] of a tensor; strides in elements
    T *data;
    long long token, batch, head;
    __device__ T *at(unsigned t, unsigned b, unsigned h) const { return data + t * token + b * batch + h * head; }
};

// A thread block's rows of threads each take one (token, batch, head). `into` may be `out` or `next` itself.
template <class Out, class Next, class Into, class Lse, int N, bool WIDE>
__global__ void merge(Rows<const Out> out, Rows<const Next> next, Rows<Into> into, Rows<const Lse> lse,
                      Rows<const Lse> next_lse, Lse *merged, int batches, int heads, int rows, int vectors) {
    unsigned row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    unsigned rest = row / heads, h = row % heads, t = rest / batches, b = rest % batches;
    Lse first = *lse.at(t, b, h), second = *next_lse.at(t, b, h), top = first > second ? first : second;
    if (isinf(top)) top = 0;  // neither has met a key: all weights become 0, not nan
    first = exp(first - top), second = exp(second - top);
    Lse sum = first + second;
    if (threadIdx.x == 0) merged[row] = top + log(sum);
    first = sum > 0 ? first / sum : 0, second = sum > 0 ? second / sum : 0;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
        auto x = load<N, WIDE>(out.at(t, b, h) + i * N);
        auto y = load<N, WIDE>(next.at(t, b, h) + i * N);
        Vector<Into, N, WIDE> z;
        for (int j = 0; j < N; j++) down(z.at[j], up(x.at[j]) * first + up(y.at[j]) * second);
        store<N, WIDE>(into.at(t, b, h) + i * N, z);
    }
}

template <class T> struct Block { Rows<T> rows; long long first, count; };  // heads first .. first + count - 1
template <class T> struct Blocks { Block<T> block[MAX_BLOCKS]; long long count; };

template <class A> __device__ A block_sum(A x) {  // the same on all threads
    __shared__ A parts[32];
    for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < (blockDim.x + 31) / 32; warp++) x += parts[warp];
    return x;
}

// A thread block takes one (token, batch): all heads of it, as the norm is over all of them. The second reading of x
// is served by the cache.
template <class T, class W, class C, int N, bool WIDE, bool NORM, bool ROTATE>
__global__ void embed(const T *x, long long token, long long batch, const W *weight, const C *cos, const C *sin,
                      double eps, int heads, int dim, const __grid_constant__ Blocks<T> blocks) {
    using A = decltype(up(T()));
    const T *row = x + blockIdx.x * token + blockIdx.y * batch;
    A scale = 1;
    if constexpr (NORM) {
        A sum = 0;
        for (int i = threadIdx.x * N; i < heads * dim; i += blockDim.x * N) {
            auto v = load<N, WIDE>(row + i);
            for (int j = 0; j < N; j++) sum += up(v.at[j]) * up(v.at[j]);
        }
        scale = rsqrt(block_sum(sum) / (A)(heads * dim) + (A)eps);
    }
    int per_head = dim / N, block = 0, start = 0, i = threadIdx.x;
    while (true) {
        while (block < blocks.count && i - start >= blocks.block[block].count * per_head)
            start += blocks.block[block++].count * per_head;
        if (block == blocks.count) return;
        int head = (i - start) / per_head, column = (i - start) % per_head * N;
        int from = (blocks.block[block].first + head) * dim + column;
        auto v = load<N, WIDE>(row + from);
        if constexpr (NORM) {
            auto w = load<N, WIDE>(weight + from);
            for (int j = 0; j < N; j++) down(v.at[j], up(v.at[j]) * scale * up(w.at[j]));
        }
        if constexpr (ROTATE) {
            auto c = load<N / 2, WIDE>(cos + (blockIdx.x * (long long)dim + column) / 2);
            auto s = load<N / 2, WIDE>(sin + (blockIdx.x * (long long)dim + column) / 2);
            for (int j = 0; j < N; j += 2) {
                auto even = up(v.at[j]), odd = up(v.at[j + 1]);
                down(v.at[j], even * c.at[j / 2] - odd * s.at[j / 2]);
                down(v.at[j + 1], even * s.at[j / 2] + odd * c.at[j / 2]);
            }
        }
        store<N, WIDE>(blocks.block[block].rows.at(blockIdx.x, blockIdx.y, head) + column, v);
        i += blockDim.x;
    }
}

template <class T, int N, bool WIDE> __global__ void to_uint8(const T *x, unsigned char *y, long long count) {
    long long i = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * N;
    auto convert = [](T value) {
        down(value, up(value) * 255);  // rounded to its type before it is rounded to a whole number, as torch does
        auto whole = rint(up(value));
        return (unsigned char)(whole > 0 ? whole < 255 ? whole : 255 : 0);
    };
    if (i + N <= count) {
        auto v = load<N, WIDE>(x + i);
        Vector<unsigned char, N, true> bytes;
        for (int j = 0; j < N; j++) bytes.at[j] = convert(v.at[j]);
        store<N, true>(y + i, bytes);
    } else {
        for (; i < count; i++) y[i] = convert(x[i]);
    }
}
""".replace("MAX_BLOCKS", str(MAX_BLOCKS))
