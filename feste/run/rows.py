"""Rows of training_log.csv as bytes: RFC 4180, written and read so that every text comes back as it was.

Python's csv module is not used: on 3.10 it can neither write nor read a NUL, everywhere it refuses a cell of more than
131,072 characters, and it would take seconds for a run of a million steps, whose numbers are read here all at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from feste.run.names import COLUMNS

NUMBER_BYTES = b"0123456789+-.e,nainf"
SPECIAL = re.compile('[",\r\n]')
CELL = re.compile(r'"([^"]*(?:""[^"]*)*)"|([^",]*)')


# ---- one record --------------------------------------------------------------------------------------------


def record_of(cells: Iterable[str]) -> str:
    """The record of some cells, with its line end. `cells_of` is its inverse."""
    return ",".join('"' + cell.replace('"', '""') + '"' if SPECIAL.search(cell) else cell for cell in cells) + "\n"


def cells_of(record: bytes) -> list[str] | None:
    """The cells of a record, None if its quotes are wrong. Without a quote, a carriage return is only a character."""
    text = record.decode("utf-8", errors="replace").removesuffix("\n").removesuffix("\r")
    if '"' not in text:
        return text.split(",")
    cells, place = [], 0
    while True:
        match = CELL.match(text, place)
        quoted, plain = match.groups()
        cells.append(plain if quoted is None else quoted.replace('""', '"'))
        place = match.end()
        if place == len(text):
            return cells
        if text[place] != ",":
            return None
        place += 1


def number_of(text: str) -> float | None:
    """The number that a cell holds, or None."""
    try:
        return float(text)
    except ValueError:
        return None


def records(data: bytes) -> Iterator[bytes]:
    """The whole records of a log; what is left behind the last one is torn."""
    begin = 0
    while end := record_end(data, begin):
        yield data[begin:end]
        begin = end


def record_end(data: bytes, begin: int) -> int | None:
    """Where the record that begins there ends: behind the first line end that is outside quotes."""
    end, quotes = begin, 0
    while stop := data.find(b"\n", end) + 1:
        quotes += data.count(b'"', end, stop)
        if quotes % 2 == 0:
            return stop
        end = stop
    return None


# ---- many records at once ----------------------------------------------------------------------------------


def ascending(steps: np.ndarray, last: float) -> bool:
    """Whether the steps are whole numbers that go on behind the last one."""
    return bool(np.all(np.diff(steps, prepend=last) > 0)) and bool(np.all(steps == np.floor(steps)))


def without_samples(data: bytes) -> tuple[bytes | None, list[tuple[int, str]], int]:
    """The whole records with their samples taken out (None if a record is not feste's), the samples, and the end."""
    pieces, samples, position = [], [], 0
    text = np.frombuffer(data, np.uint8)
    special = np.flatnonzero((text[1:] == ord("\n")) & (text[:-1] != ord(",")) | (text[1:] == ord('"'))) + 1
    for place in special.tolist():
        if place < position:
            continue
        begin = max(position, data.rfind(b"\n", position, place) + 1)
        end = record_end(data, begin)
        if end is None:
            return b"".join([*pieces, data[position:begin]]), samples, begin
        numbers, sample = _split_sample(data[begin:end])
        if numbers is None:
            return None, [], _last_end(data, end)
        pieces += [data[position:begin], numbers]
        samples += [sample] if sample[1] else []
        position = end
    end = max(position, data.rfind(b"\n") + 1)
    return b"".join([*pieces, data[position:end]]), samples, end


def _split_sample(record: bytes) -> tuple[bytes | None, tuple[int, str]]:
    """A record as a row of numbers with an empty sample, and its sample; None if it does not look like that."""
    cells = record.split(b",", len(COLUMNS) - 1)
    if len(cells) < len(COLUMNS) or b'"' in b"".join(cells[:-1]) or not cells[0].isdigit():
        return None, (0, "")
    sample = cells_of(cells[-1])
    if sample is None or len(sample) != 1:
        return None, (0, "")
    return b",".join(cells[:-1]) + b",\n", (int(cells[0]), sample[0])


def _last_end(data: bytes, position: int) -> int:
    """The end of the last whole record."""
    while end := record_end(data, position):
        position = end
    return position


def parse_plain(data: bytes, names: tuple[str, ...]) -> np.ndarray | None:
    """The numeric columns of rows without quotes and samples; None if the rows are not of that form."""
    text = np.frombuffer(data, np.uint8)
    commas, ends = np.flatnonzero(text == ord(",")), np.flatnonzero(text == ord("\n"))
    wide = len(COLUMNS) - 1
    if len(commas) != wide * len(ends) or not np.array_equal(commas[wide - 1::wide] + 1, ends):
        return None
    stops = commas.reshape(-1, wide)
    begins = np.empty_like(stops)
    begins[:, 1:] = stops[:, :-1] + 1
    begins[1:, 0] = ends[:-1] + 1
    begins[:1, 0] = 0
    columns = [COLUMNS.index(name) for name in names]
    begins, stops = begins[:, columns], stops[:, columns]
    present = stops > begins
    kept = np.zeros(len(text) + 1, np.int8)  # +1 where a cell begins, -1 behind the comma that ends it
    kept[begins[present]] += 1
    kept[stops[present] + 1] -= 1
    cells = text[np.cumsum(kept[:-1], dtype=np.int8).view(bool)].tobytes()
    values = np.full(present.shape, math.nan)
    numbers = _numbers(cells)
    if numbers is None:
        return None
    values[present] = numbers
    return values.T


def _numbers(cells: bytes) -> np.ndarray | None:
    """The numbers of a list in which a comma follows each, all at once; None if one is not a number.

    Digits are read eight at a time as one 64-bit integer. A whole number below 10**15 divided by a power of ten is
    rounded correctly, so the result equals float(). What has not the form 123.456 is parsed one by one.
    """
    if cells.translate(None, NUMBER_BYTES):
        return None
    text = np.frombuffer(cells, np.uint8)
    commas, dots = np.flatnonzero(text == ord(",")), np.flatnonzero(text == ord("."))
    owner = np.searchsorted(commas, dots)
    decimals = np.zeros(len(commas), int)
    decimals[owner] = commas[owner] - dots - 1
    digits = np.frombuffer(bytes(16) + cells.translate(None, b"."), np.uint8)
    stops = np.flatnonzero(digits == ord(","))
    counts = np.diff(stops, prepend=15) - 1
    words = np.ndarray(len(digits) - 7, "<u8", digits, strides=(1,))
    values = (_eight_digits(words[stops - 16], counts - 8) * 10**8 + _eight_digits(words[stops - 8], counts)
              ) / 10.0 ** np.minimum(decimals, 15)
    odd = (counts < 1) | (counts > 15) | (np.bincount(owner, minlength=len(commas)) > 1)
    odd[np.searchsorted(commas, np.flatnonzero((text != ord(",")) & (text != ord(".")) & (text - 48 > 9)))] = True
    if odd.any():
        others = text[np.repeat(odd, np.diff(commas, prepend=-1))].tobytes().split(b",")[:-1]
        try:
            values[odd] = np.array(others).astype(np.float64)
        except ValueError:
            return None
    return values


def _eight_digits(words: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The decimal numbers in the last counts (at most eight) bytes of each word, its lowest byte the first digit."""
    unused = (8 * np.clip(8 - counts, 0, 8)).astype(np.uint64)
    half = unused // 2  # twice half of it, for a shift by 64 is undefined
    words = words >> half >> half << half << half
    words = (words & 0x0F0F0F0F0F0F0F0F) * 2561 >> 8
    words = (words & 0x00FF00FF00FF00FF) * 6553601 >> 16
    return (words & 0x0000FFFF0000FFFF) * 42949672960001 >> 32
