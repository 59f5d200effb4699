// Pages of codes to keys and values, in the order of the slots.

#include "../native/buffers.h"
#include "../native/codes.h"
#include "../native/threads.h"
#include "../native/vectors.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kSlots = kLanes;  // at a time

// A number is (code * unit + zero) * step. Of a refined slot it is half a step less, which is
// counted to the zero: exact, as a float16 has no bit below 2**-24. Nor does the product round, so
// that it is all one whether it is fused with the sum.
struct Scale {
  Floats unit, step, zero;

  Scale refined() const { return {unit, step, zero - 0.5f}; }
  Floats operator()(const uint8_t* codes) const {
    return fused(to_floats(load<Bytes>(codes)), unit, zero) * step;
  }
};

// Of kLanes channels, or slots.
Scale scale_at(const uint16_t* step, const uint16_t* zero, const uint8_t* fine) {
  return {all(fine == nullptr ? 1.0f : 0.0625f), from_bfloat16(load<Shorts>(step)),
          from_float16(load<Shorts>(zero))};
}

template <Kind kind>
void open_keys(const PageBytes& page, const uint16_t* step, const uint16_t* zero, void* out,
               int64_t at) {
  const int half = page.half, dim = 2 * half;
  Scale scales[kMostNumbers / kLanes];
  for (int c = 0; c < dim; c += kLanes)
    scales[c / kLanes] = scale_at(step + c, zero + c, page.key_fine);
  alignas(64) uint8_t codes[kSlots][kMostNumbers];
  for (int t = 0; t < page.tokens; t += kSlots) {
    for (int i = 0; i < kSlots; i++)
      separate(page.key_base + int64_t{t + i} * half, fine_key(page, t + i),
               page.key_fine != nullptr, half, codes[i], codes[i] + half);
    const int refined = std::clamp(page.refined() - t, 0, kSlots);
    for (int c = 0; c < dim; c += 2 * kLanes) {
      auto rows = [&](int first, int last, Scale one, Scale two) {
        for (int i = first; i < last; i++)
          write_two<kind>(out, at + int64_t{t + i} * dim + c, one(codes[i] + c),
                          two(codes[i] + c + kLanes));
      };
      const Scale &one = scales[c / kLanes], &two = scales[c / kLanes + 1];
      rows(0, refined, one.refined(), two.refined());
      rows(refined, kSlots, one, two);
    }
  }
}

template <Kind kind>
void open_values(const PageBytes& page, const uint16_t* step, const uint16_t* zero, void* out,
                 int64_t at) {
  const int half = page.half, dim = 2 * half, tokens = page.tokens;
  alignas(64) uint8_t rows[kMostNumbers * kMostNumbers];  // [dim, tokens]
  for (int c = 0; c < half; c++) {
    uint8_t room[kMostNumbers];
    separate(page.value_base + int64_t{c} * tokens, fine_value(page, c, room),
             page.value_fine != nullptr, tokens, rows + c * tokens, rows + (half + c) * tokens);
  }
  alignas(64) uint8_t codes[kSlots][kMostNumbers];
  for (int t = 0; t < tokens; t += kSlots) {
    for (int c = 0; c < dim; c += kLanes) {
      Bytes x[kLanes];
      for (int i = 0; i < kLanes; i++) x[i] = load<Bytes>(rows + (c + i) * tokens + t);
      transpose(x);
      for (int i = 0; i < kLanes; i++) store(codes[i] + c, x[i]);
    }
    const Scale of_slots = scale_at(step + t, zero + t, page.value_fine);
    for (int i = 0; i < kSlots; i++) {
      const Scale plain = {of_slots.unit, all(of_slots.step[i]), all(of_slots.zero[i])};
      const Scale value = t + i < page.refined() ? plain.refined() : plain;
      for (int c = 0; c < dim; c += 2 * kLanes)
        write_two<kind>(out, at + int64_t{t + i} * dim + c, value(codes[i] + c),
                        value(codes[i] + c + kLanes));
    }
  }
}

ffi::Error Open(ffi::ThreadPool pool, I32 layer, I32 ids, I32 chunks, U8 base, U8 fine,
                BF16 key_step, F16 key_zero, BF16 value_step, F16 value_zero,
                ffi::Result<ffi::AnyBuffer> keys, ffi::Result<ffi::AnyBuffer> values,
                int32_t fine_bits, int32_t kind) {
  const int64_t pages = base.dimensions()[1], heads = base.dimensions()[3];
  const int64_t dim = key_step.dimensions()[3], tokens = value_step.dimensions()[3];
  const int64_t half = dim / 2, l = layer.typed_data()[0];
  const int64_t fine_rows = fine.dimensions()[0] ? fine.dimensions()[3] / half : 0;
  const uint8_t* of_layer = base.typed_data() + l * pages * 2 * heads * tokens * half;
  const uint8_t* chunk_bytes = fine.typed_data();
  auto open = [&]<Kind of>(int64_t i) {
    const int64_t entry = i / heads, head = i % heads, at = i * tokens * dim;
    const int64_t id = ids.typed_data()[entry];
    if (id < 0) {  // not to be read
      const int64_t width = of == Kind::kFloat32 ? 4 : 2;
      for (void* x : {keys->untyped_data(), values->untyped_data()})
        std::memset(static_cast<char*>(x) + at * width, 0, tokens * dim * width);
      return;
    }
    const int64_t chunk = fine_rows ? chunks.typed_data()[entry] : -1;
    const PageBytes page = page_bytes(of_layer, chunk_bytes, id, chunk, head, heads, half, tokens,
                                      fine_rows, fine_bits);
    const int64_t scale = (l * pages + id) * heads + head;
    open_keys<of>(page, bits(key_step) + scale * dim, bits(key_zero) + scale * dim,
                  keys->untyped_data(), at);
    open_values<of>(page, bits(value_step) + scale * tokens, bits(value_zero) + scale * tokens,
                    values->untyped_data(), at);
  };
  const int64_t count = ids.element_count() * heads;
  switch (static_cast<Kind>(kind)) {
    case Kind::kBFloat16:
      share(pool, count, [&](int64_t i) { open.template operator()<Kind::kBFloat16>(i); });
      break;
    case Kind::kFloat16:
      share(pool, count, [&](int64_t i) { open.template operator()<Kind::kFloat16>(i); });
      break;
    case Kind::kFloat32:
      share(pool, count, [&](int64_t i) { open.template operator()<Kind::kFloat32>(i); });
      break;
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvcompress_open, Open,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<I32>()
                                  .Arg<U8>()
                                  .Arg<U8>()
                                  .Arg<BF16>()
                                  .Arg<F16>()
                                  .Arg<BF16>()
                                  .Arg<F16>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("fine_bits")
                                  .Attr<int32_t>("kind"));
