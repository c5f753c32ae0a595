// A pool of threads for one decoder: it runs the stages of a step with barriers between them, and sleeps when idle.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "common.h"

namespace {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

// A number that threads wait on: they look at it for some microseconds, then sleep, so that a waiting thread does
// not take a core from another process.
struct Signal {
    std::atomic<uint32_t> value{0};
    std::atomic<int> sleepers{0};

    void wait_past(uint32_t old) {
        for (int look = 0; look < 600; ++look) {
            if (value.load(std::memory_order_acquire) != old) return;
            relax();
        }
        sleepers.fetch_add(1);
        while (value.load() == old)
            syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value), FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
        sleepers.fetch_sub(1);
    }

    void advance() {
        value.fetch_add(1);
        if (sleepers.load())
            syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    }
};

class Pool {
  public:
    explicit Pool(int count) : count_(count) {
        for (int thread = 1; thread < count; ++thread) workers_.emplace_back([this, thread] { serve(thread); });
    }

    ~Pool() {
        stop_ = true;
        start_.advance();
        for (auto& worker : workers_) worker.join();
    }

    int size() const { return count_; }

    // Runs body(thread) on every thread and returns when all are done.
    template <class Body>
    void run(const Body& body) {
        next_ = 0;
        job_ = [&body](int thread) { body(thread); };
        if (count_ > 1) start_.advance();
        body(0);
        barrier();
    }

    // Within run: returns when every thread is here. The last to arrive restarts the count of tasks.
    void barrier() {
        if (count_ == 1) {
            next_.store(0, std::memory_order_relaxed);
            return;
        }
        uint32_t old = passed_.value.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1) + 1 == count_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            passed_.advance();
        } else {
            passed_.wait_past(old);
        }
    }

    // Within run: every thread takes tasks 0..count-1 in turn until none is left, then waits for the others.
    template <class Body>
    void tasks(int64_t count, const Body& body) {
        for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < count;) body(task);
        barrier();
    }

  private:
    void serve(int thread) {
        for (uint32_t seen = 0;;) {
            start_.wait_past(seen);
            ++seen;
            if (stop_) return;
            job_(thread);
            barrier();
        }
    }

    int count_;
    std::vector<std::thread> workers_;
    Signal start_, passed_;
    std::atomic<int> arrived_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<bool> stop_{false};
    std::function<void(int)> job_;
};

}  // namespace
