"""Ways to look at the model: a page with the network inside, a recorded sample, a picture.

Code that samples or evaluates belongs in the six scripts; tests check the JavaScript against it.
"""

from lib import program  # noqa: F401 (first of all: from here on Ctrl-C is one line)
