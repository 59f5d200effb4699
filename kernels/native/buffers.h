// Arrays of XLA, by the names that JAX gives their dtypes.
#pragma once

#include "xla/ffi/api/ffi.h"

using I32 = xla::ffi::Buffer<xla::ffi::S32>;
using U8 = xla::ffi::Buffer<xla::ffi::U8>;
using BF16 = xla::ffi::Buffer<xla::ffi::BF16>;
using F16 = xla::ffi::Buffer<xla::ffi::F16>;
using F32 = xla::ffi::Buffer<xla::ffi::F32>;

// Of numbers of 16 bits.
template <typename Buffer>
inline uint16_t* bits(Buffer& x) {
  return reinterpret_cast<uint16_t*>(x.untyped_data());
}
