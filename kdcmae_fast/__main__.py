"""`python -m kdcmae_fast` is `kdcmae`."""

import sys

from kdcmae_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
