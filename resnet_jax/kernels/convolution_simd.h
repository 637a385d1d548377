// The arithmetic of convolution.cc for one instruction set. The including file defines, for each:
//   LANES  floats of a vector register
//   ROWS   rows of a matrix product that are kept in registers, with two vectors each
// and opens a namespace. Nothing here may use templates of the standard library: the linker keeps one copy of each, perhaps
// one with instructions that the processor lacks.

constexpr int kLanes = LANES;
constexpr int kRows = ROWS;
constexpr int kPanel = 2 * kLanes;  // columns of a matrix product that are kept in registers

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec relu(Vec v) { return 0.0f > v ? Vec{} : v; }  // NaN stays NaN

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Activations ----

struct Relu {
  static constexpr bool monotone = true;
  static Vec value(Vec z) { return relu(z); }
  static Vec gradient(Vec z, Vec dvalue) { return z > 0.0f ? dvalue : Vec{}; }
};

// exp(x) to some units in the last place, for x from -87.3 to 88: 2^n exp(r) with |r| <= log(2) / 2, and Taylor's polynomial of
// exp(r). Adding 1.5 * 2^23 rounds to n, and leaves it in the lowest bits.
inline Vec exponential(Vec x) {
  Vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  Vec r = x - n * 0.693145752f - n * 1.42860677e-6f;  // log(2) in two parts, the first exact in products with n
  Vec series = 1.0f + r * (1.0f + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
  return series * (Vec)(((Ints)shifted << 23) + (127 << 23));  // a product, so that NaN stays NaN
}

// The form of GELU with tanh (Hendrycks and Gimpel, arXiv:1606.08415): z / (1 + exp(-u)), u = 2 sqrt(2 / pi) (z + 0.044715 z^3).
// It falls up to z = -0.75 and rises from there, so its largest value is at the lowest or at the highest of several z.
struct Gelu {
  static constexpr bool monotone = false;
  static constexpr float kLinear = 1.59576912f, kCubic = 0.0713548162f;
  static constexpr float kBound = 9.99f;  // there, the gate is 1 in float32; at -kBound it is below 2e-38
  static Vec at_least(Vec z) { return z < -kBound ? Vec{} - kBound : z; }
  static Vec at_most(Vec z) { return z > kBound ? Vec{} + kBound : z; }
  static Vec gate(Vec z) { return 1.0f / (1.0f + exponential(z * (-kLinear - kCubic * z * z))); }
  static Vec value(Vec z) {
    z = at_least(z);
    return z * gate(at_most(z));
  }
  static Vec gradient(Vec z, Vec dvalue) {
    z = at_most(at_least(z));
    Vec s = gate(z);
    return dvalue * (s + z * s * (1.0f - s) * (kLinear + 3 * kCubic * z * z));
  }
};

// ---- Winograd's minimal filtering F(4x4, 3x3): output = A^T [(G kernel G^T) * (B^T input B)] A ----
//
// Toom-Cook's matrices for the points 0, 1, -1, 1/2, -2 and infinity, whose rounding error is a quarter of that of the usual
// points 2 and -2 (Barabasz et al., arXiv:1803.10986). Each function is the product of one matrix and a vector.

inline void input_transform(const Vec* x, Vec* y) {  // B^T: 6 -> 6
  Vec d = x[3] - x[1], e = x[4] - x[2];
  y[0] = x[0] + x[4] + 1.5f * d - 2.0f * x[2];
  y[1] = x[4] - x[1] + 0.5f * x[2] + 2.5f * x[3];
  y[2] = x[4] + x[1] - 2.5f * x[2] + 0.5f * x[3];
  y[3] = e + 2.0f * d;
  y[4] = e - 0.5f * d;
  y[5] = x[5] + x[1] + 1.5f * e - 2.0f * x[3];
}

inline void output_transform(const Vec* x, Vec* y) {  // A^T: 6 -> 4
  Vec sum = x[1] + x[2], difference = x[1] - x[2];
  y[0] = x[0] + sum + (x[3] + x[4]);
  y[1] = difference + 0.5f * x[3] - 2.0f * x[4];
  y[2] = sum + 0.25f * x[3] + 4.0f * x[4];
  y[3] = difference + x[5] + 0.125f * x[3] - 8.0f * x[4];
}

inline void output_gradient_transform(const Vec* x, Vec* y) {  // A: 4 -> 6
  Vec even = x[0] + x[2], odd = x[1] + x[3];
  y[0] = x[0];
  y[1] = even + odd;
  y[2] = even - odd;
  y[3] = x[0] + 0.5f * x[1] + 0.25f * x[2] + 0.125f * x[3];
  y[4] = x[0] - 2.0f * x[1] + 4.0f * x[2] - 8.0f * x[3];
  y[5] = x[3];
}

inline void kernel_transform(const Vec* x, Vec* y) {  // G: 3 -> 6
  Vec ends = (x[0] + x[2]) * (1 / 3.0f), middle = x[1] * (1 / 3.0f);
  y[0] = x[0];
  y[1] = ends + middle;
  y[2] = middle - ends;
  y[3] = x[0] * (-16 / 15.0f) - x[1] * (8 / 15.0f) - x[2] * (4 / 15.0f);
  y[4] = x[0] * (1 / 15.0f) - x[1] * (2 / 15.0f) + x[2] * (4 / 15.0f);
  y[5] = x[2];
}

inline void kernel_gradient_transform(const Vec* x, Vec* y) {  // G^T: 6 -> 3
  Vec sum = (x[1] + x[2]) * (1 / 3.0f), difference = (x[1] - x[2]) * (1 / 3.0f);
  y[0] = x[0] + difference - x[3] * (16 / 15.0f) + x[4] * (1 / 15.0f);
  y[1] = sum - x[3] * (8 / 15.0f) - x[4] * (2 / 15.0f);
  y[2] = x[5] + difference - x[3] * (4 / 15.0f) + x[4] * (4 / 15.0f);
}

// Applies a transform to both axes of an N x N tile of vectors: reads get(row, column), calls put(row, column, value) for M x M.
template <int N, int M, void (*transform)(const Vec*, Vec*), class Get, class Put>
inline __attribute__((always_inline)) void transform_both_axes(Get get, Put put) {
  Vec columns[M][N];
#pragma GCC unroll 6
  for (int j = 0; j < N; j++) {
    Vec in[N], out[M];
#pragma GCC unroll 6
    for (int i = 0; i < N; i++) in[i] = get(i, j);
    transform(in, out);
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) columns[i][j] = out[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; i++) {
    Vec out[M];
    transform(columns[i], out);
#pragma GCC unroll 6
    for (int j = 0; j < M; j++) put(i, j, out[j]);
  }
}

// ---- What is applied to pixels as they are read ----

// The pixels themselves.
struct Identity {
  const float* x;
  static constexpr bool pooled = false;
  struct Channels {
    const float* x;
    Vec operator()(int64_t at) const { return load(x + at); }
  };
  Channels channels(int64_t c) const { return {x + c}; }
};

// The activation A of x * scale + shift.
template <class A>
struct Activation {
  const float *x, *scale, *shift;
  static constexpr bool pooled = false;
  struct Channels {
    const float* x;
    Vec scale, shift;
    Vec operator()(int64_t at) const { return A::value(load(x + at) * scale + shift); }
  };
  Channels channels(int64_t c) const { return {x + c, load(scale + c), load(shift + c)}; }
};

// The gradient of y, where the loss depends on y, on its sums and on its sums of squares: dy + dsum + 2 y dsquares.
struct WithMoments {
  const float *dy, *y, *dsum, *dsquares;
  static constexpr bool pooled = false;
  struct Channels {
    const float *dy, *y;
    Vec dsum, dsquares;
    Vec operator()(int64_t at) const { return load(dy + at) + dsum + load(y + at) * dsquares; }
  };
  Channels channels(int64_t c) const { return {dy + c, y + c, load(dsum + c), 2.0f * load(dsquares + c)}; }
};

// The same where y is a max-pool's output, and which[at] is the number of the pixel, of 2x2, that it took.
struct FromMaxPool {
  WithMoments gradient;
  const uint8_t* which;
  static constexpr bool pooled = true;
  struct Channels {
    WithMoments::Channels gradient;
    const uint8_t* which;
    Vec operator()(int64_t at) const { return gradient(at); }
    Ints pixel(int64_t at) const { return __builtin_convertvector(*reinterpret_cast<const Bytes*>(which + at), Ints); }
  };
  Channels channels(int64_t c) const { return {gradient.channels(c), which + c}; }
};

// ---- What is done with pixels as they are written: each adds up to two sums over the pixels ----

struct Write {
  float* y;
  static constexpr bool sums = false, pooled = false;
  struct Channels {
    float* y;
    void operator()(int64_t at, Vec v, Vec&, Vec&) const { store(y + at, v); }
  };
  Channels channels(int64_t c) const { return {y + c}; }
};

// Also the sums of the values and of their squares.
struct WriteWithMoments {
  float* y;
  static constexpr bool sums = true, pooled = false;
  struct Channels {
    float* y;
    void operator()(int64_t at, Vec v, Vec& sum, Vec& squares) const {
      store(y + at, v);
      sum += v;
      squares += v * v;
    }
  };
  Channels channels(int64_t c) const { return {y + c}; }
};

// The largest of each 2x2 pixels and the number of the first that is as large; the sums are of what is written.
struct WriteMaxPool {
  float* y;
  uint8_t* which;
  static constexpr bool sums = true, pooled = true;
  struct Channels {
    float* y;
    uint8_t* which;
    void operator()(int64_t at, const Vec* window, Vec& sum, Vec& squares) const {
      Vec largest = window[0];
      Ints number{};
      for (int i = 1; i < 4; i++) {
        auto larger = (window[i] > largest) | (window[i] != window[i]);  // NaN stays NaN
        largest = larger ? window[i] : largest;
        number = larger ? Ints{} + i : number;
      }
      store(y + at, largest);
      *reinterpret_cast<Bytes*>(which + at) = __builtin_convertvector(number, Bytes);
      sum += largest;
      squares += largest * largest;
    }
  };
  Channels channels(int64_t c) const { return {y + c, which + c}; }
};

// The gradient of the activation of x * scale + shift: writes that of x, sums those of scale and shift.
template <class A>
struct WriteActivationGradient {
  float* dx;
  const float *x, *scale, *shift;
  static constexpr bool sums = true, pooled = false;
  struct Channels {
    float* dx;
    const float* x;
    Vec scale, shift;
    void operator()(int64_t at, Vec v, Vec& dscale, Vec& dshift) const {
      Vec value = load(x + at);
      Vec passed = A::gradient(value * scale + shift, v);
      store(dx + at, passed * scale);
      dscale += passed * value;
      dshift += passed;
    }
  };
  Channels channels(int64_t c) const { return {dx + c, x + c, load(scale + c), load(shift + c)}; }
};

// ---- Matrix products ----

// c [R, kPanel] = (c +) a [R, depth] b [depth, kPanel]. a(r, i) is at a[r * lda + i], or a[i * lda + r] if transposed.
template <int R, bool accumulate, bool transposed>
inline void product(const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t depth) {
  Vec left[R], right[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    left[r] = accumulate ? load(c + r * ldc) : Vec{};
    right[r] = accumulate ? load(c + r * ldc + kLanes) : Vec{};
  }
  for (int64_t i = 0; i < depth; i++) {
    Vec b0 = load(b + i * kPanel), b1 = load(b + i * kPanel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      float value = transposed ? a[i * lda + r] : a[r * lda + i];
      left[r] += value * b0;
      right[r] += value * b1;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    store(c + r * ldc, left[r]);
    store(c + r * ldc + kLanes, right[r]);
  }
}

// The same for any number of rows up to R.
template <int R, bool accumulate, bool transposed>
inline void product_of_rows(int64_t rows, const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t depth) {
  if (rows == R) {
    product<R, accumulate, transposed>(a, lda, b, c, ldc, depth);
  } else if constexpr (R > 1) {
    product_of_rows<R - 1, accumulate, transposed>(rows, a, lda, b, c, ldc, depth);
  }
}

// Replaces rows [rows, depth] of v by their product with b [columns / kPanel, depth, kPanel]; rows are `stride` apart.
inline void multiply_in_place(float* v, int64_t stride, const float* b, int64_t rows, int64_t depth, int64_t columns) {
  float* copy = scratch(kRowsScratch, kRows * depth);
  for (int64_t row = 0; row < rows; row += kRows) {
    int64_t count = smaller(kRows, rows - row);
    for (int64_t r = 0; r < count; r++) memcpy(copy + r * depth, v + (row + r) * stride, depth * sizeof(float));
    for (int64_t n = 0; n < columns; n += kPanel)
      product_of_rows<kRows, false, false>(count, copy, depth, b + n * depth, v + row * stride + n, stride, depth);
  }
}

// d [kPanel, kPanel] += a^T b for panels a and b [depth, kPanel]; rows of d are `stride` apart.
inline void accumulate_outer_product(const float* a, const float* b, float* d, int64_t stride, int64_t depth) {
  for (int r = 0; r < kPanel; r += kRows)
    product_of_rows<kRows, true, true>(smaller(kRows, kPanel - r), a + r, kPanel, b, d + r * stride, stride, depth);
}

// ---- 3x3 convolutions of stride 1 and padding 1, by Winograd ----

// Images [batch, height, width, channels] as tiles of 4x4 outputs; those at the lower and right edge may reach over it.
struct Tiles {
  int64_t height, width, rows, columns, count;
  Tiles(int64_t batch, int64_t height, int64_t width)
      : height(height), width(width), rows((height + 3) / 4), columns((width + 3) / 4), count(batch * rows * columns) {}
};

struct Tile {
  int64_t image, y, x;  // its first output
  Tile(const Tiles& tiles, int64_t index)
      : image(index / (tiles.rows * tiles.columns)), y(index / tiles.columns % tiles.rows * 4), x(index % tiles.columns * 4) {}
};

// Spreads the gradient of a max-pool's output over the N x N pixels from `before` (0 or 1) pixels above and left of a tile's first.
template <int N, int before, class Channels>
inline void read_windows(const Tiles& tiles, const Tile& tile, const Channels& window, int64_t channels, Vec (&pixels)[N][N]) {
  int64_t height = tiles.height / 2, width = tiles.width / 2;
#pragma GCC unroll 4
  for (int a = 0; a < N / 2 + before; a++)
#pragma GCC unroll 4
    for (int b = 0; b < N / 2 + before; b++) {
      int64_t y = tile.y / 2 - before + a, x = tile.x / 2 - before + b, at = ((tile.image * height + y) * width + x) * channels;
      bool exists = y >= 0 && y < height && x >= 0 && x < width;
      Vec gradient = exists ? window(at) : Vec{};
      Ints taken = exists ? window.pixel(at) : Ints{};
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        int row = 2 * a - before + i / 2, column = 2 * b - before + i % 2;
        if (row >= 0 && row < N && column >= 0 && column < N) pixels[row][column] = taken == i ? gradient : Vec{};
      }
    }
}

// Transforms N x N pixels from `before` pixels above and left of a tile's first output; put(stream, c, value) takes the M x M results.
template <int N, int M, void (*transform)(const Vec*, Vec*), int before, class Input, class Put>
inline void read_tile(const Tiles& tiles, int64_t index, const Input& input, int64_t channels, Put put) {
  Tile tile(tiles, index);
  int64_t y0 = tile.y - before, x0 = tile.x - before;
  int64_t origin = ((tile.image * tiles.height + y0) * tiles.width + x0) * channels, line = tiles.width * channels;
  bool inside = y0 >= 0 && x0 >= 0 && y0 + N <= tiles.height && x0 + N <= tiles.width;
  for (int64_t c = 0; c < channels; c += kLanes) {
    auto pixel = input.channels(c);
    auto write = [&](int i, int j, Vec value) { put(i * M + j, c, value); };
    if constexpr (Input::pooled) {
      Vec pixels[N][N];
      read_windows<N, before>(tiles, tile, pixel, channels, pixels);
      transform_both_axes<N, M, transform>([&](int i, int j) { return pixels[i][j]; }, write);
    } else if (inside) {
      transform_both_axes<N, M, transform>([&](int i, int j) { return pixel(origin + i * line + j * channels); }, write);
    } else {
      transform_both_axes<N, M, transform>(
          [&](int i, int j) {
            bool exists = y0 + i >= 0 && y0 + i < tiles.height && x0 + j >= 0 && x0 + j < tiles.width;
            return exists ? pixel(origin + i * line + j * channels) : Vec{};
          },
          write);
    }
  }
}

// Kernels w [3, 3, inputs, outputs] -> [36, outputs / kPanel, inputs, kPanel]. `turned` gives the kernels of the input's gradient:
// of w [3, 3, outputs, inputs], turned by half a turn.
inline void transform_kernels(Threads& threads, const float* w, int64_t inputs, int64_t outputs, bool turned, float* u) {
  int64_t padded = round_up(outputs, kPanel);
  parallel_for(threads, inputs, [=](int64_t c) {
    for (int64_t k = 0; k < padded; k += kLanes) {
      transform_both_axes<3, 6, kernel_transform>(
          [&](int i, int j) {
            if (k >= outputs) return Vec{};
            if (!turned) return load(w + ((i * 3 + j) * inputs + c) * outputs + k);
            Vec value;
            for (int lane = 0; lane < kLanes; lane++) value[lane] = w[(((2 - i) * 3 + 2 - j) * outputs + k + lane) * inputs + c];
            return value;
          },
          [&](int i, int j, Vec value) {
            store(u + (((i * 6 + j) * padded + k / kPanel * kPanel) * inputs + c * kPanel + k % kPanel), value);
          });
    }
  });
}

// How many tiles a thread takes at once: their transforms should fit into its share of the cache. The number does not depend on
// the number of threads, nor on the instruction set, so neither do the sums.
inline int64_t tiles_at_once(int64_t count, int64_t channels) {
  int64_t most = channels <= 64 ? 36 : channels <= 128 ? 30 : 60;
  int64_t blocks = round_up((count + most - 1) / most, 4);
  return (count + blocks - 1) / blocks;
}

// Convolves with transformed kernels. `sums` [2, outputs] receives the sums of Output, in double precision over blocks of tiles.
template <class Input, class Output>
inline void winograd(Threads& threads, const Input& input, const Output& output, const float* u, const Tiles& tiles, int64_t inputs,
                     int64_t outputs, float* sums) {
  int64_t padded = round_up(outputs, kPanel), widest = inputs > padded ? inputs : padded;
  int64_t at_once = tiles_at_once(tiles.count, widest), blocks = (tiles.count + at_once - 1) / at_once;
  int64_t stream = at_once * widest + kLinePadding;
  float* partial = Output::sums ? scratch(kSumsScratch, blocks * 2 * outputs) : nullptr;
  parallel_for(threads, blocks, [&](int64_t block) {
    int64_t first = block * at_once, count = smaller(at_once, tiles.count - first);
    float* v = scratch(kTilesScratch, 36 * stream);
    for (int64_t p = 0; p < count; p++)
      read_tile<6, 6, input_transform, 1>(tiles, first + p, input, inputs,
                                          [&](int t, int64_t c, Vec value) { store(v + t * stream + p * widest + c, value); });
    for (int t = 0; t < 36; t++) multiply_in_place(v + t * stream, widest, u + t * inputs * padded, count, inputs, padded);
    float* sum = Output::sums ? partial + block * 2 * outputs : nullptr;
    if (Output::sums) memset(sum, 0, 2 * outputs * sizeof(float));
    for (int64_t p = 0; p < count; p++) {
      Tile tile(tiles, first + p);
      int64_t origin = ((tile.image * tiles.height + tile.y) * tiles.width + tile.x) * outputs, line = tiles.width * outputs;
      int64_t rows = tiles.height - tile.y, columns = tiles.width - tile.x;
      for (int64_t c = 0; c < outputs; c += kLanes) {
        auto pixel = output.channels(c);
        Vec first_sum{}, second_sum{};
        auto read = [&](int i, int j) { return load(v + (i * 6 + j) * stream + p * widest + c); };
        if constexpr (Output::pooled) {
          Vec windows[4][4];
          transform_both_axes<6, 4, output_transform>(
              read, [&](int i, int j, Vec value) { windows[i / 2 * 2 + j / 2][i % 2 * 2 + j % 2] = value; });
          int64_t pooled = (tile.image * tiles.height + tile.y) / 2 * (tiles.width / 2) + tile.x / 2;
          for (int i = 0; i < 4; i++)
            if (i / 2 * 2 < rows && i % 2 * 2 < columns)
              pixel((pooled + i / 2 * (tiles.width / 2) + i % 2) * outputs, windows[i], first_sum, second_sum);
        } else if (rows >= 4 && columns >= 4)
          transform_both_axes<6, 4, output_transform>(
              read, [&](int i, int j, Vec value) { pixel(origin + i * line + j * outputs, value, first_sum, second_sum); });
        else
          transform_both_axes<6, 4, output_transform>(read, [&](int i, int j, Vec value) {
            if (i < rows && j < columns) pixel(origin + i * line + j * outputs, value, first_sum, second_sum);
          });
        if (Output::sums) {
          store(sum + c, load(sum + c) + first_sum);
          store(sum + outputs + c, load(sum + outputs + c) + second_sum);
        }
      }
    }
  });
  if (Output::sums) add_up(partial, blocks, 2 * outputs, sums);
}

// dw [3, 3, inputs, outputs] = G^T [sum over tiles of (B^T input B) (A gradient A^T)] G.
template <class Input, class Gradient>
inline void winograd_kernel_gradient(Threads& threads, const Input& input, const Gradient& gradient, const Tiles& tiles,
                                     int64_t inputs, int64_t outputs, float* dw) {
  int64_t rows = round_up(inputs, kPanel), columns = round_up(outputs, kPanel);
  int64_t at_once = smaller(tiles.count, kTilesOfKernelGradient);
  int64_t a_stream = rows * at_once + kLinePadding, b_stream = columns * at_once + kLinePadding;
  float* a = scratch(kLeftScratch, 36 * a_stream);   // [36][rows / kPanel][at_once][kPanel]
  float* b = scratch(kRightScratch, 36 * b_stream);  // [36][columns / kPanel][at_once][kPanel]
  float* d = scratch(kProductScratch, 36 * rows * columns);
  memset(d, 0, 36 * rows * columns * sizeof(float));
  auto in_panel = [=](int64_t p, int64_t c) { return c / kPanel * at_once * kPanel + p * kPanel + c % kPanel; };
  for (int64_t first = 0; first < tiles.count; first += at_once) {
    int64_t count = smaller(at_once, tiles.count - first);
    parallel_for(threads, count, [&](int64_t p) {
      read_tile<6, 6, input_transform, 1>(tiles, first + p, input, inputs,
                                          [&](int t, int64_t c, Vec value) { store(a + t * a_stream + in_panel(p, c), value); });
      read_tile<4, 6, output_gradient_transform, 0>(
          tiles, first + p, gradient, outputs, [&](int t, int64_t k, Vec value) { store(b + t * b_stream + in_panel(p, k), value); });
    });
    parallel_for(threads, 36 * rows / kPanel, [&](int64_t task) {
      int64_t t = task % 36, r = task / 36 * kPanel;
      for (int64_t n = 0; n < columns; n += kPanel)
        accumulate_outer_product(a + t * a_stream + r * at_once, b + t * b_stream + n * at_once,
                                 d + (t * rows + r) * columns + n, columns, count);
    });
  }
  parallel_for(threads, inputs, [&](int64_t c) {
    for (int64_t k = 0; k < outputs; k += kLanes)
      transform_both_axes<6, 3, kernel_gradient_transform>(
          [&](int i, int j) { return load(d + ((i * 6 + j) * rows + c) * columns + k); },
          [&](int i, int j, Vec value) { store(dw + ((i * 3 + j) * inputs + c) * outputs + k, value); });
  });
}

// ---- Other convolutions: the pixels that an output depends on, gathered into a row, times the kernel ----

inline void gather(const Gathering& g, const float* x, int64_t channels, int64_t index, float* row) {
  int64_t image = index / (g.rows * g.columns), i = index / g.columns % g.rows, j = index % g.columns;
  for (int t = 0; t < g.taps; t++, row += channels) {
    int64_t y = i * g.from_stride + g.y[t], column = j * g.from_stride + g.x[t];
    if (y < 0 || y >= g.from_height || column < 0 || column >= g.from_width)
      memset(row, 0, channels * sizeof(float));
    else
      memcpy(row, x + ((image * g.from_height + y) * g.from_width + column) * channels, channels * sizeof(float));
  }
}

// Kernels of the taps, [taps x inputs, outputs] -> [outputs / kPanel, taps x inputs, kPanel], from w [all taps, inputs, outputs] or,
// if transposed, from w [all taps, outputs, inputs].
inline void pack_kernels(Threads& threads, const Gathering& g, const float* w, int64_t inputs, int64_t outputs, bool transposed,
                         float* panels) {
  int64_t depth = g.taps * inputs;
  parallel_for(threads, g.taps * round_up(outputs, kPanel) / kPanel, [&](int64_t task) {
    int64_t t = task % g.taps, n = task / g.taps * kPanel, count = smaller(kPanel, outputs - n);
    float* to = panels + n * depth + t * inputs * kPanel;
    const float* from = w + g.kernel[t] * inputs * outputs;
    memset(to, 0, count < kPanel ? inputs * kPanel * sizeof(float) : 0);
    for (int64_t c = 0; c < inputs; c++) {
      if (!transposed)
        memcpy(to + c * kPanel, from + c * outputs + n, count * sizeof(float));
      else
        for (int64_t k = 0; k < count; k++) to[c * kPanel + k] = from[(n + k) * inputs + c];
    }
  });
}

// Convolves with packed kernels. `sums` [2, outputs] receives the sums of the outputs and of their squares, unless null.
inline void gathered_convolution(Threads& threads, const Gathering& g, const float* x, const float* panels, int64_t inputs,
                                 int64_t outputs, float* y, float* sums) {
  int64_t depth = g.taps * inputs, columns = round_up(outputs, kPanel);
  int64_t total = g.batch * g.rows * g.columns, at_once = smaller(48, (total + 1) / 2), blocks = (total + at_once - 1) / at_once;
  int64_t width = blocks < 8 ? round_up(columns / 4, kPanel) : columns;  // few pixels are divided among the threads by columns, too
  int64_t parts = (columns + width - 1) / width;
  float* partial = sums ? scratch(kSumsScratch, blocks * 2 * outputs) : nullptr;
  parallel_for(threads, blocks * parts, [&](int64_t task) {
    int64_t block = task / parts, first = block * at_once, count = smaller(at_once, total - first);
    int64_t n0 = task % parts * width, n1 = smaller(n0 + width, columns), length = smaller(n1, outputs) - n0;
    float* a = scratch(kTilesScratch, at_once * (depth + columns));
    float* products = a + at_once * depth;
    for (int64_t p = 0; p < count; p++) gather(g, x, inputs, first + p, a + p * depth);
    for (int64_t n = n0; n < n1; n += kPanel)
      for (int64_t p = 0; p < count; p += kRows)
        product_of_rows<kRows, false, false>(smaller(kRows, count - p), a + p * depth, depth, panels + n * depth,
                                             products + p * columns + n, columns, depth);
    for (int64_t p = 0; p < count; p++) {
      int64_t index = first + p, image = index / (g.rows * g.columns);
      int64_t i = index / g.columns % g.rows * g.to_stride + g.to_y, j = index % g.columns * g.to_stride + g.to_x;
      memcpy(y + ((image * g.to_height + i) * g.to_width + j) * outputs + n0, products + p * columns + n0, length * sizeof(float));
    }
    if (sums)
      for (int64_t c = n0; c < n0 + length; c += kLanes) {
        Vec sum{}, squares{};
        for (int64_t p = 0; p < count; p++) {
          Vec value = load(products + p * columns + c);
          sum += value;
          squares += value * value;
        }
        store(partial + block * 2 * outputs + c, sum);
        store(partial + (block * 2 + 1) * outputs + c, squares);
      }
  });
  if (sums) add_up(partial, blocks, 2 * outputs, sums);
}

// dw [taps, inputs, outputs] for the gradient dy of the outputs of a gathered convolution.
inline void gathered_kernel_gradient(Threads& threads, const Gathering& g, const float* x, const float* dy, int64_t inputs,
                                     int64_t outputs, float* dw) {
  int64_t depth = g.taps * inputs, rows = round_up(depth, kPanel), columns = round_up(outputs, kPanel);
  int64_t total = g.batch * g.rows * g.columns, at_once = smaller(total, kPixelsOfKernelGradient);
  float* a = scratch(kLeftScratch, rows * at_once);      // [rows / kPanel][at_once][kPanel]
  float* b = scratch(kRightScratch, columns * at_once);  // [columns / kPanel][at_once][kPanel]
  float* d = scratch(kProductScratch, rows * columns);
  memset(d, 0, rows * columns * sizeof(float));
  auto pack = [=](const float* row, int64_t length, int64_t p, float* panels) {
    for (int64_t c = 0; c < length; c += kPanel)
      memcpy(panels + c * at_once + p * kPanel, row + c, smaller(kPanel, length - c) * sizeof(float));
  };
  for (int64_t first = 0; first < total; first += at_once) {
    int64_t count = smaller(at_once, total - first);
    parallel_for(threads, count, [&](int64_t p) {
      float* row = scratch(kRowsScratch, depth);
      gather(g, x, inputs, first + p, row);
      pack(row, depth, p, a);
      pack(dy + (first + p) * outputs, outputs, p, b);
    });
    parallel_for(threads, rows / kPanel * (columns / kPanel), [&](int64_t task) {
      int64_t r = task / (columns / kPanel) * kPanel, n = task % (columns / kPanel) * kPanel;
      accumulate_outer_product(a + r * at_once, b + n * at_once, d + r * columns + n, columns, count);
    });
  }
  for (int64_t r = 0; r < depth; r++) memcpy(dw + r * outputs, d + r * columns, outputs * sizeof(float));
}

// ---- The end of a residual block ----

// out = the activation of y * scale + shift + shortcut, [pixels, channels].
template <class A>
inline void add_activate(Threads& threads, const float* y, const float* scale, const float* shift, const float* shortcut, int64_t pixels,
                         int64_t channels, float* out) {
  int64_t blocks = (pixels + kPixelsAtOnce - 1) / kPixelsAtOnce;
  parallel_for(threads, blocks, [&](int64_t block) {
    for (int64_t p = block * kPixelsAtOnce; p < smaller(pixels, (block + 1) * kPixelsAtOnce); p++)
      for (int64_t at = p * channels, c = 0; c < channels; c += kLanes)
        store(out + at + c, A::value(load(y + at + c) * load(scale + c) + load(shift + c) + load(shortcut + at + c)));
  });
}

// Its gradients, from that of `out`: those of y and the shortcut, and of scale and shift, sums [2, channels].
template <class A>
inline void add_activate_gradient(Threads& threads, const float* y, const float* scale, const float* shift, const float* shortcut,
                                  const float* dout, int64_t pixels, int64_t channels, float* dy, float* dshortcut, float* sums) {
  int64_t blocks = (pixels + kPixelsAtOnce - 1) / kPixelsAtOnce;
  float* partial = scratch(kSumsScratch, blocks * 2 * channels);
  parallel_for(threads, blocks, [&](int64_t block) {
    int64_t first = block * kPixelsAtOnce, last = smaller(pixels, first + kPixelsAtOnce);
    float* sum = partial + block * 2 * channels;
    memset(sum, 0, 2 * channels * sizeof(float));
    for (int64_t p = first; p < last; p++)
      for (int64_t at = p * channels, c = 0; c < channels; c += kLanes) {
        Vec pixel = load(y + at + c);
        Vec passed = A::gradient(pixel * load(scale + c) + load(shift + c) + load(shortcut + at + c), load(dout + at + c));
        store(dshortcut + at + c, passed);
        store(dy + at + c, passed * load(scale + c));
        store(sum + c, load(sum + c) + passed * pixel);
        store(sum + channels + c, load(sum + channels + c) + passed);
      }
  });
  add_up(partial, blocks, 2 * channels, sums);
}

// ---- Max-pool ----

// The 2x2 pixels of y, in images of `width` pixels, that pixel (row, column) of a max-pool reads, and their largest activation.
template <class A>
struct Window {
  Window(const float* y, const Vec scale, const Vec shift, int64_t width, int64_t channels, int64_t row, int64_t column, int64_t c) {
    int64_t first = (2 * row * width + 2 * column) * channels + c;
    for (int i = 0; i < 4; i++) {
      at[i] = first + (i / 2 * width + i % 2) * channels;
      pixel[i] = load(y + at[i]);
      z[i] = pixel[i] * scale + shift;
    }
    Vec lowest = z[0], sum = relu(z[0]);
    chosen = z[0];
    for (int i = 1; i < 4; i++) {
      chosen = z[i] > chosen ? z[i] : chosen;
      lowest = z[i] < lowest ? z[i] : lowest;
      sum += relu(z[i]);
    }
    largest = A::value(chosen);
    if constexpr (!A::monotone) {
      Vec other = A::value(lowest);
      chosen = other > largest ? lowest : chosen;
      largest = other > largest ? other : largest;
    }
    largest = sum == sum ? largest : sum;  // NaN stays NaN
  }
  int64_t at[4];
  Vec pixel[4], z[4], chosen, largest;  // the activation of `chosen` is the largest
};

// out = the largest activation of y * scale + shift of each 2x2 pixels; `rows` counts the rows of `out` in all images.
template <class A>
inline void activate_max_pool(Threads& threads, const float* y, const float* scale, const float* shift, int64_t rows, int64_t width,
                              int64_t channels, float* out) {
  parallel_for(threads, rows, [&](int64_t row) {
    for (int64_t column = 0; column < width / 2; column++)
      for (int64_t c = 0; c < channels; c += kLanes)
        store(out + (row * (width / 2) + column) * channels + c,
              Window<A>(y, load(scale + c), load(shift + c), width, channels, row, column, c).largest);
  });
}

// Its gradients, from that of `out`: that of y, which the first of equally large pixels gets, and sums [2, channels] of scale and shift.
template <class A>
inline void activate_max_pool_gradient(Threads& threads, const float* y, const float* scale, const float* shift, const float* dout,
                                       int64_t rows, int64_t width, int64_t channels, float* dy, float* sums) {
  int64_t at_once = round_up(kPixelsAtOnce, width / 2) / (width / 2), blocks = (rows + at_once - 1) / at_once;
  float* partial = scratch(kSumsScratch, blocks * 2 * channels);
  parallel_for(threads, blocks, [&](int64_t block) {
    float* sum = partial + block * 2 * channels;
    memset(sum, 0, 2 * channels * sizeof(float));
    for (int64_t row = block * at_once; row < smaller(rows, (block + 1) * at_once); row++)
      for (int64_t column = 0; column < width / 2; column++)
        for (int64_t c = 0; c < channels; c += kLanes) {
          Window<A> window(y, load(scale + c), load(shift + c), width, channels, row, column, c);
          Vec left = A::gradient(window.chosen, load(dout + (row * (width / 2) + column) * channels + c));
          store(sum + channels + c, load(sum + channels + c) + left);
          for (int i = 0; i < 4; i++) {
            Vec passed = window.z[i] == window.chosen ? left : Vec{};
            left -= passed;
            store(dy + window.at[i], passed * load(scale + c));
            store(sum + c, load(sum + c) + passed * window.pixel[i]);
          }
        }
  });
  add_up(partial, blocks, 2 * channels, sums);
}

// ---- What convolution.cc calls ----

// Calls f with what reads the images: their activation where there is an affine.
template <class A, class F>
inline void with_input(const Convolution& c, const float* x, const float* affine, F f) {
  if (affine)
    f(Activation<A>{x, affine, affine + c.inputs});
  else
    f(Identity{x});
}

// Calls f with what reads the gradient of the outputs.
template <class F>
inline void with_gradient(const Convolution& c, const float* y, const uint8_t* which, const float* dy, const float* dsums, F f) {
  WithMoments gradient{dy, y, dsums, dsums + c.outputs};
  if (which)
    f(FromMaxPool{gradient, which});
  else
    f(gradient);
}

template <class A>
inline void convolve(Threads& threads, const Convolution& c, const float* x, const float* affine, const float* w, float* y,
                     uint8_t* which, float* sums) {
  if (!c.winograd) {
    Gathering g = c.forward();
    float* panels = scratch(kKernelScratch, g.taps * c.inputs * round_up(c.outputs, kPanel));
    pack_kernels(threads, g, w, c.inputs, c.outputs, false, panels);
    return gathered_convolution(threads, g, x, panels, c.inputs, c.outputs, y, sums);
  }
  Tiles tiles(c.batch, c.height, c.width);
  float* u = scratch(kKernelScratch, 36 * c.inputs * round_up(c.outputs, kPanel));
  transform_kernels(threads, w, c.inputs, c.outputs, false, u);
  with_input<A>(c, x, affine, [&](auto input) {
    if (which)
      winograd(threads, input, WriteMaxPool{y, which}, u, tiles, c.inputs, c.outputs, sums);
    else
      winograd(threads, input, WriteWithMoments{y}, u, tiles, c.inputs, c.outputs, sums);
  });
}

template <class A>
inline void input_gradient(Threads& threads, const Convolution& c, const float* x, const float* affine, const float* w, const float* y,
                           const uint8_t* which, const float* dy, const float* dsums, float* dx, float* daffine) {
  if (!c.winograd) {
    for (int64_t i = 0; i < c.stride * c.stride; i++) {
      Gathering g = c.backward(i / c.stride, i % c.stride);
      if (g.rows == 0 || g.columns == 0) continue;  // an image of one row has none that begins at the second
      float* panels = scratch(kKernelScratch, g.taps * c.outputs * round_up(c.inputs, kPanel));
      pack_kernels(threads, g, w, c.outputs, c.inputs, true, panels);
      gathered_convolution(threads, g, dy, panels, c.outputs, c.inputs, dx, nullptr);
    }
    return;
  }
  Tiles tiles(c.batch, c.height, c.width);
  float* u = scratch(kKernelScratch, 36 * c.outputs * round_up(c.inputs, kPanel));
  transform_kernels(threads, w, c.outputs, c.inputs, true, u);
  with_gradient(c, y, which, dy, dsums, [&](auto gradient) {
    if (affine)
      winograd(threads, gradient, WriteActivationGradient<A>{dx, x, affine, affine + c.inputs}, u, tiles, c.outputs, c.inputs, daffine);
    else
      winograd(threads, gradient, Write{dx}, u, tiles, c.outputs, c.inputs, nullptr);
  });
}

template <class A>
inline void kernel_gradient(Threads& threads, const Convolution& c, const float* x, const float* affine, const float* y,
                            const uint8_t* which, const float* dy, const float* dsums, float* dw) {
  if (!c.winograd) return gathered_kernel_gradient(threads, c.forward(), x, dy, c.inputs, c.outputs, dw);
  Tiles tiles(c.batch, c.height, c.width);
  with_gradient(c, y, which, dy, dsums, [&](auto gradient) {
    with_input<A>(c, x, affine,
                  [&](auto input) { winograd_kernel_gradient(threads, input, gradient, tiles, c.inputs, c.outputs, dw); });
  });
}

template <class A>
constexpr Kernels kernels = {convolve<A>,
                             input_gradient<A>,
                             kernel_gradient<A>,
                             add_activate<A>,
                             add_activate_gradient<A>,
                             activate_max_pool<A>,
                             activate_max_pool_gradient<A>};
