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

include "_bpe_words.pxi"      # text is cut into words
include "_bpe_tables.pxi"     # hash tables and a heap
include "_bpe_training.pxi"   # merges are learnt
include "_bpe_encoding.pxi"   # and applied
