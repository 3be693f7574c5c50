// Threads of a kernel as fibers of one CPU thread: each runs until it gives way to the next.

#include <setjmp.h>
#include <ucontext.h>

#include <functional>
#include <vector>

struct Fiber {
    ucontext_t context;  // to begin
    jmp_buf place;       // to go on: swapcontext would call the system each time
    std::vector<char> stack;
    bool begun, ended;
};
static std::vector<Fiber> fibers;
static jmp_buf scheduling;
static int running;
static std::function<void()> body;

static void give_way() {
    if (!_setjmp(fibers[running].place)) _longjmp(scheduling, 1);
}

static void fiber() {
    body();
    fibers[running].ended = true;
    _longjmp(scheduling, 1);
}

static void go_on(Fiber& one) {
    if (_setjmp(scheduling)) return;
    if (one.begun) _longjmp(one.place, 1);
    one.begun = true;
    setcontext(&one.context);
}

// Runs `body` in so many threads; `enter` says which one goes on, each time that one does.
template <class Enter> static void run_fibers(int count, Enter enter) {
    fibers.resize(count);
    for (Fiber& one : fibers) {
        one.stack.resize(1 << 16);
        one.begun = one.ended = false;
        getcontext(&one.context);
        one.context.uc_stack.ss_sp = one.stack.data();
        one.context.uc_stack.ss_size = one.stack.size();
        makecontext(&one.context, fiber, 0);
    }
    for (bool working = true; working;) {
        working = false;
        for (running = 0; running < count; running++) {
            if (fibers[running].ended) continue;
            working = true;
            enter(running);
            go_on(fibers[running]);
        }
    }
}
