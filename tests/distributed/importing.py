"""A rank that imports what is often imported, and says from where."""

from __future__ import annotations

import json
import sys

import numpy as np

import dynaconv

sys.stdout.write(json.dumps([json.__file__, np.__file__, dynaconv.__file__]) + "\n")
