"""One replica's ledger and its part in the agreement, kept in step with each other. Pure.

The ledger says what was computed, the agreement what counts. Microbatches are named in the one and numbered by their
place in the step in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.agreement import Action, Indices, StageAgreement
from node.replication.sources import next_source, spans
from stage_server.ids import MicrobatchId, MicrobatchKind
from stage_server.ledger import StageLedger
from stage_server.plan import Plan


@dataclass(frozen=True, slots=True)
class News:
    """What a replica tells the others beside its tally, of the step that follows `committed`."""

    committed: int
    begun: Indices = frozenset()
    losses: Mapping[int, float] = field(default_factory=dict)  # nats per token, of what it has done
    earlier_losses: Mapping[int, float] = field(default_factory=dict)  # all of the step before


def sizes(plan: Plan) -> Callable[[int], int]:
    """How many microbatches a step has, by step; the closing step has its evaluation, and later ones nothing."""
    return lambda step: len(plan.microbatches(step)) if 1 <= step <= plan.last_step else 0


class ReplicaDuties:
    """See the module's text."""

    def __init__(self, ledger: StageLedger, agreement: StageAgreement) -> None:
        self.ledger, self.agreement = ledger, agreement
        self._news: dict[str, News] = {}
        self._throughputs: Mapping[str, float] = {agreement.peer: 1.0}
        ledger.pick = self._pick

    @property
    def is_level(self) -> bool:
        """Whether ledger and agreement stand at the same step: between a decision and its execution they do not."""
        return self.agreement.committed == self.ledger.committed

    @property
    def is_closed(self) -> bool:
        """The last step is over: nothing is counted any more."""
        return self.agreement.committed >= self.ledger.plan.last_step

    def reconcile(self) -> list[Action]:
        """Tells the agreement of what the ledger has come to hold. Call whenever either has changed."""
        actions: list[Action] = []
        if self.is_level and not self.is_closed:
            for index in sorted(self._held() - self.agreement.counted):
                if self.agreement.is_frozen:
                    break
                actions += self.agreement.count(index)
        self.freeze()
        return actions

    def freeze(self) -> None:
        """Keeps the ledger from adding to a sum that is being agreed on. Call whenever the agreement has changed."""
        self.ledger.frozen = not self.is_closed and (self.agreement.is_frozen or not self.is_level)

    def to_recount(self) -> list[MicrobatchId]:
        """Microbatches that were done here, that the sum no longer holds, and that nobody else holds now.

        They had been left to a replica that is gone. Computed once more they count here.
        """
        if not self.is_level or self.is_closed or self.agreement.is_frozen:
            return []
        missing = self.agreement.missing
        return [
            name
            for name in sorted(self.ledger.done - self.ledger.counted)
            if name.kind is MicrobatchKind.TRAIN and self.ledger.plan.position(name) in missing
        ]

    def names(self, share: Indices) -> frozenset[MicrobatchId]:
        """The training microbatches among a share of the ledger's present step."""
        order = self.ledger.plan.microbatches(self.ledger.step)
        return frozenset(order[index] for index in share if order[index].kind is MicrobatchKind.TRAIN)

    def _held(self) -> frozenset[int]:
        evaluated = (name for name in self.ledger.done if name.kind is MicrobatchKind.EVALUATE)
        return frozenset(map(self.ledger.plan.position, (*self.ledger.counted, *evaluated)))

    # -- news ---------------------------------------------------------------------------------------------------

    def news(self) -> News:
        """What to tell the others now."""
        ledger = self.ledger
        position = ledger.plan.position
        return News(
            committed=ledger.committed,
            begun=frozenset(map(position, ledger.promised)),
            losses={position(name): loss for name, loss in ledger.own_losses.items()},
            earlier_losses={position(name): loss for name, loss in ledger.earlier_losses.items()},
        )

    def receive_news(self, peer: str, news: News) -> None:
        """Another replica's newest."""
        self._news[peer] = news
        if news.committed == self.ledger.committed:
            self._learn(news.losses)
        elif news.committed == self.ledger.committed + 1:
            self._learn(news.earlier_losses)

    def _learn(self, losses: Mapping[int, float]) -> None:
        order = self.ledger.plan.microbatches(self.ledger.step)
        self.ledger.learn_losses({order[index]: loss for index, loss in losses.items() if index < len(order)})

    def in_sight(self, throughputs: Mapping[str, float]) -> None:
        """The replicas that are there now, this one among them, and the microbatches per second of each."""
        self._throughputs = dict(throughputs)
        self._news = {peer: news for peer, news in self._news.items() if peer in throughputs}
        self.ledger.alone(len(throughputs) <= 1)

    def _pick(self, names: Sequence[MicrobatchId]) -> MicrobatchId | None:
        """What the ledger of a first stage begins next."""
        if len(self._throughputs) <= 1:
            return names[0] if names else None
        ledger = self.ledger
        order = ledger.plan.microbatches(ledger.step)
        theirs = [news for peer, news in self._news.items() if news.committed == ledger.committed]
        taken = frozenset[int]().union(*(news.begun | news.losses.keys() for news in theirs))
        candidates = [ledger.plan.position(name) for name in names]
        index = next_source(self.agreement.peer, candidates, taken, spans(self._throughputs, len(order)))
        return None if index is None else order[index]
