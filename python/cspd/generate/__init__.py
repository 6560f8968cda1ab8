"""``cspd generate``: a folder of images from a checkpoint, by any number of processes, however often interrupted.

Images are made in fixed batches: batch b holds the images b B .. b B + B - 1 and is always made whole. An image's noise
is addressed by (seed; its number) and its neighbours are always the same, so its bytes depend on neither.
"""
