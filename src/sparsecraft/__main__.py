"""`python -m sparsecraft`."""

import sys

from sparsecraft.cli import main

if __name__ == "__main__":
    sys.exit(main())
