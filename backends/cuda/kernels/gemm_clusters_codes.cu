// Where gemm_clusters.cu's threads find their codes. A block has ROWS rows of codes, a warp 16, a
// thread two of them; a cluster of two blocks has the part of the matrix that an Item names.

constexpr int STEP = 128;  // inputs a stage
constexpr int CODE_BYTES = STEP * BITS / 8;
constexpr int ROWS = 16 * WARPS;

struct Output {
    void* at;
    i64 stride;
    float limit;
    int spread;
};

struct Work {
    const u8* x;
    const int4* tiles;
    const int* pairs;
    const float* shares;
    const i64* second_ptrs;
    Output out;
};

struct Warp {  // that multiplies 16 rows of codes: lane / 4 = g has two, its halves
    int part, rank, warp;

    __device__ int chunk() const { return rank * WARPS + warp; }  // of 16 bytes that it makes

    __device__ int row(int g, int h, int spread) const {
        if (!GATED) return (part * 2 + rank) * ROWS + warp * 16 + g + 8 * h;
        int m = chunk() % 16, run = part * (WARPS / 8) + chunk() / 16;
        return run * 128 + g / 2 * 32 + m / spread * 2 * spread + m % spread + g % 2 * spread;
    }
};

// A tile and one of the parts of a matrix' rows. `number` counts through all.
struct Item {
    int4 tile;
    int number, part;
    const u8* matrices[2];  // of the rows that are this thread's first and second

    __device__ void find(const Work& work, int parts, int all) {
        int now = min(number, all - 1);
        tile = work.tiles[1 + now / parts], part = now % parts;
    }

    __device__ void open(const Matrix& m, const Work& work) {
        matrices[0] = (const u8*)m.ptrs[tile.x];
        matrices[1] = GATED ? (const u8*)work.second_ptrs[tile.x] : matrices[0];
    }
};

// A row's codes and scales for this thread, a step after the other.
struct Row {
    const u8 *codes, *scales, *biases;
    int base;

    __device__ void open(const Matrix& m, const u8* matrix, int row) {
        __builtin_assume(__isGlobal(matrix));
        int t = threadIdx.x % 4;
        i64 groups = (i64)row * (m.cols / GROUP) + t * 32 / GROUP;
        codes = matrix + (i64)row * m.cols / 8 * BITS + t * 4 * BITS;
        scales = matrix + m.scales_at + groups * (FORMAT == AFFINE ? 2 : 1);
        biases = matrix + m.biases_at + groups * 2;
        base = *(const int*)(matrix + m.base_at) - LIFT;
    }
};

struct Codes {
    u32 w[2][BITS];
    u32 scale[2], bias[2];

    __device__ void load(const Row (&rows)[2], int step) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            read_codes(w[h], rows[h].codes + step * CODE_BYTES);
            if constexpr (FORMAT == AFFINE) {
                scale[h] = ((const u16*)rows[h].scales)[step * (STEP / GROUP)];
                bias[h] = ((const u16*)rows[h].biases)[step * (STEP / GROUP)];
            } else {
                scale[h] = rows[h].scales[step * (STEP / GROUP)];
            }
        }
    }

    __device__ void open_scales(const Row (&rows)[2]) {  // relative to 2^base, as two fp16
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if constexpr (FORMAT == AFFINE) {
                float unit = power_of_two(-rows[h].base);
                scale[h] = twice(__uint_as_float(scale[h] << 16) * unit);
                bias[h] = twice(__uint_as_float(bias[h] << 16) * unit);
            } else {
                int lift = FORMAT == MXFP4 ? 14 : 8;
                int field = (int)scale[h] - 127 - rows[h].base + lift + 15;
                scale[h] = (u32)min(max(field, 0), 30) * 0x04000400;
                bias[h] = 0;
            }
        }
    }
};

struct Reader {  // of an item's codes
    Row rows[2];
    Codes ahead;

    __device__ void open(const Matrix& m, const Item& item, int rank, int spread) {
        int g = threadIdx.x % 32 / 4, warp = threadIdx.x / 32;
#pragma unroll
        for (int h = 0; h < 2; h++)
            rows[h].open(m, item.matrices[h], Warp{item.part, rank, warp}.row(g, h, spread));
        ahead.load(rows, 0);
    }
};
