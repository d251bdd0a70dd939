# Learning merges: the most frequent pair becomes a token, again and again.

cdef struct Place:     # where a symbol stands in a word; what a merge swallows is linked to no more
    int32_t symbol     # its id
    int32_t left       # its neighbours in the same word, -1 at the ends
    int32_t right
    int32_t word       # training: the word it belongs to
    int32_t pair       # training: the pair that it makes with its right neighbour, if there is one
    int32_t previous   # training: the places of the same pair, -1 at the ends
    int32_t next


cdef struct Pair:
    uint64_t key       # left id << 32 | right id
    int64_t count
    int32_t first      # the list of its places
    int32_t last


cdef class Trainer:
    """Learns merges from a table of words, which is empty then. `base` maps the 256 bytes to their ids."""
    cdef Place* places             # of all bytes of all words
    cdef int64_t* weight           # how often each word occurs
    cdef Pair* pairs               # in the order they were met
    cdef Py_ssize_t n, n_pairs, room_pairs, n_candidates
    cdef PairTable index           # of pairs
    cdef Heap heap                 # (-count, pair) of the first n_candidates pairs, with counts that may be too high

    def __cinit__(self, WordTable words, const int32_t[::1] base):
        cdef Py_ssize_t i
        self.n = words.used
        if self.n >= 0x7FFFFFFF:
            raise ValueError(f"the distinct words hold {self.n} bytes; training takes at most 2 GB of them")
        self.index, self.heap = PairTable(), Heap()
        self.places = <Place*>grow(NULL, (self.n + 1) * sizeof(Place))
        self.weight = <int64_t*>grow(NULL, (words.n + 1) * sizeof(int64_t))
        self.place_words(words, base)
        words.drop()
        for i in range(self.n):
            if self.places[i].right >= 0:
                self.link(<int32_t>i)
        self.push_new()

    def __dealloc__(self):
        free(self.places)
        free(self.weight)
        free(self.pairs)

    cdef void place_words(self, WordTable words, const int32_t[::1] base) noexcept:
        """Lay out the symbols as the bytes lie in the arena: the words met first, so the most frequent, together."""
        cdef Py_ssize_t i, k = 0
        cdef int32_t at, end
        cdef Word* w
        for i in range(words.mask + 1):
            w = &words.slots[i]
            if w.length == 0:
                continue
            self.weight[k] = w.count
            end = <int32_t>w.start + w.length
            for at in range(<int32_t>w.start, end):
                self.places[at] = Place(base[words.arena[at]], at - 1, at + 1, <int32_t>k, -1, -1, -1)
            self.places[w.start].left = self.places[end - 1].right = -1
            k += 1

    cdef int link(self, int32_t i) except -1 nogil:
        """Count the pair that starts at a place, and put the place at the end of its list."""
        cdef Place* place = &self.places[i]
        cdef uint64_t key = <uint64_t>place.symbol << 32 | <uint64_t>self.places[place.right].symbol
        cdef Entry* entry = self.index.get(key)
        if entry.value < 0:
            fit(<void**>&self.pairs, &self.room_pairs, self.n_pairs + 1, sizeof(Pair))
            self.pairs[self.n_pairs] = Pair(key, 0, -1, -1)
            entry.value = self.n_pairs
            self.n_pairs += 1
        cdef Pair* pair = &self.pairs[entry.value]
        place.pair, place.previous, place.next = <int32_t>entry.value, pair.last, -1
        if pair.last >= 0:
            self.places[pair.last].next = i
        else:
            pair.first = i
        pair.last = i
        pair.count += self.weight[place.word]
        return 0

    cdef inline void unlink(self, int32_t i) noexcept nogil:
        """The pair that starts at a place is there no more."""
        cdef Place* place = &self.places[i]
        cdef Pair* pair = &self.pairs[place.pair]
        if place.previous >= 0:
            self.places[place.previous].next = place.next
        else:
            pair.first = place.next
        if place.next >= 0:
            self.places[place.next].previous = place.previous
        else:
            pair.last = place.previous
        pair.count -= self.weight[place.word]

    cdef int push_new(self) except -1 nogil:
        """Make candidates of the pairs that are new, now that their counts are known."""
        while self.n_candidates < self.n_pairs:
            if self.pairs[self.n_candidates].count > 0:
                self.heap.push(-self.pairs[self.n_candidates].count, self.pairs[self.n_candidates].key)
            self.n_candidates += 1
        return 0

    cdef Pair* best(self) except? NULL nogil:
        """The pair with the highest count, or NULL if none is left."""
        cdef Candidate c
        cdef Pair* pair
        while self.heap.n:
            c = self.heap.pop()
            pair = &self.pairs[self.index.find(c.key).value]
            if pair.count == -c.order:
                return pair
            if pair.count > 0:
                self.heap.push(-pair.count, c.key)
        return NULL

    cdef int apply(self, int32_t pair, int32_t new) except -1 nogil:
        """Replace a pair by a new token wherever it occurs, from left to right."""
        cdef int32_t i, j
        cdef Place* place
        while self.pairs[pair].first >= 0:
            i = self.pairs[pair].first
            place = &self.places[i]
            j = place.right
            self.unlink(i)
            if place.left >= 0:
                self.unlink(place.left)
            if self.places[j].right >= 0:
                self.unlink(j)
            place.symbol, place.right = new, self.places[j].right
            if place.left >= 0:
                self.link(place.left)
            if place.right >= 0:
                self.places[place.right].left = i
                self.link(i)
        return 0

    def train(self, Py_ssize_t n_merges, int32_t first_id):
        """Up to n_merges merges, as an int32 array (n, 2) of ids; fewer if no pair is left."""
        n_merges = min(n_merges, self.n)  # each takes a place at least
        cdef cnp.ndarray merges = np.empty((n_merges, 2), np.int32)
        cdef int32_t[:, ::1] out = merges
        cdef Pair* pair
        cdef Py_ssize_t k = 0
        with nogil:
            while k < n_merges:
                pair = self.best()
                if pair == NULL:
                    break
                out[k, 0], out[k, 1] = <int32_t>(pair.key >> 32), <int32_t>pair.key
                self.apply(<int32_t>(pair - self.pairs), first_id + <int32_t>k)
                self.push_new()
                k += 1
        return merges[:k]
