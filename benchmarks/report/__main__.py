"""`python -m benchmarks.report`; see `benchmarks.report.command`."""

import sys

from benchmarks.report.command import main

sys.exit(main())
