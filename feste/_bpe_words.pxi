# Words: text is cut by GPT-2's pattern, written out by hand over four classes of characters.

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
