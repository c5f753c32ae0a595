"""What all tests share: property tests without a clock, with the same examples in continuous integration."""

import os

from hypothesis import settings

settings.register_profile("glm45", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("glm45")
