"""The syntax trees of the program and of the tests: each is parsed, and walked, once."""
from calls import PROGRAM, source_of, tree_of, walked

__all__ = ["PROGRAM", "source_of", "tree_of", "walked"]
