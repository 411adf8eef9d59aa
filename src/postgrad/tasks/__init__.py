"""Prompts, pairs, rankings and triples, and their loaders."""

from postgrad.tasks.addition import Addition
from postgrad.tasks.examples import Examples
from postgrad.tasks.formats import FORMATS, Format
from postgrad.tasks.loading import load

__all__ = ["FORMATS", "Addition", "Examples", "Format", "load"]
