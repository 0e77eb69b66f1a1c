// SPDX-License-Identifier: MIT
// expect: QueryCentre
// Mean and covariance do not say how long queries are.
#include <vector>

#include "headwise/attention/query_moments.hpp"
#include "headwise/policies/tri_attention.hpp"

#ifdef WRONG
using Found = headwise::QueryMoments;
#else
using Found = headwise::tri_attention::QueryCentre;
#endif

void score(const std::vector<Found>& found, const headwise::RowView& keys,
           const std::vector<std::int32_t>& stored, headwise::TokenScores& scores) {
  headwise::tri_attention::add_head({}, found, keys, stored, scores);
}

int main() {}
