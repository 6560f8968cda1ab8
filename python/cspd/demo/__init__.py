"""A small target and draft pair on 8x8 handwritten digits, shipped with the package.

``pair`` loads the two models, ``quality`` measures generated digits against the real ones and
``train`` makes the shipped files again. ``head`` loads a head of 100 steps for the same tokens, which
``train_head`` makes. ``cloth`` is a second pair, on images by a formula, which few steps draw badly; its weights
are in the repository's benchmarks, not in the package. Loading and measuring need torch and numpy only.
"""
