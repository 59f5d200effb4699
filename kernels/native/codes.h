// Codes of a page of one head, as planes of bytes hold them (see `kernels.pools.CodePools`).
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

constexpr int kMostNumbers = 256;  // tokens of a page, and channels of a head

// Where the bytes of one page and head are: to be read, or to be written.
template <typename Byte>
struct Planes {
  Byte *key_base, *value_base;  // [tokens, half] and [half, tokens]
  Byte *key_fine, *value_fine;  // null: there is no fine chunk
  int half, tokens, fine_rows, fine_bits;

  int refined() const { return key_fine == nullptr ? 0 : fine_rows * 4 / fine_bits; }
};

using PageBytes = Planes<const uint8_t>;

// Of a page and a head of planes [pages, 2, heads, bytes]; `chunk` is -1 where there is none.
template <typename Byte>
inline Planes<Byte> page_bytes(Byte* base, Byte* fine, int64_t page, int64_t chunk, int64_t head,
                               int64_t heads, int64_t half, int64_t tokens, int64_t fine_rows,
                               int fine_bits) {
  const int64_t plane = tokens * half, fine_plane = fine_rows * half;
  Byte* keys = base + (page * 2 * heads + head) * plane;
  Byte* fine_keys = chunk < 0 ? nullptr : fine + (chunk * 2 * heads + head) * fine_plane;
  return {keys,
          keys + heads * plane,
          fine_keys,
          chunk < 0 ? nullptr : fine_keys + heads * fine_plane,
          static_cast<int>(half),
          static_cast<int>(tokens),
          static_cast<int>(fine_rows),
          fine_bits};
}

// Fine codes of a row of bytes, which may share their bytes with those of another row.
struct FineRow {
  const uint8_t* bytes;  // null: none
  int shift;
  uint8_t mask;
};

inline FineRow fine_key(const PageBytes& page, int slot) {
  if (slot >= page.refined()) return {nullptr, 0, 0};
  if (page.fine_bits == 4) return {page.key_fine + int64_t{slot} * page.half, 0, 0xFF};
  const int row = slot % page.fine_rows;
  return {page.key_fine + int64_t{row} * page.half, slot < page.fine_rows ? 2 : 0, 0xCC};
}

// Of all tokens' values in two channels: u8[tokens], 0 for tokens that have none.
inline FineRow fine_value(const PageBytes& page, int row, uint8_t* room) {
  if (page.value_fine == nullptr) return {nullptr, 0, 0};
  const uint8_t* from = page.value_fine + int64_t{row} * page.fine_rows;
  if (page.fine_bits == 4 && page.fine_rows == page.tokens) return {from, 0, 0xFF};
  int at = 0;
  if (page.fine_bits == 2) {
    for (int i = 0; i < page.fine_rows; i++) room[i] = (from[i] << 2) & 0xCC;
    for (int i = 0; i < page.fine_rows; i++) room[page.fine_rows + i] = from[i] & 0xCC;
    at = 2 * page.fine_rows;
  } else {
    at = page.fine_rows;
    std::copy(from, from + at, room);
  }
  std::fill(room + at, room + page.tokens, 0);
  return {room, 0, 0xFF};
}

// A row of base codes, and of fine codes if `joined`, to the codes of two channels (or of the two
// halves of a token's channels): 0..255, the base codes in the upper nibble; else to the base codes
// alone. `count`: a multiple of kLanes.
inline void separate(const uint8_t* base, const FineRow& fine, bool joined, int count, uint8_t* low,
                     uint8_t* high) {
  auto some = [&]<typename Vector>(int at, Vector f) {
    const Vector b = load<Vector>(base + at);
    if (joined) {
      if (fine.bytes != nullptr) f = left(load<Vector>(fine.bytes + at), fine.shift, fine.mask);
      store(low + at, left(b, 4, 0xF0) | (f & 15));
      store(high + at, (b & 0xF0) | right(f, 4, 0x0F));
    } else {
      store(low + at, b & 15);
      store(high + at, right(b, 4, 0x0F));
    }
  };
  int at = 0;
  for (; at + kWideBytes <= count; at += kWideBytes) some(at, WideBytes{});
  for (; at < count; at += kLanes) some(at, Bytes{});
}
