"""feste's peers, each in processes that load nothing of feste: neither its modules nor its OpenMP runtime.

PyTorch brings an OpenMP runtime under the same name as the one that feste is linked to. In one process the first that
is loaded serves both, with the settings that feste makes for its own threads, which slows PyTorch down.
"""
