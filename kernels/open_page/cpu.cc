// Pages of codes to keys and values, in the order of the slots.

#include "../native/buffers.h"
#include "../native/codes.h"
#include "../native/threads.h"
#include "../native/vectors.h"

namespace ffi = xla::ffi;

namespace {


// A value is (code * unit + zero) * step, and of a refined slot half a step less, which is counted
// to the zero: exact, as a float16 has no bit below 2**-24. Nor does the product round, so that it is
// all one whether it is fused with the sum.
float unit_of(const uint8_t* fine) { return fine == nullptr ? 1.0f : 0.0625f; }

template <Kind kind>
void open_keys(const PageBytes& page, const uint16_t* step, const uint16_t* zero, void* out,
               int64_t at) {
  const int half = page.half, dim = 2 * half;
  const float unit = unit_of(page.key_fine);
  float steps[kMostNumbers], zeros[2][kMostNumbers];  // of plain and of refined slots
  for (int c = 0; c < dim; c += kLanes) {
    const Floats x = from_float16(load<Shorts>(zero + c));
    store(steps + c, from_bfloat16(load<Shorts>(step + c)));
    store(zeros[0] + c, x);
    store(zeros[1] + c, x - 0.5f);
  }
  for (int t = 0; t < page.tokens; t++) {
    const FineRow fine = fine_key(page, t);
    const float* of_slot = zeros[t < page.refined()];
    for (int c = 0; c < half; c += kLanes) {
      Bytes codes[2];
      unpack(page.key_base + int64_t{t} * half, fine, c, page.key_fine != nullptr, codes[0],
             codes[1]);
      for (int i = 0; i < 2; i++) {
        const int channel = c + i * half;
        const Floats position = to_floats(codes[i]) * unit + load<Floats>(of_slot + channel);
        write<kind>(out, at + int64_t{t} * dim + channel, position * load<Floats>(steps + channel));
      }
    }
  }
}

template <Kind kind>
void open_values(const PageBytes& page, const uint16_t* step, const uint16_t* zero, void* out,
                 int64_t at) {
  const int half = page.half, tokens = page.tokens;
  const bool joined = page.value_fine != nullptr;
  const float unit = unit_of(page.value_fine);
  float steps[kMostNumbers], zeros[kMostNumbers];
  for (int t = 0; t < tokens; t += kLanes) {
    store(steps + t, from_bfloat16(load<Shorts>(step + t)));
    store(zeros + t, from_float16(load<Shorts>(zero + t)));
  }
  for (int t = 0; t < page.refined(); t++) zeros[t] -= 0.5f;
  uint8_t room[kMostNumbers / 2][kMostNumbers];
  FineRow fine[kMostNumbers / 2];
  for (int c = 0; c < half; c++)
    fine[c] = {joined ? fine_value(page, c, room[c]) : nullptr, 0, 0xFF};
  for (int t = 0; t < tokens; t += kLanes) {
    for (int c = 0; c < half; c += kLanes) {
      Bytes codes[2][kLanes];
      for (int i = 0; i < kLanes; i++)
        unpack(page.value_base + int64_t{c + i} * tokens, fine[c + i], t, joined, codes[0][i],
               codes[1][i]);
      for (int i = 0; i < 2; i++) {
        transpose(codes[i]);
        for (int j = 0; j < kLanes; j++) {
          const int slot = t + j;
          const Floats position = to_floats(codes[i][j]) * unit + zeros[slot];
          write<kind>(out, at + int64_t{slot} * 2 * half + c + i * half, position * steps[slot]);
        }
      }
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
    const PageBytes page = page_bytes(of_layer, chunk_bytes, id, chunk, head, heads, half,
                                      tokens, fine_rows, fine_bits);
    const int64_t scale = (l * pages + id) * heads + head;
    open_keys<of>(page, bits(key_step) + scale * dim, bits(key_zero) + scale * dim,
                  keys->untyped_data(), at);
    open_values<of>(page, bits(value_step) + scale * tokens,
                    bits(value_zero) + scale * tokens, values->untyped_data(), at);
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
