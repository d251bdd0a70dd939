"""python -m tools.bench: feste measured beside its peers.

feste and its peers run in alternation, each round of each in a process of its own, so that what the machine does to
one it does to the others; figures are medians with their range, and what counts are the ratios. Every program's result
is checked before its time is believed. A peer's process loads nothing of feste.
"""
