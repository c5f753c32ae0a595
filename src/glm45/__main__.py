"""`python -m glm45` is the `glm45` command."""

import sys

from glm45.cli import main

sys.exit(main())
