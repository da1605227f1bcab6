import sys

from bad_inputs.page import page

sys.stdout.write(page())
