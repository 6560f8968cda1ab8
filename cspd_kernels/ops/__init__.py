"""The ops, one folder each: ``reference.py`` defines, ``<backend>.py`` must match it, ``__init__.py`` dispatches."""
