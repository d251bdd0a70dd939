# Encoding words as tokens, and decoding tokens.

# ---- encoding ----------------------------------------------------------------------------------------------

cdef enum:
    CACHED_BYTES = 128          # longer words are not kept
    CACHED_WORDS = 1 << 17      # words kept before the cache starts afresh
    MAX_TRIE_BYTES = 1 << 22    # of all tokens together; GPT-2's have 320,000
    FILTER_BYTES = 1 << 16

cdef int64_t NO_RANK = 0x7FFFFFFFFFFFFFFF
cdef uint32_t NO_CHILD = <uint32_t>-1


cdef struct Child:
    uint32_t key      # parent << 8 | byte; NO_CHILD if the slot is free
    int32_t node      # -1 if the slot is free


cdef class Trie:
    """What follows a node by which byte: open addressing, at most half full. Eight bytes a slot, because looking
    up tokens is most of the work on a new word, and waits for the cache."""
    cdef Child* slots
    cdef Py_ssize_t mask, n

    def __cinit__(self):
        self.resize(1024)

    def __dealloc__(self):
        free(self.slots)

    cdef int resize(self, Py_ssize_t size) except -1:
        cdef Child* old = self.slots
        cdef Py_ssize_t i, old_size = self.mask + 1 if old != NULL else 0
        self.slots = <Child*>grow(NULL, size * sizeof(Child))
        self.mask = size - 1
        for i in range(size):
            self.slots[i] = Child(NO_CHILD, -1)
        for i in range(old_size):
            if old[i].key != NO_CHILD:
                self.find(old[i].key)[0] = old[i]
        free(old)
        return 0

    cdef inline Child* find(self, uint32_t key) noexcept nogil:
        """The entry of a key, or the free slot where it would go. The children of a node lie side by side."""
        cdef uint64_t place = <uint64_t>(key >> 8) * <uint64_t>0x9E3779B97F4A7C15 >> 32
        cdef Py_ssize_t slot = <Py_ssize_t>(place ^ (key & 0xFF)) & self.mask
        while self.slots[slot].key != key and self.slots[slot].key != NO_CHILD:
            slot = (slot + 1) & self.mask
        return &self.slots[slot]

    cdef int32_t setdefault(self, uint32_t key, int32_t node) except -1:
        """The node of a key, which becomes `node` if there was none."""
        cdef Child* child = self.find(key)
        if child.key == key:
            return child.node
        child[0] = Child(key, node)
        self.n += 1
        if 2 * self.n > self.mask:
            self.resize(2 * (self.mask + 1))
        return node


cdef struct Token:
    int32_t rank      # of the merge that makes it, -1 for a byte
    int32_t left      # the two tokens it is made of
    int32_t right
    int32_t length    # in bytes; 0 of a token that no merge makes
    int32_t shorter   # the longest other token that it begins with, -1 for a byte


cdef class Merges:
    """The merges of a tokenizer: pair -> (rank, id). Read-only once made, so threads may share it.

    They are consistent if each token is made by one merge, behind those that make its two parts, and its own bytes
    come to it. Then there is a trie too: each token is a node, and what begins a token but is none has a further one.
    """
    cdef PairTable table
    cdef uint8_t[FILTER_BYTES] filter  # a bit for the hash of each pair: nearly all that are looked up are none
    cdef int32_t[256] base
    cdef Token[::1] tokens         # by id
    cdef Trie trie
    cdef readonly bint consistent

    def __init__(self, const int32_t[::1] base, const int32_t[:, ::1] pairs, const int32_t[::1] ids):
        """base: ids of the 256 bytes; pairs (n, 2) in the order of their rank; ids (n) of the merged tokens."""
        cdef Py_ssize_t k
        cdef Entry* entry
        cdef uint64_t key, bit
        self.table, self.trie = PairTable(), Trie()
        memset(self.filter, 0, sizeof(self.filter))
        for k in range(256):
            self.base[k] = base[k]
        for k in range(pairs.shape[0]):
            key = <uint64_t>pairs[k, 0] << 32 | <uint64_t>pairs[k, 1]
            bit = mix(key) & (8 * FILTER_BYTES - 1)
            self.filter[bit >> 3] |= <uint8_t>(1 << (bit & 7))
            entry = self.table.get(key)
            if entry.value < 0:  # of two merges of one pair the first counts
                entry.value = <int64_t>k << 32 | ids[k]
        self.consistent = self.set_tokens(base, pairs, ids)
        if self.consistent:
            self.make_trie(base, ids)

    cdef bint set_tokens(self, const int32_t[::1] base, const int32_t[:, ::1] pairs, const int32_t[::1] ids):
        """Fill the table of tokens; False if the merges are not consistent, or their tokens too long for a trie."""
        cdef Py_ssize_t k, total = 0
        cdef Token* a
        cdef Token* b
        cdef int size = max(np.max(base), np.max(pairs, initial=0), np.max(ids, initial=0)) + 1
        self.tokens = np.zeros(size, np.dtype("i4, i4, i4, i4, i4"))
        for k in range(256):
            self.tokens[base[k]] = Token(-1, -1, -1, 1, -1)
        for k in range(pairs.shape[0]):
            a, b = &self.tokens[pairs[k, 0]], &self.tokens[pairs[k, 1]]
            if a.length == 0 or b.length == 0 or self.tokens[ids[k]].length \
                    or not self.apart(pairs[k, 0], pairs[k, 1], k):
                return False
            total += a.length + b.length
            if total + size > MAX_TRIE_BYTES:  # a key of the trie holds 2^24 nodes
                return False
            self.tokens[ids[k]] = Token(<int32_t>k, pairs[k, 0], pairs[k, 1], a.length + b.length, -1)
        return True

    cdef make_trie(self, const int32_t[::1] base, const int32_t[::1] ids):
        cdef Py_ssize_t i, length
        cdef int32_t node, token, n_ids = <int32_t>self.tokens.shape[0], n_nodes = n_ids
        cdef const uint8_t* p
        text = {base[i]: bytes([i]) for i in range(256)}
        for token in ids:  # in the order of the merges
            text[token] = text[self.tokens[token].left] + text[self.tokens[token].right]
        for token in sorted(ids, key=lambda token: len(text[token])):  # so that what a token begins with is there
            p, length, node = text[token], self.tokens[token].length, self.base[<int>text[token][0]]
            for i in range(1, length):
                if node < n_ids:
                    self.tokens[token].shorter = node
                node = self.trie.setdefault(<uint32_t>node << 8 | p[i], token if i == length - 1 else n_nodes)
                n_nodes += node == n_nodes

    cdef inline int64_t rank(self, int32_t a, int32_t b) noexcept nogil:
        """rank << 32 | id of the merged token, or NO_RANK."""
        cdef uint64_t key = <uint64_t>a << 32 | <uint64_t>b, bit = mix(key) & (8 * FILTER_BYTES - 1)
        cdef Entry* entry
        if not self.filter[bit >> 3] >> (bit & 7) & 1:
            return NO_RANK
        entry = self.table.find(key)
        return entry.value if entry.key != EMPTY else NO_RANK

    cdef inline bint apart(self, int32_t a, int32_t b, int64_t limit) noexcept nogil:
        """Whether a and b side by side stay two tokens under the merges of rank below `limit`.

        Goes back in time: undoes the later of the merges that made the two tokens at the border, and looks whether
        a merge across the border would have come before it. Of equal ranks the leftmost merge comes first.
        """
        while True:
            if self.rank(a, b) < limit << 32:
                return False
            if self.tokens[a].rank > self.tokens[b].rank:
                limit = min(limit, self.tokens[a].rank)
                a = self.tokens[a].right
            elif self.tokens[b].rank >= 0:
                limit = min(limit, self.tokens[b].rank + 1)
                b = self.tokens[b].left
            else:
                return True

    cdef inline int32_t longest(self, const uint8_t* p, Py_ssize_t n) noexcept nogil:
        """The longest token that the n > 0 bytes at p begin with."""
        cdef int32_t node = self.base[p[0]], token = node
        cdef Py_ssize_t i
        for i in range(1, n):
            node = self.trie.find(<uint32_t>node << 8 | p[i]).node
            if node < 0:
                break
            if node < self.tokens.shape[0]:
                token = node
        return token


cdef class Encoder:
    """Encodes with some merges and its own cache of words; of several threads one uses it at a time."""
    cdef Merges merges
    cdef object lock
    cdef WordTable cache
    cdef int32_t* ids              # of the cached words of more than one
    cdef Py_ssize_t n_ids, room_ids
    cdef Place* places             # for one word in `by_rank`
    cdef Py_ssize_t room_places
    cdef Heap heap

    def __cinit__(self, Merges merges):
        self.merges, self.cache, self.heap, self.lock = merges, WordTable(), Heap(), Lock()

    def __dealloc__(self):
        free(self.ids)
        free(self.places)

    def encode(self, const uint8_t[::1] text, const int64_t[::1] ends, int32_t[::1] out, int64_t[::1] out_ends):
        """Write the ids of some documents (valid UTF-8) to out; returns how many. Runs without the GIL.

        The documents lie one behind the other in text (n); ends (number of documents) says where each ends, and
        out_ends (the same) where its ids do. out has room for an id for each byte.
        """
        cdef Py_ssize_t i = 0, k = 0, document, end, n
        if out.shape[0] < text.shape[0] or out_ends.shape[0] < ends.shape[0]:
            raise ValueError(f"out must have room for {text.shape[0]} ids of {ends.shape[0]} documents, got "
                             f"{out.shape[0]} and {out_ends.shape[0]}")
        check_ends(ends, text.shape[0])
        cdef const uint8_t* p = &text[0] if text.shape[0] else NULL
        with self.lock, nogil:
            for document in range(ends.shape[0]):
                n = ends[document]
                while i < n:
                    end = word_end(p, i, n)
                    k += self.encode_word(p + i, end - i, &out[k])
                    i = end
                out_ends[document] = k
        return k

    cdef Py_ssize_t encode_word(self, const uint8_t* p, Py_ssize_t n, int32_t* out) except -1 nogil:
        cdef Word* w
        cdef Py_ssize_t k
        if n > CACHED_BYTES:
            return self.merge(p, n, out)
        if self.cache.n == CACHED_WORDS:
            self.cache.clear()
            self.n_ids = 0
        w = self.cache.find(p, n)
        if w.ids == 1:
            out[0] = <int32_t>w.count
        elif w.ids:
            memcpy(out, self.ids + w.count, w.ids * sizeof(int32_t))
        else:
            k = self.merge(p, n, out)
            w.count, w.ids = out[0] if k == 1 else self.keep(out, k), <int32_t>k
        return w.ids

    cdef Py_ssize_t keep(self, const int32_t* ids, Py_ssize_t n) except -1 nogil:
        """Keep the ids of a word; returns where they start."""
        fit(<void**>&self.ids, &self.room_ids, self.n_ids + n, sizeof(int32_t))
        memcpy(self.ids + self.n_ids, ids, n * sizeof(int32_t))
        self.n_ids += n
        return self.n_ids - n

    cdef Py_ssize_t merge(self, const uint8_t* p, Py_ssize_t n, int32_t* out) except -1 nogil:
        """The ids of one word; returns how many."""
        if n > 0x7FFFFFFF:
            with gil:
                raise ValueError(f"a word of {n} bytes is too long; the limit is 2 GB")
        return self.forward(p, n, out) if self.merges.consistent else self.by_rank(p, n, out)

    cdef Py_ssize_t forward(self, const uint8_t* p, Py_ssize_t n, int32_t* out) noexcept nogil:
        """Take the longest token that stays apart from the one before, and go back where none does.

        Tokens are the encoding of their bytes if and only if each two neighbours among them are the encoding of
        theirs: the first merge across any border would cross it between these two alone as well. So there is one
        way to reach any place by tokens that stay apart, the encoding of what stands before it, and the search
        comes to no place twice: time is linear in n, as tokens have a greatest length.
        """
        cdef Py_ssize_t k = 0, at = 0
        cdef int32_t token = self.merges.longest(p, n)
        while True:
            while token >= 0 and k > 0 and not self.merges.apart(out[k - 1], token, 0x7FFFFFFF):
                token = self.merges.tokens[token].shorter
            if token >= 0:
                out[k] = token
                k += 1
                at += self.merges.tokens[token].length
                if at == n:
                    return k
                token = self.merges.longest(p + at, n - at)
            else:
                k -= 1
                at -= self.merges.tokens[out[k]].length
                token = self.merges.tokens[out[k]].shorter

    cdef Py_ssize_t by_rank(self, const uint8_t* p, Py_ssize_t n, int32_t* out) except -1 nogil:
        """Merge the pair of lowest rank, the leftmost of equals, until there is none: a heap of (rank, place)."""
        cdef Py_ssize_t i, j, k = 0
        cdef Place* place
        cdef Candidate c
        fit(<void**>&self.places, &self.room_places, n, sizeof(Place))
        for i in range(n):
            self.places[i] = Place(self.merges.base[p[i]], <int32_t>(i - 1), <int32_t>(i + 1), 0, 0, 0, 0)
        self.places[n - 1].right = -1
        for i in range(n - 1):
            self.offer(i)
        while self.heap.n:
            c = self.heap.pop()
            place = &self.places[c.key]
            j = place.right
            if j < 0 or self.merges.rank(place.symbol, self.places[j].symbol) != c.order:
                continue  # an earlier merge has changed this place
            place.symbol, place.right = <int32_t>c.order, self.places[j].right
            self.places[j].right = -1
            if place.right >= 0:
                self.places[place.right].left = <int32_t>c.key
                self.offer(c.key)
            if place.left >= 0:
                self.offer(place.left)
        i = 0
        while i >= 0:
            out[k] = self.places[i].symbol
            k += 1
            i = self.places[i].right
        return k

    cdef inline int offer(self, Py_ssize_t i) except -1 nogil:
        """Make a candidate of the pair that starts at a place, if it can be merged."""
        cdef int64_t rank = self.merges.rank(self.places[i].symbol, self.places[self.places[i].right].symbol)
        if rank != NO_RANK:
            self.heap.push(rank, i)
        return 0


def to_lists(const int32_t[::1] ids, const int64_t[::1] ends, list numbers):
    """The ids of each document as a list: those of document k end at ends[k].

    numbers[i] is the int i for every id there is. The lists share these objects, because to make an int for each id
    takes several times as long as to encode the text.
    """
    cdef Py_ssize_t i = 0, j, k, n, vocab_size = len(numbers)
    cdef list found = [], document
    check_ends(ends, ids.shape[0])
    for k in range(ends.shape[0]):
        n = ends[k] - i
        document = PyList_New(n)
        for j in range(n):
            number = numbers[ids[i + j]] if 0 <= ids[i + j] < vocab_size else <object>ids[i + j]
            Py_INCREF(number)  # PyList_SET_ITEM takes over a reference
            PyList_SET_ITEM(document, j, number)
        i = ends[k]
        found.append(document)
    return found


# ---- decoding ----------------------------------------------------------------------------------------------

def decode(const int32_t[::1] ids, bytes arena, const int64_t[::1] starts):
    """The bytes of some ids; token i is arena[starts[i]:starts[i + 1]], and 16 bytes of anything end the arena."""
    cdef Py_ssize_t i, n = ids.shape[0], vocab_size = starts.shape[0] - 1, size = 0, length
    for i in range(n):
        if ids[i] < 0 or ids[i] >= vocab_size:
            raise ValueError(f"token ids must lie in 0 .. {vocab_size - 1}, got {ids[i]} at position {i}")
        size += starts[ids[i] + 1] - starts[ids[i]]
    cdef bytes text = PyBytes_FromStringAndSize(NULL, size)
    cdef const uint8_t* source = arena
    cdef uint8_t* target = text
    cdef uint8_t* end = target + size
    with nogil:
        for i in range(n):
            length = starts[ids[i] + 1] - starts[ids[i]]
            if length <= 16 <= end - target:
                memcpy(target, source + starts[ids[i]], 16)  # of a known length is two instructions, not a call
            else:
                memcpy(target, source + starts[ids[i]], length)
            target += length
    return text
