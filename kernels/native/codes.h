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

// Fine codes of one token's keys, which may share their bytes with those of another token.
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

// Fine codes of all tokens' values in two channels: u8[tokens], 0 where there are none.
inline const uint8_t* fine_value(const PageBytes& page, int row, uint8_t* room) {
  const uint8_t* from = page.value_fine + int64_t{row} * page.fine_rows;
  if (page.fine_bits == 4 && page.fine_rows == page.tokens) return from;
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
  return room;
}

// kLanes bytes of base codes, and of fine codes, to the codes of two channels (or of the two halves
// of a token's channels): 0..255, the base codes in the upper nibble.
inline void join(Bytes base, Bytes fine, Bytes& low, Bytes& high) {
  low = left(base, 4, 0xF0) | (fine & 15);
  high = (base & 0xF0) | right(fine, 4, 0x0F);
}

// kLanes bytes of a row of base codes, from byte `at`, and of fine codes where the page has any, to
// codes as `join` gives them; else to the base codes alone.
inline void unpack(const uint8_t* base, const FineRow& fine, int at, bool joined, Bytes& low,
                   Bytes& high) {
  const Bytes b = load<Bytes>(base + at);
  if (joined) {
    Bytes f = {};
    if (fine.bytes != nullptr) f = left(load<Bytes>(fine.bytes + at), fine.shift, fine.mask);
    join(b, f, low, high);
  } else {
    low = b & 15, high = right(b, 4, 0x0F);
  }
}
