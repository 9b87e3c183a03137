"""Lines that hold a nonlinear op between them on a box."""

from corollary.verify.relaxations import curved as _curved  # noqa: F401  # importing a family registers its ops
from corollary.verify.relaxations import s_shaped as _s_shaped  # noqa: F401
from corollary.verify.relaxations import smooth as _smooth  # noqa: F401
from corollary.verify.relaxations.lines import Lines as Lines
from corollary.verify.relaxations.lines import Relaxation as Relaxation
from corollary.verify.relaxations.lines import register_relaxation as register_relaxation
from corollary.verify.relaxations.lines import relaxation as relaxation
from corollary.verify.relaxations.odds import OddsLines as OddsLines
from corollary.verify.relaxations.odds import odds_lines as odds_lines
from corollary.verify.relaxations.offset_rule import register_function as register_function
from corollary.verify.relaxations.piecewise import OneKink as OneKink
from corollary.verify.relaxations.piecewise import prelu as prelu
from corollary.verify.relaxations.pools import MaxLines as MaxLines
from corollary.verify.relaxations.pools import largest_lines as largest_lines
from corollary.verify.relaxations.product import ProductLines as ProductLines
from corollary.verify.relaxations.product import product_lines as product_lines
