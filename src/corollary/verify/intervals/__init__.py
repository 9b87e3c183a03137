"""Interval bounds: each entry of each value of a network between two numbers."""

from corollary.verify.intervals import bilinear, elementwise, joint
from corollary.verify.intervals.interval import Interval as Interval
from corollary.verify.intervals.interval import apply_interval as apply_interval
from corollary.verify.intervals.interval import interval as interval
from corollary.verify.intervals.propagate import propagate as propagate

RULES = (bilinear, elementwise, joint)
"""The modules that enter rules; importing them is what gives the meaning its rules."""
