"""Imported for its effect: `luthier` comes from this checkout's `src`, whether or not it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "src"))
