/* A team of threads that run a kernel together: its barrier, and the lots from which its members take tasks.
 *
 * A member that has to wait spins first, because the others are rarely more than some microseconds behind; then it
 * sleeps, because one that was put off its core by another program comes back sooner if it leaves it a core. How long
 * it spins is learnt: much where spinning has helped, little where it was in vain. With little patience hardly anything
 * helps, so now and then it is tried again with much: the other program may be gone.
 */
#ifndef FESTE_TEAM_H
#define FESTE_TEAM_H

#include <pthread.h>
#include <stdatomic.h>

enum { LOTS = 64 };                   /* at most; a member of a larger team has one with others */

typedef struct {
    _Alignas(64) atomic_ullong taken; /* tasks of this lot, below the phase in which they were */
} lot_t;

typedef struct {
    _Alignas(64) atomic_uint phase;   /* barriers passed so far */
    _Alignas(64) atomic_int arrived;  /* members that wait at the next one */
    atomic_int asleep;
    _Alignas(64) atomic_long last;    /* the call after which all go home, see work_through; -1 if not known */
    pthread_mutex_t lock;
    pthread_cond_t passed;
    lot_t lots[LOTS];
} team_t;

enum {
    PATIENCE_MOST = 4000,             /* looks at the phase before a member sleeps: some 50 microseconds, */
    PATIENCE_LEAST = 40,              /* or half of one where it was in vain, again and again */
    SLEEPS_TO_TRY_AGAIN = 4096        /* some 75 steps of a small model in which nobody spins */
};
static atomic_int patience = PATIENCE_MOST, sleeps;

static inline int lots_of(int size) { return size < LOTS ? size : LOTS; }

static inline void team_open(team_t *team, int size) {
    atomic_init(&team->phase, 0);
    atomic_init(&team->arrived, 0);
    atomic_init(&team->asleep, 0);
    atomic_init(&team->last, -1);
    for (int lot = 0; lot < lots_of(size); lot++) atomic_init(&team->lots[lot].taken, 0);
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->passed, NULL);
}

static inline void team_close(team_t *team) {
    pthread_cond_destroy(&team->passed);
    pthread_mutex_destroy(&team->lock);
}

static inline void look_again(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Sleep until the team has passed the barrier of this phase. */
static void team_sleep(team_t *team, unsigned phase) {
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add(&team->asleep, 1);
    while (atomic_load(&team->phase) == phase) pthread_cond_wait(&team->passed, &team->lock);
    atomic_fetch_sub(&team->asleep, 1);
    pthread_mutex_unlock(&team->lock);
}

static void team_wait(team_t *team, unsigned phase) {
    int most = atomic_load_explicit(&patience, memory_order_relaxed);
    for (int looks = 0; looks < most; looks++) {
        if (atomic_load_explicit(&team->phase, memory_order_acquire) != phase) {
            if (most < PATIENCE_MOST) atomic_store_explicit(&patience, most + most / 16 + 1, memory_order_relaxed);
            return;
        }
        look_again();
    }
    most = most / 2 > PATIENCE_LEAST ? most / 2 : PATIENCE_LEAST;
    if (atomic_fetch_add_explicit(&sleeps, 1, memory_order_relaxed) % SLEEPS_TO_TRY_AGAIN == 0) most = PATIENCE_MOST;
    atomic_store_explicit(&patience, most, memory_order_relaxed);
    team_sleep(team, phase);
}

/* Wait for all members, of which there are `size`. Behind it tasks are counted anew. */
static inline void team_barrier(team_t *team, int size) {
    unsigned phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 < size) {
        team_wait(team, phase);
        return;
    }
    atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
    atomic_store(&team->phase, phase + 1);
    if (atomic_load(&team->asleep)) {
        pthread_mutex_lock(&team->lock);
        pthread_cond_broadcast(&team->passed);
        pthread_mutex_unlock(&team->lock);
    }
}

/* What a barrier does for a team of one. */
static inline void begin_tasks(team_t *team) { atomic_fetch_add_explicit(&team->phase, 1, memory_order_relaxed); }

/* The number of a task of a lot of n that nobody has taken in this phase yet, or -1. */
static inline long take_from(lot_t *lot, unsigned phase, long n) {
    unsigned long long seen = atomic_load_explicit(&lot->taken, memory_order_relaxed), next;
    long task;
    do {
        task = seen >> 32 == phase ? (long)(seen & 0xFFFFFFFF) : 0;
        if (task >= n) return -1;
        next = ((unsigned long long)phase << 32) + task + 1;
    } while (!atomic_compare_exchange_weak_explicit(&lot->taken, &seen, next, memory_order_relaxed, memory_order_relaxed));
    return task;
}

/* A task of n that nobody has taken in this phase yet, or n: first one of the member's own lot, then of the others'. The
 * lots are the same in every kernel, so that a member mostly finds in its cache what it wrote there before. */
static inline long take_task(team_t *team, int thread, int size, long n) {
    unsigned phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
    int lots = lots_of(size);
    for (int i = 0; i < lots; i++) {
        int lot = (thread % lots + i) % lots;
        long begin = n * lot / lots, end = n * (lot + 1) / lots, task = take_from(&team->lots[lot], phase, end - begin);
        if (task >= 0) return begin + task;
    }
    return n;
}

/* All go home after a call: said before a barrier and read behind it, by its number, because the next call may be over for
 * one member before another has read. */
static inline void end_after(team_t *team, long call) { atomic_store_explicit(&team->last, call, memory_order_relaxed); }
static inline int ends_after(team_t *team, long call) {
    return atomic_load_explicit(&team->last, memory_order_relaxed) == call;
}

/* What the calling thread records its kernels in, or NULL. */
static _Thread_local void *current_recording;
static inline void *recording(void) { return current_recording; }
static inline void set_recording(void *recording) { current_recording = recording; }

#endif
