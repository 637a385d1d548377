// Convolutions for a CPU in float32, with batch norm and activation in the same pass over memory, for XLA's foreign function interface.
//
// A 3x3 convolution of stride 1 uses Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, arXiv:1509.09308): a block of tiles
// goes through transform, products and inverse transform while it is in the cache. Others are matrix products over gathered pixels.
// Images are [batch, height, width, channels], kernels [height, width, inputs, outputs].
//
// No result depends on the number of threads: sums are over blocks whose size follows from the shapes.

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// ---- Threads ----

using Threads = ffi::ThreadPool;

// A function of an index.
struct Task {
  template <class F>
  Task(const F& f) : function(&f), call([](const void* function, int64_t i) { (*static_cast<const F*>(function))(i); }) {}
  void operator()(int64_t i) const { call(function, i); }
  const void* function;
  void (*call)(const void*, int64_t);
};

// Calls task(0), ..., task(count - 1) on this thread and those of XLA's pool. A thread of the pool that comes late finds nothing left, so
// this returns although the pool be busy: with other devices, which wait in the same way.
void parallel_for(Threads& threads, int64_t count, Task task) {
  struct Work {
    Work(int64_t count, Task task) : count(count), task(task) {}
    void run() {
      int64_t finished = 0;
      for (int64_t i; (i = next++) < count; finished++) task(i);
      if (finished && (done += finished) == count) {
        std::lock_guard<std::mutex> lock(mutex);
        complete.notify_one();
      }
    }
    const int64_t count;
    const Task task;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable complete;
  };
  int64_t helpers = (count < threads.num_threads() ? count : threads.num_threads()) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; i++) task(i);
    return;
  }
  auto work = std::make_shared<Work>(count, task);
  for (int64_t i = 0; i < helpers; i++) threads.Schedule([work] { work->run(); });
  work->run();
  for (int spins = 0; spins < 2000 && work->done != count; spins++) std::atomic_signal_fence(std::memory_order_seq_cst);
  std::unique_lock<std::mutex> lock(work->mutex);
  work->complete.wait(lock, [&] { return work->done == count; });
}

// ---- Memory ----

enum Scratch { kKernelScratch, kRowsScratch, kTilesScratch, kSumsScratch, kLeftScratch, kRightScratch, kProductScratch, kScratches };

// Memory for `count` floats, one of each kind for each thread. It is kept, so that its pages are touched once; its contents are
// finite but otherwise arbitrary.
float* scratch(Scratch kind, int64_t count) {
  struct Buffer {
    ~Buffer() { free(data); }
    float* data = nullptr;
    int64_t size = 0;
  };
  thread_local Buffer buffers[kScratches];
  Buffer& buffer = buffers[kind];
  if (buffer.size < count) {
    free(buffer.data);
    size_t bytes = (count * sizeof(float) + 4095) / 4096 * 4096;
    buffer.data = static_cast<float*>(aligned_alloc(4096, bytes));
    if (!buffer.data) throw std::bad_alloc();
    memset(buffer.data, 0, bytes);
    buffer.size = count;
  }
  return buffer.data;
}

constexpr int64_t kLinePadding = 16;  // floats between streams, which would otherwise share the sets of the cache
constexpr int64_t kTilesOfKernelGradient = 192, kPixelsOfKernelGradient = 512, kPixelsAtOnce = 1024;

// sums [n] = the sum of partial [blocks, n].
void add_up(const float* partial, int64_t blocks, int64_t n, float* sums) {
  for (int64_t i = 0; i < n; i++) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; block++) sum += partial[block * n + i];
    sums[i] = static_cast<float>(sum);
  }
}

// ---- Geometry ----

constexpr int kMostTaps = 49;

// Which pixels an output depends on: output (i, j), of [rows, columns], is pixel (i, j) * to_stride + (to_y, to_x) of an image. Its tap t
// reads pixel (i, j) * from_stride + (y[t], x[t]) of an image of another size, and is kernel[t] of the convolution's kernels.
struct Gathering {
  int64_t batch, rows, columns, from_height, from_width, from_stride, to_height, to_width, to_stride, to_y, to_x;
  int taps;
  int64_t y[kMostTaps], x[kMostTaps], kernel[kMostTaps];
};

// A square kernel of odd size, padded by size / 2 on all sides.
struct Convolution {
  int64_t batch, height, width, inputs, outputs, size, stride;
  bool winograd;  // only for 3x3 kernels of stride 1

  Gathering forward() const {
    int64_t to_height = (height - 1) / stride + 1, to_width = (width - 1) / stride + 1;
    Gathering g{batch, to_height, to_width, height, width, stride, to_height, to_width, 1, 0, 0, 0, {}, {}, {}};
    for (int64_t i = 0; i < size; i++)
      for (int64_t j = 0; j < size; j++, g.taps++) {
        g.y[g.taps] = i - size / 2;
        g.x[g.taps] = j - size / 2;
        g.kernel[g.taps] = g.taps;
      }
    return g;
  }

  // The gradient of the input's pixels (y, x) + stride (i, j).
  Gathering backward(int64_t y, int64_t x) const {
    int64_t from_height = (height - 1) / stride + 1, from_width = (width - 1) / stride + 1;
    Gathering g{batch, (height - y + stride - 1) / stride, (width - x + stride - 1) / stride, from_height, from_width, 1,
                height, width, stride, y, x, 0, {}, {}, {}};
    for (int64_t i = 0; i < size; i++)
      for (int64_t j = 0; j < size; j++) {
        int64_t above = y + size / 2 - i, left = x + size / 2 - j;  // multiples of the stride come from an output
        if (above % stride || left % stride) continue;
        g.y[g.taps] = above / stride;
        g.x[g.taps] = left / stride;
        g.kernel[g.taps++] = i * size + j;
      }
    return g;
  }
};

// ---- Instruction sets ----

// For each instruction set, those with ReLU and those with GELU.
struct Kernels {
  void (*convolve)(Threads&, const Convolution&, const float* x, const float* affine, const float* w, float* y,
                   uint8_t* which, float* sums);
  void (*input_gradient)(Threads&, const Convolution&, const float* x, const float* affine, const float* w, const float* y,
                         const uint8_t* which, const float* dy, const float* dsums, float* dx, float* daffine);
  void (*kernel_gradient)(Threads&, const Convolution&, const float* x, const float* affine, const float* y,
                          const uint8_t* which, const float* dy, const float* dsums, float* dw);
  void (*add_activate)(Threads&, const float* y, const float* scale, const float* shift, const float* shortcut, int64_t pixels,
                       int64_t channels, float* out);
  void (*add_activate_gradient)(Threads&, const float* y, const float* scale, const float* shift, const float* shortcut,
                                const float* dout, int64_t pixels, int64_t channels, float* dy, float* dshortcut, float* sums);
  void (*activate_max_pool)(Threads&, const float* y, const float* scale, const float* shift, int64_t rows, int64_t width,
                            int64_t channels, float* out);
  void (*activate_max_pool_gradient)(Threads&, const float* y, const float* scale, const float* shift, const float* dout, int64_t rows,
                                     int64_t width, int64_t channels, float* dy, float* sums);
};

namespace baseline {
#define LANES 4
#define ROWS 6
#include "convolution_simd.h"
#undef LANES
#undef ROWS
}  // namespace baseline

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LANES 8
#define ROWS 6
#include "convolution_simd.h"
#undef LANES
#undef ROWS
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,fma")
namespace avx512 {
#define LANES 16
#define ROWS 12
#include "convolution_simd.h"
#undef LANES
#undef ROWS
}  // namespace avx512
#pragma GCC pop_options
#endif

int64_t most_lanes() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return 16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

int64_t lanes = most_lanes();

// The widest kernels whose vectors divide the channels.
const Kernels& kernels_for(int64_t channels, bool gelu) {
#ifdef __x86_64__
  if (lanes >= 16 && channels % 16 == 0) return gelu ? avx512::kernels<avx512::Gelu> : avx512::kernels<avx512::Relu>;
  if (lanes >= 8 && channels % 8 == 0) return gelu ? avx2::kernels<avx2::Gelu> : avx2::kernels<avx2::Relu>;
#endif
  return gelu ? baseline::kernels<baseline::Gelu> : baseline::kernels<baseline::Relu>;
}

// Gathered convolutions read any number of channels.
const Kernels& kernels_for(const Convolution& c, bool gelu) { return kernels_for(c.winograd ? c.inputs | c.outputs : c.outputs, gelu); }

// ---- The functions that XLA calls. Optional arrays, [2, channels], are empty where they are left out. ----

using Array = ffi::Buffer<ffi::F32>;
using Bytes = ffi::Buffer<ffi::U8>;
using Result = ffi::ResultBuffer<ffi::F32>;

template <class T>
auto optional(T& a) {
  return a.element_count() ? a.typed_data() : nullptr;
}

Convolution convolution_of(ffi::Span<const int64_t> x, ffi::Span<const int64_t> w, int64_t stride, bool winograd) {
  return {x[0], x[1], x[2], x[3], w[3], w[0], stride, winograd};
}

ffi::Error Convolve(Threads threads, int64_t stride, bool winograd, bool gelu, Array x, Array affine, Array w, Result y,
                    ffi::ResultBuffer<ffi::U8> which, Result sums) {
  Convolution c = convolution_of(x.dimensions(), w.dimensions(), stride, winograd);
  kernels_for(c, gelu).convolve(threads, c, x.typed_data(), optional(affine), w.typed_data(), y->typed_data(), optional(*which),
                                sums->typed_data());
  return ffi::Error::Success();
}

ffi::Error InputGradient(Threads threads, int64_t stride, bool winograd, bool gelu, Array x, Array affine, Array w, Array y, Bytes which,
                         Array dy, Array dsums, Result dx, Result daffine) {
  Convolution c = convolution_of(x.dimensions(), w.dimensions(), stride, winograd);
  kernels_for(c, gelu).input_gradient(threads, c, x.typed_data(), optional(affine), w.typed_data(), y.typed_data(), optional(which),
                                      dy.typed_data(), dsums.typed_data(), dx->typed_data(), daffine->typed_data());
  return ffi::Error::Success();
}

ffi::Error KernelGradient(Threads threads, int64_t stride, bool winograd, bool gelu, Array x, Array affine, Array y, Bytes which,
                          Array dy, Array dsums, Result dw) {
  Convolution c = convolution_of(x.dimensions(), dw->dimensions(), stride, winograd);
  kernels_for(c, gelu).kernel_gradient(threads, c, x.typed_data(), optional(affine), y.typed_data(), optional(which), dy.typed_data(),
                                       dsums.typed_data(), dw->typed_data());
  return ffi::Error::Success();
}

ffi::Error AddActivate(Threads threads, bool gelu, Array y, Array affine, Array shortcut, Result out) {
  int64_t channels = affine.dimensions()[1];
  kernels_for(channels, gelu)
      .add_activate(threads, y.typed_data(), affine.typed_data(), affine.typed_data() + channels, shortcut.typed_data(),
                    y.element_count() / channels, channels, out->typed_data());
  return ffi::Error::Success();
}

ffi::Error AddActivateGradient(Threads threads, bool gelu, Array y, Array affine, Array shortcut, Array dout, Result dy,
                               Result dshortcut, Result daffine) {
  int64_t channels = affine.dimensions()[1];
  kernels_for(channels, gelu)
      .add_activate_gradient(threads, y.typed_data(), affine.typed_data(), affine.typed_data() + channels, shortcut.typed_data(),
                             dout.typed_data(), y.element_count() / channels, channels, dy->typed_data(), dshortcut->typed_data(),
                             daffine->typed_data());
  return ffi::Error::Success();
}

ffi::Error ActivateMaxPool(Threads threads, bool gelu, Array y, Array affine, Result out) {
  auto shape = y.dimensions();
  kernels_for(shape[3], gelu)
      .activate_max_pool(threads, y.typed_data(), affine.typed_data(), affine.typed_data() + shape[3], shape[0] * shape[1] / 2,
                         shape[2], shape[3], out->typed_data());
  return ffi::Error::Success();
}

ffi::Error ActivateMaxPoolGradient(Threads threads, bool gelu, Array y, Array affine, Array dout, Result dy, Result daffine) {
  auto shape = y.dimensions();
  kernels_for(shape[3], gelu)
      .activate_max_pool_gradient(threads, y.typed_data(), affine.typed_data(), affine.typed_data() + shape[3], dout.typed_data(),
                                  shape[0] * shape[1] / 2, shape[2], shape[3], dy->typed_data(), daffine->typed_data());
  return ffi::Error::Success();
}

}  // namespace

extern "C" const char* sources_digest() { return SOURCES_DIGEST; }

// XLA refuses functions that were compiled for a later minor version of its interface than its own.
extern "C" int64_t ffi_api_version() { return XLA_FFI_API_MINOR; }

// How many floats a vector has: the most of this processor, or as many as a test asks for.
extern "C" int64_t vector_lanes() { return lanes; }
extern "C" void set_vector_lanes(int64_t n) { lanes = n < most_lanes() ? n : most_lanes(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(convolve, Convolve,
                                     ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("stride").Attr<bool>("winograd").Attr<bool>("gelu")
                                         .Arg<Array>().Arg<Array>().Arg<Array>()
                                         .Ret<Array>().Ret<Bytes>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(input_gradient, InputGradient,
                                     ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("stride").Attr<bool>("winograd").Attr<bool>("gelu")
                                         .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Bytes>().Arg<Array>().Arg<Array>()
                                         .Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kernel_gradient, KernelGradient,
                                     ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("stride").Attr<bool>("winograd").Attr<bool>("gelu")
                                         .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Bytes>().Arg<Array>().Arg<Array>()
                                         .Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(add_activate, AddActivate,
                                     ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<bool>("gelu")
                                         .Arg<Array>().Arg<Array>().Arg<Array>()
                                         .Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(add_activate_gradient, AddActivateGradient,
                                     ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<bool>("gelu")
                                         .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
                                         .Ret<Array>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(activate_max_pool, ActivateMaxPool,
                                     ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<bool>("gelu")
                                         .Arg<Array>().Arg<Array>()
                                         .Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(activate_max_pool_gradient, ActivateMaxPoolGradient,
                                     ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<bool>("gelu")
                                         .Arg<Array>().Arg<Array>().Arg<Array>()
                                         .Ret<Array>().Ret<Array>());
