// Everything the layering test must find.
#include <Eigen/Core>

#include "headwise/cache/page_pool.hpp"
#include "neighbour.hpp"
#include <cuda_runtime.h>
