// A few waiting threads. torch brings its own OpenMP runtime under a private name, so linking another one would mean
// two pools that spin against each other; these threads sleep between calls.
#pragma once

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace sparing {

class Pool {
  public:
    // Run job(i) for every i in [0, count) on up to `threads` threads, the caller's among them.
    void run(int threads, int count, const std::function<void(int)> &job) {
        std::unique_lock<std::mutex> one_caller(calls_);
        grow(threads - 1);
        {
            std::lock_guard<std::mutex> lock(state_);
            job_ = &job;
            count_ = count;
            next_ = 0;
            wanted_ = threads - 1;
            busy_ = threads - 1;
            round_++;
        }
        wake_.notify_all();
        work(job, count);
        std::unique_lock<std::mutex> lock(state_);
        done_.wait(lock, [&] { return busy_ == 0; });
    }

  private:
    void grow(int threads) {
        while (static_cast<int>(workers_) < threads) {
            int number = workers_++;
            std::thread([this, number] { serve(number); }).detach();
        }
    }

    void serve(int number) {
        long seen = 0;
        for (;;) {
            const std::function<void(int)> *job;
            int count;
            {
                std::unique_lock<std::mutex> lock(state_);
                wake_.wait(lock, [&] { return round_ != seen; });
                seen = round_;
                if (number >= wanted_) continue;
                job = job_;
                count = count_;
            }
            work(*job, count);
            std::lock_guard<std::mutex> lock(state_);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    void work(const std::function<void(int)> &job, int count) {
        for (int i = next_++; i < count; i = next_++) job(i);
    }

    std::mutex calls_, state_;
    std::condition_variable wake_, done_;
    const std::function<void(int)> *job_ = nullptr;
    std::atomic<int> next_{0};
    int count_ = 0, wanted_ = 0, busy_ = 0, workers_ = 0;
    long round_ = 0;
};

// The pool of this process: after a fork the parent's threads are gone, so the child makes its own. Pools are never
// destroyed: their threads wait on them until the process ends.
inline Pool &pool() {
    static std::mutex guard;
    static Pool *current = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(guard);
    if (current == nullptr || owner != getpid()) {
        current = new Pool();
        owner = getpid();
    }
    return *current;
}

template <class F>
void parallel(int threads, int count, const F &job) {
    threads = threads < count ? threads : count;
    if (threads <= 1) {
        for (int i = 0; i < count; i++) job(i);
        return;
    }
    pool().run(threads, count, job);
}

}  // namespace sparing
