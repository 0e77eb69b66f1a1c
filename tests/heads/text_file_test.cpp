// SPDX-License-Identifier: MIT
#include "headwise/heads/text_file.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/errors.hpp"

namespace headwise {
namespace {

using ::testing::HasSubstr;
using testing::message_of;
using ::testing::TempDir;

TEST(TextFile, ReadsBackWhatWasWritten) {
  const std::string path = TempDir() + "headwise_text_file_test";
  const std::string text(200000, 'x');
  detail::save_text(path, text);
  EXPECT_EQ(detail::load_text(path), text);
  EXPECT_TRUE(detail::can_open(path));
  detail::save_text(path, "");
  EXPECT_TRUE(detail::can_open(path));
  std::remove(path.c_str());
  EXPECT_FALSE(detail::can_open(path));
  EXPECT_FALSE(detail::can_open(TempDir()));
}

TEST(TextFile, NamesThePathThatCannotBeRead) {
  const std::string missing = TempDir() + "headwise_no_such_file";
  EXPECT_EQ(message_of<ConfigError>([&] { (void)detail::load_text(missing); }),
            "cannot open " + missing + ": No such file or directory");
  EXPECT_THAT(message_of<ConfigError>([&] { (void)detail::load_text(TempDir()); }),
              HasSubstr(TempDir()));
  EXPECT_THAT(message_of<ConfigError>([&] { detail::save_text(missing + "/x", ""); }),
              HasSubstr("cannot write " + missing + "/x"));
}

TEST(TextFile, StopsAtTheLimit) {
  const std::string path = TempDir() + "headwise_text_file_limit";
  detail::save_text(path, std::string(101, 'x'));
  EXPECT_EQ(message_of<FormatError>([&] { (void)detail::load_text(path, 100); }),
            path + ": larger than the limit of 100 bytes");
  EXPECT_EQ(detail::load_text(path, 101).size(), 101U);
  std::remove(path.c_str());
}

TEST(Excerpt, IsShortAndPrintable) {
  EXPECT_EQ(detail::excerpt("0.5"), "'0.5'");
  EXPECT_EQ(detail::excerpt(std::string("a\0\n\x1b\xff", 5)), "'a####'");
  EXPECT_EQ(detail::excerpt(std::string(1000, 'y')), "'" + std::string(40, 'y') + "...'");
}

}  // namespace
}  // namespace headwise
