#include "cuda/sockets.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "protocol/error.hpp"

namespace deep_ep {
namespace cuda {
namespace {

Error system_error(const std::string& what) {
  return Error(ErrorKind::general, what + ": " + std::strerror(errno));
}

socklen_t abstract_address(const std::string& name, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  if (name.size() + 1 > sizeof address->sun_path) throw Error(ErrorKind::general, "an endpoint's name is too long");
  std::memcpy(address->sun_path + 1, name.data(), name.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

Descriptor new_socket() {
  Descriptor socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) throw system_error("socket");
  return socket;
}

bool credentials(const Descriptor& socket, ucred* found) {
  socklen_t size = sizeof *found;
  return getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, found, &size) == 0;
}

}  // namespace

void set_text(Message* message, const std::string& text) {
  const size_t n = std::min<size_t>(text.size(), kTextBytes - 1);
  std::memcpy(message->text, text.data(), n);
  message->text[n] = '\0';
}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = other.release();
  }
  return *this;
}

Descriptor::~Descriptor() {
  if (fd_ >= 0) ::close(fd_);
}

int Descriptor::release() {
  const int fd = fd_;
  fd_ = -1;
  return fd;
}

Descriptor listen_at(const std::string& name, int num_peers) {
  Descriptor socket = new_socket();
  sockaddr_un address;
  const socklen_t size = abstract_address(name, &address);
  if (::bind(socket.get(), reinterpret_cast<sockaddr*>(&address), size) != 0) throw system_error("bind");
  // More than come, so that none has to try again.
  if (::listen(socket.get(), num_peers + 8) != 0) throw system_error("listen");
  return socket;
}

Descriptor connect_to(const std::string& name) {
  Descriptor socket = new_socket();
  sockaddr_un address;
  const socklen_t size = abstract_address(name, &address);
  if (::connect(socket.get(), reinterpret_cast<sockaddr*>(&address), size) != 0)
    throw system_error("connect (is it on the same machine, in the same network namespace?)");
  return socket;
}

Descriptor accept_from(const Descriptor& listener) {
  Descriptor socket(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  ucred them{};
  if (socket && credentials(socket, &them) && them.uid != geteuid()) return Descriptor();
  return socket;
}

Descriptor process_behind(const Descriptor& socket) {
  ucred them{};
  if (!credentials(socket, &them) || them.pid <= 0 || them.pid == getpid()) return Descriptor();
  return Descriptor(static_cast<int>(syscall(SYS_pidfd_open, them.pid, 0)));
}

bool send_message(const Descriptor& socket, const Message& message, int descriptor) {
  iovec part{const_cast<Message*>(&message), sizeof message};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (descriptor >= 0) {
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    cmsghdr* beside = CMSG_FIRSTHDR(&header);
    beside->cmsg_level = SOL_SOCKET;
    beside->cmsg_type = SCM_RIGHTS;
    beside->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(beside), &descriptor, sizeof descriptor);
  }
  ssize_t sent;
  do
    sent = ::sendmsg(socket.get(), &header, MSG_DONTWAIT | MSG_NOSIGNAL);
  while (sent < 0 && errno == EINTR);
  return sent == static_cast<ssize_t>(sizeof message);
}

Received receive_message(const Descriptor& socket, Message* message, Descriptor* descriptor) {
  iovec part{message, sizeof *message};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  header.msg_control = control;
  header.msg_controllen = sizeof control;
  ssize_t got;
  do
    got = ::recvmsg(socket.get(), &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  while (got < 0 && errno == EINTR);
  if (got < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? Received::nothing : Received::closed;
  for (cmsghdr* beside = CMSG_FIRSTHDR(&header); beside; beside = CMSG_NXTHDR(&header, beside))
    if (beside->cmsg_level == SOL_SOCKET && beside->cmsg_type == SCM_RIGHTS) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(beside), sizeof fd);
      *descriptor = Descriptor(fd);
    }
  // A message of another size is not from this library: whoever speaks so is not listened to.
  return got == static_cast<ssize_t>(sizeof *message) ? Received::message : Received::closed;
}

bool wait_readable(const Descriptor& socket, int milliseconds) {
  pollfd polled{socket.get(), POLLIN, 0};
  return ::poll(&polled, 1, milliseconds) > 0;
}

}  // namespace cuda
}  // namespace deep_ep
