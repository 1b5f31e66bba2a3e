// SPDX-License-Identifier: Apache-2.0
#include "cuda_emulation.h"

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/stream.h"

extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t) __attribute__((weak));

namespace emu {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 163 * 1024;  // of sm_80, the GPU that is emulated
constexpr size_t kPage = 4096;
constexpr size_t kStack = 256 * 1024;  // only pages that are touched take memory
constexpr int kResident = 3;           // blocks that run at once, in turns
constexpr unsigned kMaxSpins = 10'000'000;

// Switching stacks. swapcontext would do, but makes two system calls each time, and there are millions.
#ifdef __x86_64__
using Context = void*;  // the stack pointer; what a function must preserve lies there
extern "C" void livevlm_switch_stack(Context* from, const Context* to);
asm(R"(
.pushsection .text
.type livevlm_switch_stack, @function
livevlm_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.popsection
)");

void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 2;
  *top = reinterpret_cast<void*>(entry);
  context = top - 6;
}

void switch_stack(Context& from, const Context& to) {
  livevlm_switch_stack(&from, &to);
}
#else
using Context = ucontext_t;

void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack = {.ss_sp = stack, .ss_flags = 0, .ss_size = kStack};
  makecontext(&context, entry, 0);
}

void switch_stack(Context& from, const Context& to) {
  swapcontext(&from, &to);
}
#endif

enum class State : uint8_t { kReady, kAtBlockBarrier, kAtWarpCollective, kExited };

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, group;
};

struct Fiber {
  Context context;
  uint3 index;
  unsigned mask;  // of the collective it waits at
  Combine combine;
  void* operand;
  std::vector<Copy> copies;
  unsigned copy_groups;
};

struct Warp {
  unsigned alive, waiting;  // lanes
};

struct Block {
  uint3 index;
  Fiber fibers[kMaxThreads];
  State states[kMaxThreads];
  Warp warps[kMaxThreads / warpSize];
  unsigned current, alive, arrived;
  bool backwards;
  Votes votes, votes_so_far;
  char* shared;
  std::vector<char> static_shared;  // while another block runs
};

// The launch that runs now: there is one at a time.
Block blocks[kResident];
Block* now;
Context launcher;
const std::function<void()>* body;
dim3 grid, threads;
unsigned count, spins;
std::minstd_rand random_numbers;
std::pair<char*, size_t> static_shared;
std::string error;

// Memory between two pages that may not be touched; `size` is a multiple of a page.
char* map_guarded(size_t size) {
  void* memory =
      mmap(nullptr, size + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  char* usable = static_cast<char*>(memory) + kPage;
  if (mprotect(usable, size, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  return usable;
}

// Static shared memory: the thread-local storage of this library.
int find_static_shared(dl_phdr_info* info, size_t, void*) {
  const auto self = reinterpret_cast<uintptr_t>(&find_static_shared);
  bool here = false;
  size_t size = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type == PT_LOAD && self - info->dlpi_addr - header.p_vaddr < header.p_memsz) here = true;
    if (header.p_type == PT_TLS) size = header.p_memsz;
  }
  if (here) static_shared = {static_cast<char*>(info->dlpi_tls_data), size};
  return here;
}

unsigned lane_bit() {
  return 1u << now->current % warpSize;
}

// Makes a block the one that runs, or none.
void enter(Block* block) {
  if (block == now) return;
  if (now) now->static_shared.assign(static_shared.first, static_shared.first + static_shared.second);
  if (block) std::copy(block->static_shared.begin(), block->static_shared.end(), static_shared.first);
  now = block;
}

// Goes on with the next fiber that can, if possible of the block `first`; false if no fiber can.
bool run_next(Context& from, ptrdiff_t first) {
  for (int i = 0; i < kResident; ++i) {
    Block& block = blocks[(first + i) % kResident];
    for (unsigned step = 1; block.alive > 0 && step <= count; ++step) {
      const unsigned next = (block.current + (block.backwards ? count - step : step)) % count;
      if (block.states[next] != State::kReady) continue;
      enter(&block);
      block.current = next;
      Context& to = block.fibers[next].context;
      if (&to != &from) switch_stack(from, to);
      return true;
    }
  }
  return false;
}

void switch_to_next(bool anywhere = false) {
  Context& from = now->fibers[now->current].context;
  const ptrdiff_t first = anywhere ? random_numbers() % kResident : now - blocks;
  if (anywhere) blocks[first].current = random_numbers() % count;
  if (now->alive == 0 || !run_next(from, first)) switch_stack(from, launcher);
}

void wait(State state) {
  now->states[now->current] = state;
  switch_to_next();
}

bool release_block() {
  if (now->arrived == 0 || now->arrived < now->alive) return false;
  now->votes = {now->votes_so_far.yes, now->arrived};
  now->votes_so_far = {};
  now->arrived = spins = 0;
  std::replace(now->states, now->states + count, State::kAtBlockBarrier, State::kReady);
  return true;
}

bool release_warp(unsigned first, const Fiber& with) {
  Warp& warp = now->warps[first / warpSize];
  const unsigned lanes = with.mask & warp.alive;
  if ((lanes & ~warp.waiting) != 0) return false;
  void* operands[warpSize] = {};
  for (int i = 0; i < warpSize; ++i) {
    if (!(lanes >> i & 1)) continue;
    const Fiber& fiber = now->fibers[first + i];
    if (fiber.mask != with.mask || fiber.combine != with.combine) return false;
    operands[i] = fiber.operand;
  }
  with.combine(operands);
  for (int i = 0; i < warpSize; ++i) {
    if (lanes >> i & 1) now->states[first + i] = State::kReady;
  }
  warp.waiting &= ~lanes;
  spins = 0;
  return true;
}

void fiber_main() {
  (*body)();
  now->states[now->current] = State::kExited;
  --now->alive;
  spins = 0;
  release_block();
  const unsigned first = now->current / warpSize * warpSize;
  now->warps[first / warpSize].alive &= ~lane_bit();
  for (unsigned i = first; i < std::min(first + warpSize, count); ++i) {
    if (now->states[i] == State::kAtWarpCollective) release_warp(first, now->fibers[i]);
  }
  switch_to_next();
}

// Lets `block` start as the next of the grid.
void start(Block& block, uint64_t number, char* stacks, size_t shared_bytes) {
  block.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / grid.x / grid.y)};
  block.backwards = number % 2 == 1;
  block.current = block.backwards ? 0 : count - 1;
  block.alive = count;
  block.arrived = 0;
  block.votes_so_far = {};
  std::memset(block.shared, 0xff, shared_bytes);
  block.static_shared.assign(static_shared.second, '\xff');
  for (unsigned i = 0; i < count; ++i) {
    block.states[i] = State::kReady;
    block.fibers[i].index = {i % threads.x, i / threads.x % threads.y, i / (threads.x * threads.y)};
    block.fibers[i].copies.clear();
    block.fibers[i].copy_groups = 0;
    prepare(block.fibers[i].context, stacks + i * (kStack + kPage), fiber_main);
    block.warps[i / warpSize] = {.alive = ~0u >> (warpSize - 1 - i % warpSize), .waiting = 0};
  }
}

}  // namespace

const uint3& thread_index() {
  return now->fibers[now->current].index;
}
const uint3& block_index() {
  return now->index;
}
const dim3& block_size() {
  return threads;
}
const dim3& grid_size() {
  return grid;
}
int lane() {
  return static_cast<int>(now->current % warpSize);
}
void* dynamic_shared() {
  return now->shared;
}

void fail(const char* why) {
  error = why;
  switch_stack(now->fibers[now->current].context, launcher);
  __builtin_unreachable();
}

void yield(bool spinning) {
  spins = spinning ? spins + 1 : 0;
  if (spins > kMaxSpins) fail("a thread waits forever for a value in memory");
  switch_to_next(true);
}

Votes block_barrier(bool predicate) {
  now->votes_so_far.yes += predicate;
  ++now->arrived;
  release_block() ? switch_to_next(true) : wait(State::kAtBlockBarrier);
  return now->votes;
}

void warp_collective(unsigned mask, Combine combine, void* operand) {
  if (!(mask & lane_bit())) fail("a lane calls a warp function with a mask that leaves it out");
  Fiber& fiber = now->fibers[now->current];
  fiber.mask = mask;
  fiber.combine = combine;
  fiber.operand = operand;
  const unsigned first = now->current / warpSize * warpSize;
  now->warps[first / warpSize].waiting |= lane_bit();
  if (!release_warp(first, fiber)) wait(State::kAtWarpCollective);
}

static void copy_async(void* to, const void* from, bool valid, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) fail("cp_async: misaligned shared memory");
  if (valid && reinterpret_cast<uintptr_t>(from) % bytes != 0) fail("cp_async: misaligned global memory");
  std::memset(to, 0xff, bytes);
  Fiber& fiber = now->fibers[now->current];
  fiber.copies.push_back({to, valid ? from : nullptr, bytes, fiber.copy_groups});
}

void cp_async16(void* to, const void* from, bool valid) {
  copy_async(to, from, valid, 16);
}

void cp_async4(void* to, const void* from, bool valid) {
  copy_async(to, from, valid, 4);
}

void cp_async_commit() {
  ++now->fibers[now->current].copy_groups;
}

void cp_async_finish(unsigned pending) {
  Fiber& fiber = now->fibers[now->current];
  std::erase_if(fiber.copies, [&](const Copy& copy) {
    if (copy.group + pending >= fiber.copy_groups) return false;
    copy.from ? std::memcpy(copy.to, copy.from, copy.bytes) : std::memset(copy.to, 0, copy.bytes);
    return true;
  });
}

void run_blocks(const std::function<void()>& thread, dim3 wanted_grid, dim3 wanted_threads,
                size_t shared_bytes, const char* name) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const auto check = [&](bool ok, const std::string& what) {
    if (!ok) throw std::runtime_error(std::string(name) + ": " + what);
  };
  body = &thread;
  grid = wanted_grid;
  threads = wanted_threads;
  count = threads.x * threads.y * threads.z;
  check(count >= 1 && count <= kMaxThreads && threads.z <= 64, "a thread block of this size does not exist");
  check(grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x < 1u << 31 && grid.y < 1u << 16 &&
            grid.z < 1u << 16,
        "a grid of this size does not exist");
  check(shared_bytes <= kMaxShared, "too much shared memory");

  // What lies beyond the dynamic shared memory, but for the last bytes of its alignment, cannot be touched;
  // nor what lies beyond a stack.
  constexpr size_t kShared = (kMaxShared + kPage - 1) / kPage * kPage,
                   kStacks = (kStack + kPage) * kMaxThreads;
  static char *stacks[kResident], *shared_ends[kResident];
  for (int i = 0; i < kResident && !stacks[i]; ++i) {
    shared_ends[i] = map_guarded(kShared) + kShared;
    stacks[i] = map_guarded(kStacks);
    for (char* end = stacks[i] + kStack; end < stacks[i] + kStacks; end += kStack + kPage)
      mprotect(end, kPage, PROT_NONE);
  }
  static thread_local char used;  // or there might be no thread-local storage yet
  static_cast<volatile char&>(used) = 0;
  dl_iterate_phdr(find_static_shared, nullptr);
  shared_bytes = (shared_bytes + 127) / 128 * 128;

  error.clear();
  spins = 0;
  random_numbers.seed(1);
  const uint64_t total = uint64_t{grid.x} * grid.y * grid.z;
  uint64_t started = 0;
  for (Block& block : blocks) block.alive = 0;
  while (true) {
    for (int i = 0; i < kResident && started < total; ++i) {
      if (blocks[i].alive > 0) continue;
      blocks[i].shared = shared_ends[i] - shared_bytes;
      start(blocks[i], started++, stacks[i], shared_bytes);
    }
    const Block* block = std::find_if(blocks, blocks + kResident, [](const Block& b) { return b.alive > 0; });
    if (block == blocks + kResident) return;
    if (run_next(launcher, random_numbers() % kResident)) {
      block = now;
      enter(nullptr);
    } else {
      const auto waiting = [&](State state) {
        return std::to_string(std::count(block->states, block->states + count, state));
      };
      error = "deadlock: " + waiting(State::kAtBlockBarrier) + " threads wait at __syncthreads and " +
              waiting(State::kAtWarpCollective) + " at warp functions for threads that do not come";
    }
    if (error.empty()) continue;
    for (char* first : stacks) {  // functions that never returned have left marks for AddressSanitizer
      if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(first, kStacks);
    }
    check(false, "block (" + std::to_string(block->index.x) + ", " + std::to_string(block->index.y) + ", " +
                     std::to_string(block->index.z) + "): " + error);
  }
}

}  // namespace emu

// ---- what the host side of launches asks the CUDA runtime

namespace livevlm {
void* current_cuda_stream(int32_t) {
  return nullptr;
}
}  // namespace livevlm

const char* cudaGetErrorString(cudaError_t) {
  return "emulated";
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor         ? 8
           : attribute == cudaDevAttrComputeCapabilityMinor       ? 0
           : attribute == cudaDevAttrMultiProcessorCount          ? 16  // few, so that splits stay quick
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(emu::kMaxShared)
                                                                  : -1;
  return *value < 0 ? cudaErrorInvalidValue : cudaSuccess;
}
