"""The other replicas of this peer's stage: who they are, how they were heard last, and a line to each.

Every replica tells every other how it stands whenever that changes, and twice a second. Who answers or calls is in
sight; who has done neither for a while is not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from coordinator.agreement import Round
from node.replication.calls import Line
from node.replication.messages import ReplicaWord
from node.tasks import Background
from stage_server.errors import StageError
from stage_server.silence import Patience, Silence

HEARTBEAT = timedelta(seconds=0.5)
GATHERING = timedelta(milliseconds=10)
"""What changes within so little time is told at once."""
CALL_LIMIT = timedelta(seconds=3)
SIGHT = Patience(least=2.5, factor=4.0, longest=20.0)
"""Who has not been heard for so long is out of sight: a round without it is void, so this is no hasty judgement."""
ABSENCE = timedelta(seconds=1)
"""`in_sight` is asked several times a second: where it was not for so long, this process stood still."""
REFUSALS = 2
"""Who cannot be reached so often in a row, without a wait, is out of sight at once: its process is gone."""
DIAL_AGAIN = 2
"""After so many failed calls in a row: TCP goes on with a connection that was cut for a while after as long again."""
MEMORY = timedelta(minutes=1)
"""Who is out of sight for so long, and not in the directory, is forgotten."""


@dataclass(slots=True)
class Contact:
    """One other replica."""

    peer_id: str
    endpoint: str
    word: ReplicaWord | None = None  # the newest heard
    silence: Silence = field(default_factory=lambda: Silence(SIGHT))
    refusals: int = 0  # calls in a row that failed at once
    listed_at: float = 0.0  # when the directory last named it
    proposals: dict[int, Round] = field(default_factory=dict)  # to be passed on, by number
    dirty: asyncio.Event = field(default_factory=asyncio.Event)
    talking: asyncio.Task[None] | None = None

    @property
    def heard_at(self) -> float:
        """Monotonic seconds; 0 before its first word."""
        return self.silence.heard_at or 0.0

    def hears(self, now: float) -> None:
        """It said something. `now`: monotonic seconds."""
        self.silence.heard(now)
        self.refusals = 0

    def is_in_sight(self, now: float) -> bool:
        """Whether it was heard lately, for one that keeps others waiting as long as this one does."""
        is_heard = self.silence.heard_at is not None and not self.silence.is_long(now)
        return is_heard and self.refusals < REFUSALS


class Contacts:
    """See the module's text."""

    def __init__(
        self,
        own_word: Callable[[], ReplicaWord],
        heard: Callable[[ReplicaWord], None],
        line: Callable[[str], Line],
        background: Background,
    ) -> None:
        """`own_word`: what to tell now. `heard`: who is told of what others answer. `line`: dials an endpoint.

        `background`: where each conversation goes on, and what it may fail with is noticed.
        """
        self._own_word, self._heard, self._line, self._background = own_word, heard, line, background
        self._contacts: dict[str, Contact] = {}
        self._closed = False
        self._looked_at = 0.0  # monotonic seconds

    def __getitem__(self, peer_id: str) -> Contact:
        return self._contacts[peer_id]

    @property
    def known(self) -> Mapping[str, Contact]:
        """Everybody who is not forgotten, by peer id."""
        return self._contacts

    @property
    def unheard(self) -> bool:
        """Whether somebody is known who has neither said anything nor turned out to be gone."""
        return any(contact.word is None and contact.refusals < REFUSALS for contact in self._contacts.values())

    def in_sight(self) -> dict[str, ReplicaWord]:
        """The newest word of each that was heard lately."""
        now = time.monotonic()
        self._note_absence(now)
        return {
            peer: contact.word
            for peer, contact in self._contacts.items()
            if contact.word is not None and contact.is_in_sight(now)
        }

    def _note_absence(self, now: float) -> None:
        """A machine that slept wakes up beside others who seem to have been silent: they have not."""
        away = now - self._looked_at
        if self._looked_at and away > ABSENCE.total_seconds():
            for contact in self._contacts.values():
                contact.silence.excuse(away)
        self._looked_at = now

    def listed(self, endpoints: Mapping[str, str]) -> None:
        """What the directory says: the endpoint of each other replica."""
        for peer_id, endpoint in endpoints.items():
            self._contact(peer_id, endpoint).listed_at = time.monotonic()

    def hears(self, word: ReplicaWord) -> None:
        """A replica was heard."""
        contact = self._contact(word.peer_id, word.endpoint)
        known = contact.word
        if known is None or word.tally.version >= known.tally.version:
            contact.word = word
        contact.hears(time.monotonic())

    def changed(self) -> None:
        """This replica's word is another one: everybody is told soon."""
        for contact in self._contacts.values():
            contact.dirty.set()

    def propose(self, peer_id: str, proposed: Round) -> None:
        """A round for that replica, with the next word to it."""
        if peer_id in self._contacts:
            self._contacts[peer_id].proposals[proposed.number] = proposed
            self._contacts[peer_id].dirty.set()

    def forget_old(self) -> None:
        """Hangs up on those who are long gone."""
        oldest = time.monotonic() - MEMORY.total_seconds()
        for contact in [c for c in self._contacts.values() if max(c.heard_at, c.listed_at) < oldest]:
            del self._contacts[contact.peer_id]
            _hang_up(contact)

    async def close(self) -> None:
        """Hangs up on everybody, for good."""
        self._closed = True
        talking = [contact.talking for contact in self._contacts.values() if contact.talking is not None]
        for contact in self._contacts.values():
            _hang_up(contact)
        self._contacts.clear()
        await asyncio.gather(*talking, return_exceptions=True)

    def _contact(self, peer_id: str, endpoint: str) -> Contact:
        contact = self._contacts.get(peer_id)
        if contact is None:
            contact = self._contacts[peer_id] = Contact(peer_id, endpoint, listed_at=time.monotonic())
        if self._closed:
            return contact
        if contact.talking is None or contact.endpoint != endpoint:
            _hang_up(contact)
            contact.endpoint = endpoint
            contact.talking = self._background.start(self._talk(contact))
        return contact

    async def _talk(self, contact: Contact) -> None:
        line, failures = self._line(contact.endpoint), 0
        try:
            while True:
                contact.dirty.clear()
                number = max(contact.proposals, default=None)
                proposed = None if number is None else contact.proposals[number]
                called_at = time.monotonic()
                try:
                    word = await line.agree(self._own_word(), proposed, CALL_LIMIT)
                except StageError:
                    contact.refusals += time.monotonic() - called_at < HEARTBEAT.total_seconds()
                    failures += 1
                    if failures % DIAL_AGAIN == 0:
                        await line.close()
                        line = self._line(contact.endpoint)
                    await asyncio.sleep(HEARTBEAT.total_seconds())
                    continue
                failures = 0
                if word.peer_id != contact.peer_id:
                    await asyncio.sleep(MEMORY.total_seconds())  # somebody else lives there now
                    continue
                if number is not None:
                    contact.proposals = {n: r for n, r in contact.proposals.items() if n > number}
                self._heard(word)
                try:
                    async with asyncio.timeout(HEARTBEAT.total_seconds()):
                        await contact.dirty.wait()
                    await asyncio.sleep(GATHERING.total_seconds())
                except TimeoutError:
                    continue
        finally:
            await line.close()


def _hang_up(contact: Contact) -> None:
    if contact.talking is not None:
        contact.talking.cancel()
        contact.talking = None  # a task knows its contact: knowing each other, both would keep the line's socket
