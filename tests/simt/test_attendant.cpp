// Heaps and attendants of ranks that are threads, and processes: mapping both ways, growth, who went and how.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cuda/attendant.hpp"
#include "cuda/heap.hpp"
#include "simt/expect.hpp"
#include "simt/launch.hpp"

using namespace deep_ep;
using namespace deep_ep::cuda;
using simt_test::has;

namespace {

constexpr uint64_t kEpoch = 0x1234567890abcdefULL;

// A rank without kernels.
struct Member {
  Member(int rank, int num_ranks, uint64_t epoch = kEpoch, double timeout = 10)
      : rank(rank), num_ranks(num_ranks), table(static_cast<size_t>(num_ranks) * kMaxSegments) {
    heap = Heap::create(epoch, rank, num_ranks, 0);
    heap->grow(1 << 20);
    AttendantOptions options;
    options.epoch = epoch;
    options.rank = rank;
    options.num_ranks = num_ranks;
    options.timeout_seconds = timeout;
    options.table = table.data();
    options.missed = [this](int gone) { return missed[static_cast<size_t>(gone)].load(); };
    options.abort = [this] { ++aborts; };
    attendant = std::make_unique<Attendant>(options);
  }
  ~Member() {
    attendant->close();
    heap->close();
  }
  void connect(const std::vector<std::string>& endpoints) {
    attendant->connect(endpoints, nullptr);
    heap->connect([this](uint64_t id, const Segment& segment, const Share& share, int fd) {
      attendant->announce(id, segment, share, fd);
    });
    attendant->meet(nullptr);
  }
  // The table stands for device memory, and what orders its entries before their use (a message through other ranks'
  // attendants, of other processes too) is not seen by the thread sanitizer.
  __attribute__((no_sanitize("thread"))) char* at(int owner, const BlockRef& block) const {
    return table.data()[owner * kMaxSegments + static_cast<int>(block.segment)] + block.offset;
  }
  BlockRef allocate(uint64_t bytes) {
    BlockRef ref;
    heap->locate(heap->allocate(bytes), bytes, &ref);
    return ref;
  }

  const int rank, num_ranks;
  std::vector<char*> table;
  std::atomic<bool> missed[8] = {};
  std::atomic<int> aborts{0};
  std::shared_ptr<Heap> heap;
  std::unique_ptr<Attendant> attendant;
};

bool soon(const std::function<bool()>& happened, int milliseconds = 30000) {
  for (int i = 0; i < milliseconds; ++i) {
    if (happened()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return happened();
}

void in_threads(int n, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int r = 0; r < n; ++r)
    threads.emplace_back([&body, r] {
      try {
        body(r);
      } catch (const std::exception& error) {
        EXPECT(false, "rank %d: %s", r, error.what());
      }
    });
  for (auto& thread : threads)
    thread.join();
}

std::string error_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    return error.message;
  }
  return {};
}

// Blocks never overlap, holes merge, everything that is freed can be had again.
void heap_alone() {
  const auto heap = Heap::create(kEpoch, 0, 1, 0);
  heap->grow(1 << 20);
  const uint64_t segments = heap->num_segments(), total = heap->total_bytes();
  std::mt19937_64 random(7);
  struct Block {
    char* data;
    uint64_t bytes;
    char mark;
  };
  std::vector<Block> held;
  auto check_and_free = [&](size_t i) {
    for (uint64_t b = 0; b < held[i].bytes; b += 97)
      EXPECT(held[i].data[b] == held[i].mark, "block %zu was written to", i);
    Heap::free_anywhere(held[i].data);
    held.erase(held.begin() + static_cast<int64_t>(i));
  };
  for (int i = 0; i < 3000; ++i) {
    if (!held.empty() && (random() % 2 || held.size() > 60)) {
      check_and_free(random() % held.size());
      continue;
    }
    Block block{nullptr, 1 + random() % 200000, static_cast<char>(random())};
    block.data = static_cast<char*>(heap->allocate(block.bytes));
    EXPECT(reinterpret_cast<uint64_t>(block.data) % kBlockAlignment == 0, "alignment");
    std::memset(block.data, block.mark, block.bytes);
    BlockRef ref;
    EXPECT(heap->locate(block.data + 1, block.bytes - 1, &ref) && heap->address(ref) == block.data + 1, "locate");
    held.push_back(block);
  }
  while (!held.empty())
    check_and_free(0);
  EXPECT(heap->num_segments() == segments && heap->total_bytes() == total, "it grew for what fits");
  void* whole = heap->allocate(uint64_t{64} << 20);  // all of segment 1
  EXPECT(heap->num_segments() == segments, "holes were not merged");
  BlockRef ref;
  int elsewhere = 0;
  EXPECT(!heap->locate(&elsewhere, 4, &ref), "not in the heap");
  EXPECT(!heap->locate(heap->address({1, 0, 0}), total, &ref), "beyond its segment");
  heap->free(whole);
}

// The heap goes with the last block, not with who made it.
void heap_outlives() {
  std::weak_ptr<Heap> watch;
  char* block;
  {
    const auto heap = Heap::create(kEpoch, 0, 1, 0);
    watch = heap;
    heap->grow(1);
    block = static_cast<char*>(heap->allocate(1000));
    heap->close();
    EXPECT(!error_of([&] { heap->allocate(1); }).empty(), "a closed heap gave memory");
  }
  std::memset(block, 1, 1000);
  EXPECT(!watch.expired(), "the heap went under its block");
  Heap::free_anywhere(block);
  EXPECT(watch.expired(), "nobody holds it any more");
}

// All ranks grow at once, again and again; every block is reachable by everyone when its owner knows it.
void grow_together(int n) {
  std::vector<std::unique_ptr<Member>> members;
  std::vector<std::string> endpoints;
  for (int r = 0; r < n; ++r) {
    members.push_back(std::make_unique<Member>(r, n));
    endpoints.push_back(members.back()->attendant->endpoint());
    EXPECT(endpoints.back().size() <= 107, "endpoint");
  }
  in_threads(n, [&](int r) { members[static_cast<size_t>(r)]->connect(endpoints); });
  in_threads(n, [&](int r) {
    for (int i = 0; i < 6; ++i) {
      const BlockRef ref = members[static_cast<size_t>(r)]->allocate((uint64_t{65} + r) << 20);
      for (int reader = 0; reader < n; ++reader) {
        // The value travels through two mappings of the same memory.
        char* theirs = members[static_cast<size_t>(reader)]->at(r, ref);
        theirs[reader] = static_cast<char>(10 * i + reader);
        EXPECT(members[static_cast<size_t>(r)]->at(r, ref)[reader] == static_cast<char>(10 * i + reader), "mapping");
      }
    }
  });
  EXPECT(members[0]->heap->num_segments() >= 8, "segments");

  // Goodbye: known as such, and harmless while nothing is missed.
  members[0]->attendant->close();
  Member& last = *members.back();
  EXPECT(soon([&] { return has(last.attendant->state(0).gone, "destroyed its buffer"); }), "goodbye");
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  EXPECT(last.aborts == 0, "nothing of it was missed");
  EXPECT(error_of([&] { last.allocate(uint64_t{200} << 20); }).empty(), "who went need not answer");
  last.missed[0] = true;
  EXPECT(soon([&] { return last.aborts == 1; }), "missed: waits end");

  // A reason travels.
  Error reason(ErrorKind::timeout, "waited for rank 2");
  reason.ranks = {2};
  reason.seconds = 1.5;
  last.attendant->give_up(reason);
  Member& other = *members[1];
  if (n > 2) {
    EXPECT(soon([&] { return other.attendant->state(n - 1).gave_up.has_value(); }), "reason");
    const Error told = *other.attendant->state(n - 1).gave_up;
    EXPECT(told.kind == ErrorKind::timeout && told.message == reason.message && told.ranks == reason.ranks &&
               told.seconds == 1.5,
           "reason");
    EXPECT(soon([&] { return other.aborts == 1; }), "its waits end");
  }
}

void refusals() {
  // Another buffer's rank.
  Member a(0, 2, kEpoch, 1.0), stranger(1, 2, kEpoch + 1, 1.0);
  std::string waited;
  std::thread first([&] { waited = error_of([&] { a.attendant->connect({"", ""}, nullptr); }); });
  const std::string refused = error_of([&] { stranger.attendant->connect({a.attendant->endpoint(), ""}, nullptr); });
  first.join();
  EXPECT(has(refused, "it belongs to another buffer"), "%s", refused.c_str());
  EXPECT(has(waited, "waited for ranks [1]") && has(waited, "another buffer"), "%s", waited.c_str());
  const std::string nobody = error_of([&] { Member(1, 2).attendant->connect({"deep_ep_py-nobody", ""}, nullptr); });
  EXPECT(has(nobody, "cannot meet rank 0"), "%s", nobody.c_str());

  // Memory that the peer cannot map; and its own next segment is no worse for it.
  Member b(0, 2), c(1, 2);
  in_threads(2, [&](int r) { (r ? c : b).connect({b.attendant->endpoint(), ""}); });
  Share share;
  share.kind = ShareKind::ipc;
  Segment segment;
  const std::string why = error_of([&] { b.attendant->announce(2, segment, share, -1); });
  EXPECT(has(why, "rank 1 cannot map the memory of rank 0: "), "%s", why.c_str());
  EXPECT(error_of([&] { c.allocate(uint64_t{100} << 20); }).empty(), "the other direction");
}

// Children run `body(member)` and then wait to be killed.
struct Child {
  Child(int rank, int n, const std::function<void(Member&)>& body) {
    pid = fork();
    if (pid != 0) return;
    alarm(60);
    Member member(rank, n);
    body(member);
    for (;;)
      pause();
  }
  pid_t pid;
};

std::string read_line(int fd) {
  std::string line;
  for (char c; read(fd, &c, 1) == 1 && c != '\n';)
    line += c;
  return line;
}

void write_line(int fd, const std::string& line) {
  EXPECT(write(fd, (line + "\n").data(), line.size() + 1) > 0, "pipe");
}

// Rank 1 is another process: it is found dead, and found silent.
void processes() {
  for (const bool stopped : {false, true}) {
    int down[2], up[2];
    EXPECT(pipe(down) == 0 && pipe(up) == 0, "pipe");
    const Child child(1, 2, [&](Member& member) {
      member.connect({read_line(down[0]), ""});
      BlockRef own = member.allocate(1000);
      std::strcpy(member.at(1, own), "from rank 1");
      write_line(up[1], std::to_string(own.segment) + " " + std::to_string(own.offset));
      const std::string seen = read_line(down[0]);  // where rank 0 wrote
      BlockRef theirs;
      std::sscanf(seen.c_str(), "%lu %lu", &theirs.segment, &theirs.offset);
      write_line(up[1], member.at(0, theirs));
      for (int i = 0; i < 3; ++i)
        member.allocate(uint64_t{70} << 20);
      read_line(down[0]);  // until it is killed: one that ends has said goodbye
    });
    Member member(0, 2, kEpoch, stopped ? 3.0 : 10.0);
    write_line(down[1], member.attendant->endpoint());
    member.connect({"", ""});
    BlockRef theirs;
    std::sscanf(read_line(up[0]).c_str(), "%lu %lu", &theirs.segment, &theirs.offset);
    EXPECT(std::string(member.at(1, theirs)) == "from rank 1", "read");
    const BlockRef own = member.allocate(uint64_t{80} << 20);  // mapped by the child before this returns
    std::strcpy(member.at(0, own), "from rank 0");
    write_line(down[1], std::to_string(own.segment) + " " + std::to_string(own.offset));
    EXPECT(read_line(up[0]) == "from rank 0", "written");
    if (stopped) {
      int status = 0;
      kill(child.pid, SIGSTOP);  // its threads run on until each has seen it
      EXPECT(waitpid(child.pid, &status, WUNTRACED) == child.pid && WIFSTOPPED(status), "stopped");
      const std::string why = error_of([&] { member.allocate(uint64_t{400} << 20); });
      EXPECT(has(why, "waited for ranks [1] to map its new memory"), "%s", why.c_str());
      EXPECT(member.attendant->state(1).gone.empty(), "it is there");
      kill(child.pid, SIGCONT);
    }
    kill(child.pid, SIGKILL);
    member.missed[1] = true;
    EXPECT(soon([&] { return member.attendant->state(1).gone == "died"; }), "death is noticed");
    EXPECT(soon([&] { return member.aborts == 1; }), "waits end");
    EXPECT(member.attendant->state(1).process == child.pid, "process");
    waitpid(child.pid, nullptr, 0);
    for (const int fd : {down[0], down[1], up[0], up[1]})
      close(fd);
  }
}

}  // namespace

int main() {
  heap_alone();
  heap_outlives();
  processes();  // forks: before there are threads
  for (const int n : {2, 4})
    grow_together(n);
  refusals();
  std::printf("%s\n", simt_test::failures ? "FAILED" : "attendant: sound");
  return simt_test::failures != 0;
}
