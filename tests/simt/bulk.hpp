// Bulk copies, mostly as late as the hardware may make them (who uses the data before the wait that says so reads
// garbage), and now and then at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "simt/launch.hpp"

namespace deep_ep {
namespace simt {

// Of one block: what was asked for on each of its barriers.
struct BulkBarrier {
  uint32_t phase = 0;    // completed ones
  bool pending = false;  // the copy is not done
  bool unseen = false;   // nobody has waited for the last phase asked for
  Site asked{};
  unsigned char* shared = nullptr;
  const unsigned char* global = nullptr;
  uint32_t bytes = 0;
};
using BulkBarriers = std::map<const uint64_t*, BulkBarrier>;

struct BulkStore {
  unsigned char* global;
  const unsigned char* shared;
  uint32_t bytes;
  Site asked;
  bool early;  // read when it is asked for, written when it is read; or both at the last moment
  bool read = false;
  bool written = false;
  std::vector<unsigned char> data;
};
using BulkGroup = std::vector<BulkStore>;

// Of one thread.
struct BulkStores {
  BulkGroup open;                 // not committed yet
  std::vector<BulkGroup> groups;  // committed, oldest first
  size_t groups_read = 0;
};

// Empty, or what is not finished though its thread, or all threads of its block, returned.
std::string unfinished(const BulkStores& stores);
std::string unfinished(const BulkBarriers& barriers);

}  // namespace simt
}  // namespace deep_ep
