"""The `luthier` command. Every command imports what it needs when it runs, so that `--help` is instant."""

from __future__ import annotations

import sys

from luthier.cli import (
    chat as chat,
    evaluate as evaluate,
    facts as facts,
    launch as launch,
    models as models,
    predict as predict,
    serve as serve,
    training as training,
)
from luthier.cli.app import app as app


def main() -> None:
    """The console entry point."""
    sys.exit(app())
