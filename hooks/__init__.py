"""Sites: what can be read and edited inside a model, and how.

``sites(model)`` and ``show(model)`` list them; ``record(model, x, sites)`` reads; ``with edit(model, {pattern: edit})``
changes. Every name is a full path or a glob. The TransformerLens idiom (``model.run_with_cache`` …) and the nnsight
idiom (``nnsight(model).trace(x)``) work on the same models and give the same numbers.
"""

from hooks.edits import DoState, Edit, add, do_state, freeze, mean, resample, scale, set_to, zero
from hooks.errors import BadArgument, DidNotFire, MambascopeError, NonFinite, RunFailed, TooLarge, UnknownSite
from hooks.intervene import Edited, edit, expose
from hooks.listing import show
from hooks.onlookers import watched
from hooks.point import HookedModule, emit, site
from hooks.records import Record, record
from hooks.trace import nnsight
from hooks.vocabulary import SITES, Site, resolve, sites

__all__ = [
    "SITES",
    "BadArgument",
    "DidNotFire",
    "DoState",
    "Edit",
    "Edited",
    "HookedModule",
    "MambascopeError",
    "NonFinite",
    "Record",
    "RunFailed",
    "Site",
    "TooLarge",
    "UnknownSite",
    "add",
    "do_state",
    "edit",
    "emit",
    "expose",
    "freeze",
    "mean",
    "nnsight",
    "record",
    "resample",
    "resolve",
    "scale",
    "set_to",
    "show",
    "site",
    "sites",
    "watched",
    "zero",
]
