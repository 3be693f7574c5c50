
// A part of gemv.cu: weights on their way from memory.

struct Matrix {  // one quantized matrix in memory
  const u8* codes;
  int rows, cols;
  int scales_at, biases_at, base_at, pad;
};

struct Scale {  // of a group of 32, 64 or 128 codes
  u32 scale, bias;
};

// One of the GROUPS of a lane's share of a row. They stay as they were loaded until then: taking them apart
// earlier would have the warp wait for what it just asked for.
template <int FORMAT> __device__ __forceinline__ Scale one_of(const Scale& given, int group) {
  using T = Format<FORMAT>;
  if constexpr (T::GROUPS == 1) return given;
  const int shift = (T::AFFINE ? 16 : 8) * group;
  const u32 mask = T::AFFINE ? 0xffff : 0xff;
  return {given.scale >> shift & mask, given.bias >> shift & mask};
}

template <int FORMAT> __device__ __forceinline__ void prepare(Scale& s, int base) {
  using T = Format<FORMAT>;
  if constexpr (T::AFFINE) {
    s.scale = half2_of(__int_as_float(s.scale << 16) * power_of_2(14 + T::BITS - base));
    s.bias = half2_of(__int_as_float(s.bias << 16) * power_of_2(-base));
  } else if constexpr (T::SCALED) {
    int e = max((int)s.scale - base - 127 + 15 - (T::F == MXFP4 ? -14 : E4M3), 0);
    s.scale = e * 0x04000400;  // the exponents of two fp16
  }
}

// One lane's share of a block of two rows, 8 apart.
template <int F> struct Fetched {
  u32 words[2][Format<F>::WORDS];
  Scale scales[2];
};

// Blocks [first, first + count) of 16 rows, then of the 16 rows `step` below, and so on.
template <int F> struct Reader {
  using T = Format<F>;
  const Matrix& m;
  const u8* codes[2];
  const u8* scales[2];
  int row, step, first, count, left;

  __device__ __forceinline__ Reader(const Matrix& m, int row0, int step, int first, int count)
      : m(m), row(row0 + threadIdx.x % 32 / 4), step(step), first(first), count(count) {
    start_rows();
  }

  __device__ __forceinline__ void start_rows() {
    const int k = first * T::BLOCK + threadIdx.x % 4 * T::CODES;
    left = count;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      u32 at = min(row + 8 * r, m.rows - 1);
      codes[r] = m.codes + (u64)at * (m.cols / 8 * T::BITS) + k / 8 * T::BITS;
      scales[r] = m.codes + m.scales_at + (at * (m.cols / T::GROUP) + k / T::GROUP) * (T::AFFINE ? 2 : 1);
    }
  }

  __device__ __forceinline__ void next(Fetched<F>& to) {
    bool inside = true;
#ifdef RAGGED  // lanes beyond a row's end take zeros
    inside = (first + count - left) * T::BLOCK + threadIdx.x % 4 * T::CODES < m.cols;
    if (!inside) to = Fetched<F>{};
#endif
    if (inside) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        fetch(codes[r], to.words[r]);
        const int skipped = T::BLOCK % T::GROUP ? scale_offset() : 0;
        constexpr int BYTES = T::GROUPS * (T::AFFINE ? 2 : 1);
        if constexpr (T::SCALED) to.scales[r].scale = fetch_scale<BYTES>(scales[r] + skipped);
        if constexpr (T::AFFINE)
          to.scales[r].bias = fetch_scale<BYTES>(scales[r] + skipped + (m.biases_at - m.scales_at));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      codes[r] += T::BLOCK / 8 * T::BITS;
      scales[r] += T::BLOCK % T::GROUP ? 0 : T::BLOCK / T::GROUP * (T::AFFINE ? 2 : 1);
    }
    if (--left == 0) {
      row += step;
      start_rows();
    }
  }

  // Of a block smaller than a group: from where the row's share began.
  __device__ __forceinline__ int scale_offset() const {
    const int quad = threadIdx.x % 4 * T::CODES, start = first * T::BLOCK + quad;
    return (((first + count - left) * T::BLOCK + quad) / T::GROUP - start / T::GROUP) * 2;
  }
};
