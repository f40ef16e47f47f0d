"""Generation by a step of static shapes, traced or compiled, that gives the tokens of plain `generate`.

from hf_genlm.decoding import FastGenerator

fast = FastGenerator(model)                       # traced: ready in half a second, needs no compiler
fast = FastGenerator(model, program="compiled")   # one program, kept on disk for all models of this shape
fast.generate(**prompt, max_new_tokens=256)       # takes what model.generate takes
"""

from hf_genlm.decoding.generator import FastGenerator
from hf_genlm.decoding.program import PROGRAMS

__all__ = ["PROGRAMS", "FastGenerator"]
