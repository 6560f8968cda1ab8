"""``python -m cspd`` is the command ``cspd``."""

from .cli import main

raise SystemExit(main())
