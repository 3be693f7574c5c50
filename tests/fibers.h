// Threads of a kernel as fibers of one CPU thread: each runs until it gives way to the next.

#include <ucontext.h>

#include <functional>
#include <vector>

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool ended;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int running;
static std::function<void()> body;

static void give_way() { swapcontext(&fibers[running].context, &scheduler); }

static void fiber() {
    body();
    fibers[running].ended = true;
}

// Runs `body` in so many threads; `enter` says which one goes on, each time that one does.
template <class Enter> static void run_fibers(int count, Enter enter) {
    fibers.resize(count);
    for (Fiber& one : fibers) {
        one.stack.resize(1 << 16);
        one.ended = false;
        getcontext(&one.context);
        one.context.uc_stack.ss_sp = one.stack.data();
        one.context.uc_stack.ss_size = one.stack.size();
        one.context.uc_link = &scheduler;
        makecontext(&one.context, fiber, 0);
    }
    for (bool working = true; working;) {
        working = false;
        for (running = 0; running < count; running++) {
            if (fibers[running].ended) continue;
            working = true;
            enter(running);
            swapcontext(&scheduler, &fibers[running].context);
        }
    }
}
