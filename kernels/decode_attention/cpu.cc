// Attention of a few queries to the pages of a paged cache, one softmax over all of them. What it
// means, `api.py` says; what it reads is read as it lies: no page is ever decoded as a whole.

#include <cmath>
#include <vector>

#include "../native/buffers.h"
#include "../native/codes.h"
#include "../native/threads.h"
#include "../native/vectors.h"

namespace ffi = xla::ffi;

namespace {

constexpr float kMasked = -1e30f;
constexpr int kRows = 4;                  // of keys, or of values' channels, at a time
constexpr int kQueries = kLanes / kRows;  // at a time: so that all their sums are one vector

// How numbers of an array are addressed, outermost axis first.
struct Sizes {
  int64_t rows, heads, queries, dim, pages, raw_pages, sinks, sink_tokens, tokens, fine_rows;
  int64_t sealed_columns, raw_columns;
  int fine_bits;
  Kind kind;
  float soft_cap;
  int window;  // 0: none
  bool mass;
};

struct Arrays {
  const float* q;           // [rows, heads, queries, dim], scaled
  const int32_t* position;  // [rows, queries], -1: not real
  const uint8_t *base, *fine;
  const int32_t* fine_of;  // [pages], of the layer, like all that follows but `fine`
  const uint16_t *key_step, *key_zero, *value_step, *value_zero;
  const uint8_t* order;
  const void *raw, *sinks;
  const int32_t *sealed, *sealed_index, *sealed_count, *raw_ids, *raw_index, *raw_count;
  const int32_t *sink, *length;
  float *out, *lse, *sealed_mass, *raw_mass;
};

int64_t sealed_pages(const Sizes& s, const Arrays& a, int64_t row) {
  return s.pages ? std::min<int64_t>(a.sealed_count[row], s.sealed_columns) : 0;
}

int64_t raw_pages(const Sizes& s, const Arrays& a, int64_t row) {
  return std::min<int64_t>(a.raw_count[row], s.raw_columns);
}

// Sums of kQueries queries with kRows rows each, element i * kRows + r of query i and row r.
using Tile = Floats;

// The first queries of a row and head, up to kQueries of them, and what they have found so far.
class Softmax {
 public:
  Softmax(const Sizes& sizes, const float* q, const int32_t* position, int count)
      : sizes_(sizes), dim_(sizes.dim), count_(count) {
    std::fill(position_, position_ + kQueries, -1);
    std::copy(position, position + count, position_);
    std::fill(&q_[0][0], &q_[0][0] + kQueries * kMostNumbers, 0.0f);
    for (int i = 0; i < count; i++) std::copy(q + i * dim_, q + (i + 1) * dim_, q_[i]);
    std::fill(coded_, coded_ + dim_ / kRows, Tile{});
    std::fill(&raw_[0][0], &raw_[0][0] + kQueries * kMostNumbers, 0.0f);
    top_ = all(kMasked), total_ = Tile{};
  }

  float logit(int query, int token) const {
    return weights_[token / kRows][query * kRows + token % kRows];
  }
  float top(int query) const { return top_[query * kRows]; }

  // Logits of a sealed page's slots.
  void multiply_keys(const PageBytes& page, const uint16_t* step, const uint16_t* zero) {
    const int half = page.half, refined = page.refined();
    const bool joined = page.key_fine != nullptr;
    float x[kQueries][kMostNumbers];  // times the steps: codes are multiplied as they are
    Floats shift[kQueries], middle[kQueries];
    for (int i = 0; i < kQueries; i++) {
      shift[i] = middle[i] = Floats{};
      for (int c = 0; c < dim_; c += kLanes) {
        const Floats y = load<Floats>(&q_[i][c]) * from_bfloat16(load<Shorts>(step + c));
        store(&x[i][c], joined ? y * 0.0625f : y);
        shift[i] += y * from_float16(load<Shorts>(zero + c));
        middle[i] += y * 0.5f;
      }
    }
    const Tile bias = each(shift), less = bias - each(middle);
    alignas(64) uint8_t codes[kRows][kMostNumbers];
    for (int t = 0; t < page.tokens; t += kRows) {
      for (int r = 0; r < kRows; r++)
        separate(page.key_base + int64_t{t + r} * half, fine_key(page, t + r), joined, half,
                 codes[r], codes[r] + half);
      Floats sum[kLanes] = {};
      for (int c = 0; c < dim_; c += kLanes) {
        Floats row[kRows];
        for (int r = 0; r < kRows; r++) row[r] = to_floats(load<Bytes>(codes[r] + c));
        for (int i = 0; i < kQueries; i++) {
          const Floats y = load<Floats>(&x[i][c]);
          for (int r = 0; r < kRows; r++) sum[i * kRows + r] += y * row[r];
        }
      }
      const Ints slot = kRow + t;
      weights_[t / kRows] = sums<kLanes>(sum) + choose(slot < refined, less, bias);
    }
  }

  // Logits of tokens that are kept as they are, [tokens, dim] from element `at`.
  void multiply_raw(const void* keys, int64_t at, int tokens) {
    for (int t = 0; t < tokens; t += kRows) {
      Floats sum[kLanes] = {};
      for (int c = 0; c < dim_; c += kLanes) {
        Floats row[kRows];
        for (int r = 0; r < kRows; r++)  // what is not written yet may hold NaN
          row[r] = read(keys, sizes_.kind, at + int64_t{std::min(t + r, tokens - 1)} * dim_ + c);
        for (int i = 0; i < kQueries; i++)
          for (int r = 0; r < kRows; r++) sum[i * kRows + r] += load<Floats>(&q_[i][c]) * row[r];
      }
      weights_[t / kRows] = sums<kLanes>(sum);
    }
  }

  // Caps logits, and masks those that `sees(query's position, token)` denies; without `some`, none.
  template <typename Sees>
  void mask(int tokens, bool some, const Sees& sees) {
    for (int t = 0; t < (tokens + kRows - 1) / kRows * kRows; t++)
      for (int i = 0; (some || sizes_.soft_cap > 0) && i < kQueries; i++) {
        float* logit = reinterpret_cast<float*>(&weights_[t / kRows]) + i * kRows + t % kRows;
        if (sizes_.soft_cap > 0) *logit = sizes_.soft_cap * std::tanh(*logit / sizes_.soft_cap);
        if (some && (t >= tokens || !sees(position_[i], t))) *logit = kMasked;
      }
  }

  // Logits to weights; returns what each query gives to all of them, of exp(top()).
  Tile weigh(int tokens) {
    const int tiles = (tokens + kRows - 1) / kRows;
    Tile most = top_, total = {};
    for (int t = 0; t < tiles; t++) most = greater(most, weights_[t]);
    const Tile top = among_rows(most, [](Floats a, Floats b) { return greater(a, b); });
    for (int t = 0; t < tiles; t++) {
      const Tile x = weights_[t];
      weights_[t] = choose(x > all(kMasked), exp_negative(x - top), Tile{});
      total += weights_[t] + (x - x);  // NaN is handed on
    }
    total = among_rows(total, [](Floats a, Floats b) { return a + b; });
    const Tile shrink = exp_negative(top_ - top);
    top_ = top, total_ = total_ * shrink + total;
    for (int c = 0; c < dim_ / kRows; c++) coded_[c] *= shrink;
    for (int i = 0; i < kQueries; i++)
      for (int c = 0; c < dim_; c += kLanes)
        store(&raw_[i][c], load<Floats>(&raw_[i][c]) * shrink[i * kRows]);
    return total;
  }

  // Adds the values of a sealed page.
  void add_values(const PageBytes& page, const uint16_t* step, const uint16_t* zero) {
    const int tokens = page.tokens, refined = page.refined();
    const bool joined = page.value_fine != nullptr;
    float x[kQueries][kMostNumbers];  // weights times the steps
    for (int t = 0; t < tokens; t += kRows)
      for (int i = 0; i < kQueries; i++)
        std::memcpy(&x[i][t], reinterpret_cast<const float*>(&weights_[t / kRows]) + i * kRows,
                    kRows * sizeof(float));
    Floats shift[kQueries] = {};
    for (int t = 0; t < tokens; t += kLanes) {
      const Floats middle = choose(kLane + t < refined, all(0.5f), Floats{});
      const Floats steps = from_bfloat16(load<Shorts>(step + t));
      const Floats zeros = from_float16(load<Shorts>(zero + t)) - middle;
      for (int i = 0; i < kQueries; i++) {
        const Floats y = load<Floats>(&x[i][t]) * steps;
        shift[i] += y * zeros;
        store(&x[i][t], joined ? y * 0.0625f : y);
      }
    }
    const Tile bias = each(shift);
    uint8_t room[kMostNumbers];
    alignas(64) uint8_t codes[kRows][kMostNumbers];
    for (int c = 0; c < page.half; c += kRows / 2) {
      // Channels c and c + 1, then those of the other half.
      for (int r = 0; r < kRows / 2; r++)
        separate(page.value_base + int64_t{c + r} * tokens, fine_value(page, c + r, room), joined,
                 tokens, codes[r], codes[kRows / 2 + r]);
      Floats sum[kLanes] = {};
      for (int t = 0; t < tokens; t += kLanes) {
        Floats row[kRows];
        for (int r = 0; r < kRows; r++) row[r] = to_floats(load<Bytes>(codes[r] + t));
        for (int i = 0; i < kQueries; i++) {
          const Floats y = load<Floats>(&x[i][t]);
          for (int r = 0; r < kRows; r++) sum[i * kRows + r] += y * row[r];
        }
      }
      coded_[c / (kRows / 2)] += sums<kLanes>(sum) + bias;
    }
  }

  // Adds values that are kept as they are.
  void add_raw(const void* values, int64_t at, int tokens) {
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count_; i++) {
        const float weight = logit(i, t);
        if (weight == 0) continue;  // not seen, and may be NaN
        for (int c = 0; c < dim_; c += kLanes)
          store(&raw_[i][c], load<Floats>(&raw_[i][c]) +
                                 weight * read(values, sizes_.kind, at + int64_t{t} * dim_ + c));
      }
  }

  // Writes what was found: zeros and -inf for queries that saw nothing.
  void finish(float* out, float* lse) const {
    const int half = dim_ / 2, pair = kRows / 2;
    for (int i = 0; i < count_; i++) {
      const float total = total_[i * kRows];
      const bool some = position_[i] >= 0 && total != 0;
      lse[i] = some ? top(i) + std::log(total) : -INFINITY;
      for (int c = 0; c < dim_; c++) {
        const int row = c % half % pair + (c < half ? 0 : pair);
        const float x = coded_[c % half / pair][i * kRows + row] + raw_[i][c];
        out[int64_t{i} * dim_ + c] = some ? x / total : 0.0f;
      }
    }
  }

 private:
  static constexpr Ints count_up(bool of_row) {
    Ints x = {};
    for (int i = 0; i < kLanes; i++) x[i] = of_row ? i % kRows : i;
    return x;
  }

  // Sums of the elements, for all rows of each query.
  static Tile each(const Floats* x) {
    Floats tile[kLanes];
    for (int i = 0; i < kLanes; i++) tile[i] = x[i / kRows];
    return sums<kLanes>(tile);
  }

  // For all rows of each query, of all rows of that query.
  template <typename Of>
  static Tile among_rows(Tile x, const Of& of) {
    x = of(x, swap_pairs(x));
    return of(x, swap_neighbours(x));
  }

  static inline const Ints kLane = count_up(false), kRow = count_up(true);

  const Sizes& sizes_;
  const int dim_, count_;
  int32_t position_[kQueries];
  float q_[kQueries][kMostNumbers];
  Tile weights_[kMostNumbers / kRows];  // of kRows tokens each: logits, then weights
  Tile top_, total_;                    // the same for all rows of a query
  Tile coded_[kMostNumbers / kRows];    // weighted sums of coded values: see `finish`
  float raw_[kQueries][kMostNumbers];   // and of others
};

// Long sequences are attended to in parts, so that threads share even one of few heads. Where they
// end depends on the sequence alone: its results are the same bits whatever the batch and however
// many threads there are.
constexpr int64_t kPartTokens = 512;  // at least, but of the last
constexpr int64_t kMostParts = 16;

int64_t fewest_pages(const Sizes& s) { return std::max<int64_t>(kPartTokens / s.tokens, 1); }

int64_t part_pages(const Sizes& s, int64_t pages) {
  return std::max(fewest_pages(s), (pages + kMostParts - 1) / kMostParts);
}

// At least one: the last has what is not sealed, too.
int64_t parts_of(const Sizes& s, int64_t pages) {
  const int64_t each = part_pages(s, pages);
  return std::max<int64_t>((pages + each - 1) / each, 1);
}

// Of any row: one with fewer pages may have more parts than one with more.
int64_t most_parts(const Sizes& s) {
  const int64_t columns = s.pages ? s.sealed_columns : 0, fewest = fewest_pages(s);
  return std::clamp<int64_t>((columns + fewest - 1) / fewest, 1, kMostParts);
}

// What parts found, and what queries gave to pages, until the totals are known.
struct Found {
  int64_t parts;                   // of a row and head, at most
  std::vector<float> out, lse;     // [rows, heads, parts, queries, dim] and without dim
  std::vector<float> weight, top;  // [rows, heads, columns, queries]: of exp(top)
  std::vector<float> logit;        // [rows, heads, columns, queries, tokens] of raw pages

  explicit Found(const Sizes& s) : parts(most_parts(s)) {
    const int64_t each = s.rows * s.heads * s.queries;
    if (parts > 1) {
      out.resize(each * parts * s.dim);
      lse.resize(each * parts);
    }
    if (s.mass) {
      weight.resize(each * s.sealed_columns);
      top.resize(each * s.sealed_columns);
      logit.resize(each * s.raw_columns * s.tokens, kMasked);
    }
  }
};

// Some queries of one row and head attend to the pages of a part.
void attend(const Sizes& s, const Arrays& a, int64_t row, int64_t head, int64_t part, int first,
            Found& found) {
  const int64_t of = row * s.heads + head, half = s.dim / 2;
  const int64_t at = of * s.queries + first;
  const int count = std::min<int64_t>(kQueries, s.queries - first);
  const int64_t pages = sealed_pages(s, a, row), parts = parts_of(s, pages);
  const int64_t begin = part * part_pages(s, pages);
  const int64_t end = std::min(begin + part_pages(s, pages), pages);
  Softmax softmax(s, a.q + at * s.dim, a.position + row * s.queries + first, count);
  const bool exact = s.sinks && a.sink[row] >= 0;
  auto visible = [&](int32_t query, int64_t token) {
    return token <= query && (s.window <= 0 || query - token < s.window);
  };

  for (int64_t column = begin; column < end; column++) {
    const int64_t id = a.sealed[row * s.sealed_columns + column];
    const int64_t index = a.sealed_index[row * s.sealed_columns + column];
    const int32_t chunk = s.fine_rows ? a.fine_of[id] : -1;
    const PageBytes page = page_bytes(a.base, a.fine, id, chunk, head, s.heads, half, s.tokens,
                                      s.fine_rows, s.fine_bits);
    const int64_t of_keys = (id * s.heads + head) * s.dim;
    const int64_t of_values = (id * s.heads + head) * s.tokens;
    softmax.multiply_keys(page, a.key_step + of_keys, a.key_zero + of_keys);
    const int64_t kept = exact && index == 0 ? s.sink_tokens : 0;  // in the first slots
    softmax.mask(s.tokens, kept > 0 || s.window > 0, [&](int32_t query, int slot) {
      const int64_t token = index * s.tokens + a.order[of_values + slot];
      return slot >= kept && (s.window <= 0 || visible(query, token));
    });
    const Tile weight = softmax.weigh(s.tokens);
    for (int i = 0; s.mass && i < count; i++) {
      const int64_t entry = (of * s.sealed_columns + column) * s.queries + first + i;
      found.weight[entry] = weight[i * kRows];
      found.top[entry] = softmax.top(i);
    }
    softmax.add_values(page, a.value_step + of_values, a.value_zero + of_values);
  }

  if (exact && part == parts - 1) {
    const int64_t from = (int64_t{a.sink[row]} * 2 * s.heads + head) * s.sink_tokens * s.dim;
    softmax.multiply_raw(a.sinks, from, s.sink_tokens);
    softmax.mask(s.sink_tokens, true, [&](int32_t query, int token) {
      return token < a.length[row] && visible(query, token);
    });
    softmax.weigh(s.sink_tokens);
    softmax.add_raw(a.sinks, from + s.heads * s.sink_tokens * s.dim, s.sink_tokens);
  }

  for (int64_t column = 0; part == parts - 1 && column < raw_pages(s, a, row); column++) {
    const int64_t id = a.raw_ids[row * s.raw_columns + column];
    const int64_t start = a.raw_index[row * s.raw_columns + column] * s.tokens;
    const int64_t from = (id * 2 * s.heads + head) * s.tokens * s.dim;
    const int tokens = std::clamp<int64_t>(a.length[row] - start, 0, s.tokens);
    if (tokens == 0) continue;
    softmax.multiply_raw(a.raw, from, tokens);
    softmax.mask(tokens, true,
                 [&](int32_t query, int token) { return visible(query, start + token); });
    for (int i = 0; s.mass && i < count; i++)
      for (int t = 0; t < tokens; t++)
        found.logit[((of * s.raw_columns + column) * s.queries + first + i) * s.tokens + t] =
            softmax.logit(i, t);
    softmax.weigh(tokens);
    softmax.add_raw(a.raw, from + s.heads * s.tokens * s.dim, tokens);
  }

  if (parts == 1) {
    softmax.finish(a.out + at * s.dim, a.lse + at);
  } else {
    const int64_t to = (of * found.parts + part) * s.queries + first;
    softmax.finish(&found.out[to * s.dim], &found.lse[to]);
  }
}

// The parts of one row and head to one result.
void merge(const Sizes& s, const Arrays& a, int64_t of, const Found& found) {
  const int64_t parts = parts_of(s, sealed_pages(s, a, of / s.heads));
  if (parts == 1) return;
  for (int64_t i = 0; i < s.queries; i++) {
    const int64_t to = of * s.queries + i;
    const auto from = [&](int64_t part) { return (of * found.parts + part) * s.queries + i; };
    float top = -INFINITY, total = 0;
    for (int64_t part = 0; part < parts; part++) top = std::max(top, found.lse[from(part)]);
    float* out = a.out + to * s.dim;
    std::fill(out, out + s.dim, 0.0f);
    for (int64_t part = 0; part < parts; part++) {
      const float lse = found.lse[from(part)];
      if (lse == -INFINITY) continue;
      const float weight = std::exp(lse - top);
      total += weight;
      for (int64_t c = 0; c < s.dim; c += kLanes)
        store(out + c,
              load<Floats>(out + c) + weight * load<Floats>(&found.out[from(part) * s.dim + c]));
    }
    a.lse[to] = total == 0 ? -INFINITY : top + std::log(total);
    for (int64_t c = 0; c < s.dim && total != 0; c++) out[c] /= total;
  }
}

// What pages and raw tokens of one row and head received.
void count_mass(const Sizes& s, const Arrays& a, int64_t of, const Found& found) {
  const int64_t row = of / s.heads;
  const float* lse = a.lse + of * s.queries;
  float* of_sealed = a.sealed_mass + of * s.sealed_columns;
  float* of_raw = a.raw_mass + of * s.raw_columns * s.tokens;
  std::fill(of_sealed, of_sealed + s.sealed_columns, 0.0f);
  std::fill(of_raw, of_raw + s.raw_columns * s.tokens, 0.0f);
  for (int64_t i = 0; i < s.queries; i++) {
    if (!(lse[i] > -INFINITY)) continue;
    for (int64_t column = 0; column < sealed_pages(s, a, row); column++) {
      const int64_t entry = (of * s.sealed_columns + column) * s.queries + i;
      if (found.weight[entry] > 0)
        of_sealed[column] += found.weight[entry] * std::exp(found.top[entry] - lse[i]);
    }
    for (int64_t column = 0; column < raw_pages(s, a, row); column++)
      for (int64_t t = 0; t < s.tokens; t++) {
        const int64_t entry = (of * s.raw_columns + column) * s.queries + i;
        const float logit = found.logit[entry * s.tokens + t];
        if (logit > kMasked) of_raw[column * s.tokens + t] += std::exp(logit - lse[i]);
      }
  }
}

ffi::Error Attend(ffi::ThreadPool pool, F32 q, I32 position, I32 layer, I32 window, U8 base,
                  U8 fine, I32 fine_of, BF16 key_step, F16 key_zero, BF16 value_step,
                  F16 value_zero, U8 order, ffi::AnyBuffer raw, ffi::AnyBuffer sinks, I32 sealed,
                  I32 sealed_index, I32 sealed_count, I32 raw_ids, I32 raw_index, I32 raw_count,
                  I32 sink, I32 length, ffi::ResultBuffer<ffi::F32> out,
                  ffi::ResultBuffer<ffi::F32> lse, ffi::ResultBuffer<ffi::F32> sealed_mass,
                  ffi::ResultBuffer<ffi::F32> raw_mass, float soft_cap, int32_t fine_bits,
                  int32_t kind, bool mass) {
  const auto pages = base.dimensions(), raws = raw.dimensions(), kept = sinks.dimensions();
  Sizes s = {};
  s.rows = q.dimensions()[0], s.heads = q.dimensions()[1], s.queries = q.dimensions()[2];
  s.dim = q.dimensions()[3], s.pages = pages[1], s.raw_pages = raws[1], s.tokens = raws[4];
  s.sinks = kept[1], s.sink_tokens = kept[4];
  s.fine_rows = fine.dimensions()[0] ? fine.dimensions()[3] / (s.dim / 2) : 0;
  s.sealed_columns = sealed.dimensions()[1], s.raw_columns = raw_ids.dimensions()[1];
  s.fine_bits = fine_bits, s.kind = static_cast<Kind>(kind), s.soft_cap = soft_cap;
  s.window = window.typed_data()[0], s.mass = mass;

  const int64_t l = layer.typed_data()[0], of_page = s.heads * (s.tokens * s.dim / 2) * 2;
  const int64_t of_keys = l * s.pages * s.heads * s.dim,
                of_values = l * s.pages * s.heads * s.tokens;
  const int64_t width = s.kind == Kind::kFloat32 ? 4 : 2;
  auto layer_of = [&](ffi::AnyBuffer& x, int64_t pages, int64_t tokens) {
    const int64_t size = pages * 2 * s.heads * tokens * s.dim * width;
    return static_cast<const void*>(static_cast<const char*>(x.untyped_data()) + l * size);
  };
  const Arrays a = {q.typed_data(),
                    position.typed_data(),
                    base.typed_data() + l * s.pages * of_page,
                    fine.typed_data(),
                    fine_of.typed_data() + l * s.pages,
                    bits(key_step) + of_keys,
                    bits(key_zero) + of_keys,
                    bits(value_step) + of_values,
                    bits(value_zero) + of_values,
                    order.typed_data() + of_values,
                    layer_of(raw, s.raw_pages, s.tokens),
                    layer_of(sinks, s.sinks, s.sink_tokens),
                    sealed.typed_data(),
                    sealed_index.typed_data(),
                    sealed_count.typed_data(),
                    raw_ids.typed_data(),
                    raw_index.typed_data(),
                    raw_count.typed_data(),
                    sink.typed_data(),
                    length.typed_data(),
                    out->typed_data(),
                    lse->typed_data(),
                    sealed_mass->typed_data(),
                    raw_mass->typed_data()};
  Found found(s);
  share(pool, s.rows * s.heads * found.parts, [&](int64_t i) {
    const int64_t part = i % found.parts, of = i / found.parts, row = of / s.heads;
    if (part >= parts_of(s, sealed_pages(s, a, row))) return;
    for (int first = 0; first < s.queries; first += kQueries)
      attend(s, a, row, of % s.heads, part, first, found);
  });
  if (found.parts > 1 || s.mass)
    share(pool, s.rows * s.heads, [&](int64_t of) {
      merge(s, a, of, found);
      if (s.mass) count_mass(s, a, of, found);
    });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvcompress_attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<U8>()
                                  .Arg<U8>()
                                  .Arg<I32>()
                                  .Arg<BF16>()
                                  .Arg<F16>()
                                  .Arg<BF16>()
                                  .Arg<F16>()
                                  .Arg<U8>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Attr<float>("soft_cap")
                                  .Attr<int32_t>("fine_bits")
                                  .Attr<int32_t>("kind")
                                  .Attr<bool>("mass"));
