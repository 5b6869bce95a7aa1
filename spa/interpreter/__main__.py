"""Prints the document about the interpreter: `python -m spa.interpreter > docs/interpreter.md`."""

from spa.interpreter.listing import markdown

print(markdown(), end="")
