"""`python -m dreamteacher` is the command `dreamteacher`."""

import sys

from dreamteacher.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
