// SPDX-License-Identifier: MIT
// `using namespace headwise` in a program that also uses the C library and POSIX: no name of ours
// makes one of theirs ambiguous, nor the other way round.
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <vector>

#if __has_include(<unistd.h>)
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#endif

#include "headwise/headwise.hpp"

using namespace headwise;

int main() {
#if __has_include(<unistd.h>)
  const long number = random();
  fd_set none;
  FD_ZERO(&none);
  timeval at_once{};
  const int ready = select(0, &none, nullptr, nullptr, &at_once);
  const char* const found = index("headwise", 'w');
  const bool theirs = number >= 0 && ready == 0 && found != nullptr && scalbn(1.0, 2) == 4.0;
#else
  const bool theirs = true;
#endif
  const ModelShape shape = ModelShape::uniform(2, 4, 2, 64);
  const Window window{4, 60};
  const HeadScores scores = random_heads::scores(shape, 1);
  const HeadPlan plan = select(scores, {.sparsity = 0.5, .window = window});
  const bool ours = plan == random_heads::Policy{0.5, window, 1}.plan(shape) &&
                    uniform_budget::Policy{}.plan(shape) == HeadPlan(shape) &&
                    pinned::Policy{}.plan(plan) == plan && shard(plan, 1).plan(plan, 0) == plan &&
                    streaming_llm::Policy{}.plan(shape).sparsity() == 1.0 &&
                    simd::isa_name<simd::BestIsa>()[0] != '\0';
  return ours && theirs ? 0 : 1;
}
