"""`python -m megadiff <verb>`."""

import sys

from megadiff.cli.main import main

sys.exit(main())
