"""The rooms of the library from the ground up: a module imports from its own room and from those below.

`tests/test_floors.py` holds the library to it, and the site lists the modules in this order.
"""

FLOORS = "errors notation rounding attention data model baselines quantize export experiments options cli".split()
ANYWHERE = ["plots", "puzzles"]  # stand beside the house
