"""`python -m speculens`."""

import sys

from speculens.cli import main

sys.exit(main())
