"""Fast generation by a traced or compiled step of static shapes, with the same tokens as `generate`.

from hf_genlm.decoding import FastGenerator

fast = FastGenerator(model)                       # traced: ready in 0.5 s, needs no compiler
fast = FastGenerator(model, program="compiled")   # cached on disk for all models of this shape
fast.generate(**prompt, max_new_tokens=256)       # takes what model.generate takes
"""

from hf_genlm.decoding.generator import FastGenerator
from hf_genlm.decoding.step import PROGRAMS

__all__ = ["PROGRAMS", "FastGenerator"]
