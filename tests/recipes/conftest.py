"""The recipe's scripts import each other by name, as scripts in one folder do; so do their tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "recipes" / "faces"))
