"""The directory's doorkeeper: what this peer stores for others, and what it believes when it reads."""

from __future__ import annotations

import time

from coordinator import identity, records
from coordinator.errors import RecordError
from coordinator.hivemind_parts import DHTID, DHTRecord, MSGPackSerializer, RecordValidatorBase


class SignedRecordValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    """Refuses every record that is unsigned, forged, void, misplaced or stored under a foreign peer id.

    hivemind asks it before storing a record for another peer and before believing one it reads. It keeps no state:
    it is pickled into the directory's process.
    """

    def validate(self, record: DHTRecord) -> bool:
        """Whether the record proves who published it, for this key and subkey, until exactly its expiration."""
        sealed = _unwrapped(record.value)
        if sealed is None:
            return False
        try:
            envelope = records.parse_envelope(sealed)
            # The tolerance is for slower clocks only. One void entry condemns the whole answer that holds it.
            records.verify_envelope(envelope, now=time.time(), tolerance=records.CLOCK_TOLERANCE)
        except RecordError:
            return False
        owner = identity.peer_id_of(envelope.public_key)
        return bool(
            envelope.expiration == record.expiration_time
            and DHTID.generate(source=envelope.key).to_bytes() == record.key
            and MSGPackSerializer.dumps(owner) == record.subkey
        )


def _unwrapped(value: bytes) -> bytes | None:
    """The bytes in a MessagePack "bin" value; None for anything else, which is not decoded at all."""
    for code, length_bytes in ((0xC4, 1), (0xC5, 2), (0xC6, 4)):
        start = 1 + length_bytes
        if value[:1] == bytes([code]) and int.from_bytes(value[1:start], "big") == len(value) - start:
            return value[start:]
    return None
