"""`python -m speculens`, for launchers that start modules."""

import sys

from speculens.cli import main

sys.exit(main())
