// SPDX-License-Identifier: MIT
/// @file tile.cuh
/// A tile of K and V rows in shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/decode/work.cuh"
#include "headwise/attention/cuda/ptx/tensor_core.cuh"

namespace headwise::inline v0::cuda::detail {

/// Tiles of a worker in shared memory: one in use, the others on their way. One on its way is 64
/// KiB a multiprocessor at widths 128 and 256, 48 KiB at 64; 4.6 TB/s x 1 us over 132 of them are
/// 35 KiB. A third tile reads no faster and lengthens the queue behind which page numbers, queries
/// and partial results wait as well.
inline constexpr int kDecodeStages = 2;

/// How a tile's rows lie in shared memory, K, then V: so that the eight rows of a matrix load lie
/// in different banks. Where rows are whole lines of 128 bytes, their 16-byte chunks are permuted
/// and a line of memory stays one line; rows padded by 16 bytes, which put a line's bytes on two
/// lines, cost 3 to 6 % of the read rate (bench/results). Rows of other widths are padded.
/// @tparam kRows  of a tile, see DecodeSize::tile_rows().
template <int kDim, int kRows>
struct TileLayout {
  static constexpr bool kPermuted = kDim % 64 == 0;
  static constexpr int kRowBytes = (kPermuted ? kDim : kPaddedDim<kDim>)*2;
  static constexpr int kBytes = 2 * kRows * kRowBytes;
  static constexpr int kRingBytes = kDecodeStages * kBytes;

  static constexpr int kValues = kRows * kRowBytes;  ///< offset of V

  /// Byte offset of a chunk.
  static __device__ constexpr int at(int row, int chunk) {
    return row * kRowBytes + (kPermuted ? chunk ^ row % 8 : chunk) * 16;
  }
  /// The address `rows` rows on from one that at() gave for a row below `rows`, a power of two or a
  /// multiple of 8. Where kPermuted; `rows` is known when compiled.
  static __device__ constexpr std::uint32_t rows_on(std::uint32_t address, int rows) {
    return (address ^ static_cast<std::uint32_t>(rows % 8 * 16)) +
           static_cast<std::uint32_t>(rows * kRowBytes);
  }
  /// The address `block` pairs of chunks after `address`, which at() gave for chunk 0 or 1.
  /// @pre the tile begins at a multiple of kRowBytes where kPermuted: the kernel asks for 1024, to
  ///   which ptxas pads its static shared memory.
  static __device__ constexpr std::uint32_t pairs_on(std::uint32_t address, int block) {
    return kPermuted ? address ^ static_cast<std::uint32_t>(block * 32)
                     : address + static_cast<std::uint32_t>(block * 32);
  }
};

}  // namespace headwise::inline v0::cuda::detail
