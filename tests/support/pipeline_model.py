"""A model checker for the pipeline of the wgmma kernels: every order in which its asynchronous parts can happen.

One thread of a block copies stages of operands, warps multiply them. Full and empty barriers (mbarrier: a phase ends
when all arrivals and all announced bytes have come) pass the stages to and fro; a pair of blocks copies half of the
rows for each other. Copies land at any time after they were issued, in any order, also before their bytes are
announced; wgmma reads its operands from its issue until it has been waited for. All of that is a graph of states, and a
walk over all of them finds what can go wrong: data overwritten while it is read, or read before it came, too many
arrivals, arrivals at a block that has ended, and deadlocks.

States are small tuples; steps that concern nobody else are joined with the next one. The numbers are smaller than the
kernel's: some stages are used three times, which is when parities repeat.
"""

from dataclasses import dataclass, replace


class Violation(Exception):
    """Something that must not happen, and the steps that lead there."""


@dataclass(frozen=True)
class Pipeline:
    """The facts of the pipeline that the model takes from the kernel, and its size.

    Attributes:
        blocks: 1, or 2 that copy for each other.
        warps: that multiply, of each block.
        stages, rounds: buffers, and how many token blocks pass through them.
        empty_count: arrivals that empty a stage; None: those of all warps that read what the copy writes.
        producer_parity, consumer_parity: of the first round.
        in_flight: groups of wgmma that are not waited for when a stage is given back.
        release: which token block's stage is given back after `it` was issued: it - release.
        expected_parts: copies that a stage's announcement counts.
        announce_first: the announcement comes before the copies.
        remote: warps arrive at the other block's barriers as well.
        final_sync: a block ends only when the other has ended, too.
        init_fence, init_sync: a block's barriers are announced to the other one (fence.mbarrier_init), which they meet
            at a barrier of the cluster; without either it may see the initial values at any later time.
        proxy_fence: the same for the copies (fence.proxy.async).
        tile: rounds of a tile; after its last one all products are waited for, and its stage is given back. None: there
            is one tile, whose last stage nobody needs again.
        tile_waits, tile_gives_back: the two things that happen there.
        columns: a stage has columns beside its rows. Their copy is a block's own affair: without it a pair has fewer
            states.
    """

    blocks: int = 1
    warps: int = 2
    stages: int = 2
    rounds: int = 6
    empty_count: int | None = None
    producer_parity: int = 1
    consumer_parity: int = 0
    in_flight: int = 1
    release: int = 1
    expected_parts: int | None = None
    announce_first: bool = True
    remote: bool = True
    final_sync: bool = True
    init_fence: bool = True
    init_sync: bool = True
    proxy_fence: bool = True
    tile: int | None = None
    tile_waits: bool = True
    tile_gives_back: bool = True
    columns: bool = True

    @property
    def parts(self) -> int:
        """Copies that fill a stage: the columns, and the rows, whole or in two halves."""
        return self.columns + self.blocks


# A barrier: (phase, arrivals still to come, bytes announced and not arrived in copies; negative: the other way round).
Barrier = tuple[int, int, int]


@dataclass(frozen=True)
class State:
    """Everything that decides what can happen next.

    Attributes:
        full, empty: barriers [block][stage].
        data: [block][stage][part]: the token block whose bytes are there, -1 none.
        copies: on their way: (block, stage, part, token block).
        producers: [block]: (token block, step of 2).
        consumers: [block][warp]: the next token block, and those of wgmma in flight.
        ended: [block].
        unseen: (block, by whom) whose barriers may not be initialised yet for "copies" or for the "other" block.
    """

    full: tuple[tuple[Barrier, ...], ...]
    empty: tuple[tuple[Barrier, ...], ...]
    data: tuple[tuple[tuple[int, ...], ...], ...]
    copies: frozenset
    producers: tuple[tuple[int, int], ...]
    consumers: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]
    ended: tuple[bool, ...]
    unseen: frozenset


def put(items: tuple, index: int, value: object) -> tuple:
    return (*items[:index], value, *items[index + 1 :])


class Model:
    """The steps of a pipeline."""

    def __init__(self, facts: Pipeline):
        self.facts = facts
        self.full_count = 1
        self.empty_count = facts.empty_count or facts.warps * facts.blocks

    def first(self) -> State:
        f = self.facts
        unseen = set() if f.proxy_fence else {(block, "copies") for block in range(f.blocks)}
        if f.blocks > 1 and not (f.init_fence and f.init_sync):
            unseen |= {(block, "other") for block in range(f.blocks)}
        return State(
            unseen=frozenset(unseen),
            full=((((0, self.full_count, 0),) * f.stages),) * f.blocks,
            empty=((((0, self.empty_count, 0),) * f.stages),) * f.blocks,
            data=((((-1,) * f.parts,) * f.stages),) * f.blocks,
            copies=frozenset(),
            producers=((0, 0),) * f.blocks,
            consumers=((((0, ()),) * f.warps),) * f.blocks,
            ended=(False,) * f.blocks,
        )

    # --- barriers ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _completed(barrier: Barrier, count: int, what: str) -> Barrier:
        phase, pending, awaited = barrier
        if pending < 0:
            raise Violation(f"more arrivals at a {what} barrier than its count")
        return (phase + 1, count, 0) if pending == 0 and awaited == 0 else barrier

    def _change(self, state: State, kind: str, block: int, stage: int, arrivals: int, parts: int) -> State:
        if state.ended[block]:
            raise Violation("a barrier of a block was used that has ended")
        barriers = getattr(state, kind)
        phase, pending, awaited = barriers[block][stage]
        count = self.full_count if kind == "full" else self.empty_count
        changed = self._completed((phase, pending - arrivals, awaited + parts), count, kind)
        return replace(state, **{kind: put(barriers, block, put(barriers[block], stage, changed))})

    @staticmethod
    def _seen(state: State, block: int, by: str) -> None:
        if (block, by) in state.unseen:
            raise Violation(f"a barrier of block {block} was used before it was initialised ({by})")

    @staticmethod
    def _passes(barrier: Barrier, parity: int) -> bool:
        """try_wait: the phase of this parity has ended."""
        return barrier[0] % 2 != parity

    # --- steps -------------------------------------------------------------------------------------------------------

    def steps(self, state: State):
        """(name, next state) of everything that can happen now."""
        f = self.facts
        for block in range(f.blocks):
            yield from self._produce(state, block)
            for warp in range(f.warps):
                yield from self._consume(state, block, warp)
            yield from self._end(state, block)
        for one in sorted(state.unseen):
            yield f"barriers of {one[0]} are seen ({one[1]})", replace(state, unseen=state.unseen - {one})
        for copy in sorted(state.copies):
            yield f"copy {copy} lands", self._land(state, copy)

    def _produce(self, state: State, block: int):
        f = self.facts
        it, step = state.producers[block]
        if it == f.rounds:
            return
        stage = it % f.stages
        if step == 0:
            if not self._passes(state.empty[block][stage], (it // f.stages & 1) ^ f.producer_parity):
                return
            act = self._announce if f.announce_first else self._issue
            yield f"producer {block} begins {it}", self._produced(act(state, block, it), block, (it, 1))
        else:
            act = self._issue if f.announce_first else self._announce
            yield f"producer {block} ends {it}", self._produced(act(state, block, it), block, (it + 1, 0))

    @staticmethod
    def _produced(state: State, block: int, value: tuple[int, int]) -> State:
        return replace(state, producers=put(state.producers, block, value))

    def _announce(self, state: State, block: int, it: int) -> State:
        parts = self.facts.expected_parts or self.facts.parts
        return self._change(state, "full", block, it % self.facts.stages, 1, parts)

    def _issue(self, state: State, block: int, it: int) -> State:
        f, stage = self.facts, it % self.facts.stages
        # The rows: a pair's blocks each send one half to both.
        copies = {(other, stage, block, it) for other in range(f.blocks)}
        if f.columns:
            copies |= {(block, stage, f.blocks, it)}
        return replace(state, copies=state.copies | copies)

    def _land(self, state: State, copy: tuple[int, int, int, int]) -> State:
        block, stage, part, it = copy
        if state.ended[block]:
            raise Violation("a copy landed in a block that has ended")
        self._seen(state, block, "copies")
        if part < self.facts.blocks and part != block:  # the half that the other block sends
            self._seen(state, block, "other")
        for warp, (_, reading) in enumerate(state.consumers[block]):
            if any(one % self.facts.stages == stage for one in reading):  # negative ones as well
                raise Violation(f"token block {it} overwrites stage {stage} that warp {warp} reads")
        if state.data[block][stage][part] >= 0 and any(
            nxt <= state.data[block][stage][part] for nxt, _ in state.consumers[block]
        ):
            raise Violation(f"token block {it} overwrites one that was not read")
        data = put(state.data, block, put(state.data[block], stage, put(state.data[block][stage], part, it)))
        landed = replace(state, data=data, copies=state.copies - {copy})
        return self._change(landed, "full", block, stage, 0, -1)

    def _consume(self, state: State, block: int, warp: int):
        """Waits for a stage, multiplies it, waits for all but the newest products, and gives a stage back."""
        f = self.facts
        it, reading = state.consumers[block][warp]
        if it > f.rounds:
            return
        if f.tile and it and it % f.tile == 0 and reading and reading[-1] == it - 1:
            yield f"warp {block}.{warp} ends a tile", self._end_tile(state, block, warp)
            return
        if it == f.rounds:  # the last wait: nothing is in flight
            if reading:
                yield f"warp {block}.{warp} waits for all", self._consumed(state, block, warp, (it, ()))
            return
        reading = tuple(one for one in reading if one >= 0)
        if len(reading) <= f.in_flight and (not reading or reading[-1] < it):
            stage = it % f.stages
            if not self._passes(state.full[block][stage], (it // f.stages & 1) ^ f.consumer_parity):
                return
            if any(one != it for one in state.data[block][stage]):
                raise Violation(f"token block {it} was read before it came: {state.data[block][stage]}")
            issued = self._consumed(state, block, warp, (it, (*reading, it)))
            yield f"warp {block}.{warp} multiplies {it}", issued
            return
        kept = reading[len(reading) - f.in_flight :] if f.in_flight else ()
        freed = self._consumed(state, block, warp, (it + 1, kept))
        if (it % f.tile if f.tile else it) >= f.release:
            freed = self._give_back(freed, block, it - f.release)
        yield f"warp {block}.{warp} gives back", freed

    def _give_back(self, state: State, block: int, it: int) -> State:
        for other in range(self.facts.blocks) if self.facts.remote else [block]:
            if other != block:
                self._seen(state, other, "other")
            state = self._change(state, "empty", other, it % self.facts.stages, 1, 0)
        return state

    def _end_tile(self, state: State, block: int, warp: int) -> State:
        f = self.facts
        it, reading = state.consumers[block][warp]
        # Products that are not waited for are read on: their tile is over, they are marked by a negative number.
        left = () if f.tile_waits else tuple(one - f.stages * f.rounds for one in reading)
        ended = self._consumed(state, block, warp, (it, left))
        return self._give_back(ended, block, it - 1) if f.tile_gives_back else ended

    @staticmethod
    def _consumed(state: State, block: int, warp: int, value: tuple[int, tuple[int, ...]]) -> State:
        return replace(state, consumers=put(state.consumers, block, put(state.consumers[block], warp, value)))

    def _done(self, state: State, block: int) -> bool:
        return state.producers[block][0] == self.facts.rounds and all(
            it == self.facts.rounds and not reading for it, reading in state.consumers[block]
        )

    def _end(self, state: State, block: int):
        waits_for = range(self.facts.blocks) if self.facts.final_sync else [block]
        if not state.ended[block] and all(self._done(state, other) for other in waits_for):
            yield f"block {block} ends", replace(state, ended=put(state.ended, block, True))


def check(facts: Pipeline, most: int = 400_000) -> int:
    """Walk over all states; how many there are.

    Raises:
        Violation: with the steps that lead to it.
        RuntimeError: there are more than `most` states.
    """
    model = Model(facts)
    first = model.first()
    came: dict[State, tuple[State, str] | None] = {first: None}
    todo = [first]
    while todo:
        state = todo.pop()
        found, name = False, ""
        try:
            for name, following in model.steps(state):
                found = True
                if following not in came:
                    came[following] = (state, name)
                    todo.append(following)
            if not found and not all(state.ended):
                raise Violation("deadlock")
            if not found and state.copies:
                raise Violation("copies are under way at the end")
        except Violation as violation:
            raise Violation(f"{violation}, after: {', '.join(path_to(came, state))}") from None
        if len(came) > most:
            raise RuntimeError(f"more than {most} states")
    return len(came)


def path_to(came: dict, state: State) -> list[str]:
    names = []
    while came[state] is not None:
        state, name = came[state]
        names.append(name)
    return names[::-1]
