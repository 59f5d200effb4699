// Full raw pages to codes, in place: what `reference.py` does, byte for byte, but for sums of error
// feedback, which round the other way.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../native/buffers.h"
#include "../native/codes.h"
#include "../native/threads.h"
#include "../native/vectors.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kMostRank = 8;

// One page of one head and layer: what is read, and where its code goes.
struct Page {
  const void* raw;
  int64_t keys, values;  // elements of `raw` at which they begin, [tokens, dim] each
  Kind kind;
  int dim, exact;
  const float* worth;           // [tokens], or null: slot j holds token j
  const float *carry, *answer;  // [rank, dim], or null: to the nearest
  int rank, pairs;
  Planes<uint8_t> to;
  uint16_t *key_step, *key_zero, *value_step, *value_zero;
  uint8_t* order;

  float cells(int slot) const { return slot < to.refined() ? float(1 << to.fine_bits) : 1.0f; }
};

struct Scale {
  float step[kMostNumbers], zero[kMostNumbers];  // as they are stored
  float inverse[kMostNumbers];                   // of the step; 1 where that is 0
};

// Scales of kLanes groups with the ends lo <= hi; see `kernels.embedded.fit`.
void fit(Floats lo, Floats hi, int at, Scale& scale, uint16_t* steps, uint16_t* zeros) {
  // hi - lo may overflow; and as XLA compiles hi / 15 - lo / 15.
  const Floats extent = fused(hi, all(1.0f / 15), -(lo * (1.0f / 15)));
  const Floats reach = greater((Floats)((Ints)lo & 0x7FFFFFFF), (Floats)((Ints)hi & 0x7FFFFFFF));
  Floats step = greater(greater(extent, reach / 2048.0f), all(0x1p-126f));
  step = (Floats)(((Words)step + 0xFFFFu) & 0xFFFF0000u);  // up to a bfloat16
  step = choose(reach < all(0x1p-126f), Floats{}, step);
  const Words zero = (Words)(lo / choose(step > Floats{}, step, all(1.0f)));
  const Words rounded = (zero + 0xFFFu + ((zero >> 13) & 1u)) & 0xFFFFE000u;
  const Shorts stored = to_float16((Floats)rounded);
  store(steps + at, __builtin_convertvector((Words)step >> 16, Shorts));
  store(zeros + at, stored);
  store(scale.step + at, step);
  store(scale.zero + at, from_float16(stored));
  store(scale.inverse + at, 1.0f / choose(step > Floats{}, step, all(1.0f)));
}

// Into how many cells steps are cut, of kLanes numbers, and what follows from it.
struct Cells {
  Floats count, shift, width, most;

  explicit Cells(Floats count)
      : count(count), shift(floor(count * 0.5f)), width(16.0f / count), most(256.0f - width) {}
};

// Codes 0..255 as floats; see `kernels.embedded.encode`. XLA, too, multiplies by the inverse of
// what many numbers are divided by.
inline Floats encode(Floats x, Floats inverse, Floats zero, const Cells& cells) {
  const Floats position = fused(x, inverse, -zero);
  // Far beyond the ends is clipped all the same, and no number for an integer.
  const Floats fine = less(greater(cells.count * position + 0.5f, all(-1e4f)), all(1e4f));
  const Floats code = (floor(fine) + cells.shift) * cells.width;
  return less(greater(code, Floats{}), cells.most);
}

// Codes of both halves of the channels to bytes of the base plane, and of the fine plane.
inline Bytes base_of(Bytes low, Bytes high) { return right(low, 4, 0x0F) | (high & 0xF0); }
inline Bytes fine_of(Bytes low, Bytes high) { return (low & 15) | left(high, 4, 0xF0); }

void order_tokens(const Page& page, int* token) {
  std::iota(token, token + page.to.tokens, 0);
  if (page.worth != nullptr) {  // NaN is worth nothing
    auto worth = [&](int i) { return std::isnan(page.worth[i]) ? -INFINITY : page.worth[i]; };
    std::stable_sort(token, token + page.to.tokens,
                     [&](int a, int b) { return worth(a) > worth(b); });
  }
  std::copy(token, token + page.to.tokens, page.order);
}

// Keys' codes of a slot to its rows of the planes.
void put_key(const Page& page, int slot, int c, Bytes low, Bytes high) {
  const int half = page.dim / 2;
  store(page.to.key_base + int64_t{slot} * half + c, base_of(low, high));
  if (slot >= page.to.refined()) return;
  const Bytes fine = fine_of(low, high);
  uint8_t* to = page.to.key_fine + int64_t{slot % page.to.fine_rows} * half + c;
  if (page.to.fine_bits == 4)
    store(to, fine);
  else if (slot < page.to.fine_rows)
    store(to, right(fine, 2, 0x33));
  else
    store(to, load<Bytes>(to) | fine);
}

void code_keys(const Page& page, const int* token, const Scale& scale) {
  const int half = page.dim / 2;
  for (int slot = 0; slot < page.to.tokens; slot++) {
    const Cells cells(all(page.cells(slot)));
    const int64_t from = page.keys + int64_t{token[slot]} * page.dim;
    for (int c = 0; c < half; c += kLanes) {
      Bytes codes[2];
      for (int i = 0; i < 2; i++) {
        const int at = c + i * half;
        codes[i] =
            to_bytes(encode(read(page.raw, page.kind, from + at), load<Floats>(scale.inverse + at),
                            load<Floats>(scale.zero + at), cells));
      }
      put_key(page, slot, c, codes[0], codes[1]);
    }
  }
}

// Like `code_keys`, kLanes slots at a time: blocks of channels from the last to the first, each
// rounded so as to undo what the errors of those before add up to.
void code_keys_fed(const Page& page, const int* token, const Scale& scale) {
  const int dim = page.dim, half = dim / 2;
  Floats x[kMostNumbers];     // of channels
  Bytes codes[kMostNumbers];  // likewise
  for (int slot = 0; slot < page.to.tokens; slot += kLanes) {
    for (int c = 0; c < dim; c += kLanes) {
      for (int i = 0; i < kLanes; i++)
        x[c + i] = read(page.raw, page.kind, page.keys + int64_t{token[slot + i]} * dim + c);
      transpose(x + c);
    }
    Floats count;
    for (int i = 0; i < kLanes; i++) count[i] = page.cells(slot + i);
    const Cells cells(count);
    const Floats above = choose(count > all(1.0f), all(8.0f), Floats{});  // the middle of a cell
    Floats debts[kMostRank] = {};
    for (int start = half - page.pairs; start >= 0; start -= page.pairs) {
      Floats owed[kMostRank];
      std::copy(debts, debts + page.rank, owed);
      for (int j = 0; j < 2; j++)
        for (int c = start + j * half; c < start + j * half + page.pairs; c++) {
          Floats shift = {};
          for (int r = 0; r < page.rank; r++) shift += debts[r] * page.answer[r * dim + c];
          // What overflows is not owed.
          const Ints finite = (Floats)((Ints)shift & 0x7FFFFFFF) < all(INFINITY);
          const Floats target = choose(finite, x[c] - shift, x[c]);
          const Floats step = all(scale.step[c]), zero = all(scale.zero[c]);
          const Floats code = encode(target, all(scale.inverse[c]), zero, cells);
          codes[c] = to_bytes(code);
          const Floats error = ((code - above) * 0.0625f + zero) * step - x[c];
          for (int r = 0; r < page.rank; r++) owed[r] += error * page.carry[r * dim + c];
        }
      std::copy(owed, owed + page.rank, debts);
    }
    for (int c = 0; c < half; c += kLanes) {
      transpose(codes + c);
      transpose(codes + half + c);
      for (int i = 0; i < kLanes; i++)
        put_key(page, slot + i, c, codes[c + i], codes[half + c + i]);
    }
  }
}

void code_values(const Page& page, const int* token, const Scale& scale) {
  const int half = page.dim / 2, tokens = page.to.tokens;
  uint8_t room[kMostNumbers];  // fine codes of two channels, of all slots
  for (int c = 0; c < half; c += kLanes) {
    Bytes base[kMostNumbers], fine[kMostNumbers];  // of slots; turned, of channels, block by block
    for (int slot = 0; slot < tokens; slot++) {
      const Cells cells(all(page.cells(slot)));
      const Floats inverse = all(scale.inverse[slot]);
      const int64_t from = page.values + int64_t{token[slot]} * page.dim + c;
      const Floats zero = all(scale.zero[slot]);
      const Bytes low = to_bytes(encode(read(page.raw, page.kind, from), inverse, zero, cells));
      const Bytes high =
          to_bytes(encode(read(page.raw, page.kind, from + half), inverse, zero, cells));
      base[slot] = base_of(low, high), fine[slot] = fine_of(low, high);
    }
    for (int slot = 0; slot < tokens; slot += kLanes) {
      transpose(base + slot);
      transpose(fine + slot);
    }
    for (int i = 0; i < kLanes; i++) {
      for (int slot = 0; slot < tokens; slot += kLanes) {
        store(page.to.value_base + int64_t{c + i} * tokens + slot, base[slot + i]);
        store(room + slot, fine[slot + i]);
      }
      if (page.to.value_fine == nullptr) continue;
      const int rows = page.to.fine_rows;
      uint8_t* to = page.to.value_fine + int64_t{c + i} * rows;
      if (page.to.fine_bits == 4)
        std::memcpy(to, room, rows);
      else
        for (int j = 0; j < rows; j++) to[j] = (room[j] >> 2) | room[rows + j];
    }
  }
}

void seal(const Page& page) {
  int token[kMostNumbers];
  order_tokens(page, token);
  const int dim = page.dim, tokens = page.to.tokens;
  Scale scale;
  for (int c = 0; c < dim; c += kLanes) {
    Floats lo = all(INFINITY), hi = all(-INFINITY);
    for (int t = page.exact; t < tokens; t++) {
      const Floats x = read(page.raw, page.kind, page.keys + int64_t{t} * dim + c);
      lo = less(x, lo), hi = greater(x, hi);
    }
    fit(lo, hi, c, scale, page.key_step, page.key_zero);
  }
  if (page.carry == nullptr)
    code_keys(page, token, scale);
  else
    code_keys_fed(page, token, scale);
  for (int slot = 0; slot < tokens; slot += kLanes) {
    Floats lo[kLanes], hi[kLanes];
    for (int i = 0; i < kLanes; i++) {
      lo[i] = all(INFINITY), hi[i] = all(-INFINITY);
      const int64_t from = page.values + int64_t{token[slot + i]} * dim;
      for (int c = 0; c < dim; c += kLanes) {
        const Floats x = read(page.raw, page.kind, from + c);
        lo[i] = less(x, lo[i]), hi[i] = greater(x, hi[i]);
      }
    }
    transpose(lo);
    transpose(hi);
    for (int i = 1; i < kLanes; i++) lo[0] = less(lo[i], lo[0]), hi[0] = greater(hi[i], hi[0]);
    fit(lo[0], hi[0], slot, scale, page.value_step, page.value_zero);
  }
  code_values(page, token, scale);
}

// Whether so many numbers from element `at` are finite.
bool finite(const void* raw, Kind kind, int64_t at, int64_t count) {
  Floats most = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Words size = (Words)read(raw, kind, at + i) & 0x7FFFFFFFu;
    most = (Floats)((Words)most | (Words)(size >= 0x7F800000u));
  }
  uint32_t some = 0;
  for (int i = 0; i < kLanes; i++) some |= ((Words)most)[i];
  return some == 0;
}

ffi::Error Seal(ffi::ThreadPool pool, ffi::AnyBuffer raw, I32 source, I32 target, I32 chunks,
                I32 count, I32 exact, F32 worth, F32 feedback, ffi::RemainingArgs /*pools*/,
                ffi::ResultBuffer<ffi::U8> base, ffi::ResultBuffer<ffi::U8> fine,
                ffi::ResultBuffer<ffi::BF16> key_step, ffi::ResultBuffer<ffi::F16> key_zero,
                ffi::ResultBuffer<ffi::BF16> value_step, ffi::ResultBuffer<ffi::F16> value_zero,
                ffi::ResultBuffer<ffi::U8> order, ffi::ResultBuffer<ffi::PRED> sealed,
                int32_t fine_bits, int32_t kind, int32_t pairs) {
  const auto of_raw = raw.dimensions();
  const int64_t layers = of_raw[0], raw_pages = of_raw[1], heads = of_raw[3];
  const int64_t tokens = of_raw[4], dim = of_raw[5], half = dim / 2;
  const int64_t pages = base->dimensions()[1], each = layers * heads, n = source.element_count();
  const int64_t real = std::clamp<int64_t>(count.typed_data()[0], 0, n);
  const int64_t fine_rows = fine->dimensions()[0] ? fine->dimensions()[3] / half : 0;
  const int64_t rank = feedback.element_count() ? feedback.dimensions()[4] : 0;
  if (rank > kMostRank)
    return ffi::Error::InvalidArgument("feedback: expected a rank of at most 8");
  const Kind of = static_cast<Kind>(kind);
  auto start = [&](int64_t i, int64_t layer, int64_t head, int64_t half_of) {
    const int64_t page = layer * raw_pages + source.typed_data()[i];
    return ((page * 2 + half_of) * heads + head) * tokens * dim;
  };

  bool* good = sealed->typed_data();
  std::fill(good, good + real, true);
  std::fill(good + real, good + n, false);
  std::vector<uint8_t> sound(real * layers);
  share(pool, real * layers, [&](int64_t i) {
    sound[i] = finite(raw.untyped_data(), of, start(i / layers, i % layers, 0, 0),
                      2 * heads * tokens * dim);
  });
  for (int64_t i = 0; i < real * layers; i++) good[i / layers] &= sound[i] != 0;

  share(pool, real * each, [&](int64_t task) {
    const int64_t i = task / each, layer = task % each / heads, head = task % heads;
    if (!good[i]) return;
    const int64_t id = target.typed_data()[i];
    const int64_t chunk = fine_rows ? chunks.typed_data()[i * layers + layer] : -1;
    const int64_t at = (layer * pages + id) * heads + head;
    const int64_t entry = (i * layers + layer) * heads + head;
    const float* fed = rank ? feedback.typed_data() + entry * 2 * rank * dim : nullptr;
    seal({raw.untyped_data(), start(i, layer, head, 0), start(i, layer, head, 1), of,
          static_cast<int>(dim), exact.typed_data()[i],
          worth.element_count() ? worth.typed_data() + entry * tokens : nullptr, fed,
          rank ? fed + rank * dim : nullptr, static_cast<int>(rank), pairs,
          page_bytes(base->typed_data(), fine->typed_data(), layer * pages + id, chunk, head, heads,
                     half, tokens, fine_rows, fine_bits),
          bits(*key_step) + at * dim, bits(*key_zero) + at * dim, bits(*value_step) + at * tokens,
          bits(*value_zero) + at * tokens, order->typed_data() + at * tokens});
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvcompress_seal, Seal,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .RemainingArgs()
                                  .Ret<U8>()
                                  .Ret<U8>()
                                  .Ret<BF16>()
                                  .Ret<F16>()
                                  .Ret<BF16>()
                                  .Ret<F16>()
                                  .Ret<U8>()
                                  .Ret<ffi::Buffer<ffi::PRED>>()
                                  .Attr<int32_t>("fine_bits")
                                  .Attr<int32_t>("kind")
                                  .Attr<int32_t>("pairs"));
