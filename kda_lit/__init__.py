"""Kimi Delta Attention, explained by building it. Every public name of the notebooks is importable from here.

This file is written by hand; nbdev keeps only the version. `l2norm` and `solve_tril` are functions that are called like
their modules, so the modules are imported now and their names put over them. What needs transformers or Triton waits
until it is asked for.
"""
__version__ = "0.1.0"

from importlib import import_module

from .utils import *
from .cumsum import *
from .solve_tril import *
from .l2norm import *
from .naive import *
from .gate import *
from .chunk_intra import *
from .wy_fast import *
from .chunk_delta_h import *
from .chunk_o import *
from .chunk_inter import *
from .chunk import *
from .fused_recurrent import *
from .gated_delta_rule import *
from .modules import *
from .layer import *
from .gated_deltanet import *
from .kimi_linear import *

_LATER = dict.fromkeys(("KDAConfig", "KDAMLP", "mlp_width", "SoftmaxAttention", "attend", "KDABlock", "KDAPreTrainedModel",
                        "KDAModel", "next_labels", "chunked_cross_entropy", "KDAForCausalLM"), ".model")
_LATER |= dict.fromkeys(("KDAEncoder", "pool", "KDAEncoderStrategy", "FLAEncoderFactory"), ".encoder")
_LATER["make_tensor_descriptor"] = ".utils"


def __getattr__(name):
    "A name that is imported when it is first asked for."
    if name not in _LATER: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)


def __dir__(): return sorted({*globals(), *_LATER})
