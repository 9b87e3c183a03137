"""A network written out in the few ops that bounds understand."""

from corollary.verify.primitives import arithmetic, layers, normalisation, sorting
from corollary.verify.primitives.rewriter import is_primitive as is_primitive
from corollary.verify.primitives.rewriter import primitives as primitives

PARTS = (arithmetic, layers, normalisation, sorting)
"""The modules that say what ops are made of; importing them is what enters their rules."""
