#include "simt/bulk.hpp"

#include <cstring>

#include "simt/block.hpp"

#if defined(DEEP_EP_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace deep_ep {
namespace simt {
namespace {

void check_piece(const void* shared, const void* global, uint32_t bytes, Site site) {
  const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
  if (bytes == 0 || bytes % 16 != 0)
    fail("a bulk copy of " + std::to_string(bytes) + " bytes, not a multiple of 16", site);
  if (misaligned(shared) || misaligned(global)) fail("a bulk copy whose address is not a multiple of 16", site);
  if (!me().owner->shares(shared, bytes))
    fail("a bulk copy whose shared side is not in the block's shared memory", site);
#if defined(DEEP_EP_SIMT_ASAN)
  // Now, so that the report names the request; the copy itself comes later.
  if (__asan_region_is_poisoned(const_cast<void*>(global), bytes) != nullptr)
    fail("a bulk copy whose global side goes beyond what is allocated", site);
#endif
}

BulkBarrier& find(const uint64_t* barrier, Site site) {
  BulkBarriers& all = me().owner->bulk_barriers;
  const auto at = all.find(barrier);
  if (at == all.end()) fail("a bulk barrier that is not initialised yet", site);
  return at->second;
}

void complete(BulkBarrier& b) {
  std::memcpy(b.shared, b.global, b.bytes);
  b.pending = false;
  ++b.phase;
  for (Fiber& fiber : me().owner->fibers) {
    if (fiber.state == State::at_bulk_barrier) wake(fiber);
  }
}

void read(BulkStore& store) {
  if (store.read) return;
  store.data.assign(store.shared, store.shared + store.bytes);
  store.read = true;
}

void write(BulkStore& store) {
  if (store.written) return;
  std::memcpy(store.global, store.data.data(), store.bytes);
  store.data = std::vector<unsigned char>();
  store.written = true;
}

}  // namespace

void bulk_barrier_init(uint64_t* barrier, Site site) {
  yield();
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0 || !me().owner->shares(barrier, sizeof(*barrier)))
    fail("a bulk barrier that is not an aligned word of the block's shared memory", site);
  if (!me().owner->bulk_barriers.emplace(barrier, BulkBarrier{}).second)
    fail("a bulk barrier that is initialised twice", site);
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, Site site) {
  yield();
  check_piece(shared, global, bytes, site);
  BulkBarrier& b = find(barrier, site);
  if (b.unseen) fail("a bulk load on a barrier whose load nobody waited for, asked for at " + name_of(b.asked), site);
  // From now on the hardware may write there at any time, so what was there is gone and what comes is not there yet.
  std::memset(shared, 0xDB, bytes);
  b.pending = b.unseen = true;
  b.asked = site;
  b.shared = static_cast<unsigned char*>(shared);
  b.global = static_cast<const unsigned char*>(global);
  b.bytes = bytes;
  if (current_launch->schedule.random().one_in(4)) complete(b);
}

void bulk_load_wait(uint64_t* barrier, uint32_t parity, Site site) {
  yield();
  BulkBarrier& b = find(barrier, site);  // entries of a map stay where they are
  while (b.phase % 2 == (parity & 1u)) {
    if (b.pending) {
      complete(b);
    } else {
      wait(State::at_bulk_barrier, site);
    }
  }
  // The phase before this one: the one that was asked for last, unless the next is under way already.
  if (!b.pending) b.unseen = false;
}

void bulk_store(void* global, const void* shared, uint32_t bytes, Site site) {
  yield();
  check_piece(shared, global, bytes, site);
  BulkStore store{};
  store.global = static_cast<unsigned char*>(global);
  store.shared = static_cast<const unsigned char*>(shared);
  store.bytes = bytes;
  store.asked = site;
  store.early = current_launch->schedule.random().one_in(2);
  if (store.early) {
    read(store);
    write(store);
  }
  me().bulk_stores.open.push_back(std::move(store));
}

void bulk_commit() {
  yield();
  BulkStores& stores = me().bulk_stores;
  stores.groups.push_back(std::move(stores.open));
  stores.open.clear();
}

void bulk_wait_read(int pending) {
  yield();
  BulkStores& stores = me().bulk_stores;
  while (stores.groups_read + static_cast<size_t>(pending) < stores.groups.size()) {
    for (BulkStore& store : stores.groups[stores.groups_read++])
      read(store);
  }
}

void bulk_wait_all() {
  yield();
  bulk_wait_read(0);
  BulkStores& stores = me().bulk_stores;
  for (BulkGroup& group : stores.groups) {
    for (BulkStore& store : group)
      write(store);
  }
  stores.groups.clear();
  stores.groups_read = 0;
}

std::string unfinished(const BulkStores& stores) {
  if (!stores.open.empty())
    return "returned with a bulk store that it did not commit, asked for at " + name_of(stores.open[0].asked);
  for (const BulkGroup& group : stores.groups) {
    if (!group.empty())
      return "returned with a bulk store that it did not wait for, asked for at " + name_of(group[0].asked);
  }
  return {};
}

std::string unfinished(const BulkBarriers& barriers) {
  for (const auto& entry : barriers) {
    if (entry.second.unseen)
      return "its block ended with a bulk load that nobody waited for, asked for at " + name_of(entry.second.asked);
  }
  return {};
}

}  // namespace simt
}  // namespace deep_ep
