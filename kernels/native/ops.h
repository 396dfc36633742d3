// The ops, each as the bytes of scratch that a thread needs and a body that works through chunks of rows. Included like keys.h.

template <class T>
struct Ops {
  struct Band {
    Rows<T> weight, reference;
    int64_t together;

    static int64_t scratch(const Job& job) { return 2 * Rows<T>::scratch(job.columns); }

    Band(const Job& job, char*& memory)
        : weight(job.weight, job.weight_row, job.weight_column, job.columns, memory),
          reference(job.reference, job.reference_row, job.reference_column, job.columns,
                    memory + Rows<T>::scratch(job.columns)),
          together(Rows<T>::together(job.columns)) {
      memory += scratch(job);
    }

    int64_t load(int64_t begin, int64_t end) {
      end = smaller(end, begin + together);
      weight.load(begin, end);
      reference.load(begin, end);
      return end;
    }
  };

  static int64_t padded(const Job& job) { return round_up(job.columns, BLOCK) + 2 * BLOCK; }

  static int64_t select_scratch(const Job& job) { return Band::scratch(job) + 12 * padded(job); }

  struct Selection {
    const Job& job;
    Cut* cuts;  // one a row for remove_rows, or null where each row is dealt with at once
  };

  // Finds each row's cut and keeps it, or marks the mask's row, or removes. Counts the rows with a score that is not finite.
  static void select_rows(const void* context, char* memory, Chunks& chunks) {
    const Selection& selection = *static_cast<const Selection*>(context);
    const Job& job = selection.job;
    int64_t columns = job.columns, bytes = (columns + 7) / 8;
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    int32_t* one = key + padded(job);
    int32_t* two = one + padded(job);
    Guess guess;
    int64_t refused = 0, begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        int64_t first = row, last = band.load(row, end);
        for (; row < last; ++row) {
          T *w = band.weight.at(row), *r = band.reference.at(row);
          Cut cut{0, 0};
          bool finite = select<T>(w, r, job.norm, columns, job.a, guess, key, one, two, cut);
          refused += !finite;
          if (selection.cuts) {
            selection.cuts[row] = cut;
          } else if (!job.mask) {
            remove<T>(w, r, job.norm, columns, cut, job.invert, key, reinterpret_cast<uint8_t*>(one));
          } else if (!finite) {
            std::memset(job.mask + row * bytes, 0, size_t(bytes));
          } else if (columns <= SPAN) {
            mark(key, columns, cut, job.invert, job.mask + row * bytes);
          } else {
            mark_scores<T>(w, r, job.norm, columns, cut, job.invert, key, job.mask + row * bytes);
          }
        }
        if (!job.mask && !selection.cuts) band.weight.save(first, last);
      }
    }
    __atomic_fetch_add(static_cast<int64_t*>(job.values), refused, __ATOMIC_RELAXED);
  }

  static void remove_rows(const void* context, char* memory, Chunks& chunks) {
    const Selection& selection = *static_cast<const Selection*>(context);
    const Job& job = selection.job;
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    uint8_t* bits = reinterpret_cast<uint8_t*>(key + SPAN + BLOCK);
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        int64_t first = row, last = band.load(row, end);
        for (; row < last; ++row)
          remove<T>(band.weight.at(row), band.reference.at(row), job.norm, job.columns, selection.cuts[row], job.invert, key, bits);
        band.weight.save(first, last);
      }
    }
  }

  // In place in two passes, the second only when every score is finite. It reads the weights again, but together they cost no
  // more than one pass that does both. b = 1 says that every score is finite: one pass then, and no memory for cuts.
  static bool prune_rows(const Job& job, int64_t unit) {
    Selection selection{job, nullptr};
    if (job.mask || job.b)
      return parallel(job.rows, job.columns, unit, job.threads, select_scratch(job), select_rows, &selection);
    selection.cuts = static_cast<Cut*>(std::malloc(size_t(job.rows) * sizeof(Cut)));
    bool done = selection.cuts &&
                parallel(job.rows, job.columns, unit, job.threads, select_scratch(job), select_rows, &selection) &&
                (*static_cast<int64_t*>(job.values) ||
                 parallel(job.rows, job.columns, unit, job.threads, span_scratch(job), remove_rows, &selection));
    std::free(selection.cuts);
    return done;
  }

  // The highest key of each row; values = int32 [rows].
  static void top_keys(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        for (int64_t last = band.load(row, end); row < last; ++row) {
          const T *w = band.weight.at(row), *r = band.reference.at(row);
          int32_t top = 0;
          for (int64_t i = 0; i < job.columns; i += SPAN) {
            int64_t n = smaller(SPAN, job.columns - i);
            make_keys<T>(w + i, r ? r + i : nullptr, job.norm + i, n, key);
            for (int64_t j = 0; j < n; ++j) top = key[j] > top ? key[j] : top;
          }
          static_cast<int32_t*>(job.values)[row] = top;
        }
      }
    }
  }

  // The a-th lowest key of each row, 0 < a <= columns; values = int32 [rows].
  static bool row_keys(const Job& job, int64_t unit) {
    if (job.a == job.columns) return parallel(job.rows, job.columns, unit, job.threads, span_scratch(job), top_keys, &job);
    Job counted = job;
    int64_t refused = 0;
    counted.values = &refused;
    Selection selection{counted, static_cast<Cut*>(std::malloc(size_t(job.rows) * sizeof(Cut)))};
    bool done = selection.cuts && parallel(job.rows, job.columns, unit, job.threads, select_scratch(job), select_rows, &selection);
    // a cut whose ties all go is one above their key
    for (int64_t row = 0; done && row < job.rows; ++row)
      static_cast<int32_t*>(job.values)[row] = selection.cuts[row].key - (selection.cuts[row].quota == 0);
    std::free(selection.cuts);
    return done;
  }

  static int64_t span_scratch(const Job& job) { return Band::scratch(job) + 9 * (SPAN + 2 * BLOCK); }

  static void nonfinite(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    float longest = peak(job.norm, job.columns);
    int64_t total = 0, begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        for (int64_t last = band.load(row, end); row < last; ++row) {
          const T *w = band.weight.at(row), *r = band.reference.at(row);
          // rounding keeps order, so no score of the row exceeds this product: cheaper than the scores themselves
          if (!r && std::isfinite(peak(w, job.columns) * longest)) continue;
          for (int64_t i = 0; i < job.columns; i += SPAN) {
            int64_t n = smaller(SPAN, job.columns - i);
            float sum = make_keys<T>(w + i, r ? r + i : nullptr, job.norm + i, n, key);
            total += count_nonfinite(key, n, sum);
          }
        }
      }
    }
    __atomic_fetch_add(static_cast<int64_t*>(job.values), total, __ATOMIC_RELAXED);
  }

  static void tie_counts(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        for (int64_t last = band.load(row, end); row < last; ++row) {
          const T *w = band.weight.at(row), *r = band.reference.at(row);
          int64_t total = 0;
          for (int64_t i = 0; i < job.columns; i += SPAN) {
            int64_t n = smaller(SPAN, job.columns - i), equal;
            make_keys<T>(w + i, r ? r + i : nullptr, job.norm + i, n, key);
            count(key, n, int32_t(job.a), equal);
            total += equal;
          }
          job.rowwise[row] = total;
        }
      }
    }
  }

  static int64_t histogram_scratch(const Job& job) { return span_scratch(job) + 4 * (SPAN + 2 * BLOCK) + 8 * (job.c + 3); }

  // a = low, b = shift, c = bins
  static void score_histogram(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    int32_t* inside = key + SPAN + BLOCK;
    int64_t* bins = reinterpret_cast<int64_t*>(inside + SPAN + 3 * BLOCK);
    std::memset(bins, 0, size_t(job.c + 3) * 8);
    const int64_t start = job.a, shift = job.b;  // of this thread: the bins could alias the job
    int64_t low = job.a < 0 ? 0 : smaller(job.a, FINITE);
    int64_t high = job.b >= 31 ? int64_t{FINITE} : smaller(job.a + (job.c << job.b), FINITE);
    if (high < low) high = low;
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        for (int64_t last = band.load(row, end); row < last; ++row) {
          const T *w = band.weight.at(row), *r = band.reference.at(row);
          for (int64_t i = 0; i < job.columns; i += SPAN) {
            const T* other = r ? r + i : nullptr;
            int64_t n = smaller(SPAN, job.columns - i), below, strange = 0;
            float sum;
            int64_t found = collect_scores(w + i, other, job.norm + i, n, int32_t(low), int32_t(high), inside, below, sum);
            if (!std::isfinite(sum)) strange = count_nonfinite(key, n, make_keys<T>(w + i, other, job.norm + i, n, key));
            bins[0] += below;
            bins[job.c + 1] += n - below - found - strange;
            bins[job.c + 2] += strange;
            for (int64_t j = 0; j < found; ++j) ++bins[1 + ((inside[j] - start) >> shift)];
          }
        }
      }
    }
    int64_t* out = static_cast<int64_t*>(job.values);
    for (int64_t i = 0; i < job.c + 3; ++i)
      if (bins[i]) __atomic_fetch_add(out + i, bins[i], __ATOMIC_RELAXED);
  }

  static int64_t between_scratch(const Job& job) { return Band::scratch(job) + 4 * (padded(job) + SPAN + 3 * BLOCK); }

  // a = low, b = high, or `keys`: low of each row, then high of each row; c = room; values = int32 [c]; rowwise = where each row's keys
  // begin [rows], how many they are [rows], of all rows: below, inside, not finite [3], and with `keys`, how many of each row are below
  // [rows]
  static void keys_between(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    int32_t* inside = key + SPAN + 2 * BLOCK;
    int32_t* out = static_cast<int32_t*>(job.values);
    int64_t *starts = job.rowwise, *counts = starts + job.rows, *totals = counts + job.rows, *belows = totals + 3;
    int64_t under = 0, strange = 0, begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        for (int64_t last = band.load(row, end); row < last; ++row) {
          const T *w = band.weight.at(row), *r = band.reference.at(row);
          const int32_t low = job.keys ? job.keys[row] : int32_t(job.a), high = job.keys ? job.keys[job.rows + row] : int32_t(job.b);
          const int64_t before = under;
          int64_t found = 0;
          for (int64_t i = 0; i < job.columns; i += SPAN) {
            const T* other = r ? r + i : nullptr;
            int64_t n = smaller(SPAN, job.columns - i), below;
            float sum;
            found += collect_scores(w + i, other, job.norm + i, n, low, high, inside + found, below, sum);
            under += below;
            if (!std::isfinite(sum)) strange += count_nonfinite(key, n, make_keys<T>(w + i, other, job.norm + i, n, key));
          }
          int64_t at = __atomic_fetch_add(totals + 1, found, __ATOMIC_RELAXED);
          if (at + found <= job.c) std::memcpy(out + at, inside, size_t(found) * 4);
          starts[row] = at;
          counts[row] = found;
          if (job.keys) belows[row] = under - before;
        }
      }
    }
    __atomic_fetch_add(totals, under, __ATOMIC_RELAXED);
    __atomic_fetch_add(totals + 2, strange, __ATOMIC_RELAXED);
  }

  // a = first, b = step, c = how many; items are the sampled weights, values = int32 [c]
  static void sampled_keys(const void* context, char*, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    const T *weight = static_cast<const T*>(job.weight), *reference = static_cast<const T*>(job.reference);
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      // each is a cache line of its own, so a block of them is on its way before the first is looked at
      int64_t rows[BLOCK], columns[BLOCK];
      for (int64_t i = begin; i < end; i += BLOCK) {
        int64_t n = smaller(BLOCK, end - i);
        for (int64_t j = 0; j < n; ++j) {
          int64_t at = job.a + (i + j) * job.b;
          rows[j] = at / job.columns;
          columns[j] = at % job.columns;
          __builtin_prefetch(weight + rows[j] * job.weight_row + columns[j] * job.weight_column);
        }
        for (int64_t j = 0; j < n; ++j) {
          float x = widen(weight[rows[j] * job.weight_row + columns[j] * job.weight_column]);
          if (reference) x -= widen(reference[rows[j] * job.reference_row + columns[j] * job.reference_column]);
          static_cast<int32_t*>(job.values)[i + j] = int32_t(to_bits(x * job.norm[columns[j]]) & 0x7FFFFFFFu);
        }
      }
    }
  }

  // a = key, or `keys`: one of each row; rowwise = quota, of which columns or more means all ties
  static void cut(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    int64_t bytes = (job.columns + 7) / 8;
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    uint8_t* own = reinterpret_cast<uint8_t*>(key + SPAN + 2 * BLOCK);
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        int64_t first = row, last = band.load(row, end);
        for (; row < last; ++row) {
          T* w = band.weight.at(row);
          const T* r = band.reference.at(row);
          Cut cut = settled(job.keys ? job.keys[row] : int32_t(job.a), job.rowwise[row], job.columns);
          if (!job.mask) {
            remove<T>(w, r, job.norm, job.columns, cut, job.invert, key, own);
            continue;
          }
          mark_scores(w, r, job.norm, job.columns, cut, job.invert, key, job.mask + row * bytes);
        }
        if (!job.mask) band.weight.save(first, last);
      }
    }
  }

  // n:4 for finite keys: the six comparisons of four neighbours, for many groups at once
  static void mark_fours(const int32_t* key, int64_t groups, int n, bool invert, uint8_t* four, uint8_t* bits) {
    const int flip = invert ? 15 : 0;
    for (int64_t g = 0; g < groups; ++g) {
      int32_t a = key[4 * g], b = key[4 * g + 1], c = key[4 * g + 2], d = key[4 * g + 3];
      int ba = b < a, ca = c < a, da = d < a, cb = c < b, db = d < b, dc = d < c;
      int low = (ba + ca + da < n) | (1 - ba + cb + db < n) << 1 | (2 - ca - cb + dc < n) << 2 | (3 - da - db - dc < n) << 3;
      four[g] = uint8_t(low ^ flip);
    }
    for (int64_t i = 0; i < groups / 2; ++i) bits[i] = uint8_t(four[2 * i] | four[2 * i + 1] << 4);
    if (groups % 2) bits[groups / 2] = four[groups - 1];
  }

  static int64_t groups_scratch(const Job& job) { return Band::scratch(job) + 5 * padded(job); }

  // a = n, b = m
  static void prune_groups(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    int64_t columns = job.columns, bytes = (columns + 7) / 8, n = job.a, m = job.b;
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    uint8_t* own = reinterpret_cast<uint8_t*>(key + padded(job));
    uint64_t all = m == 64 ? ~uint64_t{0} : (uint64_t{1} << m) - 1;
    int64_t refused = 0, begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        int64_t first = row, last = band.load(row, end);
        for (; row < last; ++row) {
          T* w = band.weight.at(row);
          const T* r = band.reference.at(row);
          uint8_t* bits = job.mask ? job.mask + row * bytes : own;
          float sum = make_keys<T>(w, r, job.norm, columns, key);
          if (m == 4 && count_nonfinite(key, columns, sum) == 0) {
            mark_fours(key, columns / 4, int(n), job.invert, own + padded(job) / 4, bits);
            if (!job.mask) put<T>(w, r, bits, columns);
            continue;
          }
          uint64_t word = 0;   // bits not yet written
          int64_t held = 0, written = 0;
          for (int64_t g = 0; g < columns; g += m) {
            uint64_t low = 0;
            bool strange = false;
            for (int64_t i = 0; i < m; ++i) {
              int32_t own_key = key[g + i];
              int64_t rank = 0;
              for (int64_t j = 0; j < i; ++j) rank += key[g + j] <= own_key;
              for (int64_t j = i + 1; j < m; ++j) rank += key[g + j] < own_key;
              low |= uint64_t{rank < n} << i;
              strange |= own_key >= FINITE;
            }
            if (job.invert) low ^= all;
            if (strange) {
              ++refused;
              low = 0;
            }
            word |= low << held;
            held += m;
            if (held >= 64) {
              std::memcpy(bits + written, &word, 8);
              written += 8;
              held -= 64;
              word = held ? low >> (m - held) : 0;
            }
          }
          if (held) std::memcpy(bits + written, &word, size_t((held + 7) / 8));
          if (!job.mask) put<T>(w, r, bits, columns);
        }
        if (!job.mask) band.weight.save(first, last);
      }
    }
    __atomic_fetch_add(static_cast<int64_t*>(job.values), refused, __ATOMIC_RELAXED);
  }

  static int64_t blocks_scratch(const Job& job) { return Band::scratch(job) + 12 * padded(job); }

  // a = bm, b = bn; items are rows of blocks
  static void block_scores(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    int64_t bm = job.a, bn = job.b, across = job.columns / bn;
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    double* total = reinterpret_cast<double*>(key + padded(job));
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t block = begin; block < end; ++block) {
        for (int64_t i = 0; i < across; ++i) total[i] = 0;
        for (int64_t row = block * bm; row < (block + 1) * bm;) {
          for (int64_t last = band.load(row, (block + 1) * bm); row < last; ++row) {
            make_keys<T>(band.weight.at(row), band.reference.at(row), job.norm, job.columns, key);
            for (int64_t j = 0; j < bn; ++j)
              for (int64_t i = 0; i < across; ++i) {
                double score = from_bits(uint32_t(key[i * bn + j]));
                total[i] += score * score;
              }
          }
        }
        float* out = static_cast<float*>(job.values) + block * across;
        for (int64_t i = 0; i < across; ++i) out[i] = float(total[i]);
      }
    }
  }

  static int64_t band_scratch(const Job& job) { return Band::scratch(job); }

  // rowwise = where in `values` each row begins
  static void masked_take(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    int64_t bytes = (job.columns + 7) / 8;
    Band band(job, memory);
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        for (int64_t last = band.load(row, end); row < last; ++row) {
          const T* w = band.weight.at(row);
          T* out = static_cast<T*>(job.values) + job.rowwise[row];
          for (int64_t i = 0; i < job.columns; i += BLOCK) {
            uint64_t word = load_bits(job.mask + row * bytes + i / 8, job.columns - i);
            out = job.columns - i < BLOCK ? take_marked(w + i, word, out) : take64(w + i, word, out);
          }
        }
      }
    }
  }

  static void masked_put(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    int64_t bytes = (job.columns + 7) / 8;
    Band band(job, memory);
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        int64_t first = row, last = band.load(row, end);
        for (; row < last; ++row) {
          T* w = band.weight.at(row);
          const uint8_t* bits = job.mask + row * bytes;
          if (!job.values) {
            put<T>(w, nullptr, bits, job.columns);
            continue;
          }
          const T* value = static_cast<const T*>(job.values) + job.rowwise[row];
          for (int64_t i = 0; i < job.columns; i += BLOCK) {
            uint64_t word = load_bits(bits + i / 8, job.columns - i);
            value = job.columns - i < BLOCK ? put_marked(w + i, word, value) : give64(w + i, word, value);
          }
        }
        band.weight.save(first, last);
      }
    }
  }

  static constexpr int64_t STRIP = 1024;  // columns whose sums stay in the first-level cache
  static constexpr int64_t GROUP = 64;    // tokens summed in float32
  static constexpr int64_t TOKENS = 8;    // of these, added in one walk over the sums

  static int64_t energy_scratch(const Job&) { return STRIP * (4 + 8 + TOKENS * int64_t{sizeof(T)}); }

  // Token after token: the bits are those of one at a time.
  template <int64_t N>
  static INLINE void add_squares(const T* const* x, int64_t n, float* sum) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
      Floats total = load(sum + j);
      for (int64_t i = 0; i < N; ++i) total = add_square(total, load(x[i] + j));
      store(sum + j, total);
    }
    for (; j < n; ++j)
      for (int64_t i = 0; i < N; ++i) sum[j] += widen(x[i][j]) * widen(x[i][j]);
  }

  // a = tokens of a slab, b = strips; items are (slab, strip); values = float64 [slabs, columns]
  static void column_energy(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    double* total = reinterpret_cast<double*>(memory);
    float* partial = reinterpret_cast<float*>(total + STRIP);
    T* gathered = reinterpret_cast<T*>(partial + STRIP);
    const T* x = static_cast<const T*>(job.weight);
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t item = begin; item < end; ++item) {
        int64_t slab = item / job.b, strip = item % job.b * STRIP;
        int64_t n = smaller(STRIP, job.columns - strip);
        int64_t token = slab * job.a, stop = smaller(token + job.a, job.rows);
        std::memset(total, 0, STRIP * 8);
        while (token < stop) {
          std::memset(partial, 0, STRIP * 4);
          for (int64_t counted = 0; counted < GROUP && token < stop;) {
            const T* some[TOKENS];
            int64_t have = 0;
            for (; have < TOKENS && counted + have < GROUP && token < stop; ++token) {
              if (job.mask && !job.mask[token]) continue;
              const T* row = x + token * job.weight_row + strip * job.weight_column;
              if (job.weight_column != 1) {
                T* copy = gathered + have * STRIP;
                for (int64_t j = 0; j < n; ++j) copy[j] = row[j * job.weight_column];
                row = copy;
              }
              some[have++] = row;
            }
            counted += have;
            if (have == TOKENS) {
              add_squares<TOKENS>(some, n, partial);
            } else {
              for (int64_t i = 0; i < have; ++i) add_squares<1>(some + i, n, partial);
            }
          }
          for (int64_t j = 0; j < n; ++j) total[j] += partial[j];
        }
        std::memcpy(static_cast<double*>(job.values) + slab * job.columns + strip, total, size_t(n) * 8);
      }
    }
  }
};

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

// Σ mix64(element + (position + 1) · golden ratio); a = number of elements, items are pieces of b of them, c = position of the first
template <class Bits>
inline void fingerprint(const void* context, char*, Chunks& chunks) {
  const Job& job = *static_cast<const Job*>(context);
  const Bits* bits = static_cast<const Bits*>(job.weight);
  uint64_t total = 0;
  int64_t begin, end;
  while (chunks.next(begin, end)) {
    const int64_t first = begin * job.b, stop = smaller(end * job.b, job.a);
    // counted up, as a product of 64 bits is dear
    uint64_t place = (uint64_t(first) + uint64_t(job.c) + 1) * GOLDEN;
    for (int64_t i = first; i < stop; ++i, place += GOLDEN) {
      uint64_t z = bits[i] + place;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
      total += z ^ (z >> 31);
    }
  }
  __atomic_fetch_add(static_cast<uint64_t*>(job.values), total, __ATOMIC_RELAXED);
}

// Where the low set of each row ends among the keys of several processes: values = int32 [processes, a], the keys of each, row by row;
// columns = processes; b = this one; c = keys of the longest row. rowwise = where the keys of a row begin [processes, rows], how many
// they are [processes, rows], how many of a row's keys are in the low set [rows]; and what is found: the highest key in it [rows], and
// how many that equal it are left for this process and those to its right [rows]
inline int64_t merge_scratch(const Job& job) { return 12 * (job.c + 3 * BLOCK); }

inline void row_merge(const void* context, char* memory, Chunks& chunks) {
  const Job& job = *static_cast<const Job*>(context);
  const int32_t* values = static_cast<const int32_t*>(job.values);
  const int64_t *starts = job.rowwise, *counts = starts + job.columns * job.rows, *need = counts + job.columns * job.rows;
  int64_t *keys = job.rowwise + (2 * job.columns + 1) * job.rows, *left = keys + job.rows;
  int32_t *all = reinterpret_cast<int32_t*>(memory), *one = all + job.c + 3 * BLOCK, *two = one + job.c + 3 * BLOCK;
  int64_t begin, end;
  while (chunks.next(begin, end)) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t size = 0, before = 0, equal, ties = 0;
      for (int64_t process = 0; process < job.columns; ++process) {
        if (process == job.b) before = size;
        const int64_t run = process * job.rows + row;
        std::memcpy(all + size, values + process * job.a + starts[run], size_t(counts[run]) * 4);
        size += counts[run];
      }
      if (job.b == job.columns) before = size;
      for (int64_t i = 0; i < BLOCK; ++i) all[size + i] = PADDING;
      int32_t key;
      nth(all, size, need[row], 0, FINITE, false, one, two, key);
      for (int64_t i = 0; i < before; ++i) ties += all[i] == key;
      keys[row] = key;
      left[row] = larger(0, need[row] - count(all, size, key, equal) - ties);
    }
  }
}

// How many entries of each row are marked.
inline void mask_counts(const void* context, char*, Chunks& chunks) {
  const Job& job = *static_cast<const Job*>(context);
  int64_t bytes = (job.columns + 7) / 8, begin, end;
  while (chunks.next(begin, end))
    for (int64_t row = begin; row < end; ++row) {
      int64_t total = 0;
      for (int64_t i = 0; i < job.columns; i += BLOCK)
        total += __builtin_popcountll(load_bits(job.mask + row * bytes + i / 8, job.columns - i));
      job.rowwise[row] = total;
    }
}

template <class T>
inline bool run_typed(int op, const Job& job) {
  if (is_product(op)) return run_product<T>(op, job);
  using O = Ops<T>;
  int64_t unit = job.weight_column == 1 ? 1 : Rows<T>::together(job.columns);
  switch (op) {
    case PRUNE_ROWS:
      return O::prune_rows(job, unit);
    case PRUNE_GROUPS:
      return parallel(job.rows, job.columns, unit, job.threads, O::groups_scratch(job), O::prune_groups, &job);
    case NONFINITE:
      return parallel(job.rows, job.columns, unit, job.threads, O::span_scratch(job), O::nonfinite, &job);
    case TIE_COUNTS:
      return parallel(job.rows, job.columns, unit, job.threads, O::span_scratch(job), O::tie_counts, &job);
    case SCORE_HISTOGRAM:
      return parallel(job.rows, job.columns, unit, job.threads, O::histogram_scratch(job), O::score_histogram, &job);
    case SAMPLED_KEYS:
      return parallel(job.c, 16, 1, job.threads, 0, O::sampled_keys, &job);
    case ROW_KEYS:
      return O::row_keys(job, unit);
    case KEYS_BETWEEN:
      return parallel(job.rows, job.columns, unit, job.threads, O::between_scratch(job), O::keys_between, &job);
    case CUT:
      return parallel(job.rows, job.columns, unit, job.threads, O::span_scratch(job), O::cut, &job);
    case BLOCK_SCORES:
      return parallel(job.rows / job.a, job.columns * job.a, 1, job.threads, O::blocks_scratch(job), O::block_scores, &job);
    case MASKED_TAKE:
      return parallel(job.rows, job.columns, unit, job.threads, O::band_scratch(job), O::masked_take, &job);
    case MASKED_PUT:
      return parallel(job.rows, job.columns, unit, job.threads, O::band_scratch(job), O::masked_put, &job);
    case COLUMN_ENERGY:
      return parallel((job.rows + job.a - 1) / job.a * job.b, job.a * O::STRIP, 1, job.threads, O::energy_scratch(job),
                      O::column_energy, &job);
    default:
      return false;
  }
}

inline bool run(int op, const Job& job) {
  if (op == MASK_COUNTS) return parallel(job.rows, job.columns / 8, 1, job.threads, 0, mask_counts, &job);
  if (op == ROW_MERGE) return parallel(job.rows, 16 * job.columns, 1, job.threads, merge_scratch(job), row_merge, &job);
  if (op == FINGERPRINT) {
    int64_t pieces = (job.a + job.b - 1) / job.b;
    switch (job.dtype) {
      case 1: return parallel(pieces, job.b, 1, job.threads, 0, fingerprint<uint8_t>, &job);
      case 2: return parallel(pieces, job.b, 1, job.threads, 0, fingerprint<uint16_t>, &job);
      case 4: return parallel(pieces, job.b, 1, job.threads, 0, fingerprint<uint32_t>, &job);
      case 8: return parallel(pieces, job.b, 1, job.threads, 0, fingerprint<uint64_t>, &job);
      default: return false;
    }
  }
  switch (job.dtype) {
    case FLOAT32: return run_typed<float>(op, job);
    case BFLOAT16: return run_typed<BFloat16>(op, job);
    case FLOAT16: return run_typed<Float16>(op, job);
    default: return false;
  }
}
