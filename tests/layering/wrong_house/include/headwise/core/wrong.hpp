// Everything the layering test must find.
#include <cuda_runtime.h>

#include <Eigen/Core>

#include "headwise/cache/page_pool.hpp"
#include "neighbour.hpp"
