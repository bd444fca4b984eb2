"""Slices a dense model boundary by boundary: the only room that knows the order.

The files, in the order in which a run goes through them:

    pipeline     the steps of a run as a recipe has them: text, samples, slicing
    options      how to slice, and what slicing saw
    driver       `slice_model`, `slice_checkpoint`: the plan, one run of slicing, the choice of λ
    sink         where finished tensors go: into memory, or to the disk
    plans        which plan is sliced: how wide, and how many neurons each layer keeps
      allocation     what deleting neurons costs in the dense model, layer by layer
      prices         what the logits lose by it, and by fewer columns
      divergence     of their distributions from the dense model's
      exchange       the least loss at a size, from costs and prices
      trials         plans sliced on a part of the text, and measured
    slicer       one run: embedding, block after block, head; a block is collected, fitted, written (`slice_block`)
      streams        the calibration tokens' residual stream between blocks: device, host or disk
      stores             how its tensors come and go while a block runs
      blocks         what lies between two boundaries, with its output at full width
      propagation    the streams on their way past a block, in the sliced and in the dense model
      moments        the fitted tokens' second moments                    1. collect
      objective      what the output weights minimise over them           2. fit
      regression         the solution at one λ
      matrices           factor, solution and inverse in place
      deletion           rows of a solution go, and the others make up for it
      neurons            which MLP neurons to delete
      heads              which key/value groups to delete
      levels             a block at several counts of what it keeps
      refit              a block's fits at every λ
      block_state        a block's entries of the sliced model's state
      covariance     of the stream that the block has written             3. write
      eigensolver    its leading eigenvectors, the next basis
      quantizing     the block's weights in 8 or 4 bits, where they are asked for
      gptq               rounding by second moments
      rounds         the slicer's steps for it
      resuming       what is kept between two blocks, for a run that is interrupted
      rotation       the orientation of that basis, and compact shortcuts
      timing         seconds of each stage
    reuse        what several sizes of one model share
    ridge        λ: the candidate whose sliced model loses least on held-out windows
    workload     beforehand: what a run does, and what machine it has
    budget       what memory it takes, part by part
    effort       what operations, and how long they take
    affordable   whether it fits, and what would make it fit
    held_out     afterwards: was the calibration text enough?
"""

from .driver import slice_checkpoint, slice_model
from .objective import Objective
from .options import SlicingOptions, SlicingReport
from .reuse import Reuse

__all__ = ["Objective", "Reuse", "SlicingOptions", "SlicingReport", "slice_checkpoint", "slice_model"]
