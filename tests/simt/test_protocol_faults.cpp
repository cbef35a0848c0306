// What goes wrong at a rendezvous on the emulated execution model: what all ranks agree about, and giving up.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "simt/protocol_dispatch.hpp"

using namespace deep_ep;
using namespace deep_ep::cuda;

namespace {

// ---- what all ranks agree about; the buffer stays usable

// After an agreed failure: the rest of the operation does nothing, the host raises, a barrier works.
void recover(Domain& domain) {
  domain.run([](Rank& me) {
    expect(me.status->agreed == 1 && me.state.failed == me.state.seq && me.state.poisoned == 0, "not agreed");
    expect(me.status->error_seq == me.state.seq, "seq of an agreed error");
    wait(me, Signal::arrived, 0.001);  // nobody signals: it must not wait
    me.status->error = 0;
    notify(me, barrier(me));
    expect(me.status->error == 0, "the barrier after an agreed error");
  });
}

void test_agreed_failures() {
  Rng rng(9);
  for (const int R : {1, 2, 4, 8}) {
    Domain domain(R);
    const int bad = R - 1;
    domain.run([&](Rank& me) {
      NotifyParams p = barrier(me);
      const std::string text(600, 'x');  // longer than a record holds
      if (me.rank == bad) p.refused_text = text.c_str();
      if (me.rank == bad) p.op = Op::combine;  // a refusal comes before what differs
      notify(me, p);
      const HostStatus& s = *me.status;
      expect(me.has(ErrorKind::argument) && s.refusal == Refusal::text && s.error_rank == bad && s.text[0] == 'x' &&
                 std::strlen(s.text) == kTextBytes - 1,
             "refused with a text");
      for (int r = 0; r < R; ++r)
        expect(me.missing[r] == (r == bad), "who refused");
    });
    recover(domain);
    domain.run([&](Rank& me) {
      NotifyParams p = barrier(me);
      const int64_t verdict[5] = {static_cast<int64_t>(Refusal::expert), 7, 3, -9}, sound[5] = {};
      p.refused = me.rank == bad ? verdict : sound;
      notify(me, p);
      const HostStatus& s = *me.status;
      expect(me.has(ErrorKind::argument) && s.refusal == Refusal::expert && s.error_rank == bad && s.refused[0] == 7 &&
                 s.refused[1] == 3 && s.refused[2] == -9,
             "refused by layout");
    });
    recover(domain);
    // The offer of one rank fails.
    domain.run([&](Rank& me) {
      notify(me, barrier(me));
      std::vector<DeviceDestination> destinations(R);
      OfferParams o;
      o.world = me.world();
      o.destinations = destinations.data();
      o.blocks[kRecvX] = {kHeapId, 0, 40};
      o.blocks[kRecvSf] = {kHeapId, 0, 2};
      if (me.rank == bad) o.refused_text = "no memory";
      launch_offer(o, nullptr);
      const HostStatus& s = *me.status;
      expect(
          me.has(ErrorKind::general) && s.error_phase == Phase::offer && s.error_rank == bad && s.error_values[0] == 42,
          "cannot grow");
    });
    recover(domain);
    // Worst case exceeded on one rank.
    Shape shape = random_shape(rng, R);
    shape.fixed = true;
    for (const Layout layout : {Layout::topk, Layout::expand}) {
      shape.layout = layout;
      const Dispatch dispatch(rng, shape);
      domain.run([&](Rank& me) {
        expect(!dispatch(me, nullptr, me.rank == bad ? 4 : 0), "the worst case is not exceeded");
        const HostStatus& s = *me.status;
        expect(me.has(ErrorKind::argument) && s.refusal == Refusal::none && s.error_rank == bad &&
                   s.error_values[0] == dispatch.rows(bad) && s.error_values[1] == dispatch.rows(bad) - 1,
               "worst case");
      });
      recover(domain);
    }
    if (R == 1) continue;
    domain.run([&](Rank& me) {
      NotifyParams p = barrier(me);
      p.op = Op::combine;
      p.num_compared = kNumComparedCombine;
      p.fields[2] = me.rank == bad ? 5 : 6;
      p.fields[4] = me.rank;
      notify(me, p);
      expect(me.has(ErrorKind::mismatch) && me.status->error_field == 2, "mismatch of a field");
      for (int r = 0; r < R; ++r)
        expect(me.values[r] == (r == bad ? 5 : 6), "values of a mismatch");
    });
    recover(domain);
    domain.run([&](Rank& me) {
      NotifyParams p = barrier(me);
      if (me.rank == 0) p.op = Op::combine;
      notify(me, p);
      expect(me.has(ErrorKind::mismatch) && me.status->error_field == -1, "mismatch of the operation");
      for (int r = 0; r < R; ++r)
        expect(me.values[r] == static_cast<int64_t>(r == 0 ? Op::combine : Op::barrier), "operations of a mismatch");
    });
    // Not raised yet: the next error does not take its place.
    domain.run([&](Rank& me) {
      NotifyParams p = barrier(me);
      p.refused_text = "later";
      notify(me, p);
      expect(me.has(ErrorKind::mismatch) && me.status->text[0] != 'l', "a pending error was overwritten");
      me.status->error_seq = me.state.seq;
    });
    recover(domain);
  }
}

// ---- giving up

void test_giving_up() {
  for (const int R : {2, 4, 8}) {
    const int gone = R / 2;
    std::vector<int> others;
    for (int r = 0; r < R; ++r)
      if (r != gone) others.push_back(r);
    for (const bool in_wait : {false, true}) {
      Domain domain(R);
      if (in_wait) {
        domain.run([](Rank& me) { notify(me, barrier(me)); });
        domain.run([](Rank& me) { signal(me, Signal::arrived); }, others);
      }
      domain.run(
          [&](Rank& me) {
            if (in_wait)
              wait(me, Signal::arrived, 0.05);
            else
              notify(me, barrier(me, 0.05));
            const HostStatus& s = *me.status;
            expect(me.state.poisoned == 1 && s.agreed == 0 && s.error_seq == me.state.seq, "not poisoned");
            expect(me.has(ErrorKind::timeout) || (me.has(ErrorKind::general) && s.error_rank != gone),
                   "kind of a timeout");
            expect(s.error_phase == (in_wait ? Phase::arrive : Phase::notify), "phase of a timeout");
            if (me.has(ErrorKind::timeout)) expect(s.seconds >= 0.05, "seconds");
            // One that is only slow to publish may be missed as well.
            for (int r = 0; r < R; ++r)
              expect(r == gone ? me.missing[r] != 0 : !in_wait || me.missing[r] == 0, "missing ranks");
          },
          others);
      // The one that comes late learns it at the first record that is not there, although its own deadline is far.
      domain.run(
          [&](Rank& me) {
            if (!in_wait) notify(me, barrier(me));
            expect(me.status->error == 0, "everybody's records were there");
            notify(me, barrier(me, 20));
            expect(me.state.poisoned == 1, "the late rank does not know");
            expect(me.has(ErrorKind::general) && me.status->error_rank != gone, "who gave up");
          },
          {gone});
      // Whoever has given up still answers its host, with an error even if that was raised.
      domain.run([](Rank& me) {
        me.status->error = 0;
        notify(me, barrier(me));
        expect(me.has(ErrorKind::general) && me.status->error_rank == me.rank && me.status->agreed == 0,
               "an operation of a poisoned rank");
        wait(me, Signal::arrived);
      });
    }
    // The host says so.
    Domain domain(R);
    domain.ranks[0]->status->abort = 1;
    domain.run([&](Rank& me) { notify(me, barrier(me)); }, others);
    expect(domain.ranks[0]->has(ErrorKind::peer), "abort");
    for (const int r : others)
      expect(domain.ranks[r]->state.poisoned == 1, "abort does not spread");
    // Released, but a peer gave up in the very operation: the sums are worth nothing.
    Domain pulled(R);
    pulled.run([](Rank& me) {
      notify(me, barrier(me));
      signal(me, Signal::released);
    });
    Rank &first = *pulled.ranks[0], &last = *pulled.ranks[R - 1];
    inbox_at(last.world(), R - 1, 0)->poison = 2;
    pulled.run([](Rank& me) { wait(me, Signal::released); }, {R - 1});
    expect(last.status->error == 0 && last.state.poisoned == 0, "a peer that gave up later is not this pull's");
    inbox_at(first.world(), 0, gone)->poison = 1;
    pulled.run([](Rank& me) { wait(me, Signal::released); }, {0});
    expect(first.has(ErrorKind::general) && first.status->error_rank == gone, "a poisoned pull");
    expect(first.state.poisoned == 1, "a poisoned pull does not give up");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int scale = argc > 1 ? std::atoi(argv[1]) : 1;
  for (int seed = 1; seed <= scale; ++seed) {
    deep_ep_simt_configure(static_cast<uint64_t>(seed), 4);
    test_agreed_failures();
    test_giving_up();
  }
  if (failures != 0) return std::fprintf(stderr, "%d failures\n", failures.load()), 1;
  return 0;
}
