// SPDX-License-Identifier: MIT
/// @file state.cuh
/// The computing half of a decode warp: online softmax over tiles, and its result in parts.
#pragma once

#include <cuda_runtime.h>

#include <concepts>
#include <cstdint>

#include "headwise/attention/cuda/compensation.cuh"
#include "headwise/attention/cuda/decode/args.cuh"
#include "headwise/attention/cuda/decode/tile.cuh"
#include "headwise/attention/cuda/decode/work.cuh"
#include "headwise/attention/cuda/ptx/tensor_core.cuh"
#include "headwise/cache/cuda/elements.cuh"

namespace headwise::inline v0::cuda::detail {

/// One partial result: (maximum, sum) of an item's query rows, then as many rows of unnormalised
/// output.
__host__ __device__ constexpr int partial_floats(int dim, int rows) { return rows * (dim + 4 + 2); }

/// Where row `row`'s output begins in a partial result; 4 floats of padding a row keep the four
/// queries that lanes store at once in different banks.
template <int kDim, class Size>
__device__ constexpr int partial_row(int row) {
  return 2 * Size::kRows + row * (kDim + 4);
}

/// Sixteen K and V rows in shared memory, and who sees them.
struct TileRows {
  std::uint32_t k = 0;           ///< address of K row 0
  std::uint32_t v = 0;           ///< and of V row 0
  int low = 0;                   ///< rows [low, high) exist and are seen
  int high = 0;                  ///< see low
  bool is_ragged = false;        ///< queries see different rows
  std::int32_t position = 0;     ///< of row 0 where they do, or scores need it
  bool is_in_slots = false;      ///< that is its slot
  const Piece* piece = nullptr;  ///< whose tile it is, in shared memory
  int group_size = 1;

  /// Of row `row`, if it exists.
  __device__ int position_of(int row) const {
    return is_in_slots ? piece->position_in(position + row) : position + row;
  }
  /// Whose query row `row` of the piece is.
  __device__ int token_of(int row) const {
    return piece->num_tokens == 1 ? 0 : (piece->first_row + row) / group_size;
  }
};

/// The row that stands for those that a piece's head has dropped.
template <int kDim, class Size>
__device__ MeanRow mean_of(const DecodeArgs& args, const Piece& piece) {
  if constexpr (Size::Softmax::kHasCompensation) {
    if (args.softmax.folded.heads != nullptr) {
      return {args.softmax.folded, chunk_at(args.step, piece.query_row), piece.kv_head, kDim};
    }
  }
  return {};
}

/// Attention of a warp's query rows over the tiles of one piece, transposed: scores are [keys,
/// queries], the output [dims, queries], so that 16 keys or dims fill a tensor core's rows and the
/// few queries its 8 columns, once or twice. Lane 4g + t has queries 2t and 2t + 1 of each 8.
///
/// Weights are relative to a score that grows when one exceeds it by kSlack powers of two: most
/// tiles need neither the maximum over lanes nor new factors.
/// @tparam Io  of q and out. What q holds is rounded to Row, once; f32 outputs are not rounded.
template <DeviceRow Row, DeviceIo Io, int kDim, class Size>
class DecodeState {
 public:
  /// Reads the queries that the next start() takes. Only where registers allow to read ahead.
  static constexpr bool kFetchesAhead = !Size::kChunks;
  __device__ void fetch(const DecodeArgs& args, const PieceRows& rows) {
    if constexpr (kFetchesAhead) {
      load(args, rows, next_q_);
      if constexpr (kShapes) load_slopes(args, rows, next_slope_);
    }
  }

  /// Begins a piece, with the queries fetched before where they were.
  __device__ void start(const DecodeArgs& args, const Piece& piece) {
    if constexpr (kFetchesAhead) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        q_[0][b][0] = next_q_[0][b][0];
        q_[0][b][1] = next_q_[0][b][1];
      }
      if constexpr (kShapes) {
        slope_[0][0] = next_slope_[0][0];
        slope_[0][1] = next_slope_[0][1];
      }
    } else {
      const PieceRows rows = rows_of<Size>(args, piece);
      is_idle_ = first_row() >= rows.count;
      if (is_idle()) return;
      load(args, rows, q_);
      if constexpr (kShapes) load_slopes(args, rows, slope_);
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[n][b][i] = 0.0F;
      }
      max_[n][0] = max_[n][1] = kLowest;
      sum_[n][0] = sum_[n][1] = 0.0F;
    }
  }

  /// Adds a tile.
  __device__ void add(const TileRows& tile, float scale_log2, const SoftmaxArgs& softmax) {
    if (is_idle()) return;
    const int lane = static_cast<int>(threadIdx.x % 32);
    float score[kColumns][4];
    multiply_keys(tile.k + Layout::at(lane % 16, lane / 16), scale_log2, score);
    if constexpr (kShapes) shape(tile, softmax, score);
    if (tile.low > 0 || tile.high < 16 || (Size::kChunks && tile.is_ragged)) hide(tile, score);

    bool grows = false;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        grows = grows || fmaxf(score[n][c], score[n][c + 2]) > max_[n][c] + kSlack;
      }
    }
    if (__any_sync(kWholeWarp, grows)) rescale(score);

    std::uint32_t p[kColumns][2];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float weight[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[i] = exp2_fast(score[n][i] - max_[n][i % 2] - TensorCore<Row>::kHeadroom);
      }
      sum_[n][0] += weight[0] + weight[2];
      sum_[n][1] += weight[1] + weight[3];
      p[n][0] = transposed(Pair<Row>::pack(weight[0], weight[1]));
      p[n][1] = transposed(Pair<Row>::pack(weight[2], weight[3]));
    }
    const std::uint32_t v_at = tile.v + Layout::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    if constexpr (Size::kChunks) {
      if (tile.is_ragged && !are_finite(v_at)) {
        multiply_values_one_by_one(tile, v_at, p);
        return;
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      std::uint32_t columns[4];
      load_matrices_transposed(columns, Layout::pairs_on(v_at, b));
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        TensorCore<Row>::multiply(out_[n][b], columns, p[n][0], p[n][1]);
      }
    }
  }

  /// Sums over the keys that other lanes have; after the last add().
  __device__ void finish() {
    if (is_idle()) return;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int d = 4; d < 32; d *= 2) {
        sum_[n][0] += __shfl_xor_sync(kWholeWarp, sum_[n][0], d);
        sum_[n][1] += __shfl_xor_sync(kWholeWarp, sum_[n][1], d);
      }
    }
  }

  /// Adds the row that stands for those that the head has dropped; after finish().
  __device__ void add_compensation(const DecodeArgs& args, const Piece& piece) {
    if (is_idle()) return;
    const MeanRow mean = mean_of<kDim, Size>(args, piece);
    if (!mean.exists()) return;
    const PieceRows rows = rows_of<Size>(args, piece);
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int t = lane % 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float logit[2] = {kHidden, kHidden};
#pragma unroll 1
      for (int query = 0; query < 8; ++query) {
        const int row = first_row() + n * 8 + query;
        if (row >= rows.count) break;
        float dot = dot_with_mean<Row, Io>(rows.query<Io>(args, row), mean.k, lane, 32, kDim / 2);
#pragma unroll
        for (int d = 1; d < 32; d *= 2) dot += __shfl_xor_sync(kWholeWarp, dot, d);
        if (query / 2 != t) continue;
        const float of_query = mean.logit(dot, args.scale_log2, args.softmax);
        if (query % 2 == 0) logit[0] = of_query;
        if (query % 2 == 1) logit[1] = of_query;
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const JoiningRow joining(max_[n][c], logit[c], TensorCore<Row>::kHeadroom);
        max_[n][c] = joining.top;
        sum_[n][c] = sum_[n][c] * joining.factor + joining.weight;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          const float* value = mean.v + b * 16 + lane / 4;
          out_[n][b][c] = joining.joined(out_[n][b][c], value);
          out_[n][b][c + 2] = joining.joined(out_[n][b][c + 2], value + 8);
        }
      }
    }
  }

  /// The finished output.
  __device__ void store(const DecodeArgs& args, const PieceRows& rows) const {
    if (is_idle()) return;
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float sum[2] = {sum_[n][0], sum_[n][1]};
      if constexpr (Size::Softmax::kHasSinks) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int query = first_row() + n * 8 + lane % 4 * 2 + c;
          if (query >= rows.count) continue;
          sum[c] += args.softmax.sink_weight(rows.head_of(query),
                                             max_[n][c] + TensorCore<Row>::kHeadroom);
        }
      }
      const float inverse[2] = {sum[0] > 0.0F ? 1.0F / sum[0] : 0.0F,
                                sum[1] > 0.0F ? 1.0F / sum[1] : 0.0F};
      const int row = first_row() + n * 8 + lane / 4;
      Bits<Io>* out = output_row(args, rows, row) + lane % 4 * 2;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float low = out_[n][b][2 * half] * inverse[0];
          const float high = out_[n][b][2 * half + 1] * inverse[1];
          Bits<Io>* to = out + b * 16 + half * 8;
          if constexpr (std::same_as<Io, f32>) {
            // Upper and lower halves of a float are two matrices of two-byte elements.
            const std::uint32_t bits[2] = {__float_as_uint(low), __float_as_uint(high)};
            const std::uint32_t upper = transposed(__byte_perm(bits[0], bits[1], 0x7632));
            const std::uint32_t lower = transposed(__byte_perm(bits[0], bits[1], 0x5410));
            if (row < rows.count) {
              *reinterpret_cast<float2*>(to) =
                  make_float2(__uint_as_float(__byte_perm(lower, upper, 0x5410)),
                              __uint_as_float(__byte_perm(lower, upper, 0x7632)));
            }
          } else {
            const std::uint32_t pair = transposed(Pair<Io>::pack(low, high));
            if (row < rows.count) *reinterpret_cast<std::uint32_t*>(to) = pair;
          }
        }
      }
    }
  }

  /// The state itself, as partial_floats() lays it out; rows that the item has not are left out.
  __device__ void store_partial(float* partial) const {
    if (is_idle()) return;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int g = lane / 4;
    const int t = lane % 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int row = first_row() + n * 8 + 2 * t;
      if (g < 2) {
        *reinterpret_cast<float2*>(partial + 2 * (row + g)) =
            g == 0 ? make_float2(max_[n][0], sum_[n][0]) : make_float2(max_[n][1], sum_[n][1]);
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          partial[partial_row<kDim, Size>(row + i % 2) + b * 16 + g + i / 2 * 8] = out_[n][b][i];
        }
      }
    }
  }

 private:
  using Layout = TileLayout<kDim, Size::kTileRows>;
  static constexpr int kBlocks = kDim / 16;
  static constexpr int kColumns = Size::kColumns;
  static constexpr bool kShapes = Size::Softmax::kShapesScores;
  /// Powers of two that weights may exceed 1 by; none where that could overflow the sums.
  static constexpr float kSlack = TensorCore<Row>::kHeadroom > 0.0F ? 0.0F : 8.0F;

  /// The warp's, of the item's rows.
  static __device__ int first_row() { return Size::warp() * 8 * kColumns; }
  /// Whether the warp has no query rows, and only copies.
  __device__ bool is_idle() const { return Size::kWarps > 1 && is_idle_; }
  static __device__ Bits<Io>* output_row(const DecodeArgs& args, const PieceRows& rows, int row) {
    if constexpr (Size::kChunks) return rows.output<Io>(args, row);
    return output_at<Io>(args, rows.query_row, rows.first_head + row);
  }

  static __device__ void load(const DecodeArgs& args, const PieceRows& rows,
                              std::uint32_t (&q)[kColumns][kBlocks][2]) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int row = first_row() + n * 8 + lane / 4;
      const Bits<Io>* from = nullptr;
      if constexpr (Size::kChunks) {
        from = rows.query<Io>(args, row) + lane % 4 * 2;
      } else {
        from = query_at<Io>(args, rows.query_row, rows.first_head + row) + lane % 4 * 2;
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        q[n][b][0] = row < rows.count ? load_pair<Row, Io>(from + b * 16) : 0U;
        q[n][b][1] = row < rows.count ? load_pair<Row, Io>(from + b * 16 + 8) : 0U;
      }
    }
  }

  /// ALiBi's, of the lane's queries.
  static __device__ void load_slopes(const DecodeArgs& args, const PieceRows& rows,
                                     float (&slope)[kColumns][2]) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const float* slopes = args.softmax.alibi_slopes;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = first_row() + n * 8 + lane % 4 * 2 + c;
        slope[n][c] =
            slopes != nullptr && row < rows.count ? __ldg(slopes + rows.head_of(row)) : 0.0F;
      }
    }
  }

  /// From scale x q.k to logits: soft-cap, then ALiBi's slope times the tokens from query to key.
  __device__ void shape(const TileRows& tile, const SoftmaxArgs& softmax,
                        float (&score)[kColumns][4]) const {
    if (softmax.cap > 0.0F) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[n][i] = softmax.capped(score[n][i]);
      }
    }
    if (softmax.alibi_slopes == nullptr) return;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int position[2] = {tile.position_of(lane / 4), tile.position_of(lane / 4 + 8)};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int token = tile.token_of(first_row() + n * 8 + lane % 4 * 2 + c);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& logit = score[n][2 * half + c];
          logit = fmaf(slope_[n][c], static_cast<float>(position[half] - token), logit);
        }
      }
    }
  }

  __device__ void multiply_keys(std::uint32_t k_at, float scale_log2,
                                float (&score)[kColumns][4]) const {
    constexpr int kChains = kColumns == 1 ? 2 : 1;  // of products, two at least: half the latency
    float sums[kChains][kColumns][4] = {};
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      std::uint32_t rows[4];
      load_matrices(rows, Layout::pairs_on(k_at, b));
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        TensorCore<Row>::multiply(sums[b % kChains][n], rows, q_[n][b][0], q_[n][b][1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = kChains == 1 ? sums[0][n][i] : sums[0][n][i] + sums[kChains - 1][n][i];
        score[n][i] = sum * scale_log2;
      }
    }
  }

  /// Whether the warp's query `query` sees row `row` of a ragged tile.
  static __device__ bool sees(const TileRows& tile, int query, int row) {
    const int token = (tile.piece->first_row + first_row() + query) / tile.group_size;
    const int position = tile.position + row;
    return row >= tile.low && row < tile.high && position <= token &&
           (token - position < tile.piece->recent || position < tile.piece->sink_end);
  }

  __device__ void hide(const TileRows& tile, float (&score)[kColumns][4]) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8;
        bool seen = row >= tile.low && row < tile.high;
        if constexpr (Size::kChunks) {
          if (tile.is_ragged) seen = sees(tile, n * 8 + lane % 4 * 2 + i % 2, row);
        }
        if (!seen) score[n][i] = kHidden;
      }
    }
  }

  __device__ void rescale(const float (&score)[kColumns][4]) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float top = fmaxf(score[n][c], score[n][c + 2]);
#pragma unroll
        for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, d));
        top = fmaxf(top, max_[n][c]);
        const float factor = exp2_fast(max_[n][c] - top);
        max_[n][c] = top;
        sum_[n][c] *= factor;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          out_[n][b][c] *= factor;
          out_[n][b][c + 2] *= factor;
        }
      }
    }
  }

  /// Whether all values of a tile are.
  static __device__ bool are_finite(std::uint32_t v_at) {
    std::uint32_t zeros = 0;
#pragma unroll 1
    for (int b = 0; b < kBlocks; ++b) {
      std::uint32_t columns[4];
      load_matrices_transposed(columns, Layout::pairs_on(v_at, b));
#pragma unroll
      for (int i = 0; i < 4; ++i) TensorCore<Row>::note(columns[i], zeros);
    }
    return !__any_sync(kWholeWarp, !are_zeros(zeros));
  }

  /// As the products of a tile's values at once; but 0 times infinity is NaN: for each query the
  /// rows that it does not see become zeros first.
  __device__ void multiply_values_one_by_one(const TileRows& tile, std::uint32_t v_at,
                                             const std::uint32_t (&p)[kColumns][2]) {
    const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll 1
      for (int query = 0; query < 8; ++query) {
        const auto seen = [&](int row) {
          return (sees(tile, n * 8 + query, row) ? 0x0000FFFFU : 0U) |
                 (sees(tile, n * 8 + query, row + 1) ? 0xFFFF0000U : 0U);
        };
        const std::uint32_t first = seen(2 * t);
        const std::uint32_t second = seen(2 * t + 8);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          std::uint32_t columns[4];
          load_matrices_transposed(columns, Layout::pairs_on(v_at, b));
          columns[0] &= first;
          columns[1] &= first;
          columns[2] &= second;
          columns[3] &= second;
          float sums[4] = {};
          TensorCore<Row>::multiply(sums, columns, p[n][0], p[n][1]);
          if (query / 2 == t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (i % 2 == query % 2) out_[n][b][i] += sums[i];
            }
          }
        }
      }
    }
  }

  std::uint32_t q_[kColumns][kBlocks][2];
  std::uint32_t next_q_[kColumns][kBlocks][2];
  float out_[kColumns][kBlocks][4];
  float max_[kColumns][2];
  float sum_[kColumns][2];
  float slope_[kColumns][2];       // where scores are shaped
  float next_slope_[kColumns][2];  // likewise
  bool is_idle_ = false;
};

}  // namespace headwise::inline v0::cuda::detail
