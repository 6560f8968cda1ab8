"""A small target and draft pair on 8x8 handwritten digits, shipped with the package.

``pair`` loads the two models, ``quality`` measures generated digits against the real ones and
``train`` makes the shipped files again. ``head`` loads a head of 100 steps for the same tokens, which
``train_head`` makes. Loading and measuring need torch and numpy only.
"""
