"""To look at the model: a page with the network inside, a recorded sample, a terminal, a picture.

What samples or evaluates belongs in the six scripts; the JavaScript here is held to it by tests.
"""

from lib import program  # noqa: F401 (first of all: from here on Ctrl-C is one line)
