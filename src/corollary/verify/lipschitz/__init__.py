"""Lipschitz constants: certified upper bounds by semidefinite programs, and the largest slopes found."""

from corollary.verify.lipschitz.bound import LipschitzBound as LipschitzBound
from corollary.verify.lipschitz.bound import lipschitz_bound as lipschitz_bound
from corollary.verify.lipschitz.bound import robust_radius as robust_radius
from corollary.verify.lipschitz.certificate import Certificate as Certificate
from corollary.verify.lipschitz.certificate import NotCertified as NotCertified
from corollary.verify.lipschitz.implicit import Equilibrium as Equilibrium
from corollary.verify.lipschitz.implicit import NotWellPosed as NotWellPosed
from corollary.verify.lipschitz.lower import lipschitz_enumerate as lipschitz_enumerate
from corollary.verify.lipschitz.lower import lipschitz_lower as lipschitz_lower
from corollary.verify.lipschitz.multipliers import activation_qc as activation_qc
from corollary.verify.lipschitz.reading import UnsupportedLayer as UnsupportedLayer
from corollary.verify.lipschitz.reading import system_of as system_of
from corollary.verify.lipschitz.system import System as System
