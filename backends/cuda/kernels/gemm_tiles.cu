// What gemm_clusters.cu works through: tiles of tokens, each of one expert, and their inputs one
// after the other as shared memory wants them. gemm_clusters.py says what the macros mean.

__device__ int fit(int n) {  // the smallest size of a tile that n tokens fit
#define FIT(size) \
    if (n <= size) return size;
    SIZES(FIT)
    return 0;
}

// tiles[0] = {tiles, rows of all, 0, 0}, then {expert, first row, size, 0} each. An expert's tokens
// are cut into the fewest tiles, of equal size. By row: `pairs`, -1 where there is none, `shares`,
// the weights; by 8 rows: `groups`, {first row, size} of their tile. A block an expert.
extern "C" __global__ void plan_tiles(const int* order, const int* offsets, const float* weights,
                                      int experts, int4* tiles, int* pairs, float* shares,
                                      int2* groups) {
    await_previous_kernel();
    __shared__ int before[4];  // tiles and rows of experts before this one, and of all
    int mine = blockIdx.x;
    if (threadIdx.x < 4) before[threadIdx.x] = 0;
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        int count = offsets[e + 1] - offsets[e], cut = (count + TOKENS - 1) / TOKENS;
        int rows = cut ? cut * fit((count + cut - 1) / cut) : 0;
        if (e < mine) atomicAdd(before, cut), atomicAdd(before + 1, rows);
        atomicAdd(before + 2, cut), atomicAdd(before + 3, rows);
    }
    __syncthreads();
    if (mine == 0 && threadIdx.x == 0) tiles[0] = make_int4(before[2], before[3], 0, 0);
    int first = offsets[mine], count = offsets[mine + 1] - first;
    if (count <= 0) return;
    int cut = (count + TOKENS - 1) / TOKENS, each = (count + cut - 1) / cut, size = fit(each);
    int row0 = before[1];
    for (int i = threadIdx.x; i < cut; i += THREADS)
        tiles[1 + before[0] + i] = make_int4(mine, row0 + i * size, size, 0);
    for (int i = threadIdx.x; i < cut * size; i += THREADS) {
        int tile = i / size, inside = i % size, token = tile * each + inside;
        bool real = inside < each && token < count;
        int pair = real ? order[first + token] : -1;
        pairs[row0 + i] = pair;
        shares[row0 + i] = real ? weights[pair] : 0.f;
        if (i % 8 == 0) groups[(row0 + i) / 8] = make_int2(row0 + tile * size, size);
    }
}

// x, a row a token, into tiles: runs of 64 inputs of a tile's every row, 128 bytes a row, swizzled.
extern "C" __global__ void fill_tiles(const uint4* x, i64 stride, const int4* tiles,
                                      const int* pairs, const int2* groups, int choices, int width,
                                      uint4* out) {
    await_previous_kernel();
    int row = blockIdx.x * 16 + threadIdx.x / 16, chunk = threadIdx.x % 16;
    if (row >= tiles[0].y || pairs[row] < 0) return;
    int2 tile = groups[row / 8];
    int inside = row - tile.x, runs = width / 128;
    const uint4* from = x + pairs[row] / choices * (stride / 8) + chunk;
    uint4* to = out + (i64)tile.x * (width / 8) + chunk / 8 * tile.y * 8 + inside * 8;
    to += (chunk ^ inside) & 7;
#pragma unroll 4
    for (int run = blockIdx.y; run < runs; run += gridDim.y) to[run * tile.y * 16] = from[run * 16];
}
