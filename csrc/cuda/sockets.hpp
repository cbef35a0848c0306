// Unix sockets between the attendants of ranks of one machine: whole messages, with a descriptor beside them.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "cuda/device.hpp"

namespace deep_ep {
namespace cuda {

enum class MessageKind : uint32_t {
  hello = 1,   // the first one, in both directions: who this is
  refuse,      // of a hello: why not
  segment,     // a new segment of the sender; a descriptor may travel beside it
  mapped,      // its answer
  not_mapped,  // its answer: why not
  ready,       // everybody has mapped the sender's first segments
  gave_up,     // the sender's buffer is poisoned: why
  goodbye      // nothing more will come
};

// Plain data between processes that run the same library (`layout` tells); what a kind does not use is zero.
struct Message {
  uint64_t magic;
  uint64_t epoch;
  uint32_t version;
  uint32_t layout;
  MessageKind kind;
  int32_t rank;
  int32_t num_ranks;
  int32_t num_named;  // gave_up: of `named`
  int64_t process;
  uint64_t segment;
  Share share;
  uint32_t error;  // gave_up: ErrorKind
  int32_t reserved;
  double seconds;
  int32_t named[kMaxNamedRanks];
  char text[kTextBytes];
};

// Cut to what fits.
void set_text(Message* message, const std::string& text);

// Closes what it holds.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor();
  int get() const { return fd_; }
  int release();
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// A socket that peers reach by a name in the abstract namespace: no file, gone with the process. Throws Error.
Descriptor listen_at(const std::string& name, int num_peers);
Descriptor connect_to(const std::string& name);
// Empty: nobody waits. Only processes of this user are let in.
Descriptor accept_from(const Descriptor& listener);
// A descriptor that becomes readable when the process at the other end ends, even where a forked child of it keeps the
// socket open. Empty: it is this process, or cannot be seen.
Descriptor process_behind(const Descriptor& socket);

// Never waits. False: nobody is there to read it.
bool send_message(const Descriptor& socket, const Message& message, int descriptor = -1);
enum class Received { message, nothing, closed };
Received receive_message(const Descriptor& socket, Message* message, Descriptor* descriptor);
// Whether it came within that time.
bool wait_readable(const Descriptor& socket, int milliseconds);

}  // namespace cuda
}  // namespace deep_ep
