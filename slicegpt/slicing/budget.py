"""How much memory a run of slicing takes, part by part, from its config and options alone: no weight is read.

A run is a sequence of stages, and each is a list of parts: arrays whose shapes are known beforehand. The peak is that
of the largest stage. Where the run decides by the free memory (streams, activations that are kept, moments that leave
the device), so does this model, by the same rules; tests hold it to 15 % of what a process takes.
"""

from __future__ import annotations

import math

from slicegpt.conversion.folding import READER_BYTES, TABLE_ROWS
from slicegpt.families import FAMILIES
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.sizes import stored_parameters
from slicegpt.runtime.speed import CPU_PARAMETERS
from slicegpt.slicing.allocation import POINTS, SHARE, deletes_neurons, fewest_neurons
from slicegpt.slicing.blocks import Block, blocks_of, group_rows
from slicegpt.slicing.budget_mixture import mixture_allocation, mixture_stages, writers
from slicegpt.slicing.budget_rounding import add_codes, add_rounded_readers, add_rounded_writers
from slicegpt.slicing.filed_moments import batch_bytes, needs_files
from slicegpt.slicing.matrices import PANEL_BYTES
from slicegpt.slicing.neurons import ROUNDS
from slicegpt.slicing.planned import Budget, PlannedStage
from slicegpt.slicing.prices import GROUP_LEVELS, LEVELS, TOKENS
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
        self.storage, self.spills = self._storage(), False

    # --- sizes -------------------------------------------------------------------------------------------------

    def rows(self, part: str) -> int:
        """Rows of a part's layers that read the stream; of the MLPs that are no mixtures."""
        config = self.config
        if part == "attention":
            return config.attention_rows
        return (2 if config.gated_mlp else 1) * config.dense_intermediate_size

    def columns(self, part: str) -> int:
        """Columns of a part's layer that writes the stream."""
        config = self.config
        if part == "attention":
            return config.num_attention_heads * config.value_dim
        return config.dense_intermediate_size

    def inputs(self, block: Block) -> int:
        """K of the block's fit."""
        own = sum(self.columns(part) for part in block.parts)
        dense = self.config.shortcuts[block.index] == "dense"
        return own + (self.config.boundary_widths[block.index] if dense and self.work.share else 0)

    def layer(self, parts: tuple[str, ...] = ("attention", "mlp")) -> int:
        """Elements of a dense layer, or of some of its parts; of a mixture none but its output layers, for its experts
        are read one by one."""
        own = sum((self.rows(part) + self.columns(part)) * self.width for part in parts)
        own += self.config.expansion_elements if "attention" in parts else 0
        if "mlp" in parts and self.config.num_experts:
            return max(own, (self.layer(("attention",)) if "attention" in parts else 0) + writers(self))
        return own

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

    def stage(self, name: str, streams: float = 1.0) -> PlannedStage:
        """What is there all along, with so much of the streams."""
        stage = PlannedStage(name)
        stage.add("imports, tokenizer, text", self.base(), "host")
        if self.work.on_gpu:
            stage.add("CUDA context", GPU_CONTEXT, "device")
        if self.work.in_memory:
            kinds = self.config.mlp_layer_types
            fits = len(kinds) * self.columns("attention") + kinds.count("dense") * self.columns("mlp")
            fits += kinds.count("sparse") * (writers(self) // self.width)
            stage.add("sliced model", stored_parameters(self.config) * self.item, "host")
            stage.add("sliced model", (self.work.ridges - 1) * fits * self.width * self.item, "host")
        if streams:
            place = {"device": self.device, "host": "host", "disk": "disk"}[self.storage]
            stage.add("streams", streams * self.stream_bytes(), place)
            if self.storage != "device":  # one comes, one goes, one is worked on
                stage.add(
                    "streams on their way", 3 * self.work.batch_tokens * self.width * self.item, self.device
                )
            if self.storage == "disk" and self.work.on_gpu:
                stage.add("streams on their way", 2 * self.work.batch_tokens * self.width * self.item, "host")
        return stage

    def budget(self) -> Budget:
        stages = [self.embedding()]
        # Past a block of which nothing is left the stream goes as it is.
        blocks = [block for block in blocks_of(self.config) if block.parts]
        for block in {(block.parts, block.sparse, self.inputs(block)): block for block in blocks}.values():
            stages += self.block(block)
        stages += [self.head(), self.losses()]
        if self.work.own_text:
            stages.insert(0, self.own_text())
        if self.work.allocate and self.work.share and deletes_neurons(self.config):
            kinds = {block.sparse: block for block in blocks if "mlp" in block.parts}
            for block in kinds.values():
                stages += mixture_allocation(self, block) if block.sparse else self.allocation(block)
        if (timing := self.timing()) is not None:
            stages.append(timing)
        return Budget(stages, self.storage, self.spills, self.machine)

    def timing(self) -> PlannedStage | None:
        """Both models, each packed into a second copy; None where the run does without (`compare_speed`)."""
        parameters = (self.config.source_parameters or 0) + stored_parameters(self.config)
        stage, size = self.stage("tokens/s", streams=0), parameters * self.item
        if not self.work.timing or parameters > CPU_PARAMETERS or 2 * size > self.free(stage):
            return None
        stage.add("both models", size, "host")
        stage.add("both models, packed", size if not self.work.on_gpu else 2 * size, self.device)
        return stage

    def own_text(self) -> PlannedStage:
        stage = self.stage("text of the model's own", streams=0)
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
        if block.sparse:
            return mixture_stages(self, block)
        work, width, item = self.work, self.width, self.item
        inputs, own = self.inputs(block), sum(self.columns(part) for part in block.parts)
        before, behind = self.config.boundary_widths[block.index : block.index + 2]
        rows = sum(self.rows(part) for part in block.parts)
        name = " and ".join(block.parts)
        refits = work.share > 0
        right = F64 * inputs * width
        plain = self.is_plain(block)

        def start(what: str, layer: int, fitted: bool = False, aside: bool = False) -> PlannedStage:
            stage = self.stage(f"{name}: {what}")
            stage.add("layer as stored", layer * item, "host")
            stage.add("bases", F64 * width * before + item * width * before, self.device)
            readers = "disk" if aside else self.device
            stage.add("block of the sliced model", rows * before * item, readers)
            if fitted or not plain:
                stage.add("block of the sliced model", inputs * width * item, self.device)
            if work.on_gpu or not plain:
                prior = F64 if self.centred or inputs > own else item
                stage.add("output weights before the fit", prior * inputs * width, self.device)
            return stage

        whole = self.layer()
        folding = start("folding", whole)
        biggest = max(self.rows(part) for part in block.parts)
        pieces = min(READER_BYTES, F64 * biggest * width)
        folding.add("layers in float64", 3 * pieces, self.device)
        stages = [folding]
        if work.rounds:
            reading = start("rounding what reads", whole)
            add_rounded_readers(reading, rows, before, item, self.device)
            stages.append(reading)

        # Beyond the last block of a layer only its output weights are still there.
        last = self.config.parallel_blocks or block.parts == ("mlp",)
        left = own * width if last else whole
        kept, kept_place, aside, away, spilled = 0, self.device, False, 0, False
        passing = self.batch_bytes(block, inputs, rows, work.fitted_tokens)
        if refits:
            self.add_teacher(folding, block, inputs, plain)
            collecting = start("collecting", left)
            self.add_teacher(collecting, block, inputs, plain)
            filed = self.add_moments(collecting, inputs, passing)
            free = self.free(collecting)
            if filed:
                kept_place, free = "disk", self.machine.disk - collecting.total("disk")
            activations = work.fitted_tokens * inputs * item
            kept = activations if 2 * activations <= free else 0
            collecting.add("batch", passing, self.device)
            collecting.add("activations kept", kept, kept_place)
            beside = start("error before the fit", left)
            beside.add("activations kept", kept, kept_place)
            free = self.free(beside)
            spilled, free = self.leaves(inputs, free, filed)
            # As the `set_aside` of `slicegpt.slicing.refit.fit_block`.
            aside = not work.on_gpu and self.is_short(inputs, free)
            free += rows * before * item if aside else 0
            away = (work.ridges - 1) * right if self.is_short(inputs, free - right) else 0
            fitting = [start(what, left, aside=aside) for what in ("choosing neurons", "fitting")]
            for stage in fitting:
                stage.add("activations kept", kept, kept_place)
                self.add_spilled(stage, inputs, spilled)
            self.add_spilled(beside, inputs, filed)
            beside.add("output weights in float64", right, self.device)
            beside.add("panels", min(2 * PANEL_BYTES, F64 * inputs * inputs), self.device)
            stages += [collecting, beside, *self.solving(block, *fitting, away)]

        fits = work.ridges * right - away if refits else 0
        after = [start(what, left, fitted=True) for what in ("writing", "choosing the next basis", "storing")]
        for stage in after:
            stage.add("fits", fits, self.device)
            stage.add("fits", away, self.elsewhere)
        writing, choosing, storing = after
        if work.rounds:
            rounding = start("rounding what writes", left, fitted=True)
            rounding.add("fits", fits, self.device)
            add_rounded_writers(rounding, behind, inputs, inputs - sum(self.deleted(block)), self.device)
            for stage in (writing, choosing, rounding):
                self.add_spilled(stage, inputs, spilled)
            for stage in (*stages[2:], *after, rounding):
                add_codes(stage, rows, before, item, self.device)
            after.insert(2, rounding)
        writing.add("covariance", F64 * width * width, self.device)
        writing.add("activations kept", kept, kept_place)
        writing.add("batch", passing, self.device)
        choosing.add("eigensolver", EIGENSOLVER * F64 * width * width, self.device)
        storing.add("bases", F64 * width * width, self.device)
        storing.add(
            "output weights on their basis", 2 * F64 * own * before + own * before * item, self.device
        )
        return [*stages, *after]

    def is_plain(self, block: Block) -> bool:
        """Whether a block before its fit has the layer's own output weights, and not a copy of them."""
        own = sum(self.columns(part) for part in block.parts)
        return not self.centred and self.inputs(block) == own and len(block.parts) == 1

    def add_teacher(self, stage: PlannedStage, block: Block, inputs: int, plain: bool) -> None:
        """The dense model's block."""
        dtype = self.work.teacher_dtype
        elements = sum(self.rows(part) for part in block.dense_parts)
        if not plain or dtype != self.work.dtype:
            elements += inputs
        stage.add("block of the dense model", elements * self.width * dtype.itemsize, self.device)

    def add_moments(self, stage: PlannedStage, inputs: int, passing: int) -> bool:
        """Moments while tokens are added, and whether they are in files, as `moments_for` decides."""
        filed = not self.work.on_gpu and needs_files(inputs, self.width, passing, self.free(stage))
        self.add_spilled(stage, inputs, filed)
        if filed:
            square = F64 * inputs * inputs
            stage.add("panels", min(2 * PANEL_BYTES, square), self.device)
        return filed

    def add_spilled(self, stage: PlannedStage, inputs: int, spilled: bool) -> None:
        place = self.elsewhere if spilled else self.device
        stage.add("moments", F64 * inputs * (inputs + self.width), place)

    @property
    def elsewhere(self) -> str:
        """Where goes what the device has no room for while a system is solved."""
        return "host" if self.work.on_gpu else "disk"

    def is_short(self, inputs: int, free: float) -> bool:
        """As `slicegpt.slicing.refit.is_short` finds it."""
        return free < F64 * inputs * (inputs + 2 * self.width) + 4 * PANEL_BYTES

    def leaves(self, inputs: int, free: float, filed: bool) -> tuple[bool, float]:
        """Whether moments are not on the device while their system is solved, and what is free then.

        Args:
            free: without moments.
        """
        moments = F64 * inputs * (inputs + self.width)
        if spilled := filed or self.is_short(inputs, free - moments):
            self.spills = True
        return spilled, free - (0 if spilled else moments)

    def allocation(self, block: Block) -> list[PlannedStage]:
        """What deleting the neurons of a layer costs: its tokens collected, and its neurons deleted."""
        work, width, plain = self.work, self.width, not self.centred and len(block.parts) == 1
        inputs, rows = (sum(of(part) for part in block.parts) for of in (self.columns, self.rows))
        batches = math.ceil(SHARE * math.ceil(work.samples / work.batch_size))
        looked_at = min(math.ceil(batches / work.ranks) * work.batch_tokens, work.tokens)
        # Of the dense model alone.
        streams = looked_at / (work.tokens + work.fitted_tokens)
        collecting, costs = (
            self.stage(f"allocation: {what}", streams) for what in ("collecting", "deleting neurons")
        )
        prior = (F64 if self.centred else self.item) * inputs * width
        if work.prices:
            networks = (len(LEVELS) + len(GROUP_LEVELS)) * self.config.num_hidden_layers / work.ranks
            priced = networks * TOKENS * width * self.item
            place = {"device": self.device, "host": "host", "disk": "disk"}[self.storage]
            for stage in (collecting, costs):
                stage.add("priced streams", priced, place)
            self.add_teacher(costs, block, inputs, plain)
        for stage in (collecting, costs):
            if work.on_gpu or not plain:
                stage.add("output weights before the fit", prior, self.device)
            elif stage is costs:
                stage.add("layer as stored", prior, "host")
        collecting.add("layer as stored", self.layer() * self.item, "host")
        self.add_teacher(collecting, block, inputs, plain)
        passing = self.batch_bytes(block, inputs, rows, looked_at)
        filed = self.add_moments(collecting, inputs, passing)
        collecting.add("batch", passing, self.device)
        spilled, _ = self.leaves(inputs, self.free(costs), filed)
        self.add_spilled(costs, inputs, spilled)
        gone = self.config.dense_neurons[block.layer] - fewest_neurons(self.config, 1, block.layer)
        self.add_inverse(costs, inputs, math.ceil(gone / POINTS))
        return [collecting, costs]

    def add_inverse(self, stage: PlannedStage, inputs: int, gone: int) -> None:
        """A system of which so many neurons are deleted at a time."""
        square = F64 * inputs * inputs
        stage.add("system or its inverse", square, self.device)
        stage.add("right-hand side or solution", F64 * inputs * self.width, self.device)
        stage.add("panels", min(2 * PANEL_BYTES, 2 * square) + 3 * F64 * gone * inputs, self.device)

    def free(self, stage: PlannedStage) -> float:
        limit = self.machine.device if self.work.on_gpu else self.machine.host
        return limit - stage.total(self.device)

    def solving(
        self, block: Block, choosing: PlannedStage, fitting: PlannedStage, away: int
    ) -> list[PlannedStage]:
        """The choice of what is deleted and the last fit; `away` bytes of the others are not on the device."""
        work, remaining = self.work, self.inputs(block)
        right, stages = F64 * remaining * self.width, []
        config = self.config
        neurons = heads = 0
        if "mlp" in block.parts:
            neurons = config.dense_neurons[block.layer] - config.neurons[block.layer]
        if "attention" in block.parts:
            heads = (config.num_attention_heads - config.attention_heads[block.layer]) * config.value_dim
        if neurons or heads:
            together = max(math.ceil(neurons / ROUNDS), min(heads, group_rows(config)[0].stop))
            self.add_inverse(choosing, remaining, together)
            remaining -= neurons + heads
            stages.append(choosing)
        fitting.add("fits", away, self.elsewhere)
        fitting.add("fits", (work.ridges - 1) * right - away, self.device)
        fitting.add("system or its inverse", F64 * remaining * remaining, self.device)
        fitting.add("right-hand side or solution", F64 * remaining * self.width, self.device)
        fitting.add("panels", min(2 * PANEL_BYTES, 2 * F64 * remaining * remaining), self.device)
        return [*stages, fitting]

    def deleted(self, block: Block) -> tuple[int, int]:
        """Neurons and columns of attention heads that a block loses."""
        config, neurons, heads = self.config, 0, 0
        if "mlp" in block.parts:
            neurons = config.dense_neurons[block.layer] - config.neurons[block.layer]
        if "attention" in block.parts:
            heads = (config.num_attention_heads - config.attention_heads[block.layer]) * config.head_dim
        return neurons, heads

    def batch_bytes(self, block: Block, inputs: int, rows: int, fitted_tokens: int) -> int:
        """What passing and adding one batch takes beside the streams."""
        own = sum(self.columns(part) for part in block.parts)
        work = self.work
        return batch_bytes(
            work.batch_tokens, fitted_tokens, rows, own, inputs, self.width, work.dtype.itemsize
        )

    def losses(self) -> PlannedStage:
        """Held-out windows pass the dense and the sliced model, a layer at a time."""
        stage = self.stage("held-out windows", streams=0)
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
