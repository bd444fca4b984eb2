"""How much memory a run of slicing takes, part by part, from its config and options alone: no weight is read.

A run is a sequence of stages, and each is a list of parts: arrays whose shapes are known beforehand. The peak is that
of the largest stage. Where the run decides by the free memory (streams, activations that are kept, moments that leave
the device), so does this model, by the same rules; tests hold it to 15 % of what a process takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from slicegpt.conversion.folding import READER_BYTES, TABLE_ROWS
from slicegpt.families import FAMILIES
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.sizes import stored_parameters
from slicegpt.slicing.blocks import Block, blocks_of
from slicegpt.slicing.matrices import PANEL_BYTES
from slicegpt.slicing.moments import TOKENS_PER_CALL
from slicegpt.slicing.neurons import ROUNDS
from slicegpt.slicing.workload import Machine, Workload

# What a process has once the package, PyTorch and transformers are imported (Linux, x86-64, PyTorch 2.13's CPU build),
# and what the tokenizer, the text and the allocators add to it.
IMPORTS, TOKENIZER = 460_000_000, 90_000_000

# PyTorch on a GPU: its context there, and libraries and page tables on the host. Assumed, not measured.
GPU_CONTEXT, GPU_LIBRARIES = 600_000_000, 2_000_000_000

# Matrices [D, D] in float64 that live at once while a basis is chosen: the covariance, LAPACK's copy of it, its
# workspace of two, the eigenvectors, their orientation, and what the shortcut's factor is computed from.
EIGENSOLVER = 8

# The head's logits in float64, 128 MiB, while losses are taken, and their softmax.
LOSSES = 3 * (1 << 27)

F64 = 8


@dataclass
class PlannedStage:
    """What lives at once at one moment of a run.

    Attributes:
        parts: bytes of each, by place: "device", "host", "disk".
    """

    name: str
    parts: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, part: str, count: float, place: str) -> None:
        if count:
            places = self.parts.setdefault(part, {})
            places[place] = places.get(place, 0) + int(count)

    def total(self, place: str) -> int:
        return sum(places.get(place, 0) for places in self.parts.values())


@dataclass(frozen=True)
class Budget:
    """The stages of a run on a machine.

    Attributes:
        storage: where the streams are: "device", "host" or "disk".
        spills: whether the moments leave the device while a system is solved.
    """

    stages: list[PlannedStage]
    storage: str
    spills: bool
    machine: Machine

    def peak(self, place: str) -> int:
        return max(stage.total(place) for stage in self.stages)

    def peak_stage(self, place: str) -> PlannedStage:
        return max(self.stages, key=lambda stage: stage.total(place))

    def parts(self) -> dict[str, dict[str, int]]:
        """The most bytes of each part in any stage, by place."""
        most: dict[str, dict[str, int]] = {}
        for stage in self.stages:
            for part, places in stage.parts.items():
                own = most.setdefault(part, {})
                for place, count in places.items():
                    own[place] = max(own.get(place, 0), count)
        return most

    @property
    def fits(self) -> bool:
        return all(self.peak(place) <= limit for place, limit in vars(self.machine).items())


def budget_of(config: SlicedConfig, work: Workload, machine: Machine) -> Budget:
    """The memory of a run that slices to `config`."""
    return _Model(config, work, machine).budget()


class _Model:
    """Goes through a run as `slicegpt.slicing.driver` does; `device` and `host` are one place on a CPU."""

    def __init__(self, config: SlicedConfig, work: Workload, machine: Machine):
        self.config, self.work, self.machine = config, work, machine
        self.device = "device" if work.on_gpu else "host"
        self.width, self.item = config.dense_hidden_size, work.dtype.itemsize
        self.centred = FAMILIES[config.source_model_type].mean_subtraction
        self.storage, self.short = self._storage(), {}

    # --- sizes -------------------------------------------------------------------------------------------------

    def rows(self, part: str) -> int:
        """Rows of a part's layers that read the stream."""
        config = self.config
        if part == "attention":
            return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        return (2 if config.gated_mlp else 1) * config.dense_intermediate_size

    def columns(self, part: str) -> int:
        """Columns of a part's layer that writes the stream."""
        config = self.config
        if part == "attention":
            return config.num_attention_heads * config.head_dim
        return config.dense_intermediate_size

    def inputs(self, block: Block) -> int:
        """K of the block's fit."""
        own = sum(self.columns(part) for part in block.parts)
        dense = self.config.shortcuts[block.index] == "dense"
        return own + (self.config.boundary_widths[block.index] if dense and self.work.share else 0)

    def layer(self, parts: tuple[str, ...] = ("attention", "mlp")) -> int:
        """Elements of a dense layer, or of some of its parts."""
        return sum((self.rows(part) + self.columns(part)) * self.width for part in parts)

    # --- stages ------------------------------------------------------------------------------------------------

    def _storage(self) -> str:
        """As `slicegpt.slicing.streams.choose_storage` decides, before anything of the run is in memory."""
        work, streams = self.work, self.stream_bytes()
        if work.storage != "auto":
            return "device" if work.storage == "host" and not work.on_gpu else work.storage
        free = {"device": self.machine.device - GPU_CONTEXT} if work.on_gpu else {}
        free["host"] = self.machine.host - self.base()
        chosen = next((place for place, room in free.items() if 2 * streams <= room), "disk")
        return "device" if chosen == "host" and not work.on_gpu else chosen

    def stream_bytes(self) -> int:
        return (self.work.tokens + self.work.fitted_tokens) * self.width * self.item

    def base(self) -> int:
        return IMPORTS + TOKENIZER + (GPU_LIBRARIES if self.work.on_gpu else 0)

    def stage(self, name: str, streams: bool = True) -> PlannedStage:
        """What is there all along."""
        stage = PlannedStage(name)
        stage.add("imports, tokenizer, text", self.base(), "host")
        if self.work.on_gpu:
            stage.add("CUDA context", GPU_CONTEXT, "device")
        if self.work.in_memory:
            fits = sum(self.columns(part) for part in ("attention", "mlp")) * self.config.num_hidden_layers
            stage.add("sliced model", stored_parameters(self.config) * self.item, "host")
            stage.add("sliced model", (self.work.ridges - 1) * fits * self.width * self.item, "host")
        if streams:
            place = {"device": self.device, "host": "host", "disk": "disk"}[self.storage]
            stage.add("streams", self.stream_bytes(), place)
            if self.storage != "device":  # one comes, one goes, one is worked on
                stage.add(
                    "streams on their way", 3 * self.work.batch_tokens * self.width * self.item, self.device
                )
            if self.storage == "disk" and self.work.on_gpu:
                stage.add("streams on their way", 2 * self.work.batch_tokens * self.width * self.item, "host")
        return stage

    def budget(self) -> Budget:
        stages = [self.embedding()]
        blocks = blocks_of(self.config)
        for block in {(block.parts, self.inputs(block)): block for block in blocks}.values():
            stages += self.block(block)
        stages += [self.head(), self.losses()]
        if self.work.own_text:
            stages.insert(0, self.own_text())
        return Budget(stages, self.storage, any(self.short.values()), self.machine)

    def own_text(self) -> PlannedStage:
        stage = self.stage("text of the model's own", streams=False)
        size = (self.config.source_parameters or 0) * self.item
        stage.add("dense model", size, "host")
        if self.work.on_gpu and 2 * size < self.machine.device:
            stage.add("dense model", size, "device")
        return stage

    def embedding(self) -> PlannedStage:
        stage = self.stage("embedding")
        table = self.config.vocab_size * self.width * self.item
        stage.add("embedding table", table, "host")
        if self.work.on_gpu:
            stage.add("embedding table", table, "device")
        self.add_table_pieces(stage)
        return stage

    def head(self) -> PlannedStage:
        stage = self.stage("head")
        stage.add("head", self.config.vocab_size * self.width * self.item, "host")
        self.add_table_pieces(stage)
        return stage

    def add_table_pieces(self, stage: PlannedStage) -> None:
        rows = min(TABLE_ROWS, self.config.vocab_size)
        stage.add("tables in float64", 3 * F64 * rows * self.width, self.device)

    def block(self, block: Block) -> list[PlannedStage]:
        """Of one block: folded, collected, neurons chosen, fitted, written, the next basis chosen, stored."""
        work, width, item = self.work, self.width, self.item
        inputs, own = self.inputs(block), sum(self.columns(part) for part in block.parts)
        before = self.config.boundary_widths[block.index]
        rows = sum(self.rows(part) for part in block.parts)
        name = " and ".join(block.parts)
        refits = work.share > 0
        square, right = F64 * inputs * inputs, F64 * inputs * width
        prior = (F64 if self.centred or inputs > own else item) * inputs * width

        def start(what: str, layer: int) -> PlannedStage:
            stage = self.stage(f"{name}: {what}")
            stage.add("layer as stored", layer * item, "host")
            stage.add("bases", F64 * width * before + item * width * before, self.device)
            stage.add("block of the sliced model", (rows * before + inputs * width) * item, self.device)
            if work.on_gpu or self.centred or inputs > own:
                stage.add("output weights before the fit", prior, self.device)
            return stage

        def teacher(stage: PlannedStage) -> None:
            stage.add(
                "block of the dense model", (rows + inputs) * width * work.teacher_dtype.itemsize, self.device
            )

        whole = self.layer()
        folding = start("folding", whole)
        biggest = max(self.rows(part) for part in block.parts)
        pieces = min(READER_BYTES, F64 * biggest * width)
        folding.add("layers in float64", 3 * pieces, self.device)
        if refits:
            teacher(folding)
        stages = [folding]

        # Beyond the last block of a layer only its output weights are still there.
        last = self.config.parallel_blocks or block.parts == ("mlp",)
        left = own * width if last else whole
        kept = 0
        if refits:
            collecting = start("collecting", left)
            teacher(collecting)
            collecting.add("moments", square + right, self.device)
            collecting.add("batch", self.batch_bytes(block, inputs, rows), self.device)
            activations = work.fitted_tokens * inputs * item
            free = self.free(collecting) + self.batch_bytes(block, inputs, rows)
            kept = activations if 2 * activations <= free else 0
            collecting.add("activations kept", kept, self.device)
            stages += [collecting, *self.solving(block, start, left, kept)]

        fits = work.ridges * right if refits else 0
        fits_place = self.elsewhere(block)
        stages.append(writing := start("writing", left))
        writing.add("fits", fits, fits_place)
        writing.add("covariance", F64 * width * width, self.device)
        writing.add("activations kept", kept, self.device)
        writing.add("batch", self.batch_bytes(block, inputs, rows), self.device)
        stages.append(choosing := start("choosing the next basis", left))
        choosing.add("fits", fits, fits_place)
        choosing.add("eigensolver", EIGENSOLVER * F64 * width * width, self.device)
        stages.append(storing := start("storing", left))
        storing.add("fits", fits, fits_place)
        storing.add("bases", F64 * width * width, self.device)
        storing.add(
            "output weights on their basis", 2 * F64 * own * before + own * before * item, self.device
        )
        return stages

    def free(self, stage: PlannedStage) -> float:
        limit = self.machine.device if self.work.on_gpu else self.machine.host
        return limit - stage.total(self.device)

    def elsewhere(self, block: Block) -> str:
        """Where the moments of a block are while it is solved, and its fits: out of the device where that is short."""
        if not self.short.get(block.index):
            return self.device
        return "host" if self.work.on_gpu else "disk"

    def solving(
        self, block: Block, start: Callable[[str, int], PlannedStage], left: int, kept: int
    ) -> list[PlannedStage]:
        """The choice of neurons and the last of the fits."""
        work, inputs = self.work, self.inputs(block)
        square, right = F64 * inputs * inputs, F64 * inputs * self.width
        panels = min(2 * PANEL_BYTES, 2 * square)
        choosing, fitting = start("choosing neurons", left), start("fitting", left)
        for stage in (choosing, fitting):
            stage.add("activations kept", kept, self.device)
        free = self.free(choosing) - square - right
        # As `slicegpt.slicing.refit.is_short` finds it.
        self.short[block.index] = free < F64 * inputs * (inputs + 2 * self.width) + 4 * PANEL_BYTES
        elsewhere = self.elsewhere(block)
        stages = []
        remaining = inputs
        if "mlp" in block.parts and (
            gone := self.config.dense_intermediate_size - self.config.neurons[block.layer]
        ):
            remaining = inputs - gone
            choosing.add("moments", square + right, elsewhere)
            choosing.add("system or its inverse", square, self.device)
            choosing.add("right-hand side or solution", right, self.device)
            choosing.add("panels", panels + 3 * F64 * math.ceil(gone / ROUNDS) * inputs, self.device)
            stages.append(choosing)
        fitting.add("moments", square + right, elsewhere)
        fitting.add("fits", (work.ridges - 1) * right, elsewhere)
        fitting.add("system or its inverse", F64 * remaining * remaining, self.device)
        fitting.add("right-hand side or solution", F64 * remaining * self.width, self.device)
        fitting.add("panels", panels, self.device)
        return [*stages, fitting]

    def batch_bytes(self, block: Block, inputs: int, rows: int) -> int:
        """What passing and adding one batch takes beside the streams."""
        work, item = self.work, self.item
        tokens = work.batch_tokens
        together = tokens if tokens >= TOKENS_PER_CALL else math.ceil(TOKENS_PER_CALL / tokens) * tokens
        together = min(together, max(work.fitted_tokens, tokens))
        own = sum(self.columns(part) for part in block.parts)
        passing = tokens * (rows + 2 * own + 6 * self.width) * item
        waiting = together * (inputs + self.width) * item * (2 if together > tokens else 1)
        # In float32 with the roots of their weights, in bfloat16, and packed into panels of 1024 tokens.
        adding = together * inputs * 4 + 2 * together * (inputs + self.width) + 2 * 4096 * inputs
        return max(passing, waiting + adding)

    def losses(self) -> PlannedStage:
        """Held-out windows pass the dense and the sliced model, a layer at a time."""
        stage = self.stage("held-out windows", streams=False)
        layer = self.layer() * self.item
        stage.add("layer as stored", layer, "host")
        if self.work.on_gpu:
            stage.add("layer as stored", layer, "device")
        windows = max(1, self.work.windows) * self.work.seqlen * self.width * self.item
        stage.add("windows", 2 * windows, "host")
        stage.add("losses", LOSSES, self.device)
        rows = max(self.rows("attention"), self.rows("mlp") + self.columns("mlp"))
        stage.add("batch", self.work.seqlen * (rows + 6 * self.width) * self.item, self.device)
        return stage
