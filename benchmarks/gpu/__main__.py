"""`python -m benchmarks.gpu`: see `benchmarks.gpu.command`."""

import sys

if __name__ == "__main__":
    # Not above: fresh processes import this file again, and need nothing of it.
    from benchmarks.gpu.command import main

    sys.exit(main())
