# What learning and encoding keep: hash tables of words and of pairs, and a heap.

# ---- hash tables -------------------------------------------------------------------------------------------

cdef inline uint64_t mix(uint64_t h) noexcept nogil:
    h = (h ^ (h >> 29)) * <uint64_t>0x9FB21C651E98DF25
    return h ^ (h >> 32)


cdef inline uint64_t hash_bytes(const uint8_t* p, Py_ssize_t n) noexcept nogil:
    """Each step can be undone, so different words of one length up to eight bytes have different hashes."""
    cdef uint64_t h = <uint64_t>n * <uint64_t>0x9E3779B97F4A7C15, x
    cdef uint32_t head, tail
    if n < 4:
        x = <uint64_t>p[0] << 16 | <uint64_t>p[n >> 1] << 8 | p[n - 1]
    elif n < 8:
        memcpy(&head, p, 4)
        memcpy(&tail, p + n - 4, 4)
        x = <uint64_t>head << 32 | tail
    else:
        while n > 8:
            memcpy(&x, p, 8)
            h = mix(h ^ x)
            p += 8
            n -= 8
        memcpy(&x, p + n - 8, 8)  # the last eight, some of them once more
    return mix(h ^ x)


cdef void* grow(void* old, size_t size) except NULL nogil:
    cdef void* new = realloc(old, size)
    if new == NULL:
        with gil:
            raise MemoryError(f"no memory for {size} bytes of tokenizer tables")
    return new


cdef inline int fit(void** array, Py_ssize_t* room, Py_ssize_t n, size_t item) except -1 nogil:
    """Make sure that an array has room for n items; it grows to twice that."""
    if n > room[0]:
        array[0] = grow(array[0], 2 * n * item)
        room[0] = 2 * n
    return 0


cdef struct Word:
    uint64_t hash
    int64_t start     # in the arena of bytes
    int64_t count     # training: occurrences; encoding: its id, or where its ids start
    int32_t length    # 0 if the slot is free
    int32_t ids       # encoding: how many ids


cdef class WordTable:
    """Distinct words: open addressing, at most three quarters full. The entries lie in the slots themselves, because a
    look-up waits for the memory more than for anything else; the bytes of the words in an arena, in order of arrival.
    """
    cdef Word* slots
    cdef uint8_t* arena
    cdef Py_ssize_t mask, n, used, room

    def __cinit__(self):
        self.resize(1 << 13)

    def __dealloc__(self):
        free(self.slots)
        free(self.arena)

    cdef int drop(self) except -1:
        """Forget all words, and give their memory back."""
        free(self.slots)
        free(self.arena)
        self.slots, self.arena = NULL, NULL
        self.n = self.used = self.room = 0
        return self.resize(1 << 13)

    cdef int resize(self, Py_ssize_t size) except -1 nogil:
        cdef Word* old = self.slots
        cdef Py_ssize_t i, old_size = self.mask + 1 if old != NULL else 0
        self.slots = <Word*>grow(NULL, size * sizeof(Word))
        self.mask = size - 1
        memset(self.slots, 0, size * sizeof(Word))
        for i in range(old_size):
            if old[i].length:
                self.free_slot(old[i].hash)[0] = old[i]
        free(old)
        return 0

    cdef inline Word* free_slot(self, uint64_t h) noexcept nogil:
        cdef Py_ssize_t slot = <Py_ssize_t>h & self.mask
        while self.slots[slot].length:
            slot = (slot + 1) & self.mask
        return &self.slots[slot]

    cdef Word* find(self, const uint8_t* p, Py_ssize_t n) except NULL nogil:
        """The entry of a word, made with zeros if it is new. Entries move when the table grows."""
        cdef uint64_t h = hash_bytes(p, n)
        cdef Py_ssize_t slot = <Py_ssize_t>h & self.mask
        cdef Word* w = &self.slots[slot]
        while w.length:
            if w.hash == h and w.length == n and (n <= 8 or memcmp(self.arena + w.start, p, n) == 0):
                return w
            slot = (slot + 1) & self.mask
            w = &self.slots[slot]
        return self.add(p, n, h)

    cdef Word* add(self, const uint8_t* p, Py_ssize_t n, uint64_t h) except NULL nogil:
        cdef Word* w
        if 4 * self.n > 3 * self.mask:
            self.resize(2 * (self.mask + 1))
        fit(<void**>&self.arena, &self.room, self.used + n, 1)
        memcpy(self.arena + self.used, p, n)
        w = self.free_slot(h)
        w[0] = Word(h, self.used, 0, <int32_t>n, 0)
        self.used += n
        self.n += 1
        return w

    cdef void clear(self) noexcept nogil:
        memset(self.slots, 0, (self.mask + 1) * sizeof(Word))
        self.n = self.used = 0

    def count(self, const uint8_t[::1] text, const int64_t[::1] ends):
        """Add the words of some documents (valid UTF-8) to the counts. Runs without the GIL.

        The documents lie one behind the other in text (n); ends (number of documents) says where each ends. No word
        reaches beyond its document.
        """
        cdef Py_ssize_t i = 0, k, end, n
        cdef const uint8_t* p = &text[0] if text.shape[0] else NULL
        check_ends(ends, text.shape[0])
        with nogil:
            for k in range(ends.shape[0]):
                n = ends[k]
                while i < n:
                    end = word_end(p, i, n)
                    if end - i > 0x7FFFFFFF:
                        with gil:
                            raise ValueError(f"a word of {end - i} bytes is too long; the limit is 2 GB")
                    self.find(p + i, end - i).count += 1
                    i = end

    def merge(self, WordTable other):
        """Take over the counts of another table, which is empty then."""
        cdef Py_ssize_t i
        cdef Word* w
        for i in range(other.mask + 1):
            w = &other.slots[i * 0x9E3779B1 & other.mask]  # all of them, but not in order: they would pile up here
            if w.length:
                self.find(other.arena + w.start, w.length).count += w.count
        other.drop()


cdef struct Entry:
    uint64_t key      # left id << 32 | right id; EMPTY if the slot is free
    int64_t value     # -1 if it is new

cdef uint64_t EMPTY = <uint64_t>-1


cdef class PairTable:
    """Pair of ids -> integer: open addressing, at most half full."""
    cdef Entry* slots
    cdef Py_ssize_t mask, n

    def __cinit__(self):
        self.resize(1024)

    def __dealloc__(self):
        free(self.slots)

    cdef int resize(self, Py_ssize_t size) except -1 nogil:
        cdef Entry* old = self.slots
        cdef Py_ssize_t i, old_size = self.mask + 1 if old != NULL else 0
        self.slots = <Entry*>grow(NULL, size * sizeof(Entry))
        self.mask = size - 1
        for i in range(size):
            self.slots[i] = Entry(EMPTY, -1)
        for i in range(old_size):
            if old[i].key != EMPTY:
                self.find(old[i].key)[0] = old[i]
        free(old)
        return 0

    cdef inline Entry* find(self, uint64_t key) noexcept nogil:
        """The entry of a pair, or the free slot where it would go."""
        cdef Py_ssize_t slot = <Py_ssize_t>mix(key) & self.mask
        while self.slots[slot].key != key and self.slots[slot].key != EMPTY:
            slot = (slot + 1) & self.mask
        return &self.slots[slot]

    cdef Entry* get(self, uint64_t key) except NULL nogil:
        """The entry of a pair, made if it is new. Entries move when the table grows."""
        cdef Entry* entry = self.find(key)
        if entry.key == EMPTY:
            if 2 * self.n > self.mask:
                self.resize(2 * (self.mask + 1))
                entry = self.find(key)
            entry.key = key
            self.n += 1
        return entry


# ---- a heap ------------------------------------------------------------------------------------------------

cdef struct Candidate:
    int64_t order
    uint64_t key


cdef inline bint before(Candidate a, Candidate b) noexcept nogil:
    return a.order < b.order or (a.order == b.order and a.key < b.key)


cdef class Heap:
    """Gives the candidate of the lowest order first, of equals that of the lowest key."""
    cdef Candidate* items
    cdef Py_ssize_t n, room

    def __dealloc__(self):
        free(self.items)

    cdef int push(self, int64_t order, uint64_t key) except -1 nogil:
        cdef Candidate c = Candidate(order, key)
        cdef Py_ssize_t i = self.n, parent
        fit(<void**>&self.items, &self.room, self.n + 1, sizeof(Candidate))
        self.n += 1
        while i > 0:
            parent = (i - 1) // 2
            if not before(c, self.items[parent]):
                break
            self.items[i] = self.items[parent]
            i = parent
        self.items[i] = c
        return 0

    cdef Candidate pop(self) noexcept nogil:
        cdef Candidate top = self.items[0], last
        cdef Py_ssize_t i = 0, child
        self.n -= 1
        last = self.items[self.n]
        while 2 * i + 1 < self.n:
            child = 2 * i + 1
            if child + 1 < self.n and before(self.items[child + 1], self.items[child]):
                child += 1
            if not before(self.items[child], last):
                break
            self.items[i] = self.items[child]
            i = child
        self.items[i] = last
        return top
