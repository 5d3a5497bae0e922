"""``python -m lightning_mtl.cli``: the same as ``lightning-mtl``."""

import sys

from lightning_mtl.cli import main

if __name__ == "__main__":
    sys.exit(main())
