"""Scores that mean something: loss, agreement, cost and speed of a dial, with the dense parent beside it."""
