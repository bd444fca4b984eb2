"""Memory on paper: the stages of a run, each a list of parts, by place."""

from __future__ import annotations

from dataclasses import dataclass, field

from slicegpt.slicing.workload import Machine


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
        spills: whether the moments of a block are not on the device while its system is solved.
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
