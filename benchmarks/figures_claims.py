"""What ``figures.py`` checks: for each page the figures in its sentences, and the numbers that are none."""

from __future__ import annotations

import figures_devices
import figures_reference
import figures_trained
from figures import Claim

GROUPS = (figures_reference, figures_trained, figures_devices)
CLAIMS: dict[str, list[Claim]] = {page: claims for group in GROUPS for page, claims in group.CLAIMS.items()}
# Words that hold tolerances, options and sizes.
SETTINGS: dict[str, list[str]] = {page: words for group in GROUPS for page, words in group.SETTINGS.items()}
