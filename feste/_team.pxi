# How threads run a kernel: a call (function and arguments), the team that works through one call or many, and recordings.
#
# Every kernel ends in `run`, with a body that each member of a team executes:
#
#     cdef struct GeluForward: ...                                   its arguments
#     cdef void gelu_forward_body(const void* call, const Member* me) noexcept nogil:
#         the member's share of the work; `barrier(me)` where all must have come so far
#     def gelu_forward(...): check the arguments, then run(gelu_forward_body, &k, sizeof(k), ...)
#
# `run` executes the body at once with a team of its own, or notes it down if the calling thread is recording. A recording
# is replayed by one team, in one parallel region: its members stay awake from kernel to kernel, and Python is not asked.
# CUDA calls this a graph.

cdef struct Member:
    team_t* team
    int thread               # 0 .. size - 1
    int size                 # of the team
    char* work               # the work space of the whole team

ctypedef void (*Body)(const void* call, const Member* me) noexcept nogil

cdef struct Call:
    Body body
    const void* arguments
    bint alone               # too little work for a second thread: member 0 does all of it, as a team of one


cdef struct Share:           # begin .. end of a loop that is divided evenly
    Py_ssize_t begin, end


cdef inline Share share(const Member* me, Py_ssize_t n) noexcept nogil:
    """The member's part of n equal pieces of work."""
    return Share(begin=n * me.thread // me.size, end=n * (me.thread + 1) // me.size)


cdef inline Py_ssize_t next_task(const Member* me, Py_ssize_t n) noexcept nogil:
    """One of the tasks 0 .. n - 1 that nobody has taken yet, or n; first those of the member's `share`, then any.

    Between two barriers there is at most one loop over tasks.
    """
    return take_task(me.team, me.thread, me.size, n)


cdef inline void barrier(const Member* me) noexcept nogil:
    """Wait until every member has come so far."""
    if me.size > 1:
        team_barrier(me.team, me.size)
    else:
        begin_tasks(me.team)


cdef void work_through(const Call* calls, Py_ssize_t first, Py_ssize_t n, Py_ssize_t* end, double until, double* seconds,
                       Member me) noexcept nogil:
    """A member's part of the calls first .. n, in their order; ends short of n, at `end`, once the clock says until.

    seconds (n) or NULL: member 0 adds what each call took, up to the barrier behind it.
    """
    cdef team_t own
    cdef Member alone = Member(team=&own, thread=0, size=1, work=me.work)
    cdef Py_ssize_t i = first
    cdef double begun = omp_get_wtime(), now
    team_open(&own, 1)
    while i < n:
        if not calls[i].alone:
            calls[i].body(calls[i].arguments, &me)
        elif me.thread == 0:
            calls[i].body(calls[i].arguments, &alone)
            begin_tasks(&own)
        i += 1
        if i < n and not (calls[i - 1].alone and calls[i].alone):
            if me.thread == 0 and omp_get_wtime() > until:
                end_after(me.team, i)
            barrier(&me)
        if me.thread == 0 and seconds != NULL:
            now = omp_get_wtime()
            seconds[i - 1] += now - begun
            begun = now
        if ends_after(me.team, i):
            break
    team_close(&own)
    if me.thread == 0:
        end[0] = i


cdef Py_ssize_t replay(const Call* calls, Py_ssize_t first, Py_ssize_t n, double until, double* seconds, int threads,
                       char* work) noexcept nogil:
    """Work through calls first .. n with a team of so many threads; returns where it ended, for the clock may say until."""
    cdef team_t team
    cdef Py_ssize_t end = first
    team_open(&team, threads)
    if threads == 1:
        work_through(calls, first, n, &end, until, seconds, Member(team=&team, thread=0, size=1, work=work))
    else:
        with parallel(num_threads=threads):
            work_through(calls, first, n, &end, until, seconds,
                         Member(team=&team, thread=threadid(), size=omp_get_num_threads(), work=work))
    team_close(&team)
    return end


cdef class Recording:
    """Kernels that are called within `with recording:` are noted down instead, to be run by `run`, as often as one likes.

    They read and write the same arrays each time, with the same numbers as arguments; what the arrays hold may change,
    but indices (ids, targets) are checked only while recording. Recording is a matter of the calling thread alone.
    """

    cdef list arguments      # bytes: the structs that calls point to
    cdef list arrays         # that keeps the memory of the arrays alive
    cdef Call* calls
    cdef Py_ssize_t n
    cdef size_t work         # bytes
    cdef readonly int threads

    def __cinit__(self):
        self.arguments, self.arrays, self.threads = [], [], n_threads

    def __dealloc__(self):
        free(self.calls)

    def __len__(self):
        return self.n

    def __enter__(self):
        if recording() != NULL:
            raise RuntimeError("this thread records already")
        set_recording(<void*>self)
        return self

    def __exit__(self, *error):
        set_recording(NULL)

    def run(self, Py_ssize_t first=0, end=None, cnp.ndarray seconds=None):
        """Execute the calls first .. end, all by default, in their order.

        seconds (len(self)) float64, if given: what each of them took is added to it. Python's signal handlers get their turn
        every tenth of a second or so.
        """
        cdef Py_ssize_t at = first, last = self.n if end is None else end
        cdef char* work = <char*>scratch(self.work)
        cdef double* took = NULL
        cdef Arrays args
        args.n = 0
        if seconds is not None:
            took = <double*>array(&args, seconds, cnp.NPY_FLOAT64, 1, self.n, "seconds", True)
        if not 0 <= first <= last <= self.n:
            raise ValueError(f"there are calls 0 .. {self.n}, not {first} .. {last}")
        while at < last:
            with nogil:
                at = replay(self.calls, at, last, omp_get_wtime() + 0.1, took, self.threads, work)
            PyErr_CheckSignals()

    cdef int add(self, Body body, const void* arguments, size_t size, size_t work, bint alone) except -1:
        cdef bytes held = (<const char*>arguments)[:size]
        cdef void* calls = realloc(self.calls, (self.n + 1) * sizeof(Call))
        if calls == NULL:
            raise MemoryError(f"no memory for a recording of {self.n + 1} calls")
        self.calls = <Call*>calls
        self.calls[self.n] = Call(body=body, arguments=<const char*>held, alone=alone)
        self.arguments.append(held)
        self.work = max(self.work, work)
        self.n += 1
        return 0


cdef int run(Body body, const void* arguments, size_t size, size_t work, bint alone) except -1:
    """Execute a kernel, or note it down. arguments: a struct of so many bytes; work: bytes of work space for the team."""
    cdef Call call
    cdef char* space
    if recording() != NULL:
        return (<Recording>recording()).add(body, arguments, size, work, alone)
    space = <char*>scratch(work)
    call = Call(body=body, arguments=arguments, alone=False)
    with nogil:
        replay(&call, 0, 1, INFINITY, NULL, 1 if alone else n_threads, space)
    return 0


cdef inline void keep_array(cnp.ndarray x):
    """Hold on to an argument of a call that is noted down."""
    if recording() != NULL:
        (<Recording>recording()).arrays.append(x)
