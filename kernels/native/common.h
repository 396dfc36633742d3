// What every instruction set shares: the job a call describes, strided rows, and threads.
// Everything here is compiled for the baseline instruction set.
#pragma once

#include <atomic>
#include <cfenv>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace hftcore {

constexpr int32_t FINITE = 0x7F800000;   // keys from here on are infinities and NaNs
constexpr int32_t PADDING = 0x7FFFFFFF;  // fills a key buffer up to a multiple of BLOCK
constexpr int64_t BLOCK = 64;            // columns handled as one machine word of mask bits
constexpr int64_t SPAN = 2048;           // columns whose keys stay in the first-level cache
constexpr int64_t AHEAD = 1 << 13;       // bytes from what is read to what is fetched: the processor's own prefetching ends with a page
constexpr int64_t GRAIN = 1 << 17;       // elements handed to a thread at a time

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Mirrored field by field by the ctypes structure in __init__.py. Strides count elements.
struct Job {
  int64_t dtype, threads, rows, columns;
  void* weight;
  int64_t weight_row, weight_column;
  void* reference;
  int64_t reference_row, reference_column;
  const float* norm;
  uint8_t* mask;
  int64_t* rowwise;  // quotas, counts or offsets, one a row
  void* values;      // the op's other array
  const int32_t* keys;  // one a row, or two; null: `a` and `b` for all rows
  int64_t invert, a, b, c;
};

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The marked ones of up to 64 elements, to `out` and back. Each returns where the next of them belong.
template <class T>
INLINE T* take_marked(const T* w, uint64_t marked, T* out) {
  for (; marked; marked &= marked - 1) *out++ = w[__builtin_ctzll(marked)];
  return out;
}

template <class T>
INLINE const T* put_marked(T* w, uint64_t marked, const T* in) {
  for (; marked; marked &= marked - 1) w[__builtin_ctzll(marked)] = *in++;
  return in;
}

// Rows of a strided matrix as contiguous memory. Rows that are not contiguous are gathered a few at a time, so that a cache
// line of a transposed matrix serves all the rows it holds.
template <class T>
struct Rows {
  T* data;
  int64_t row, column, columns, pitch;
  T* buffer;
  int64_t first;

  static int64_t pitch_of(int64_t columns) { return round_up(columns, 64) + 32; }

  // how many rows are worth loading together
  static int64_t together(int64_t columns) {
    int64_t fit = (int64_t{1} << 20) / (pitch_of(columns) * int64_t{sizeof(T)});
    int64_t lines = 2 * 64 / int64_t{sizeof(T)};  // the neighbour of a cache line comes cheaply
    return fit < 1 ? 1 : fit < lines ? fit : lines;
  }

  static int64_t scratch(int64_t columns) {
    return round_up(together(columns) * pitch_of(columns) * int64_t{sizeof(T)}, 64);
  }

  Rows(void* data, int64_t row, int64_t column, int64_t columns, char* scratch)
      : data(static_cast<T*>(data)),
        row(row),
        column(columns == 1 ? 1 : column),
        columns(columns),
        pitch(pitch_of(columns)),
        buffer(reinterpret_cast<T*>(scratch)),
        first(0) {}

  bool direct() const { return column == 1; }

  void load(int64_t begin, int64_t end) {
    first = begin;
    if (!data || direct()) return;
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = begin; i < end; ++i) buffer[(i - begin) * pitch + j] = data[i * row + j * column];
  }

  void save(int64_t begin, int64_t end) const {
    if (direct()) return;
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = begin; i < end; ++i) data[i * row + j * column] = buffer[(i - begin) * pitch + j];
  }

  T* at(int64_t i) const {
    if (!data) return nullptr;
    return direct() ? data + i * row : buffer + (i - first) * pitch;
  }
};

// Denormal scores count, also where the caller has switched flushing to zero on.
class DefaultFloats {
 public:
  DefaultFloats() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloats() { std::fesetenv(&saved_); }
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;

 private:
  std::fenv_t saved_;
};

class Chunks {
 public:
  Chunks(int64_t items, int64_t size) : items_(items), size_(size), next_(0) {}
  bool next(int64_t& begin, int64_t& end) {
    begin = next_.fetch_add(size_, std::memory_order_relaxed);
    if (begin >= items_) return false;
    end = begin + size_ < items_ ? begin + size_ : items_;
    return true;
  }

 private:
  int64_t items_, size_;
  std::atomic<int64_t> next_;
};

using Body = void (*)(const void* context, char* scratch, Chunks& chunks);

// Calls part(context) on so many threads, this one among them, and waits for all: GOMP_parallel of GNU's OpenMP.
using Team = void (*)(void (*part)(void*), void* context, unsigned threads, unsigned flags);

// PyTorch's, or null where it has another kind. Its threads spin for milliseconds after each of PyTorch's ops, so that other threads
// would have to share the processors with them.
inline Team team = nullptr;

// One parallel run: its work, and who is at it. Where there is no team, a helper that is given a processor only after the work is done
// finds the crew closed and never looks at it, so nobody waits for a thread that has not begun.
class Crew {
 public:
  Crew(Body body, const void* context, int64_t items, int64_t chunk, int64_t workers, int64_t scratch, char* memory)
      : body_(body),
        context_(context),
        workers_(workers),
        scratch_(scratch),
        memory_(memory),
        chunks_(items, chunk),
        inside_(0),
        places_(0) {}
  ~Crew() { std::free(memory_); }
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  void work() {
    int64_t place = places_.fetch_add(1);
    if (place >= workers_) return;
    DefaultFloats floats;
    char* aligned = memory_ + (64 - reinterpret_cast<uintptr_t>(memory_) % 64) % 64;
    body_(context_, aligned + place * scratch_, chunks_);
  }

  static void work_at(void* crew) { static_cast<Crew*>(crew)->work(); }

  void help() {
    int64_t inside = inside_.load();
    do {
      if (inside < 0) return;
    } while (!inside_.compare_exchange_weak(inside, inside + 1));
    work();
    std::lock_guard<std::mutex> lock(mutex_);
    inside_.fetch_sub(1);
    left_.notify_one();
  }

  // No helper begins any more; returns when those at work are done.
  void close() {
    inside_.fetch_add(CLOSED);
    std::unique_lock<std::mutex> lock(mutex_);
    while (inside_.load() != CLOSED) left_.wait(lock);
  }

 private:
  static constexpr int64_t CLOSED = INT64_MIN / 2;
  Body body_;
  const void* context_;
  int64_t workers_, scratch_;
  char* memory_;
  Chunks chunks_;
  std::atomic<int64_t> inside_, places_;
  std::mutex mutex_;
  std::condition_variable left_;
};

// Runs `body` on as many threads as there is work for, each with `scratch` bytes of its own. Returns false, with nothing
// done, when that memory cannot be had. `size` is what one item costs, in elements; chunks hold a multiple of `unit` items.
inline bool parallel(int64_t items, int64_t size, int64_t unit, int64_t threads, int64_t scratch, Body body,
                     const void* context) {
  if (items <= 0) return true;
  if (size < 1) size = 1;
  int64_t chunk = round_up(GRAIN / size > 1 ? GRAIN / size : 1, unit);
  double work = double(items) * double(size) / (2.0 * GRAIN);
  int64_t workers = threads;
  if (work < double(workers)) workers = int64_t(work) + 1;
  int64_t pieces = (items + chunk - 1) / chunk;
  if (workers > pieces) workers = pieces;
  if (workers < 1) workers = 1;
  scratch = round_up(scratch + 64, 64);
  char* memory = static_cast<char*>(std::malloc(size_t(scratch * workers + 64)));
  if (!memory) return false;
  std::shared_ptr<Crew> crew;
  try {
    crew = std::make_shared<Crew>(body, context, items, chunk, workers, scratch, memory);
  } catch (const std::bad_alloc&) {
    std::free(memory);
    return false;
  }
  if (team && workers > 1) {
    // all of them, though fewer may be needed: OpenMP ends the threads that a smaller team leaves out
    team(Crew::work_at, crew.get(), unsigned(threads), 0);
    return true;
  }
  struct Helper {
    std::shared_ptr<Crew> crew;
    void operator()() const { crew->help(); }
  };
  try {
    for (int64_t i = 1; i < workers; ++i) std::thread(Helper{crew}).detach();
  } catch (const std::exception&) {
    // fewer threads than asked for: those that started and this one share the chunks
  }
  crew->work();
  crew->close();
  return true;
}

}  // namespace hftcore
