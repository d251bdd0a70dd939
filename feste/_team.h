/* A team of threads that run a kernel together: its barrier, and the counter from which its members take tasks.
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

typedef struct {
    _Alignas(64) atomic_uint phase;   /* barriers passed so far */
    _Alignas(64) atomic_int arrived;  /* members that wait at the next one */
    atomic_int asleep;
    _Alignas(64) atomic_long next;    /* the next task of the loop that is shared out */
    _Alignas(64) atomic_long last;    /* the call after which all go home, see work_through; -1 if not known */
    pthread_mutex_t lock;
    pthread_cond_t passed;
} team_t;

enum {
    PATIENCE_MOST = 4000,             /* looks at the phase before a member sleeps: some 50 microseconds, */
    PATIENCE_LEAST = 40,              /* or half of one where it was in vain, again and again */
    SLEEPS_TO_TRY_AGAIN = 4096        /* some 75 steps of a small model in which nobody spins */
};
static atomic_int patience = PATIENCE_MOST, sleeps;

static inline void team_open(team_t *team) {
    atomic_init(&team->phase, 0);
    atomic_init(&team->arrived, 0);
    atomic_init(&team->asleep, 0);
    atomic_init(&team->next, 0);
    atomic_init(&team->last, -1);
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

/* Wait for all members, of which there are `size`. The last to come begins a new loop of tasks. */
static inline void team_barrier(team_t *team, int size) {
    unsigned phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 < size) {
        team_wait(team, phase);
        return;
    }
    atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&team->next, 0, memory_order_relaxed);
    atomic_store(&team->phase, phase + 1);
    if (atomic_load(&team->asleep)) {
        pthread_mutex_lock(&team->lock);
        pthread_cond_broadcast(&team->passed);
        pthread_mutex_unlock(&team->lock);
    }
}

/* A task's number; a member that came too late for one gets a number beyond the last. */
static inline long take_task(team_t *team) { return atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed); }
static inline void begin_tasks(team_t *team) { atomic_store_explicit(&team->next, 0, memory_order_relaxed); }

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
