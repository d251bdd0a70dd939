# cython: binding=True
"""The hot loops of the tokenizer: splitting text into words, learning merges, encoding, decoding.

Design:

- Text is UTF-8 bytes from the door on. `word_end` is GPT-2's pattern written out by hand over a table of four
  classes (other, letter, number, space): the pattern needs no more, and a table beats a regex engine.
- Merges never cross a word, so training works on distinct words with their counts. Symbols lie in one array,
  linked to their neighbours; each pair knows its occurrences, so a merge touches only the places it changes.
  All occurrences of a pair arise at one moment, when the younger of its two tokens is made, so each list is
  written once, in order. Existing counts only fall, so a heap with stale entries, corrected when they surface,
  yields the exact maximum.
- Ties go to the smaller pair of ids, as in Hugging Face's trainer, and ids of bytes follow GPT-2's order, so
  the merges are the same as theirs.
- Encoding keeps the words it has met in a hash table of bounded size. A new word is encoded from left to right in
  linear time, see `Encoder.forward`, when the merges are consistent, as those of every training are. Merges that
  are not, from a file made by hand, are applied in their order through a heap, in n log n.
"""

cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from threading import Lock

import numpy as np

cnp.import_array()

cdef enum:
    OTHER = 0
    LETTER = 1
    NUMBER = 2
    SPACE = 3

cdef uint8_t* char_class = NULL  # class of every code point


def set_char_classes(const uint8_t[::1] table):
    """Install the classes of all 0x110000 code points."""
    global char_class
    if table.shape[0] != 0x110000:
        raise ValueError(f"the class table must have {0x110000} entries, got {table.shape[0]}")
    if char_class == NULL:
        char_class = <uint8_t*>malloc(0x110000)
        if char_class == NULL:
            raise MemoryError("no memory for the table of character classes")
    memcpy(char_class, &table[0], 0x110000)


# ---- words -------------------------------------------------------------------------------------------------

cdef inline int class_at(const uint8_t* p, Py_ssize_t* length) noexcept nogil:
    """The class of the character at p, which is valid UTF-8, and its length in bytes."""
    cdef uint32_t c = p[0]
    if c < 0x80:
        length[0] = 1
    elif c < 0xE0:
        length[0] = 2
        c = (c & 0x1F) << 6 | (p[1] & 0x3F)
    elif c < 0xF0:
        length[0] = 3
        c = (c & 0x0F) << 12 | <uint32_t>(p[1] & 0x3F) << 6 | (p[2] & 0x3F)
    else:
        length[0] = 4
        c = (c & 0x07) << 18 | <uint32_t>(p[1] & 0x3F) << 12 | <uint32_t>(p[2] & 0x3F) << 6 | (p[3] & 0x3F)
    return char_class[c]


cdef inline Py_ssize_t run_end(const uint8_t* text, Py_ssize_t i, Py_ssize_t n, int kind) noexcept nogil:
    cdef Py_ssize_t length
    while i < n and class_at(text + i, &length) == kind:
        i += length
    return i


cdef inline Py_ssize_t contraction_end(const uint8_t* text, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    """The end of 's 'd 'm 't 'll 've 're at i, or i."""
    cdef uint8_t a, b
    if i + 1 < n:
        a = text[i + 1]
        if a == b's' or a == b'd' or a == b'm' or a == b't':
            return i + 2
        if i + 2 < n:
            b = text[i + 2]
            if (a == b'l' and b == b'l') or (a == b'v' and b == b'e') or (a == b'r' and b == b'e'):
                return i + 3
    return i


cdef Py_ssize_t word_end(const uint8_t* text, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    """The end of the word that starts at `start`, by GPT-2's pattern (Radford et al. 2019):

    's|'d|'m|'t|'ll|'ve|'re| ?letters| ?numbers| ?others|spaces not followed by a non-space|spaces
    """
    cdef Py_ssize_t i = start, length, last
    cdef int kind
    if text[i] == b"'":
        i = contraction_end(text, i, n)
        if i > start:
            return i
    kind = class_at(text + i, &length)
    if text[i] == b' ' and i + 1 < n:
        kind = class_at(text + i + 1, &length)
        if kind != SPACE:
            return run_end(text, i + 1, n, kind)
    if kind != SPACE:
        return run_end(text, i, n, kind)
    last = i  # the run's last space belongs to the word behind it, unless it is the only one or there is none
    while i < n and class_at(text + i, &length) == SPACE:
        last = i
        i += length
    return i if i == n or last == start else last


def split_words(bytes text):
    """The words of a text, for tests and explanations."""
    cdef const uint8_t* p = text
    cdef Py_ssize_t i = 0, end, n = len(text)
    words = []
    while i < n:
        end = word_end(p, i, n)
        words.append(text[i:end])
        i = end
    return words


def safe_split(const uint8_t[::1] text, Py_ssize_t start):
    """The first position from `start` on where a word surely begins, whatever stands before and behind.

    That is an ASCII space behind an ASCII character that is none: no word has a space but at its start or
    throughout. Returns the length of the text if there is no such place.
    """
    cdef Py_ssize_t i, n = text.shape[0]
    for i in range(max(start, 1), n):
        if (text[i] == b' ' or text[i] == b'\n') and text[i - 1] < 0x80 and char_class[text[i - 1]] != SPACE:
            return i
    return n


# ---- hash tables -------------------------------------------------------------------------------------------

cdef inline uint64_t mix(uint64_t h) noexcept nogil:
    h = (h ^ (h >> 32)) * <uint64_t>0x9FB21C651E98DF25
    return h ^ (h >> 29)


cdef inline uint64_t hash_bytes(const uint8_t* p, Py_ssize_t n) noexcept nogil:
    cdef uint64_t h = <uint64_t>n * <uint64_t>0x9E3779B97F4A7C15, x
    while n >= 8:
        memcpy(&x, p, 8)
        h = mix(h ^ x)
        p += 8
        n -= 8
    x = 0
    memcpy(&x, p, n)
    return mix(h ^ x)


cdef void* grow(void* old, size_t size) except NULL nogil:
    cdef void* new = realloc(old, size)
    if new == NULL:
        with gil:
            raise MemoryError(f"no memory for {size} bytes of tokenizer tables")
    return new


cdef struct Word:
    uint64_t hash
    int64_t start     # in the arena of bytes
    int64_t count     # training: occurrences; encoding: where its ids start
    int32_t length
    int32_t ids       # encoding: how many ids


cdef class WordTable:
    """Distinct words: an open-addressing table of indices into an array of words, their bytes in an arena."""
    cdef Word* words
    cdef uint8_t* arena
    cdef int32_t* slots            # index + 1, 0 is empty
    cdef Py_ssize_t n_words, max_words, used, max_used, mask

    def __cinit__(self):
        self.max_words, self.max_used, self.mask = 1 << 12, 1 << 16, (1 << 13) - 1
        self.words = <Word*>malloc(self.max_words * sizeof(Word))
        self.arena = <uint8_t*>malloc(self.max_used)
        self.slots = <int32_t*>calloc(self.mask + 1, sizeof(int32_t))
        if self.words == NULL or self.arena == NULL or self.slots == NULL:
            raise MemoryError("no memory for a table of words")

    def __dealloc__(self):
        free(self.words)
        free(self.arena)
        free(self.slots)

    def __len__(self):
        return self.n_words

    def items(self):
        """(word, count) pairs."""
        return [(<bytes>self.arena[w.start:w.start + w.length], w.count) for w in self.words[:self.n_words]]

    cdef int find(self, const uint8_t* p, Py_ssize_t n, bint* added) except -1 nogil:
        """The index of a word, which is added with count 0 if it is new."""
        cdef uint64_t h = hash_bytes(p, n)
        cdef Py_ssize_t slot = <Py_ssize_t>h & self.mask
        cdef Word* w
        while self.slots[slot]:
            w = &self.words[self.slots[slot] - 1]
            if w.hash == h and w.length == n and memcmp(self.arena + w.start, p, n) == 0:
                added[0] = False
                return self.slots[slot] - 1
            slot = (slot + 1) & self.mask
        added[0] = True
        self.append(p, n, h)
        self.slots[slot] = <int32_t>self.n_words
        if 2 * self.n_words > self.mask:
            self.rehash()
        return <int>(self.n_words - 1)

    cdef int append(self, const uint8_t* p, Py_ssize_t n, uint64_t h) except -1 nogil:
        if self.n_words == self.max_words:
            self.words = <Word*>grow(self.words, 2 * self.max_words * sizeof(Word))
            self.max_words *= 2
        if self.used + n > self.max_used:
            self.arena = <uint8_t*>grow(self.arena, 2 * (self.used + n))
            self.max_used = 2 * (self.used + n)
        memcpy(self.arena + self.used, p, n)
        self.words[self.n_words] = Word(h, self.used, 0, <int32_t>n, 0)
        self.used += n
        self.n_words += 1
        return 0

    cdef int rehash(self) except -1 nogil:
        cdef Py_ssize_t i, slot, size = 4 * (self.mask + 1)
        self.slots = <int32_t*>grow(self.slots, size * sizeof(int32_t))
        memset(self.slots, 0, size * sizeof(int32_t))
        self.mask = size - 1
        for i in range(self.n_words):
            slot = <Py_ssize_t>self.words[i].hash & self.mask
            while self.slots[slot]:
                slot = (slot + 1) & self.mask
            self.slots[slot] = <int32_t>(i + 1)
        return 0

    cdef void clear(self) noexcept nogil:
        memset(self.slots, 0, (self.mask + 1) * sizeof(int32_t))
        self.n_words = self.used = 0

    def count(self, const uint8_t[::1] text):
        """Add the words of a text (valid UTF-8) to the counts. Runs without the GIL."""
        cdef Py_ssize_t i = 0, end, n = text.shape[0]
        cdef const uint8_t* p = &text[0] if n else NULL
        cdef bint added
        cdef int index
        with nogil:
            while i < n:
                end = word_end(p, i, n)
                if end - i > 0x7FFFFFFF:
                    with gil:
                        raise ValueError(f"a word of {end - i} bytes is too long; the limit is 2 GB")
                index = self.find(p + i, end - i, &added)
                self.words[index].count += 1
                i = end

    def merge(self, WordTable other):
        """Add the counts of another table."""
        cdef Py_ssize_t i
        cdef bint added
        cdef int index
        for i in range(other.n_words):
            index = self.find(other.arena + other.words[i].start, other.words[i].length, &added)
            self.words[index].count += other.words[i].count


cdef struct Pair:
    uint64_t key      # left id << 32 | right id; EMPTY if the slot is free
    int64_t count     # training: occurrences; encoding: rank << 32 | id of the merged token
    int64_t first     # training: its list of occurrences
    int64_t last

cdef uint64_t EMPTY = <uint64_t>-1


cdef class PairTable:
    """Pairs of ids: open addressing, the entries in the slots themselves."""
    cdef Pair* slots
    cdef Py_ssize_t mask, n

    def __cinit__(self, Py_ssize_t expected):
        cdef Py_ssize_t size = 1024
        while size < 2 * expected:
            size *= 2
        self.slots = self.empty(size)
        self.mask, self.n = size - 1, 0

    def __dealloc__(self):
        free(self.slots)

    cdef Pair* empty(self, Py_ssize_t size) except NULL nogil:
        cdef Pair* slots = <Pair*>grow(NULL, size * sizeof(Pair))
        cdef Py_ssize_t i
        for i in range(size):
            slots[i] = Pair(EMPTY, 0, -1, -1)
        return slots

    cdef Pair* find(self, uint64_t key) noexcept nogil:
        """The entry of a pair, or the free slot where it would go."""
        cdef Py_ssize_t slot = <Py_ssize_t>mix(key) & self.mask
        while self.slots[slot].key != key and self.slots[slot].key != EMPTY:
            slot = (slot + 1) & self.mask
        return &self.slots[slot]

    cdef Pair* get(self, uint64_t key) except NULL nogil:
        """The entry of a pair, made if it is new. Entries move when the table grows."""
        cdef Pair* pair = self.find(key)
        if pair.key == EMPTY:
            if 2 * self.n > self.mask:
                self.rehash()
                pair = self.find(key)
            pair.key = key
            self.n += 1
        return pair

    cdef int rehash(self) except -1 nogil:
        cdef Pair* old = self.slots
        cdef Py_ssize_t i, size = self.mask + 1
        self.slots = self.empty(2 * size)
        self.mask = 2 * size - 1
        for i in range(size):
            if old[i].key != EMPTY:
                self.find(old[i].key)[0] = old[i]
        free(old)
        return 0


# ---- learning merges ---------------------------------------------------------------------------------------

cdef struct Candidate:
    int64_t count
    uint64_t key


cdef struct Occurrence:
    int32_t position
    int32_t next       # in the same list, -1 at its end


cdef inline bint before(Candidate a, Candidate b) noexcept nogil:
    """The larger count first, then the smaller pair of ids."""
    return a.count > b.count or (a.count == b.count and a.key < b.key)


cdef class Trainer:
    """Learns merges from a table of words. `base` maps the 256 bytes to their ids."""
    cdef int32_t* symbol           # id at each position, -1 where a merge has swallowed it
    cdef int32_t* left             # neighbours in the same word, -1 at its ends
    cdef int32_t* right
    cdef int32_t* word             # which word a position belongs to
    cdef int64_t* weight           # how often that word occurs
    cdef Occurrence* occurrences
    cdef Py_ssize_t n, n_occurrences, max_occurrences
    cdef Candidate* heap
    cdef Py_ssize_t n_heap, max_heap
    cdef uint64_t* fresh           # pairs first met since candidates were last pushed
    cdef Py_ssize_t n_fresh, max_fresh
    cdef PairTable pairs

    def __cinit__(self, WordTable words, const int32_t[::1] base):
        cdef Py_ssize_t i, j, k = 0
        self.n = words.used
        if self.n >= 0x7FFFFFFF:
            raise ValueError(f"the distinct words hold {self.n} bytes; training takes at most 2 GB of them")
        self.symbol = <int32_t*>malloc(self.n * 4 + 4)
        self.left = <int32_t*>malloc(self.n * 4 + 4)
        self.right = <int32_t*>malloc(self.n * 4 + 4)
        self.word = <int32_t*>malloc(self.n * 4 + 4)
        self.weight = <int64_t*>malloc(words.n_words * 8 + 8)
        self.max_occurrences, self.max_heap, self.max_fresh = self.n + 16, 1 << 12, 1 << 12
        self.fresh = <uint64_t*>malloc(self.max_fresh * sizeof(uint64_t))
        self.occurrences = <Occurrence*>malloc(self.max_occurrences * sizeof(Occurrence))
        self.heap = <Candidate*>malloc(self.max_heap * sizeof(Candidate))
        if (self.symbol == NULL or self.left == NULL or self.right == NULL or self.word == NULL
                or self.weight == NULL or self.occurrences == NULL or self.heap == NULL
                or self.fresh == NULL):
            raise MemoryError(f"no memory to train on {self.n} bytes of distinct words")
        self.pairs = PairTable(1 << 14)
        for i in range(words.n_words):
            self.weight[i] = words.words[i].count
            for j in range(words.words[i].length):
                self.symbol[k] = base[words.arena[k]]
                self.word[k] = <int32_t>i
                self.left[k] = <int32_t>(k - 1) if j else -1
                self.right[k] = <int32_t>(k + 1) if j + 1 < words.words[i].length else -1
                k += 1
        for i in range(self.n):
            if self.right[i] >= 0:
                self.add_occurrence(i)
        self.push_fresh()

    def __dealloc__(self):
        free(self.symbol)
        free(self.left)
        free(self.right)
        free(self.word)
        free(self.weight)
        free(self.occurrences)
        free(self.heap)
        free(self.fresh)

    cdef inline uint64_t key_at(self, Py_ssize_t i) noexcept nogil:
        return <uint64_t>self.symbol[i] << 32 | <uint64_t>self.symbol[self.right[i]]

    cdef int add_occurrence(self, Py_ssize_t i) except -1 nogil:
        """Count the pair that starts at i, and remember the place."""
        cdef Pair* pair = self.pairs.get(self.key_at(i))
        if self.n_occurrences == self.max_occurrences:
            self.occurrences = <Occurrence*>grow(self.occurrences, 2 * self.max_occurrences * sizeof(Occurrence))
            self.max_occurrences *= 2
        self.occurrences[self.n_occurrences] = Occurrence(<int32_t>i, -1)
        if pair.last >= 0:
            self.occurrences[pair.last].next = <int32_t>self.n_occurrences
        else:
            pair.first = self.n_occurrences
            if self.n_fresh == self.max_fresh:
                self.fresh = <uint64_t*>grow(self.fresh, 2 * self.max_fresh * sizeof(uint64_t))
                self.max_fresh *= 2
            self.fresh[self.n_fresh] = pair.key
            self.n_fresh += 1
        pair.last = self.n_occurrences
        pair.count += self.weight[self.word[i]]
        self.n_occurrences += 1
        return 0

    cdef int push(self, Candidate c) except -1 nogil:
        cdef Py_ssize_t i = self.n_heap, parent
        if i == self.max_heap:
            self.heap = <Candidate*>grow(self.heap, 2 * self.max_heap * sizeof(Candidate))
            self.max_heap *= 2
        self.n_heap += 1
        while i > 0:
            parent = (i - 1) // 2
            if not before(c, self.heap[parent]):
                break
            self.heap[i] = self.heap[parent]
            i = parent
        self.heap[i] = c
        return 0

    cdef Candidate pop(self) noexcept nogil:
        cdef Candidate top = self.heap[0], last
        cdef Py_ssize_t i = 0, child
        self.n_heap -= 1
        last = self.heap[self.n_heap]
        while 2 * i + 1 < self.n_heap:
            child = 2 * i + 1
            if child + 1 < self.n_heap and before(self.heap[child + 1], self.heap[child]):
                child += 1
            if not before(self.heap[child], last):
                break
            self.heap[i] = self.heap[child]
            i = child
        self.heap[i] = last
        return top

    cdef int push_fresh(self) except -1 nogil:
        """Make candidates of the pairs that are new, now that their counts are known."""
        cdef Py_ssize_t k
        cdef int64_t count
        for k in range(self.n_fresh):
            count = self.pairs.find(self.fresh[k]).count
            if count > 0:
                self.push(Candidate(count, self.fresh[k]))
        self.n_fresh = 0
        return 0

    cdef bint best(self, Candidate* c) except -1 nogil:
        """The pair with the highest count, or False if none is left."""
        cdef int64_t count
        while self.n_heap:
            c[0] = self.pop()
            count = self.pairs.find(c.key).count
            if count == c.count:
                return True
            if count > 0:
                self.push(Candidate(count, c.key))
        return False

    cdef int apply(self, uint64_t key, int32_t new) except -1 nogil:
        """Replace a pair by a new token wherever it occurs, from left to right."""
        cdef int32_t a = <int32_t>(key >> 32), b = <int32_t>key, i, j, before_i, behind
        cdef int64_t occurrence = self.pairs.find(key).first, weight
        while occurrence >= 0:
            i = self.occurrences[occurrence].position
            occurrence = self.occurrences[occurrence].next
            j = self.right[i]
            if self.symbol[i] != a or j < 0 or self.symbol[j] != b:
                continue  # an earlier merge has changed this place
            weight = self.weight[self.word[i]]
            before_i, behind = self.left[i], self.right[j]
            if before_i >= 0:
                self.pairs.find(self.key_at(before_i)).count -= weight
            if behind >= 0:
                self.pairs.find(self.key_at(j)).count -= weight
            self.symbol[i], self.symbol[j] = new, -1
            self.right[i] = behind
            if before_i >= 0:
                self.add_occurrence(before_i)
            if behind >= 0:
                self.left[behind] = i
                self.add_occurrence(i)
        return 0

    def train(self, Py_ssize_t n_merges, int32_t first_id):
        """Up to n_merges merges, as an int32 array (n, 2) of ids; fewer if no pair is left."""
        cdef cnp.ndarray merges = np.empty((n_merges, 2), np.int32)
        cdef int32_t[:, ::1] out = merges
        cdef Candidate c
        cdef Py_ssize_t k = 0
        with nogil:
            while k < n_merges and self.best(&c):
                out[k, 0], out[k, 1] = <int32_t>(c.key >> 32), <int32_t>c.key
                self.apply(c.key, first_id + <int32_t>k)
                self.push_fresh()
                k += 1
        return merges[:k]


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
        """The entry of a key, or the free slot where it would go."""
        cdef Py_ssize_t slot = <Py_ssize_t>((<uint64_t>key * <uint64_t>0x9E3779B97F4A7C15) >> 32) & self.mask
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
        cdef Pair* pair
        cdef uint64_t key, bit
        self.table, self.trie = PairTable(pairs.shape[0]), Trie()
        memset(self.filter, 0, sizeof(self.filter))
        for k in range(256):
            self.base[k] = base[k]
        for k in range(pairs.shape[0]):
            key = <uint64_t>pairs[k, 0] << 32 | <uint64_t>pairs[k, 1]
            bit = mix(key) & (8 * FILTER_BYTES - 1)
            self.filter[bit >> 3] |= <uint8_t>(1 << (bit & 7))
            pair = self.table.get(key)
            if pair.first < 0:  # of two merges of one pair the first counts
                pair.first = k
                pair.count = <int64_t>k << 32 | ids[k]
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
        cdef Pair* pair
        if not self.filter[bit >> 3] >> (bit & 7) & 1:
            return NO_RANK
        pair = self.table.find(key)
        return pair.count if pair.key != EMPTY else NO_RANK

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
    cdef int32_t* ids              # of the cached words
    cdef Py_ssize_t n_ids, max_ids
    cdef void* work                # for one word in `by_rank`
    cdef Py_ssize_t max_work

    def __cinit__(self, Merges merges):
        self.merges, self.cache, self.lock = merges, WordTable(), Lock()
        self.max_ids = CACHED_WORDS
        self.ids = <int32_t*>malloc(self.max_ids * sizeof(int32_t))
        if self.ids == NULL:
            raise MemoryError("no memory for the cache of words")

    def __dealloc__(self):
        free(self.ids)
        free(self.work)

    def encode(self, const uint8_t[::1] text, int32_t[::1] out):
        """Write the ids of a text (valid UTF-8) to out, which has room for one for each byte; returns how many."""
        cdef Py_ssize_t i = 0, k = 0, end, n = text.shape[0]
        if out.shape[0] < n:
            raise ValueError(f"out must have room for {n} ids, got {out.shape[0]}")
        if n == 0:
            return 0
        cdef const uint8_t* p = &text[0]
        with self.lock, nogil:
            while i < n:
                end = word_end(p, i, n)
                k += self.encode_word(p + i, end - i, &out[k])
                i = end
        return k

    cdef Py_ssize_t encode_word(self, const uint8_t* p, Py_ssize_t n, int32_t* out) except -1 nogil:
        cdef Word* w
        cdef bint added
        cdef int index
        cdef Py_ssize_t k
        if n > CACHED_BYTES:
            return self.merge(p, n, out)
        if self.cache.n_words == CACHED_WORDS:
            self.cache.clear()
            self.n_ids = 0
        index = self.cache.find(p, n, &added)
        w = &self.cache.words[index]
        if added:
            k = self.merge(p, n, out)
            if self.n_ids + k > self.max_ids:
                self.ids = <int32_t*>grow(self.ids, 2 * self.max_ids * sizeof(int32_t))
                self.max_ids *= 2
            memcpy(self.ids + self.n_ids, out, k * sizeof(int32_t))
            w.count, w.ids = self.n_ids, <int32_t>k
            self.n_ids += k
            return k
        for k in range(w.ids):
            out[k] = self.ids[w.count + k]
        return w.ids

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
        """Merge the pair of lowest rank, the leftmost of equals, until there is none: a heap of (rank, position)
        over linked symbols. The heap holds at most one entry for each pair that ever was: n - 1 at first and two
        more for each of at most n - 1 merges."""
        cdef Py_ssize_t size = 3 * n * (sizeof(int32_t) + sizeof(Candidate))
        if size > self.max_work:
            self.work = grow(self.work, size)
            self.max_work = size
        cdef Candidate* heap = <Candidate*>self.work
        cdef int32_t* symbol = <int32_t*>(heap + 3 * n)
        cdef int32_t* left = symbol + n
        cdef int32_t* right = left + n
        cdef Py_ssize_t n_heap = 0, i, j, k
        cdef Candidate c
        for i in range(n):
            symbol[i] = self.merges.base[p[i]]
            left[i] = <int32_t>(i - 1)
            right[i] = <int32_t>(i + 1) if i + 1 < n else -1
        for i in range(n - 1):
            n_heap = self.offer(heap, n_heap, symbol, right, i)
        while n_heap:
            c = heap_pop(heap, &n_heap)
            i = c.key
            j = right[i]
            if symbol[i] < 0 or j < 0 or self.merges.rank(symbol[i], symbol[j]) != c.count:
                continue  # an earlier merge has changed this place
            symbol[i], symbol[j] = <int32_t>c.count, -1
            right[i] = right[j]
            if right[i] >= 0:
                left[right[i]] = <int32_t>i
                n_heap = self.offer(heap, n_heap, symbol, right, i)
            if left[i] >= 0:
                n_heap = self.offer(heap, n_heap, symbol, right, left[i])
        k = 0
        i = 0
        while i >= 0:
            out[k] = symbol[i]
            k += 1
            i = right[i]
        return k

    cdef inline Py_ssize_t offer(self, Candidate* heap, Py_ssize_t n_heap, const int32_t* symbol,
                                 const int32_t* right, Py_ssize_t i) noexcept nogil:
        """Push the pair that starts at i, if it can be merged."""
        cdef Candidate c = Candidate(self.merges.rank(symbol[i], symbol[right[i]]), i)
        cdef Py_ssize_t at = n_heap, parent
        if c.count == NO_RANK:
            return n_heap
        while at > 0:
            parent = (at - 1) // 2
            if not earlier(c, heap[parent]):
                break
            heap[at] = heap[parent]
            at = parent
        heap[at] = c
        return n_heap + 1


cdef inline bint earlier(Candidate a, Candidate b) noexcept nogil:
    """The lower rank first, then the leftmost."""
    return a.count < b.count or (a.count == b.count and a.key < b.key)


cdef Candidate heap_pop(Candidate* heap, Py_ssize_t* n) noexcept nogil:
    cdef Candidate top = heap[0], last
    cdef Py_ssize_t i = 0, child
    n[0] -= 1
    last = heap[n[0]]
    while 2 * i + 1 < n[0]:
        child = 2 * i + 1
        if child + 1 < n[0] and earlier(heap[child + 1], heap[child]):
            child += 1
        if not earlier(heap[child], last):
            break
        heap[i] = heap[child]
        i = child
    heap[i] = last
    return top


# ---- decoding ----------------------------------------------------------------------------------------------

def decode(const int32_t[::1] ids, bytes arena, const int64_t[::1] starts):
    """The bytes of some ids; token i is arena[starts[i]:starts[i + 1]]."""
    cdef Py_ssize_t i, n = ids.shape[0], vocab_size = starts.shape[0] - 1, size = 0, length
    cdef const uint8_t* source = arena
    for i in range(n):
        if ids[i] < 0 or ids[i] >= vocab_size:
            raise ValueError(f"token ids must lie in 0 .. {vocab_size - 1}, got {ids[i]} at position {i}")
        size += starts[ids[i] + 1] - starts[ids[i]]
    out = bytearray(size)
    cdef uint8_t* target = out
    with nogil:
        for i in range(n):
            length = starts[ids[i] + 1] - starts[ids[i]]
            memcpy(target, source + starts[ids[i]], length)
            target += length
    return bytes(out)
