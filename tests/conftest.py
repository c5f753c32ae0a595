"""What all tests share: property tests without a clock, and the same examples at every run of continuous integration."""

import os

from hypothesis import settings

settings.register_profile("glm45", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("glm45")
