// SPDX-License-Identifier: MIT
// expect: (template constraint failure|constraints not satisfied)
// Turned K wants q turned as often: rotation is the outermost format, once.
#include "headwise/cache/kv_cache.hpp"

using namespace headwise;

template <class Rows>
concept MayBeTurned = requires {
  typename RotatedRows<Rows>;
};
template <class K, class V>
concept MayBeParts = requires {
  typename KvRows<K, V>;
};

static_assert(MayBeTurned<KvRows<Int8Rows, Int4Rows>>);
static_assert(!MayBeTurned<RotatedRows<Int8Rows>>);
static_assert(!MayBeParts<RotatedRows<Int8Rows>, Int8Rows>);
static_assert(!MayBeParts<Int8Rows, RotatedRows<Int8Rows>>);
#ifdef WRONG
using Rows = KvRows<RotatedRows<Int8Rows>, Int4Rows>;
#else
using Rows = RotatedRows<KvRows<Int8Rows, Int4Rows>>;
#endif

int main() { return Rows::name()[0] == 0; }
