// The threshold of a row: an exact selection among its keys, quick where the rows before it tell what to expect. Included like keys.h.

// Ties that all go, or all stay, are settled by the key alone: no quota is left.
INLINE Cut settled(int32_t key, int64_t quota, int64_t ties) {
  return quota == ties ? Cut{key + 1, 0} : Cut{key, quota};
}

// The k-th smallest of `m` <= 64 keys, padded to 64.
inline Cut nth_of_few(const int32_t* key, int64_t m, int64_t k, int32_t& value) {
  uint64_t left = m == BLOCK ? ~uint64_t{0} : (uint64_t{1} << m) - 1;
  while (true) {
    value = key[__builtin_ctzll(left)];
    uint64_t below, equal;
    compare64(key, value, below, equal);
    int64_t before = __builtin_popcountll(below), ties = __builtin_popcountll(equal);
    if (k <= before) {
      left &= below;
    } else if (k > before + ties) {
      left &= ~(below | equal);
    } else {
      return settled(value, k - before, ties);
    }
  }
}

// Where the threshold is expected: it moves little from row to row, once divided by the mean score of
// the row's first span.
struct Guess {
  float scaled = 0;     // running mean of threshold over that mean
  float error = 0.01f;  // running mean of the relative miss
};

// The k-th smallest (1 <= k <= m) of `m` padded keys. All lie in [low, high) where `inside`. `one` and `two` hold m + 128 keys
// each; `from` may be `one`. `value` becomes the key itself. Every step keeps only a bracket that is known to hold the answer,
// whatever it was guessed from.
inline Cut nth(const int32_t* from, int64_t m, int64_t k, int32_t low, int32_t high, bool smooth, int32_t* one, int32_t* two,
               int32_t& value) {
  int64_t size = m;
  bool stuck = false;  // the last round kept most of the keys
  for (int round = 0; size > 64; ++round) {
    if (high - low == 1) {
      value = low;
      return settled(low, k, size);
    }
    int32_t x, y;
    double p = (double(k) - 0.5) / double(size);
    if (round >= 12) {  // values chosen to defeat the samples: halve the range of bits
      x = low;
      y = low + (high - low) / 2;
    } else if (smooth) {
      double width = double(high) - double(low);
      double half = 2.0 * std::sqrt(double(size) * p * (1 - p)) + 2.0;
      double left = std::floor(width * (p - half / double(size)));
      double right = std::ceil(width * (p + half / double(size)));
      x = left > 0 ? low + int32_t(left) : low;
      y = right < width ? low + int32_t(right) : high;
      if (y <= x) y = x + 1;
    } else {
      alignas(64) int32_t sample[BLOCK];
      for (int64_t i = 0; i < BLOCK; ++i) sample[i] = from[i * size / BLOCK];
      int64_t middle = int64_t(p * 64) + 1;
      int64_t reach = int64_t(16.0 * std::sqrt(p * (1 - p))) + 2;
      int64_t first = middle - reach, last = middle + reach;
      x = low;
      y = high;
      if (stuck) {
        // few values, each with many ties, perhaps: a range between two of them holds them all, a single one settles its own
        nth_of_few(sample, BLOCK, middle, x);
        y = x + 1;
      } else {
        if (first >= 1) nth_of_few(sample, BLOCK, first, x);
        if (last <= 64) {
          nth_of_few(sample, BLOCK, last, y);
          ++y;
        }
      }
    }
    int32_t* to = from == one ? two : one;
    int64_t below, found = collect(from, size, x, y, to, below);
    int64_t before = size;
    if (k <= below) {
      high = x;
      found = collect(from, size, low, high, to, below);
      smooth = false;
    } else if (k > below + found) {
      k -= below + found;
      low = y;
      found = collect(from, size, low, high, to, below);
      smooth = false;
    } else {
      k -= below;
      low = x;
      high = y;
    }
    from = to;
    size = found;
    stuck = size > before / 2;
    if (stuck) smooth = false;
  }
  return nth_of_few(from, size, k, value);
}

// The cut below which the k lowest scores of a row lie; false where a score is not finite. Exact whatever the guess is: a bracket
// that misses only costs time. The first span tells where the threshold is to be expected, so each span's keys are looked through
// while they are in the first-level cache, and the next span, or the row behind, is on its way meanwhile. `key`, which holds a row,
// is left with all of its keys only where one span does.
template <class T>
inline bool select(const T* w, const T* r, const float* norm, int64_t columns, int64_t k, Guess& guess, int32_t* key, int32_t* one,
                   int32_t* two, Cut& cut) {
  const int64_t head = smaller(SPAN, columns);
  float sum = make_keys<T>(w, r, norm, head, key);
  const float mean = sum / float(head), centre = guess.scaled * mean;
  const bool guessed = 0 < k && k < columns && columns > BLOCK && centre > 0 && centre < 1e38f;
  bool found = false;
  int32_t value;
  if (guessed) {
    float half = 5 * guess.error;
    if (half > 0.25f) half = 0.25f;
    int32_t low = int32_t(to_bits(centre * (1 - half))), high = int32_t(to_bits(centre * (1 + half))) + 1;
    if (low < 1) low = 1;
    int64_t below = 0, inside = 0;
    for (int64_t i = 0, n = head;;) {
      int64_t under;
      inside += collect(key, n, low, high, one + inside, under, w + i + n);
      below += under;
      i += n;
      if (i == columns) break;
      n = smaller(SPAN, columns - i);
      sum += make_keys<T>(w + i, r ? r + i : nullptr, norm + i, n, key);
    }
    found = std::isfinite(sum) && below < k && k <= below + inside;
    if (found) cut = nth(one, inside, k - below, low, high, inside * 4 < columns, one, two, value);
  }
  if (!found) {
    if (head < columns) sum = make_keys<T>(w, r, norm, columns, key);
    if (count_nonfinite(key, columns, sum)) return false;
    if (k <= 0 || k >= columns) {
      cut = {k <= 0 ? 0 : FINITE, 0};
      return true;
    }
    if (columns <= BLOCK) {
      cut = nth_of_few(key, columns, k, value);
      return true;
    }
    // a row that is mostly zeros already is common, and its threshold is 0 then
    int64_t equal, zeros = count(key, columns, 1, equal);
    if (k <= zeros) {
      guess.scaled = 0;
      cut = settled(0, k, zeros);
      return true;
    }
    cut = nth(key, columns, k, 0, FINITE, false, one, two, value);
  }
  float threshold = from_bits(uint32_t(value));
  if (guessed) {
    float miss = std::fabs(threshold / centre - 1);
    if (!(miss < 0.25f)) miss = 0.25f;
    guess.error += (miss - guess.error) * 0.125f;
    if (guess.error < 1e-6f) guess.error = 1e-6f;
  }
  float scaled = mean > 0 && mean < 1e38f ? threshold / mean : 0;
  guess.scaled += (scaled - guess.scaled) * (found ? 0.25f : 1.0f);
  return true;
}
