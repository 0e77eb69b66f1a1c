// SPDX-License-Identifier: MIT
// expect: (satisfaction of|does not satisfy) [^ ]*Executor
// A number of threads is not an executor: attend() asks for num_threads() and for_each().
#include "headwise/attention/attend.hpp"

#ifdef WRONG
using Threads = int;
#else
using Threads = headwise::SerialExecutor;
#endif

headwise::StepStatus layer(const headwise::KvCache<>& cache, headwise::Step& step,
                           headwise::TensorView<const float> in, headwise::TensorView<float> out,
                           Threads& threads) {
  return headwise::attend(cache, step, 0, in, in, in, out, threads);
}

int main() {}
