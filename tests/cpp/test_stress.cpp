// Random operations on ranks that are threads, with delays in every phase: contents are checked, and what a call
// returned is checked again much later. Built with a sanitizer it also tells of races and stray accesses; see world.hpp
// for how the thread sanitizer comes to see them.
//
//   test_stress [operations per world]
#include <deque>

#include "traffic.hpp"

namespace deep_ep_test {
namespace {

using deep_ep::Engine;
using deep_ep::ErrorKind;

void expect_error(ErrorKind kind, const char* text, const std::function<void()>& body) {
  try {
    body();
  } catch (const deep_ep::Error& error) {
    EXPECT(error.kind == kind && error.agreed && error.message.find(text) != std::string::npos, "%s", error.what());
    return;
  }
  EXPECT(false, "nothing was raised where %s was due", text);
}

// One combine. Whatever lent its rows is overwritten as soon as that is allowed: a peer that still reads them shows.
void combine(Engine& engine, Exchange& exchange, uint64_t salt, Dice& dice) {
  const auto count = static_cast<size_t>(exchange.num_rows() * exchange.routing().hidden);
  std::vector<float> ordinary, out, weights, out_weights;
  deep_ep::BlockPtr block;
  float* y = nullptr;
  const int64_t where = dice.below(3);
  const bool background = dice.one_in(4);
  if (where == 1) block = engine.allocate_result(std::max<size_t>(count * 4, 1));
  if (where == 2) {  // what dispatch delivered: in place
    y = exchange.rows();
  } else if (block) {  // the caller's own block: in place
    y = reinterpret_cast<float*>(block->data);
  } else {  // beside the heap, or the heap gave no more: copied
    ordinary.resize(count + 1);
    y = ordinary.data();
  }
  auto params = exchange.combine(y, salt, &out, &weights, &out_weights);
  params.background = background;
  const bool in_pieces = !background && dice.one_in(3);
  std::shared_ptr<deep_ep::Event> event;
  if (in_pieces) {
    const auto flight = engine.combine_begin(params, {}, nullptr);
    deep_ep::Pull pull = params.pull;
    const int64_t columns = pull.layout == deep_ep::Layout::rank ? params.num_weights : pull.num_slots;
    for (int64_t first = 0; first < params.pull.num_tokens; first += 3) {
      pull.num_tokens = std::min<int64_t>(3, params.pull.num_tokens - first);
      pull.targets = params.pull.targets + first * pull.num_slots;
      pull.out = static_cast<float*>(params.pull.out) + first * params.hidden;
      if (params.pull.out_weights) pull.out_weights = static_cast<float*>(params.pull.out_weights) + first * columns;
      engine.combine_pull(*flight, pull, nullptr);
    }
    engine.combine_end(*flight, nullptr);
  } else {
    event = engine.combine(params, {}, nullptr);
  }
  if (background) {
    EXPECT(event->wait(nullptr), "interrupted");
  } else {
    EXPECT(event == nullptr, "a synchronous call has no event");
  }
  std::fill(y, y + count, -7.0F);
  exchange.check_combined(salt, out, out_weights);
}

// Delivered rows that the caller keeps for a while: nobody may write to them.
struct Kept {
  std::unique_ptr<Exchange> exchange;
  int64_t until;
};

void rank_body(int rank, Engine& engine, const WorldOptions& options, int64_t operations) {
  Dice dice(mix(options.seed, 4321));  // common to all ranks
  std::deque<Kept> kept;
  for (int64_t i = 0; i < operations; ++i) {
    if (dice.one_in(16)) engine.barrier(nullptr);
    if (dice.one_in(16)) {
      // Some ranks refuse, at times two in a row, and with a copy of the order that only they had seen.
      const int64_t who = 1 + dice.below((int64_t{1} << options.num_ranks) - 1);
      if (who >> rank & 1)
        engine.fail(deep_ep::Op::dispatch, "no such thing", nullptr);
      else
        expect_error(ErrorKind::argument, "no such thing", [&] { engine.barrier(nullptr); });
    }
    auto exchange = std::make_unique<Exchange>(Routing(mix(options.seed, i), options.num_ranks), rank);
    if (dice.one_in(4) && exchange->most_rows() > 1)
      // Refused after the rendezvous: each rank raises as soon as it has read its peers' counts, and goes on at once.
      expect_error(ErrorKind::argument, "num_worst_tokens", [&] { exchange->dispatch(engine, false, false, 1); });
    const bool background = dice.one_in(4);
    exchange->dispatch(engine, false, background);
    const bool cached = dice.one_in(3), again = dice.one_in(2);
    if (!background || !dice.one_in(3)) {
      if (background) EXPECT(exchange->event()->wait(nullptr), "interrupted");
      exchange->check("dispatch");
    } else {  // a combine behind it; what dispatch delivered is complete by then
      while (!exchange->event()->done())
        usleep(100);
    }
    if (cached) {
      const bool behind = dice.one_in(3);
      exchange->dispatch(engine, true, behind);
      if (behind) EXPECT(exchange->event()->wait(nullptr), "interrupted");
      exchange->check("cached dispatch");
    }
    if (dice.one_in(3)) {
      exchange->dispatch(engine, false, false, -1, true);
      exchange->check("dispatch in pieces");
    }
    if (dice.one_in(4)) {
      const std::vector<int64_t> own(static_cast<size_t>(1 + dice.below(300)), rank + 10 * i);
      std::vector<int64_t> all(own.size() * static_cast<size_t>(options.num_ranks));
      engine.gather(own.data(), own.size() * 8, all.data(), nullptr);
      for (size_t k = 0; k < all.size(); ++k)
        EXPECT(all[k] == static_cast<int64_t>(k / own.size()) + 10 * i, "gather: entry %zu is %lld", k,
               (long long)all[k]);
    }
    const bool keep = dice.one_in(3);
    const int64_t keep_for = 1 + dice.below(12);
    if (keep) {
      kept.push_back({std::move(exchange), i + keep_for});
    } else {
      combine(engine, *exchange, 2 * mix(options.seed, i, 3), dice);
      if (again) combine(engine, *exchange, 2 * mix(options.seed, i, 4) + 1, dice);
    }
    for (size_t k = kept.size(); k-- > 0;) {
      if (kept[k].until > i) continue;
      kept[k].exchange->check("kept");
      if (dice.one_in(2)) combine(engine, *kept[k].exchange, 2 * mix(options.seed, i, 5), dice);
      kept.erase(kept.begin() + static_cast<ptrdiff_t>(k));
    }
  }
  engine.barrier(nullptr);
  for (Kept& k : kept)
    k.exchange->check("kept to the end");
  engine.close(1);
  for (Kept& k : kept)
    k.exchange->check("kept after the engine was closed");
  const auto statistics = engine.statistics();
  EXPECT(operations < 100 || options.num_ranks == 1 || statistics.second_records > 0, "no offer was ever too small");
  EXPECT(operations < 100 || statistics.copied_combine_inputs > 0, "no combine had to copy");
  EXPECT(operations < 100 || options.max_heap_bytes == 0 || statistics.moved_to_ordinary_memory > 0,
         "the limit was never reached");
}

int run(int64_t operations) {
  for (const int num_ranks : {3, 1, 2, 4}) {
    WorldOptions options;
    options.num_ranks = num_ranks;
    options.seed = static_cast<uint64_t>(num_ranks);
    options.num_threads = num_ranks == 2 ? 3 : 1;
    options.spin_microseconds = num_ranks == 4 ? 20 : 0;
    options.max_heap_bytes = num_ranks == 4 ? 64 << 10 : 0;  // results move to ordinary memory
    options.share_mappings = num_ranks != 1;
    run_world(options, [&](int rank, Engine& engine) { rank_body(rank, engine, options, operations); });
    if (failures) break;
  }
  if (failures == 0) {  // as between processes: each rank maps its peers' memory itself
    WorldOptions options;
    options.seed = 99;
    options.share_mappings = false;
    options.delays = false;
    run_world(options, [&](int rank, Engine& engine) { rank_body(rank, engine, options, operations); });
  }
  return report("test_stress");
}

}  // namespace
}  // namespace deep_ep_test

int main(int argc, char** argv) {
  return deep_ep_test::run(argc > 1 ? std::atoll(argv[1]) : 400);
}
