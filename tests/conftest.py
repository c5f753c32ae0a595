"""What all tests share: property tests without a clock, with the same examples in continuous integration."""

import os

try:
    from hypothesis import settings
except ImportError:  # those of the model and the kernels run without it
    pass
else:
    settings.register_profile("glm45", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("glm45")
