"""Search over a trained super-adapter: which sub-network to take. Integer vectors and a callback, no framework.

A sub-network is a tuple of sizes, one per group of the search space. What measures it is a callback; what it measured
stands in a journal, so that no evaluation is made twice.
"""
