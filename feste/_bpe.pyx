# cython: binding=True
"""The hot loops of the tokenizer: splitting text into words, learning merges, encoding, decoding.

Design:

- Text is UTF-8 bytes from the door on. `word_end` is GPT-2's pattern written out by hand over a table of four
  classes (other, letter, number, space): the pattern needs no more, and a table beats a regex engine.
- Merges never cross a word, so training works on distinct words with their counts. Symbols lie in one array,
  linked to their neighbours and to the places of the same pair; so a merge touches only the places it changes, looks
  up only the pairs it makes, and takes no memory but for new pairs.
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
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
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


cdef inline bint may_end_in_space(const uint8_t* text, Py_ssize_t n) noexcept nogil:
    """Whether the last character of n > 0 bytes can be a space. Spaces beyond ASCII are U+0085 and U+00A0, which begin
    with the byte 0xC2, and some of three bytes. May be wrong in saying yes, and takes any bytes, UTF-8 or not."""
    cdef uint32_t c = text[n - 1]
    if c < 0x80:
        return char_class[c] == SPACE
    if n < 3 or text[n - 2] == 0xC2:
        return True
    c = <uint32_t>(text[n - 3] & 0x0F) << 12 | <uint32_t>(text[n - 2] & 0x3F) << 6 | (c & 0x3F)
    return char_class[c] == SPACE


def safe_split(const uint8_t[::1] text, Py_ssize_t start):
    """The first position from `start` on where a word surely begins, whatever stands before and behind.

    That is an ASCII space or line end behind a character that is no space: no word has a space but at its start or
    throughout. Returns the length of the text if there is no such place.
    """
    cdef Py_ssize_t i, n = text.shape[0]
    for i in range(max(start, 1), n):
        if (text[i] == b' ' or text[i] == b'\n') and not may_end_in_space(&text[0], i):
            return i
    return n


cdef int check_ends(const int64_t[::1] ends, Py_ssize_t n) except -1:
    """ValueError unless documents that end there follow each other and make up n bytes."""
    cdef Py_ssize_t k
    cdef int64_t before = 0
    for k in range(ends.shape[0]):
        if ends[k] < before:
            raise ValueError(f"ends must not fall, got {ends[k]} behind {before}")
        before = ends[k]
    if before != n:
        raise ValueError(f"the last document must end at {n}, got {before}")
    return 0


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


# ---- learning merges ---------------------------------------------------------------------------------------

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
