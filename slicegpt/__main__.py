"""`python -m slicegpt`, the same as the command `slicegpt`."""

import sys

from slicegpt.cli import main

sys.exit(main())
