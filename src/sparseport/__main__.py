"""`python -m sparseport`, and `accelerate launch -m sparseport`: the command line."""

import sys

from sparseport.cli import main

sys.exit(main())
