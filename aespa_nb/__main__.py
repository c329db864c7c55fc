"""`python -m aespa_nb`: the command line."""

import sys

from aespa_nb.cli import main

if __name__ == "__main__":
    sys.exit(main())
